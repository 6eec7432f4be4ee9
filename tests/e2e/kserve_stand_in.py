"""A stand-in for KServe 0.20's controller in Standard mode, and for what Kubernetes does with its Deployments.

It works on a real API server as the real one does: one Deployment a predictor and canary, whose template names the
storageUri, and a status of the InferenceService that follows from the Deployments' conditions. What traps callers of
the real one is here on purpose (read in KServe's source, and proven by nothing but that):

- `status.observedGeneration` is that of the *Deployment*, not of the InferenceService: the two drift apart with every
  canary, and with every replica that an autoscaler adds.
- While a new version loads or fails, the old pods keep Ready at True and `modelStatus` at UpToDate, until the progress
  deadline of the Deployment (600 s in a cluster). Which pod `modelStatus` is about is undefined; see `looks_at`.
- A canary without minReplicas has ceil(share of the stable ones) pods; its autoscaler makes one at least, at 0 % too.
- A canary's failure shows as `ready: false` alone, and a canary has no URL but that of its Service.
- Every label and annotation of the InferenceService stands on every pod, stable and canary, unless the predictor has one
  of its own; any change of them is another template, and replaces the pods (`made` tells).
- What the spec no longer names is deleted before the route learns of it.
- A Deployment is made with one pod; an autoscaler brings it to minReplicas, at once or `scales_after` some seconds.

    with KserveStandIn(server, "models") as kserve:
        kserve.fates["s3://bucket/bad"] = Fate(load_error="no such key")
"""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Self

from api_server import ApiServer

__all__ = ["NEVER", "SOURCE", "Fate", "KserveStandIn", "predictor_name"]

SOURCE = "internal.serving.kserve.io/storage-initializer-sourceuri"
_OWNER = "serving.kserve.io/inferenceservice"
_PERIOD = 0.05  # seconds between looks
_MERGE = "application/merge-patch+json"


@dataclass(frozen=True)
class Fate:
    """What becomes of the pods that serve one storageUri.

    Attributes:
        ready_after: seconds until they are ready; None where they load for ever.
        load_error: the storage initializer's last words, where it fails.
        fails_after: seconds from being ready until they crash; None where they do not.
    """

    ready_after: float | None = 0.1
    load_error: str = ""
    fails_after: float | None = None

    def state(self, age: float) -> str:
        """`failing`, `loading`, `ready` or `crashing` at an age in seconds."""
        if self.load_error:
            return "failing"
        if self.ready_after is None or age < self.ready_after:
            return "loading"
        return "ready" if self.fails_after is None or age < self.ready_after + self.fails_after else "crashing"


NEVER = Fate(ready_after=None)


@dataclass
class _Rollout:
    """One template of a Deployment on its way."""

    uid: str
    template: dict[str, Any]
    uri: str
    since: float
    had_pods: bool
    done: bool = False
    pods: int = 0
    ready: int = 0  # of them, before the last change of their number
    scaled: float = 0.0  # when that was


class KserveStandIn:
    """The controller of one namespace, in a thread. Change its fields to change the world.

    Attributes:
        fates: storageUri → what becomes of its pods; those not named are ready after 0.1 s.
        urls: predictor Service's name → the URL that the status shows for it, instead of one in the cluster's network.
        progress_deadline: seconds after which a Deployment gives up a template.
        looks_at: the pod that `modelStatus` is about while old and new ones run: `old` or `new`.
        asleep: the controller is away (Deployments go on).
        gateway: Gateway API is on: an HTTPRoute of the service's name splits traffic between canaries that are ready.
        splits: the route follows canaries, as in KServe after 0.20; 0.20.0 does not split.
        gateway_sees: the gateway notes on the route which generation of it is in force.
        scales_after: seconds after which a Deployment has the pods that minReplicas wants.
        grown: Deployment's name → the pods that its autoscaler makes of it by what there is to do.
        made: each set of pods that was ever made, as its Deployment's name and storageUri.
        pods: a Pod is there of each template that does not get ready, and says why (else there are only Deployments).
    """

    def __init__(self, server: ApiServer, namespace: str, progress_deadline: float = 600.0) -> None:
        self.fates: dict[str, Fate] = {}
        self.urls: dict[str, str] = {}
        self.progress_deadline, self.looks_at, self.asleep = progress_deadline, "old", False
        self.gateway = self.pods = False
        self.splits = self.gateway_sees = True
        self.scales_after = 0.0
        self.grown: dict[str, int] = {}
        self.made: list[tuple[str, str]] = []
        self._server, self._namespace = server, namespace
        self._rollouts: dict[str, _Rollout] = {}
        self._before: dict[str, _Rollout] = {}  # of the old pods
        self._routes: dict[str, Any] = {}
        self._told: set[str] = set()
        self._made: dict[str, Any] = {}  # of each service, what its Deployments were made from
        self._wanted: dict[str, tuple[int, float]] = {}  # of each Deployment, its pods, and since when
        self._stop, self._failure = threading.Event(), ""
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._stop.set()
        self._thread.join()
        assert not self._failure, f"the stand-in itself failed: {self._failure}"

    def deployment(self, name: str) -> dict[str, Any] | None:
        """A predictor's Deployment, by `predictor_name`; None where there is none."""
        found = self._server.request("GET", f"{self._deployments()}/{name}")
        return found.body if found.status == 200 else None

    def serving(self, name: str) -> str:
        """The storageUri that the ready pods of a predictor serve: of the old template until the new one is ready."""
        rollout = self._rollouts.get(name)
        serves = rollout if rollout is not None and rollout.done else self._before.get(name)
        return serves.uri if serves is not None else ""

    def _run(self) -> None:
        while not self._stop.wait(_PERIOD):
            try:
                self._step()
            except Exception as error:  # told when the test ends
                self._failure = f"{type(error).__name__}: {error}"
                return

    def _step(self) -> None:
        path = f"/apis/serving.kserve.io/v1beta1/namespaces/{self._namespace}/inferenceservices"
        services = self._server.get(path)["items"]
        if not self.asleep:
            for service in services:
                self._make_deployments(service)
        names = [service["metadata"]["name"] for service in services]
        for deployment in self._server.get(self._deployments())["items"]:
            if deployment["metadata"]["labels"][_OWNER] in names:
                self._roll(self._scaled(deployment))
            else:  # Kubernetes collects what a deleted object owned
                self._delete(deployment["metadata"]["name"])
        if not self.asleep:
            for service in services:
                if self.gateway:
                    self._write_route(service)
                    self._see_route(service["metadata"]["name"])
                self._write_status(service, f"{path}/{service['metadata']['name']}")

    def _delete(self, deployment: str) -> None:
        self._server.request("DELETE", f"{self._deployments()}/{deployment}")
        for known in (self._rollouts, self._before, self._wanted):
            known.pop(deployment, None)

    # --- what KServe makes ------------------------------------------------------------------------------------------

    def _make_deployments(self, service: dict[str, Any]) -> None:
        name, spec = service["metadata"]["name"], service["spec"]
        stable, canaries = spec["predictor"], spec.get("canary") or []
        pods = max(1, int(stable.get("minReplicas", 1)))
        ready = {item["name"] for item in (service.get("status") or {}).get("canaryStatuses", []) if item["ready"]}
        meta = service["metadata"]
        source = (meta["uid"], meta["generation"], ready, meta.get("labels"), meta.get("annotations"))
        if self._made.get(name) == source:
            return
        for canary in canaries:
            predictor = {**stable, **canary["predictor"], "minReplicas": _canary_pods(canary, pods)}
            for field in ("model", "labels", "annotations"):
                given = {key: value for key, value in (canary["predictor"].get(field) or {}).items() if value != ""}
                predictor[field] = {**(stable.get(field) or {}), **given}
            self._apply_deployment(meta, predictor)
        fewer = sum(_canary_pods(item, pods) for item in canaries if item["predictor"]["name"] in ready)
        self._apply_deployment(meta, {**stable, "minReplicas": max(pods - fewer, 1) if fewer else pods})
        wanted = {predictor_name(name, item.get("name", "")) for item in [stable, *(c["predictor"] for c in canaries)]}
        for item in self._server.get(f"{self._deployments()}?labelSelector={_OWNER}={name}")["items"]:
            if item["metadata"]["name"] not in wanted:
                self._delete(item["metadata"]["name"])
        self._made[name] = source

    def _apply_deployment(self, service: dict[str, Any], predictor: dict[str, Any]) -> None:
        name = predictor_name(service["name"], predictor.get("name", ""))
        labels = {"app": f"isvc.{name}", _OWNER: service["name"], "component": "predictor"}
        on_pods = {
            field: {**(service.get(field) or {}), **(predictor.get(field) or {})} for field in ("labels", "annotations")
        }
        on_pods["labels"] |= labels
        on_pods["annotations"][SOURCE] = predictor["model"]["storageUri"]
        template = {
            "metadata": on_pods,
            "spec": {"containers": [{"name": "kserve-container", "image": "registry.invalid/serving:1"}]},
        }
        body = {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {
                "name": name,
                "namespace": self._namespace,
                "labels": labels,
                "annotations": service.get("annotations") or {},
            },
            "spec": {
                "selector": {"matchLabels": {"app": labels["app"]}},
                "template": template,
            },
        }
        self._server.apply(body, manager="kserve")
        if self._wanted.get(name, (None, 0.0))[0] != predictor["minReplicas"]:
            self._wanted[name] = (predictor["minReplicas"], time.monotonic())

    def _write_route(self, service: dict[str, Any]) -> None:
        name, spec = service["metadata"]["name"], service["spec"]
        weights = {
            predictor_name(name, item["predictor"]["name"]): item.get("trafficPercent", 0)
            for item in spec.get("canary") or []
            if self.splits and self._canary_status(name, item)["ready"]
        }
        stable = predictor_name(name, spec["predictor"].get("name", ""))
        weights = {stable: 100 - sum(weights.values()), **weights}
        backends = [{"name": backend, "port": 80, "weight": weight} for backend, weight in weights.items()]
        if self._routes.get(name) == backends:
            return
        self._server.apply(
            {
                "apiVersion": "gateway.networking.k8s.io/v1",
                "kind": "HTTPRoute",
                "metadata": {"name": name, "namespace": self._namespace},
                "spec": {"hostnames": [f"{name}.example.com"], "rules": [{"backendRefs": backends}]},
            },
            manager="kserve",
        )
        self._routes[name] = backends

    def _see_route(self, name: str) -> None:
        """What a gateway writes once it has understood the route as it is now."""
        path = f"/apis/gateway.networking.k8s.io/v1/namespaces/{self._namespace}/httproutes/{name}"
        route = self._server.request("GET", path)
        if not self.gateway_sees or route.status != 200:
            return
        generation, before = route.body["metadata"]["generation"], (route.body.get("status") or {}).get("parents")
        if before and before[0]["conditions"][0]["observedGeneration"] == generation:
            return
        (accepted,) = _dated({"Accepted": ("True", "Accepted", "")}, [])
        told = {"message": "", "observedGeneration": generation}
        # A word of its own, which a gateway need not say anew with each change.
        other = accepted | {"type": "example.com/Known", "message": "", "observedGeneration": 1}
        parent = {"parentRef": {"name": "gateway"}, "controllerName": "example.com/gateway"}
        status = {"parents": [{**parent, "conditions": [accepted | told, other]}]}
        answer = self._server.request("PUT", f"{path}/status", {**route.body, "status": status})
        assert answer.status in (200, 404, 409), answer.message

    # --- what Kubernetes does with a Deployment ---------------------------------------------------------------------

    def _scaled(self, deployment: dict[str, Any]) -> dict[str, Any]:
        """The Deployment with the pods that its autoscaler gives it by now."""
        name = deployment["metadata"]["name"]
        pods, since = self._wanted.get(name, (deployment["spec"]["replicas"], 0.0))
        pods = max(pods, self.grown.get(name, 0))
        if deployment["spec"]["replicas"] == pods or time.monotonic() - since < self.scales_after:
            return deployment
        path = f"{self._deployments()}/{name}?fieldManager=autoscaler"
        answer = self._server.request("PATCH", path, {"spec": {"replicas": pods}}, kind=_MERGE)
        assert answer.status in (200, 404), answer.message
        return answer.body if answer.status == 200 else deployment

    def _roll(self, deployment: dict[str, Any]) -> None:
        meta, spec = deployment["metadata"], deployment["spec"]
        name, uri = meta["name"], spec["template"]["metadata"]["annotations"][SOURCE]
        rollout = self._rollouts.get(name)
        if rollout is None or (rollout.uid, rollout.template) != (meta["uid"], spec["template"]):
            rollout = self._rollouts[name] = self._begun(deployment, rollout)
        state = self._state(rollout)
        if self.pods and state == "failing":
            self._write_pod(name, uri)
        rollout.done = rollout.done or state in ("ready", "crashing")
        if rollout.pods != spec["replicas"]:
            rollout.ready, rollout.scaled = min(rollout.pods, spec["replicas"]), time.monotonic()
            rollout.pods = spec["replicas"]
        fate = self.fates.get(rollout.uri, Fate())
        ready = rollout.pods if fate.state(time.monotonic() - rollout.scaled) == "ready" else rollout.ready
        status = _deployment_status(rollout.pods, ready, state, rollout, self.progress_deadline)
        status["observedGeneration"] = meta["generation"]
        if status != deployment.get("status"):
            found = self._server.request(
                "PUT", f"{self._deployments()}/{name}/status", {**deployment, "status": status}
            )
            assert found.status in (200, 404, 409), found.message

    def _begun(self, deployment: dict[str, Any], rollout: _Rollout | None) -> _Rollout:
        """Of another template; one that goes back to pods that still run makes none."""
        meta, template = deployment["metadata"], deployment["spec"]["template"]
        name, uri = meta["name"], template["metadata"]["annotations"][SOURCE]
        if rollout is not None and rollout.done:
            self._before[name] = rollout
        before = self._before.get(name)
        if before is not None and before is not rollout and before.template == template:
            return before
        self.made.append((name, uri))
        had_pods = bool((deployment.get("status") or {}).get("availableReplicas"))
        begun, pods = time.monotonic(), deployment["spec"]["replicas"]
        return _Rollout(meta["uid"], template, uri, begun, had_pods, pods=pods, scaled=begun)

    def _write_pod(self, deployment: str, uri: str) -> None:
        """A pod whose storage initializer fails again and again."""
        name = f"{deployment}-{abs(hash(uri)) % 10**8:08d}"
        if name in self._told:
            return
        self._told.add(name)
        path = f"/api/v1/namespaces/{self._namespace}/pods"
        container = {"name": "kserve-container", "image": "registry.invalid/serving:1"}
        init = {**container, "name": "storage-initializer"}
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "labels": {"app": f"isvc.{deployment}"}},
            "spec": {"containers": [container], "initContainers": [init]},
        }
        answer = self._server.request("POST", path, pod)
        assert answer.status == 201, answer.message
        last = {"exitCode": 1, "reason": "Error", "message": self.fates[uri].load_error}
        status = {
            "name": "storage-initializer",
            "ready": False,
            "restartCount": 3,
            "image": "registry.invalid/serving:1",
            "imageID": "",
            "state": {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 40s restarting"}},
            "lastState": {"terminated": last},
        }
        body = {**answer.body, "status": {"phase": "Pending", "initContainerStatuses": [status]}}
        assert self._server.request("PUT", f"{path}/{name}/status", body).status == 200

    def _state(self, rollout: _Rollout) -> str:
        return self.fates.get(rollout.uri, Fate()).state(time.monotonic() - rollout.since)

    # --- what KServe says -------------------------------------------------------------------------------------------

    def _write_status(self, service: dict[str, Any], path: str) -> None:
        before, meta = service.get("status") or {}, service["metadata"]
        name, predictor = meta["name"], service["spec"]["predictor"]
        stable = predictor_name(name, predictor.get("name", ""))
        deployment = self.deployment(stable)
        if deployment is None or "status" not in deployment:
            return
        canaries = [self._canary_status(name, item) for item in service["spec"].get("canary") or []]
        found = _conditions(deployment["status"], canaries)
        status: dict[str, Any] = {
            "observedGeneration": deployment["status"]["observedGeneration"],
            "deploymentMode": "Standard",
            "conditions": _dated(found, before.get("conditions", [])),
            "modelStatus": self._model_status(stable, deployment, found, before.get("modelStatus") or {}),
            "components": {"predictor": {}},
            "url": self.urls.get(stable, f"http://{name}-{self._namespace}.example.com"),
            "address": {"url": self.urls.get(stable, f"http://{stable}.{self._namespace}.svc.cluster.local")},
        }
        if canaries:
            status["canaryStatuses"] = canaries
        if status != before:
            answer = self._server.request("PUT", f"{path}/status", {**service, "status": status})
            assert answer.status in (200, 404, 409), answer.message  # 409: somebody changed it; the next look sees that

    def _canary_status(self, service: str, canary: dict[str, Any]) -> dict[str, Any]:
        name = canary["predictor"]["name"]
        deployment = self.deployment(predictor_name(service, name)) or {}
        ready = bool((deployment.get("status") or {}).get("availableReplicas"))
        share = canary.get("trafficPercent", 0)
        return {"name": name, "ready": ready, "trafficPercent": share, "modelStatus": {"transitionStatus": ""}}

    def _model_status(
        self, name: str, deployment: dict[str, Any], found: dict[str, Any], before: dict[str, Any]
    ) -> dict[str, Any]:
        rollout, status = self._rollouts[name], deployment["status"]
        state = self._state(rollout)
        if rollout.had_pods and not rollout.done and self.looks_at == "old":
            state = "ready"
        target = {"failing": "FailedToLoad", "loading": "Loading"}.get(state, "Pending")
        if state in ("ready", "crashing") and found["Ready"][0] == "True":
            target = "Loaded"
        elif state == "crashing":
            target = "FailedToLoad"
        transition = {"FailedToLoad": "BlockedByFailedLoad", "Loaded": "UpToDate"}.get(target, "InProgress")
        active = "Loaded" if target == "Loaded" else (before.get("states") or {}).get("activeModelState", "")
        model = {
            "transitionStatus": transition,
            "states": {"activeModelState": active, "targetModelState": target},
            "copies": {"failedCopies": 0, "totalCopies": status.get("readyReplicas", 0)},
        }
        if target == "FailedToLoad":
            words = self.fates[rollout.uri].load_error or "the container ended with exit code 1"
            model["lastFailureInfo"] = {"reason": "ModelLoadFailed", "message": words, "exitCode": 1}
        elif "lastFailureInfo" in before:  # the real one never clears it either
            model["lastFailureInfo"] = before["lastFailureInfo"]
        return model

    def _deployments(self) -> str:
        return f"/apis/apps/v1/namespaces/{self._namespace}/deployments"


def predictor_name(service: str, predictor: str = "") -> str:
    """The name of a predictor's Deployment and Service; `predictor` is its `name` in the spec, if it has one."""
    return "-".join(part for part in (service, predictor, "predictor") if part)


def _canary_pods(canary: dict[str, Any], stable: int) -> int:
    own = canary["predictor"].get("minReplicas")
    return max(1, math.ceil(stable * canary.get("trafficPercent", 0) / 100) if own is None else int(own))


def _deployment_status(replicas: int, ready: int, state: str, rollout: _Rollout, deadline: float) -> dict[str, Any]:
    """Pods and conditions of a rolling update: the old pods go when the new ones are ready, and not before."""
    old = replicas if rollout.had_pods and not rollout.done else 0
    new = replicas if not old else min(replicas, max(1, replicas // 4))
    good = (ready if state == "ready" else 0) + old
    status: dict[str, Any] = {"replicas": old + new, "updatedReplicas": new, "readyReplicas": good}
    status |= {"availableReplicas": good, "unavailableReplicas": old + new - good}
    late = not rollout.done and time.monotonic() - rollout.since > deadline
    progress = ("True", "NewReplicaSetAvailable" if rollout.done else "ReplicaSetUpdated", "it is progressing")
    if late:
        progress = ("False", "ProgressDeadlineExceeded", "ReplicaSet has timed out progressing.")
    enough = good >= replicas - replicas // 4
    available = ("True", "MinimumReplicasAvailable", "Deployment has minimum availability.")
    if not enough:
        available = ("False", "MinimumReplicasUnavailable", "Deployment does not have minimum availability.")
    status["conditions"] = [
        {"type": kind, "status": value, "reason": reason, "message": message}
        for kind, (value, reason, message) in (("Available", available), ("Progressing", progress))
    ]
    # The API server leaves zeros out.
    return {key: value for key, value in status.items() if value != 0}


def _conditions(deployment: dict[str, Any], canaries: list[dict[str, Any]]) -> dict[str, tuple[str, str, str]]:
    """type → (status, reason, message), as KServe derives them in Standard mode."""
    by_type = {item["type"]: (item["status"], item["reason"], item["message"]) for item in deployment["conditions"]}
    available, progress = by_type["Available"], by_type["Progressing"]
    predictor = available
    if available[0] == "True" and (progress[0] == "False" or progress[1] == "NewReplicaSetAvailable"):
        predictor = progress
    ingress = ("True", "", "") if predictor[0] == "True" else ("False", "Predictor ingress not created", "")
    found = {"PredictorReady": predictor, "IngressReady": ingress, "Stopped": ("False", "", "")}
    found["Ready"] = ("True", "", "") if predictor[0] == "True" else predictor
    if canaries:
        good = all(item["ready"] for item in canaries)
        found["CanaryPredictorReady"] = (str(good), "AllCanariesReady" if good else "CanariesNotReady", "")
    return found


def _dated(found: dict[str, tuple[str, str, str]], before: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Conditions as the API has them, with the time of their last change."""
    old = {item["type"]: item for item in before}
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    made = []
    for kind, (status, reason, message) in sorted(found.items()):
        same = kind in old and old[kind]["status"] == status
        item = {"type": kind, "status": status, "lastTransitionTime": old[kind]["lastTransitionTime"] if same else now}
        made.append(item | {key: value for key, value in (("reason", reason), ("message", message)) if value})
    return made
