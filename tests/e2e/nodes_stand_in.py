"""Stand-ins for what a cluster has beside its controllers: one node, whose kubelet runs no container, and a gateway.

Pods get the states and words that kubelets give them, by the storageUri that KServe wrote on them; which pods there are,
which of them a Service leads to and what a route says is up to the real controllers.

    with Kubelet(server) as kubelet, Gateway(server):
        kubelet.fates["s3://models/bad"] = NEVER
        kubelet.made                                # every pod that ever was
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from datetime import UTC, datetime
from typing import Any, Self

from api_server import ApiServer
from kserve_stand_in import SOURCE, Fate

__all__ = ["Endpoints", "Gateway", "Kubelet"]

_NODE = "node-1"
_ROUTES = "/apis/gateway.networking.k8s.io/v1"
_PERIOD = 0.1  # seconds between looks


class _Watcher(ABC):
    """Looks at the server again and again, in a thread."""

    def __init__(self, server: ApiServer) -> None:
        self._server = server
        self._stop, self._failure = threading.Event(), ""
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._stop.set()
        self._thread.join()
        assert not self._failure, f"the stand-in itself failed: {self._failure}"

    def _run(self) -> None:
        while not self._stop.wait(_PERIOD):
            try:
                self._step()
            except Exception as error:  # told when the test ends
                self._failure = f"{type(error).__name__}: {error}"
                return

    @abstractmethod
    def _step(self) -> None:
        """One look."""

    def _write_status(self, path: str, body: dict[str, Any], status: dict[str, Any]) -> bool:
        answer = self._server.request("PUT", f"{path}/status", {**body, "status": status})
        assert answer.status in (200, 404, 409), answer.message  # 409: somebody changed it; the next look sees that
        return answer.status != 409


class Kubelet(_Watcher):
    """Scheduler and kubelet of the only node.

    Attributes:
        fates: storageUri → what becomes of its pods; those not named are ready after 0.1 s.
        made: every predictor's pod that ever was, as it was first seen.
    """

    def __init__(self, server: ApiServer) -> None:
        super().__init__(server)
        self.fates: dict[str, Fate] = {}
        self.made: list[dict[str, Any]] = []
        self._since: dict[str, float] = {}
        self._states: dict[str, str] = {}
        server.apply({"apiVersion": "v1", "kind": "Node", "metadata": {"name": _NODE}})

    def _step(self) -> None:
        for pod in self._server.get("/api/v1/pods?labelSelector=serving.kserve.io/inferenceservice")["items"]:
            meta = pod["metadata"]
            path = f"/api/v1/namespaces/{meta['namespace']}/pods/{meta['name']}"
            if meta["uid"] not in self._since:
                self.made.append(pod)
                self._since[meta["uid"]] = time.monotonic()
            if "deletionTimestamp" in meta:
                self._server.request("DELETE", f"{path}?gracePeriodSeconds=0")
            elif "nodeName" not in pod["spec"]:
                # Without a node, no Service would lead to it.
                node = {"apiVersion": "v1", "kind": "Node", "name": _NODE}
                wanted = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": meta["name"]}, "target": node}
                self._server.request("POST", f"{path}/binding", wanted)
            else:
                self._tell(pod, path)

    def _tell(self, pod: dict[str, Any], path: str) -> None:
        uid = pod["metadata"]["uid"]
        fate = self.fates.get((pod["metadata"].get("annotations") or {}).get(SOURCE, ""), Fate())
        state = fate.state(time.monotonic() - self._since[uid])
        if state != self._states.get(uid) and self._write_status(path, pod, pod["status"] | _status(pod, state, fate)):
            self._states[uid] = state


def _status(pod: dict[str, Any], state: str, fate: Fate) -> dict[str, Any]:
    """A pod's status: `failing` and `loading` are about its init container, `crashing` about its own."""
    up, runs = state in ("ready", "crashing"), {"running": {"startedAt": _now()}}
    ended = {"terminated": {"exitCode": 1, "reason": "Error", "message": fate.load_error}}
    waits = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 40s restarting"}}
    done = {"terminated": {"exitCode": 0, "reason": "Completed"}}
    states: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "failing": ({"state": waits, "lastState": ended}, {"state": {"waiting": {"reason": "PodInitializing"}}}),
        "loading": ({"state": runs}, {"state": {"waiting": {"reason": "PodInitializing"}}}),
        "ready": ({"state": done}, {"state": runs}),
        "crashing": ({"state": done}, {"state": waits, "lastState": ended}),
    }
    first, own = states[state]
    conditions = {
        "PodScheduled": True,
        "Initialized": up,
        "ContainersReady": state == "ready",
        "Ready": state == "ready",
    }
    return {
        "phase": "Running" if up else "Pending",
        "podIP": "10.1.0.7",
        "podIPs": [{"ip": "10.1.0.7"}],
        "conditions": [{"type": kind, "status": str(value)} for kind, value in conditions.items()],
        "initContainerStatuses": [_container(item, up, first) for item in pod["spec"].get("initContainers") or []],
        "containerStatuses": [_container(item, state == "ready", own) for item in pod["spec"]["containers"]],
    }


def _container(container: dict[str, Any], ready: bool, more: dict[str, Any]) -> dict[str, Any]:
    known = {"name": container["name"], "image": container["image"], "imageID": "", "restartCount": 0}
    return {**known, "ready": ready, **more}


class Gateway(_Watcher):
    """A gateway that takes every HTTPRoute, and says where a backend of it is missing.

    Attributes:
        history: of each route, by name, the weights of its backends one after the other.
    """

    def __init__(self, server: ApiServer) -> None:
        super().__init__(server)
        self.history: dict[str, list[dict[str, int]]] = {}

    def _step(self) -> None:
        for route in self._server.get(f"{_ROUTES}/httproutes")["items"]:
            meta = route["metadata"]
            weights = {item["name"]: item["weight"] for rule in route["spec"]["rules"] for item in rule["backendRefs"]}
            seen = self.history.setdefault(meta["name"], [])
            if seen[-1:] != [weights]:
                seen.append(weights)
            services = f"/api/v1/namespaces/{meta['namespace']}/services"
            missing = any(self._server.request("GET", f"{services}/{name}").status != 200 for name in weights)
            status = {"parents": [_parent(route, missing)]}
            if _without_times(route.get("status")) != _without_times(status):
                path = f"{_ROUTES}/namespaces/{meta['namespace']}/httproutes/{meta['name']}"
                self._write_status(path, route, status)


def _parent(route: dict[str, Any], missing: bool) -> dict[str, Any]:
    found = [("Accepted", "True", "Accepted")]
    found += [("ResolvedRefs", "False", "BackendNotFound")] if missing else [("ResolvedRefs", "True", "ResolvedRefs")]
    more = {"lastTransitionTime": _now(), "observedGeneration": route["metadata"]["generation"], "message": ""}
    conditions = [{"type": kind, "status": value, "reason": reason, **more} for kind, value, reason in found]
    parent = route["spec"]["parentRefs"][0]
    return {"parentRef": parent, "controllerName": "example.com/gateway", "conditions": conditions}


def _without_times(status: dict[str, Any] | None) -> list[tuple[Any, ...]]:
    return [
        (item["type"], item["status"], item["reason"], item["observedGeneration"])
        for parent in (status or {}).get("parents") or []
        for item in parent["conditions"]
    ]


class Endpoints:
    """Where the Services of a namespace lead to, by Kubernetes' own EndpointSlices; for a PodNetwork."""

    def __init__(self, server: ApiServer, namespace: str) -> None:
        self._server, self._namespace = server, namespace

    def deployment(self, service: str) -> bool:
        """Whether there is such a Service."""
        return self._server.request("GET", f"/api/v1/namespaces/{self._namespace}/services/{service}").status == 200

    def serving(self, service: str) -> str:
        """The storageUri that one of its ready pods serves, or empty."""
        slices = f"/apis/discovery.k8s.io/v1/namespaces/{self._namespace}/endpointslices"
        found = self._server.get(f"{slices}?labelSelector=kubernetes.io/service-name={service}")["items"]
        for endpoint in (endpoint for item in found for endpoint in item.get("endpoints") or []):
            path = f"/api/v1/namespaces/{self._namespace}/pods/{endpoint['targetRef']['name']}"
            pod = self._server.request("GET", path)
            if endpoint["conditions"].get("ready") and pod.status == 200:
                return str(pod.body["metadata"]["annotations"][SOURCE])
        return ""


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
