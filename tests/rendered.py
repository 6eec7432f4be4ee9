"""What kustomize makes of manifests/, for tests: objects, the pods in them, and who may speak to whom."""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

__all__ = [
    "BASES",
    "COMPONENTS",
    "CRDS",
    "MANIFESTS",
    "OVERLAYS",
    "ROOT",
    "TARGETS",
    "Object",
    "Pod",
    "find",
    "identity",
    "merged",
    "patched",
    "pods",
    "reaches",
    "render",
    "validate",
]

Object = dict[str, Any]
ROOT = Path(__file__).resolve().parents[1]
MANIFESTS = ROOT / "manifests"
CRDS = ROOT.parent / "shared" / "crds"
BASES = sorted(path.name for path in (MANIFESTS / "base").iterdir())
COMPONENTS = sorted(path.name for path in (MANIFESTS / "components").iterdir())
OVERLAYS = sorted(path.name for path in (MANIFESTS / "overlays").iterdir())
# Every base by itself, every option on top of all bases (and of the options that it needs), every overlay.
TARGETS = [f"base/{name}" for name in BASES] + [f"components/{name}" for name in COMPONENTS]
TARGETS += [f"overlays/{name}" for name in OVERLAYS]
_NEEDS = {"istio-auth": ["gateway-canary"]}
_BUILT_IN = ("v1", "apps/v1", "autoscaling/v2", "batch/v1", "networking.k8s.io/v1", "policy/v1")
_BUILT_IN += ("rbac.authorization.k8s.io/v1", "admissionregistration.k8s.io/v1")
_VERSIONS = ("1.32", "1.34")  # 1.34 is what tests/e2e runs
# The Prometheus operator's and Argo CD's schemas are not shared; tests look at these objects by themselves.
_WITHOUT_SCHEMA = ("monitoring.coreos.com/v1", "argoproj.io/v1alpha1")


@dataclass(frozen=True)
class Pod:
    """A pod as it will be: where, with which labels, and its spec. `owner` is the object that describes it."""

    namespace: str
    labels: dict[str, str]
    spec: Object = field(default_factory=dict)
    owner: str = ""

    def ports(self) -> dict[str, int]:
        """Container ports by name."""
        return {port["name"]: port["containerPort"] for box in self.spec["containers"] for port in box.get("ports", [])}


@functools.cache
def _rendered(target: str) -> str:
    if not target.startswith("components/"):
        return _kustomize(MANIFESTS / target)
    name = target.removeprefix("components/")
    # gateway-canary comes first, as istio-auth changes what it brings.
    options = sorted(COMPONENTS, key="gateway-canary".__ne__) if name == "*" else [*_NEEDS.get(name, []), name]
    return _elsewhere([f"base/{base}" for base in BASES], [f"components/{item}" for item in options])


def _elsewhere(resources: list[str], components: list[str], more: Object | None = None) -> str:
    """What a kustomization that stands outside of manifests/ makes of these."""
    with tempfile.TemporaryDirectory() as folder:
        relative = os.path.relpath(MANIFESTS, Path(folder).resolve())
        wanted = {
            "resources": [f"{relative}/{item}" for item in resources],
            "components": [f"{relative}/{item}" for item in components],
            **(more or {}),
        }
        (Path(folder) / "kustomization.yaml").write_text(yaml.safe_dump(wanted))
        return _kustomize(Path(folder))


def _kustomize(folder: Path) -> str:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr  # deprecated fields are told there
    return done.stdout


def render(target: str) -> list[Object]:
    """The objects of `base/x`, `components/x` or `components/*` (on all bases), or `overlays/x`; a caller may change them."""
    return copy.deepcopy(_parsed(target))


@functools.cache
def _parsed(target: str) -> list[Object]:
    return [item for item in yaml.load_all(_rendered(target), Loader=yaml.CSafeLoader) if item]


def patched(target: str, words: str) -> list[Object]:
    """The objects of a base or overlay under an overlay that has the one `patches:` of docs/manifests.md with these words."""
    blocks = re.findall(r"```yaml\n(patches:\n.*?)```", (ROOT / "docs/manifests.md").read_text(), re.DOTALL)
    [block] = [block for block in blocks if words in block]
    return [item for item in yaml.safe_load_all(_elsewhere([target], [], yaml.safe_load(block))) if item]


def identity(item: Object) -> str:
    """Kind, namespace and name, for messages and for comparing."""
    return f"{item['kind']}/{item['metadata'].get('namespace', '')}/{item['metadata']['name']}"


def find(objects: list[Object], kind: str, name: str = "", namespace: str = "") -> Object:
    """The one object of that kind, and of that name and namespace where they are given."""
    (found,) = (
        item
        for item in objects
        if item["kind"] == kind
        and name in ("", item["metadata"]["name"])
        and namespace in ("", item["metadata"].get("namespace"))
    )
    return found


def pods(objects: list[Object]) -> Iterator[Pod]:
    """The pods that these objects make; of a ServingRuntime the predictor's, less what an InferenceService adds."""
    for item in objects:
        namespace = item["metadata"].get("namespace", "")
        if item["kind"] in ("Deployment", "StatefulSet", "CronJob"):
            template = item["spec"].get("jobTemplate", item)["spec"]["template"]
            yield Pod(namespace, template["metadata"]["labels"], template["spec"], identity(item))
        if item["kind"] == "ServingRuntime":
            spec = {name: item["spec"].get(name, []) for name in ("containers", "volumes")}
            yield Pod(namespace, item["spec"]["labels"], spec, identity(item))


def validate(item: Object) -> str:
    """Check an object against its schema, unknown fields refused; says by what it was checked.

    Raises:
        jsonschema.ValidationError, kubernetes_validate.ValidationError: with what is wrong.
    """
    return _validated(json.dumps(item))


@functools.cache  # most objects are in many renderings
def _validated(text: str) -> str:
    item = json.loads(text)
    version = str(item["apiVersion"])
    if version in _BUILT_IN:
        for release in _VERSIONS:
            kubernetes_validate.validate(item, release, strict=True)
        return "Kubernetes"
    if version in _WITHOUT_SCHEMA or not CRDS.is_dir():
        return "nothing"
    _validator(version, str(item["kind"])).validate(item)
    return "definition"


@functools.cache
def _validator(version: str, kind: str) -> jsonschema.Draft202012Validator:
    path = CRDS / f"{version.replace('/', '_')}_{kind}.json"
    assert path.is_file(), f"no schema of {version} {kind}"
    schema: Object = _closed(json.loads(path.read_text()))
    schema["properties"] |= {
        "apiVersion": {"type": "string"},
        "kind": {"type": "string"},
        "metadata": {"type": "object"},
    }
    return jsonschema.Draft202012Validator(schema)


def _closed(schema: Any) -> Any:
    """The schema as the API server applies it with strict field validation: an unknown field is an error."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: _closed(value) for name, value in schema.items()}
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not open_ended:
        closed["additionalProperties"] = False
    return closed


def reaches(objects: list[Object], source: Pod, target: Pod, port: int, protocol: str = "TCP") -> bool:
    """Whether the NetworkPolicies let `source` open a connection to `port` of `target`."""
    return _admits(objects, source, target, "Egress", port, protocol) and _admits(
        objects, target, source, "Ingress", port, protocol
    )


def _admits(objects: list[Object], pod: Pod, other: Pod, way: str, port: int, protocol: str) -> bool:
    policies = [
        item["spec"]
        for item in objects
        if item["kind"] == "NetworkPolicy"
        and item["metadata"]["namespace"] == pod.namespace
        and way in item["spec"]["policyTypes"]
        and _selects(item["spec"]["podSelector"], pod.labels)
    ]
    if not policies:
        return True
    peers = "to" if way == "Egress" else "from"
    return any(
        _names_port(rule, port, protocol) and (peers not in rule or any(_is_peer(p, pod, other) for p in rule[peers]))
        for spec in policies
        for rule in spec.get(way.lower(), [])
    )


def _names_port(rule: Object, port: int, protocol: str) -> bool:
    return "ports" not in rule or any((item["port"], item["protocol"]) == (port, protocol) for item in rule["ports"])


def _is_peer(peer: Object, pod: Pod, other: Pod) -> bool:
    if "ipBlock" in peer:
        return False
    spaces = peer.get("namespaceSelector")
    near = pod.namespace == other.namespace
    named = near if spaces is None else _selects(spaces, {"kubernetes.io/metadata.name": other.namespace})
    return named and _selects(peer.get("podSelector", {}), other.labels)


def _selects(selector: Object, labels: dict[str, str]) -> bool:
    for rule in selector.get("matchExpressions", []):
        assert rule["operator"] in ("In", "Exists"), "this reader knows no other operator"
        if rule["key"] not in labels or ("values" in rule and labels[rule["key"]] not in rule["values"]):
            return False
    return selector.get("matchLabels", {}).items() <= labels.items()


def merged(under: Object, over: Object) -> Object:
    """Two objects as one, field by field, as server-side apply of two owners gives them.

    Raises:
        AssertionError: both name one field, with different values.
    """
    result = copy.deepcopy(under)
    for name, value in over.items():
        if isinstance(value, dict) and isinstance(result.get(name), dict):
            result[name] = merged(result[name], value)
        else:
            assert name not in result or result[name] == value, f"both own {name}"
            result[name] = value
    return result
