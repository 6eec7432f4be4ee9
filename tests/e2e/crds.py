"""CustomResourceDefinitions from the schemas in shared/crds, one file a kind and version: `<group>_<version>_<Kind>.json`."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from api_server import ApiServer

__all__ = ["WITHOUT_SCHEMA", "definitions", "load", "without_schema"]

_CLUSTER_SCOPED = ("ClusterServingRuntime", "ClusterStorageContainer", "GatewayClass")
# Kinds in the manifests, and of what Pipelines makes, that no schema is at hand for: the server takes anything in their spec.
WITHOUT_SCHEMA = (
    ("monitoring.coreos.com", "v1", "PodMonitor"),
    ("monitoring.coreos.com", "v1", "PrometheusRule"),
    ("monitoring.coreos.com", "v1", "ServiceMonitor"),
    ("serving.kserve.io", "v1alpha1", "ClusterStorageContainer"),
    ("gateway.networking.k8s.io", "v1", "GatewayClass"),
    ("argoproj.io", "v1alpha1", "Application"),
    ("argoproj.io", "v1alpha1", "Workflow"),
    ("kubeflow.org", "v1beta1", "ScheduledWorkflow"),
)


def definitions(folder: Path) -> list[dict[str, Any]]:
    """The definitions for all schemas in a folder, the newest version of each kind as the stored one."""
    versions: dict[tuple[str, str], dict[str, dict[str, Any]]] = defaultdict(dict)
    for path in sorted(folder.glob("*.json")):
        group, version, kind = path.stem.split("_")
        schema = json.loads(path.read_text())
        schema.pop("$comment", None)
        versions[group, kind][version] = schema
    return [_definition(group, kind, schemas) for (group, kind), schemas in versions.items()]


def without_schema() -> list[dict[str, Any]]:
    """Definitions that take any content."""
    anything = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    return [_definition(group, kind, {version: anything}) for group, version, kind in WITHOUT_SCHEMA]


def load(server: ApiServer, wanted: list[dict[str, Any]]) -> None:
    """Apply definitions and wait until the server serves every version of them."""
    for definition in wanted:
        server.apply(definition)
    deadline = time.monotonic() + 300
    missing = {
        (f"/apis/{item['spec']['group']}/{version['name']}", item["spec"]["names"]["plural"])
        for item in wanted
        for version in item["spec"]["versions"]
    }
    while missing:
        assert time.monotonic() < deadline, f"not served: {sorted(missing)}"
        served = {path: server.request("GET", path).body.get("resources", []) for path, _ in missing}
        missing = {(path, name) for path, name in missing if name not in [item["name"] for item in served[path]]}
        time.sleep(0.1)


def _definition(group: str, kind: str, schemas: dict[str, dict[str, Any]]) -> dict[str, Any]:
    plural = _plural(kind)
    # Alphabetic order is age here: v1 < v1alpha1 < v1beta1, and of these the shortest is the newest.
    stored = min(schemas, key=len)
    meta: dict[str, Any] = {"name": f"{plural}.{group}"}
    if group.endswith(".k8s.io"):
        meta["annotations"] = {"api-approved.kubernetes.io": "unapproved, for tests"}  # the server wants a word on it
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": meta,
        "spec": {
            "group": group,
            "scope": "Cluster" if kind in _CLUSTER_SCOPED else "Namespaced",
            "names": {"kind": kind, "plural": plural, "singular": kind.lower(), "listKind": f"{kind}List"},
            "versions": [_version(name, schema, name == stored) for name, schema in schemas.items()],
        },
    }


def _version(name: str, schema: dict[str, Any], stored: bool) -> dict[str, Any]:
    version: dict[str, Any] = {"name": name, "served": True, "storage": stored}
    version["schema"] = {"openAPIV3Schema": schema}
    if "status" in schema.get("properties", {}):
        version["subresources"] = {"status": {}}
    return version


def _plural(kind: str) -> str:
    name = kind.lower()
    if name.endswith("cy"):
        return f"{name[:-1]}ies"
    return f"{name}es" if name.endswith("s") else f"{name}s"
