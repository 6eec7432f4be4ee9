"""The manifests on a real API server: every kustomization applies, the Role allows what it says, pods are restricted."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from api_server import ApiServer

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
SERVICE = "/apis/serving.kserve.io/v1beta1/namespaces/{}/inferenceservices"
KSERVE = {
    "apiVersion": "serving.kserve.io/v1beta1",
    "kind": "InferenceService",
    "metadata": {"name": "entrance"},
    "spec": {"predictor": {"model": {"modelFormat": {"name": "yolo-onnx"}, "storageUri": "s3://models/a"}}},
}


def _kustomizations() -> list[Path]:
    """Folders that stand for themselves: options (`kind: Component`) are applied by the overlays that name them."""
    roots = [ROOT / name for name in ("manifests/base", "manifests/overlays", "pipelines/compiled")]
    files = [path for root in roots for path in root.rglob("kustomization.yaml")]
    return sorted(path.parent for path in files if yaml.safe_load(path.read_text())["kind"] == "Kustomization")


def _render(cluster: ApiServer, folder: Path) -> list[dict[str, Any]]:
    done = cluster.kubectl("kustomize", str(folder))
    assert done.returncode == 0, done.stderr
    return [entry for entry in yaml.safe_load_all(done.stdout) if entry]


def _pod_specs(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The pods that an object makes."""
    spec = entry.get("spec") or {}
    if entry["kind"] == "ServingRuntime":
        return [{key: spec[key] for key in ("containers", "volumes") if key in spec}]
    if entry["kind"] == "CronJob":
        spec = spec["jobTemplate"]["spec"]
    template = spec.get("template")
    if not isinstance(template, dict) or "containers" not in template.get("spec", {}):
        return []
    claimed = [{"name": claim["metadata"]["name"], "emptyDir": {}} for claim in spec.get("volumeClaimTemplates", [])]
    return [template["spec"] | {"volumes": template["spec"].get("volumes", []) + claimed}]


@pytest.mark.parametrize("folder", _kustomizations(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_kustomization_is_applied_twice_without_a_change(cluster: ApiServer, folder: Path) -> None:
    rendered = _render(cluster, folder)
    own = {entry["metadata"]["name"] for entry in rendered if entry["kind"] == "Namespace"}
    for name in {entry["metadata"].get("namespace", "kubeflow") for entry in rendered} - own:
        cluster.make_namespace(name)
    # Namespaces first, as `kubectl apply -k` orders them.
    given = yaml.safe_dump_all(sorted(rendered, key=lambda entry: entry["kind"] != "Namespace"))
    apply = ("apply", "--server-side", "--filename=-", "--output=json")
    generations = []
    for _ in range(2):
        done = cluster.kubectl(*apply, given=given)
        assert done.returncode == 0, done.stderr
        found = _objects(done.stdout)
        generations.append([item["metadata"].get("generation") for item in found])
    assert len(found) == len(rendered)
    assert generations[0] == generations[1]
    # What one kustomization made must not stand in another one's way.
    mine = yaml.safe_dump_all([entry for entry in rendered if entry["kind"] != "Namespace"])
    done = cluster.kubectl("delete", "--wait=false", "--filename=-", given=mine)
    assert done.returncode == 0, done.stderr


def test_secrets_of_filled_in_examples_are_applied(cluster: ApiServer, tmp_path: Path) -> None:
    for name in ("kubeflow", "haechi-serving", "mlflow", "haechi-review"):
        cluster.make_namespace(name)
    for path in (ROOT / "manifests/examples/secrets").iterdir():
        text = re.sub(r"=$", "=filled-in", path.read_text(), flags=re.M)
        (tmp_path / path.name.removesuffix(".example")).write_text(text)
    done = cluster.kubectl("apply", "-k", str(tmp_path), "--output=json")
    assert done.returncode == 0, done.stderr
    made = _objects(done.stdout)
    assert {base64.b64decode(value) for item in made for value in item["data"].values()} <= {b"filled-in", b"mlflow"}
    assert cluster.kubectl("delete", "-k", str(tmp_path)).returncode == 0


@pytest.mark.parametrize("name", ["argocd/application.yaml", "inferenceservice-operations.yaml"])
def test_an_example_is_applied(cluster: ApiServer, name: str) -> None:
    path = ROOT / "manifests/examples" / name
    cluster.make_namespace(yaml.safe_load(path.read_text())["metadata"]["namespace"])
    done = cluster.kubectl("apply", "--server-side", "--field-manager=operations", f"--filename={path}")
    assert done.returncode == 0, done.stderr
    assert cluster.kubectl("delete", f"--filename={path}").returncode == 0


def _objects(text: str) -> list[dict[str, Any]]:
    found = json.loads(text)
    items: list[dict[str, Any]] = found["items"] if found["kind"] == "List" else [found]
    return items


@pytest.mark.parametrize("folder", _kustomizations(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_pod_is_restricted(cluster: ApiServer, folder: Path) -> None:
    label = "pod-security.kubernetes.io/enforce"
    cluster.make_namespace("restricted", **{label: "restricted"})
    for entry in _render(cluster, folder):
        for spec in _pod_specs(entry):
            # In this namespace no controller makes the service account that the pod names.
            spec = {**spec, "serviceAccountName": "default", "serviceAccount": "default"}
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "dry-run"}, "spec": spec}
            found = cluster.request("POST", "/api/v1/namespaces/restricted/pods?dryRun=All", pod)
            assert found.status == 201, f"{entry['kind']} {entry['metadata']['name']}: {found.message}"


def test_a_pod_that_is_not_restricted_is_refused(cluster: ApiServer) -> None:
    cluster.make_namespace("restricted", **{"pod-security.kubernetes.io/enforce": "restricted"})
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "dry-run"}}
    pod["spec"] = {"containers": [{"name": "c", "image": "registry.invalid/c:1"}]}
    found = cluster.request("POST", "/api/v1/namespaces/restricted/pods?dryRun=All", pod)
    assert found.status == 403
    assert "allowPrivilegeEscalation" in found.message


@pytest.mark.parametrize(
    ("verb", "path", "status"),
    [
        ("GET", SERVICE, 200),
        ("POST", SERVICE, 201),
        ("GET", SERVICE + "/entrance", 200),
        ("PATCH", SERVICE + "/entrance", 200),
        ("DELETE", SERVICE + "/entrance", 200),
        ("DELETE", SERVICE, 403),
        ("PATCH", SERVICE + "/entrance/status", 403),
        ("GET", "/api/v1/namespaces/{}/secrets", 403),
        ("GET", "/api/v1/namespaces/{}/pods", 200),
        ("DELETE", "/api/v1/namespaces/{}/pods/any", 403),
        ("DELETE", "/apis/coordination.k8s.io/v1/namespaces/{}/leases/any", 403),
        ("GET", "/apis/serving.kserve.io/v1alpha1/namespaces/{}/servingruntimes", 403),
        ("GET", "/apis/serving.kserve.io/v1beta1/inferenceservices", 403),
        ("GET", "/apis/serving.kserve.io/v1beta1/namespaces/default/inferenceservices", 403),
    ],
)
def test_the_role_allows_deploy_and_no_more(
    cluster: ApiServer, namespace: str, verb: str, path: str, status: int
) -> None:
    if "entrance" in path:
        cluster.request("POST", SERVICE.format(namespace), KSERVE)
    body = {"POST": KSERVE, "PATCH": {"metadata": {"labels": {"a": "b"}}}}.get(verb)
    kind = "application/merge-patch+json" if verb == "PATCH" else "application/json"
    found = cluster.request(verb, path.format(namespace), body, "kubeflow/pipeline-runner", kind)
    assert found.status == status, found.message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"storageURI": "s3://models/a"}, "unknown field"),
        ({"modelFormat": "yolo-onnx"}, "must be of type object"),
    ],
)
def test_schemas_are_enforced(cluster: ApiServer, namespace: str, change: dict[str, Any], message: str) -> None:
    body = json.loads(json.dumps(KSERVE))
    body["spec"]["predictor"]["model"] |= change
    found = cluster.request("POST", SERVICE.format(namespace) + "?fieldValidation=Strict", body)
    assert found.status in (400, 422)
    assert message in found.message


def test_status_is_written_by_the_controller_only(cluster: ApiServer, namespace: str) -> None:
    body = {**KSERVE, "status": {"url": "http://nobody.example.com"}}
    assert cluster.request("POST", SERVICE.format(namespace), body).status == 201
    assert "status" not in cluster.get(SERVICE.format(namespace) + "/entrance")


def test_a_test_run_that_is_killed_leaves_no_server_behind(cluster: ApiServer, tmp_path: Path) -> None:
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path; from api_server import ApiServer\n"
        "server = ApiServer(Path(sys.argv[2])); server.start()\n"
        "pids = [part._process.child.pid for part in (server, server._etcd)]\n"
        "print(*pids, flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 2
        os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 120
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "a server outlived its test run"
        time.sleep(0.1)
