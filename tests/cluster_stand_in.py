"""A stand-in for a Kubernetes API server with KServe, because no cluster runs where the tests run.

It is a real HTTP server on loopback that knows Leases and InferenceServices in mode Knative: it stores what is applied by
server-side apply (owners of fields, conflicts, removal of fields that an owner lets go), counts generations, and plays
KServe's controller by writing a status some polls later. It proves what we send and how we read answers, not KServe
itself; tests/e2e has a real API server, and mode Standard.

    with ClusterStandIn(namespaces=["models"]) as cluster:
        cluster.write_kubeconfig(tmp_path / "config")
        cluster.outcomes["s3://bucket/bad"] = "BlockedByFailedLoad"
"""

from __future__ import annotations

import http.server
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

__all__ = ["ClusterStandIn"]

TOKEN = "let-me-in"
_LEASE = re.compile(r"/apis/coordination\.k8s\.io/v1/namespaces/([^/]+)/leases(?:/([^/]+))?")
_PATH = re.compile(r"/apis/serving\.kserve\.io/v1beta1/namespaces/([^/]+)/inferenceservices/([^/]+)")
_NO_OWNER = (("apiVersion",), ("kind",), ("metadata", "name"), ("metadata", "namespace"))


class ClusterStandIn:
    """The server. Change its fields to change its mind.

    Attributes:
        namespaces: those that exist.
        kserve: whether the kind InferenceService is known.
        refuse: verb → (status, message), to refuse a verb; `GET namespace` is a look at a namespace alone.
        delay: polls after an apply until the "controller" writes the status.
        outcomes: storageUri → transitionStatus that its rollout ends in; `UpToDate` where not named.
        objects: (namespace, name) → object.
        applied: every accepted or refused apply: manager, content type, body.
        gets: number of GET requests of InferenceServices.
        leases: (namespace, name) → Lease.
    """

    def __init__(self, namespaces: list[str]) -> None:
        self.namespaces, self.kserve, self.delay = namespaces, True, 2
        self.refuse: dict[str, tuple[int, str]] = {}
        self.outcomes: dict[str, str] = {}
        self.objects: dict[tuple[str, str], dict[str, Any]] = {}
        self.applied: list[tuple[str, str, dict[str, Any]]] = []
        self.gets = 0
        self.leases: dict[tuple[str, str], dict[str, Any]] = {}
        self._rolled_out: dict[tuple[str, str], str] = {}  # the revision that last had all traffic
        self._revisions: dict[tuple[str, str], tuple[str, int]] = {}  # storageUri and number of the newest
        self._owned: dict[tuple[str, str], dict[str, dict[tuple[str, ...], Any]]] = {}
        self._wait: dict[tuple[str, str], int] = {}
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def write_kubeconfig(self, path: Path, token: str = TOKEN) -> Path:
        """A kubeconfig that reaches this server (kubeconfig files may be JSON)."""
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": {"server": self.url}}],
            "users": [{"name": "u", "user": {"token": token}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "x",
        }
        path.write_text(json.dumps(config))
        return path

    def answer(self, verb: str, url: str, headers: Any, body: bytes) -> tuple[int, Any]:
        """Status and JSON (or text) for one request."""
        parts = urlsplit(url)
        found = _PATH.fullmatch(parts.path)
        if headers.get("Authorization") != f"Bearer {TOKEN}":
            return 401, _status("Unauthorized")
        lease = _LEASE.fullmatch(parts.path)
        if lease:
            return self._lease(verb, lease[1], lease[2] or "", body)
        if verb in self.refuse:
            status, message = self.refuse[verb]
            return status, _status(message)
        if parts.path.startswith("/api/v1/namespaces/") and parts.path.count("/") == 4:
            name = parts.path.rpartition("/")[2]
            if "GET namespace" in self.refuse:
                status, message = self.refuse["GET namespace"]
                return status, _status(message)
            return (200, {}) if name in self.namespaces else (404, _status(f'namespaces "{name}" not found'))
        if parts.path.startswith("/apis/apps/v1/"):
            return 404, _status('deployments.apps "entrance-predictor" not found')
        if parts.path.startswith("/api/v1/namespaces/kserve/configmaps/"):
            return 404, _status('configmaps "inferenceservice-config" not found')
        if not self.kserve or not found:
            return 404, "404 page not found\n"
        key = (found[1], found[2])
        if verb == "GET":
            return self._get(key)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        return self._apply(key, query, headers.get("Content-Type", ""), json.loads(body))

    def _lease(self, verb: str, namespace: str, name: str, body: bytes) -> tuple[int, Any]:
        if verb == "GET":
            found = self.leases.get((namespace, name))
            return (200, found) if found else (404, _status(f'leases.coordination.k8s.io "{name}" not found'))
        if namespace not in self.namespaces:
            return 404, _status(f'namespaces "{namespace}" not found')
        entry = json.loads(body)
        key = (namespace, entry["metadata"]["name"])
        before = self.leases.get(key, {"metadata": {"resourceVersion": None}})["metadata"]["resourceVersion"]
        if entry["metadata"].get("resourceVersion") != before:
            return 409, _status("the object has been modified")
        entry["metadata"]["resourceVersion"] = str(int(before or 0) + 1)
        self.leases[key] = entry
        return 200, entry

    def _get(self, key: tuple[str, str]) -> tuple[int, Any]:
        self.gets += 1
        if key not in self.objects:
            return 404, _status(f'inferenceservices.serving.kserve.io "{key[1]}" not found')
        self._wait[key] -= 1
        if self._wait[key] <= 0 and "model" in self.objects[key]["spec"]["predictor"]:
            self._reconcile(key, self.objects[key])
        return 200, self.objects[key]

    def _apply(self, key: tuple[str, str], query: dict[str, str], kind: str, body: dict[str, Any]) -> tuple[int, Any]:
        manager = query.get("fieldManager", "")
        self.applied.append((manager, kind, body))
        if kind != "application/apply-patch+yaml" or not manager:
            return 415, _status("the stand-in takes server-side apply only")
        if key[0] not in self.namespaces:
            return 404, _status(f'namespaces "{key[0]}" not found')
        owners = self._owned.setdefault(key, {})
        wanted = dict(_leaves(body))
        for other, fields in owners.items():
            taken = [path for path in wanted if path in fields and fields[path] != wanted[path]]
            if other != manager and taken and query.get("force") != "true":
                return 409, _status(f'Apply failed with 1 conflict: conflict with "{other}": .{".".join(taken[0])}')
        if query.get("dryRun"):
            return 200, body
        current = self.objects.setdefault(
            key, {"metadata": {"generation": 0, "name": key[1], "namespace": key[0], "uid": "0"}}
        )
        before = json.dumps(current.get("spec"), sort_keys=True)
        for path in set(owners.get(manager, {})) - set(wanted):
            _remove(current, path)
        for path, value in wanted.items():
            _set(current, path, value)
        owners[manager] = {path: value for path, value in wanted.items() if path not in _NO_OWNER}
        if json.dumps(current.get("spec"), sort_keys=True) != before:
            current["metadata"]["generation"] += 1
            self._wait[key] = self.delay
        return 200, current

    def _reconcile(self, key: tuple[str, str], found: dict[str, Any]) -> None:
        uri = found["spec"]["predictor"]["model"]["storageUri"]
        outcome = self.outcomes.get(uri, "UpToDate")
        good = outcome == "UpToDate"
        model: dict[str, Any] = {"transitionStatus": outcome}
        if not good:
            model["lastFailureInfo"] = {"reason": "ModelLoadFailed", "message": f"cannot load {uri}"}
        # As in a cluster, the old pods keep the service Ready while the new ones fail.
        condition = {"type": "Ready", "status": "True" if good or found["metadata"]["generation"] > 1 else "False"}
        predictor = {"type": "PredictorReady", "status": "True" if good else "False"}
        if not good:
            predictor |= {"reason": "RevisionFailed", "message": "container kserve-container crashed"}
        generation = found["metadata"]["generation"]
        named, number = self._revisions.get(key, ("", 0))
        if named != uri:
            number += 1
            self._revisions[key] = (uri, number)
        newest, share = f"predictor-{number:05d}", found["spec"]["predictor"].get("canaryTrafficPercent")
        ready = newest if good else f"predictor-{number - 1:05d}"
        revisions: dict[str, Any] = {"latestCreatedRevision": newest, "latestReadyRevision": ready}
        if share is None or key not in self._rolled_out:
            share = 100
            self._rolled_out[key] = ready
        revisions["traffic"] = [{"latestRevision": True, "revisionName": ready, "percent": share, "tag": "latest"}]
        if share < 100:
            former = {"revisionName": self._rolled_out[key], "percent": 100 - share, "tag": "prev"}
            revisions["traffic"].append({"latestRevision": False, **former})
        found["status"] = {
            "observedGeneration": generation,
            "deploymentMode": "Knative",
            "conditions": [condition, predictor],
            "modelStatus": model,
            "components": {"predictor": revisions},
        }


def _handler(cluster: ClusterStandIn) -> type[http.server.BaseHTTPRequestHandler]:
    lock = threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer("GET")

        def do_PATCH(self) -> None:
            self._answer("PATCH")

        def do_POST(self) -> None:
            self._answer("POST")

        def do_PUT(self) -> None:
            self._answer("PUT")

        def _answer(self, verb: str) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            with lock:
                status, content = cluster.answer(verb, self.path, self.headers, body)
                data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain" if isinstance(content, str) else "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            """Keep the tests' output clean."""

    return Handler


def _status(message: str) -> dict[str, str]:
    return {"kind": "Status", "status": "Failure", "message": message}


def _leaves(value: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, item in value.items():
        if isinstance(item, dict):
            yield from _leaves(item, (*path, key))
        else:
            yield (*path, key), item


def _set(target: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        target = target.setdefault(key, {})
    target[path[-1]] = value


def _remove(target: dict[str, Any], path: tuple[str, ...]) -> None:
    for key in path[:-1]:
        target = target.get(key, {})
    target.pop(path[-1], None)
