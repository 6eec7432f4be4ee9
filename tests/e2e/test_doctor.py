"""`haechi doctor` on a real API server: every fault that a cluster can show is planted there, and found with its cause.

No kubelet, scheduler or controller runs, so what they would write (a pod's status, a ReplicaSet's condition, a Workflow's
nodes) is written here in their words; what the API server itself says (rights, quotas, Pod Security) is its own. The
store is a real SeaweedFS, MLflow a real server.
"""

from __future__ import annotations

import base64
import copy
import dataclasses
import json
import os
import shlex
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import crds
import pytest
import yaml
from api_server import ApiServer
from http_stand_in import Answers, HttpStandIn

from haechi.components.shared.settings import Settings
from haechi.components.shared.storage import Store
from haechi.pipelines.cli import main
from haechi.pipelines.doctor.checks import CHECKS
from haechi.pipelines.doctor.examine import Diagnosis, Result, examine
from haechi.pipelines.doctor.pulling import why_not_pulled
from haechi.pipelines.doctor.report import as_lines
from haechi.pipelines.doctor.scheduling import why_pending
from haechi.pipelines.doctor.world import Aim, World

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
CRDS = ROOT.parent / "shared" / "crds"
MERGE = "application/merge-patch+json"
GPU = "nvidia.com/gpu"
GATEWAY = "gateway.networking.k8s.io"
ISVC = "/apis/serving.kserve.io/v1beta1/namespaces/{}/inferenceservices"
CLUSTER_CHECKS = {name: check for name, check in CHECKS.items() if check.area != "machine"}


class Place:
    """One healthy pair of namespaces, in which a test plants its fault."""

    def __init__(self, server: ApiServer, settings: Settings, mlflow: str) -> None:
        self.server, self.settings = server, settings
        tail = uuid.uuid4().hex[:8]
        self.runs, self.serving = server.make_namespace(f"runs-{tail}"), server.make_namespace(f"serving-{tail}")
        server.make_service_account(self.runs, "pipeline-runner")
        where = {"HAECHI_S3_ENDPOINT": settings.s3_endpoint, "HAECHI_BUCKET": settings.bucket}
        self.config(self.runs, "haechi-settings", HAECHI_S3_REGION="us-east-1", MLFLOW_TRACKING_URI=mlflow, **where)
        self.config(self.serving, "haechi-serving-settings", **where)
        self.secret(self.runs, "haechi-s3", access_key=settings.s3_access_key, secret_key=settings.s3_secret_key)
        self.kserve_secret(settings.s3_endpoint.removeprefix("http://"))
        self.patch(f"/api/v1/namespaces/{self.serving}/serviceaccounts/default", {"secrets": [{"name": "haechi-s3"}]})
        for name in ("role", "rolebinding", "servingruntime"):
            entry = yaml.safe_load((ROOT / "manifests" / "base" / "serving" / f"{name}.yaml").read_text())
            entry["metadata"]["namespace"] = self.serving
            if name == "rolebinding":
                entry["subjects"][0]["namespace"] = self.runs
            if name == "role":  # as option gateway-canary adds it
                entry["rules"].append({"apiGroups": [GATEWAY], "resources": ["httproutes"], "verbs": ["get", "list"]})
            server.apply(entry)

    def aim(self, user: str = "admin") -> Aim:
        return Aim(
            namespace=self.runs,
            serving=self.serving,
            kubeconfig=str(self.server.kubeconfig(user)),
            workdir=Path("/nonexistent"),
        )

    def examine(self, user: str = "admin", env: dict[str, str] | None = None, **change: Any) -> Diagnosis:
        return examine(World(dataclasses.replace(self.aim(user), **change), env=env or {}), checks=CLUSTER_CHECKS)

    def config(self, namespace: str, name: str, **data: str) -> None:
        meta = {"name": name, "namespace": namespace}
        self.server.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": data})

    def secret(self, namespace: str, name: str, notes: dict[str, str] | None = None, **data: str) -> None:
        meta = {"name": name, "namespace": namespace, "annotations": notes or {}}
        coded = {key: base64.b64encode(value.encode()).decode() for key, value in data.items()}
        self.server.apply({"apiVersion": "v1", "kind": "Secret", "metadata": meta, "data": coded})

    def kserve_secret(self, endpoint: str, secret_key: str = "") -> None:
        notes = {"serving.kserve.io/s3-endpoint": endpoint, "serving.kserve.io/s3-usehttps": "0"}
        keys = {
            "AWS_ACCESS_KEY_ID": self.settings.s3_access_key,
            "AWS_SECRET_ACCESS_KEY": secret_key or self.settings.s3_secret_key,
        }
        self.secret(self.serving, "haechi-s3", notes, **keys)

    def patch(self, path: str, body: dict[str, Any]) -> None:
        found = self.server.request("PATCH", path, body, kind=MERGE)
        assert found.status == 200, found.message

    def create(self, path: str, body: dict[str, Any], status: dict[str, Any] | None = None) -> None:
        found = self.server.request("POST", path, body)
        assert found.status == 201, found.message
        if status is not None:
            self.patch(f"{path}/{body['metadata']['name']}/status", {"status": status})

    def pod(self, name: str, spec: dict[str, Any], status: dict[str, Any], serves: str = "") -> None:
        labels = (
            {"serving.kserve.io/inferenceservice": serves}
            if serves
            else {"pipelines.kubeflow.org/v2_component": "true"}
        )
        body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels}, "spec": spec}
        self.create(f"/api/v1/namespaces/{self.serving if serves else self.runs}/pods", body, status)

    def isvc(
        self, name: str, spec: dict[str, Any], status: dict[str, Any], notes: dict[str, str] | None = None
    ) -> None:
        model = {"modelFormat": {"name": "yolo-onnx"}, "storageUri": "s3://haechi/models/a/1"}
        whole = copy.deepcopy(spec)
        whole.setdefault("predictor", {}).setdefault("model", model)
        meta = {"name": name, "annotations": notes or {}}
        body = {"apiVersion": "serving.kserve.io/v1beta1", "kind": "InferenceService", "metadata": meta, "spec": whole}
        self.create(ISVC.format(self.serving), body, status)

    def refused(self, namespace: str, spec: dict[str, Any]) -> str:
        """The API server's words when it refuses a pod."""
        body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "refused"}, "spec": spec}
        found = self.server.request("POST", f"/api/v1/namespaces/{namespace}/pods", body)
        assert found.status == 403, found.message
        return found.message

    def replica_set(self, namespace: str, name: str, message: str) -> None:
        template = {"metadata": {"labels": {"app": name}}, "spec": {"containers": [{"name": "main", "image": "a:1"}]}}
        spec = {"replicas": 1, "selector": {"matchLabels": {"app": name}}, "template": template}
        body = {"apiVersion": "apps/v1", "kind": "ReplicaSet", "metadata": {"name": name}, "spec": spec}
        failure = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": message}
        path = f"/apis/apps/v1/namespaces/{namespace}/replicasets"
        self.create(path, body, {"replicas": 0, "conditions": [failure]})


@pytest.fixture(scope="module")
def kubeflow(cluster: ApiServer) -> ApiServer:
    """The cluster with what Kubeflow Pipelines brings: its Service with a ready pod, and Argo's kind Workflow."""
    anything = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    crds.load(cluster, [crds._definition("argoproj.io", "Workflow", {"v1alpha1": anything})])
    service(cluster, "kubeflow", "ml-pipeline", 8888)
    cluster.make_namespace("kserve")
    return cluster


@pytest.fixture
def place(kubeflow: ApiServer, store: Store, mlflow_uri: str) -> Iterator[Place]:
    yield Place(kubeflow, store.settings, mlflow_uri)
    for namespace in ("kserve", "kubeflow"):
        kubeflow.request("DELETE", f"/api/v1/namespaces/{namespace}/configmaps/inferenceservice-config")


@pytest.fixture
def nodes(kubeflow: ApiServer) -> Iterator[Callable[..., None]]:
    """nodes("gpu-1", gpus=1, labels={…}, taints=[…]) makes a node; all are deleted when the test ends."""
    made = []

    def make(
        name: str, gpus: int = 0, labels: dict[str, str] | None = None, taints: Any = (), resource: str = GPU
    ) -> None:
        body = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels or {}}}
        found = kubeflow.request("POST", "/api/v1/nodes", {**body, "spec": {}})
        assert found.status == 201, found.message
        made.append(name)
        # The API server taints a new node as not ready; the node controller would take that away.
        kubeflow.request("PATCH", f"/api/v1/nodes/{name}", {"spec": {"taints": list(taints) or None}}, kind=MERGE)
        offered = {"cpu": "8", "memory": "32Gi", **({resource: str(gpus)} if gpus else {})}
        status = {"status": {"allocatable": offered, "capacity": offered}}
        assert kubeflow.request("PATCH", f"/api/v1/nodes/{name}/status", status, kind=MERGE).status == 200

    yield make
    for name in made:
        kubeflow.request("DELETE", f"/api/v1/nodes/{name}")


def service(server: ApiServer, namespace: str, name: str, port: int, ready: bool = True) -> None:
    """A Service, and the EndpointSlice that a controller would make."""
    meta = {"name": name, "namespace": namespace}
    spec = {"ports": [{"port": port}], "selector": {"app": name}}
    server.apply({"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": spec})
    endpoints = [{"addresses": ["10.1.0.1"], "conditions": {"ready": ready}}]
    labels = {"kubernetes.io/service-name": name}
    entry = {"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": {**meta, "labels": labels}}
    server.apply({**entry, "addressType": "IPv4", "endpoints": endpoints, "ports": [{"port": port}]})


def trainer(**spec: Any) -> dict[str, Any]:
    """The pod of a training step, as Kubeflow Pipelines starts it, in short."""
    main = {
        "name": "main",
        "image": "haechi/train:0.1.0",
        "command": ["/kfp-launcher/launch", "--component_spec", "{…}", "--", "sh", "-c"],
        "args": ["from haechi.components.train.step import train"],
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }
    main |= spec.pop("container", {})
    volumes = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
    return {"restartPolicy": "Never", "containers": [main], "volumes": volumes, **spec}


def gpus(count: int, resource: str = GPU) -> dict[str, Any]:
    return {"resources": {"limits": {resource: str(count)}}}


def unschedulable(message: str) -> dict[str, Any]:
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    return {"phase": "Pending", "conditions": [condition]}


def only(diagnosis: Diagnosis, check: str) -> Any:
    """The one finding of the whole diagnosis, which must be the named check's."""
    found = [(result.check, finding) for result in diagnosis.results for finding in result.findings]
    assert [name for name, _ in found] == [check], [(name, finding.symptom) for name, finding in found]
    assert diagnosis.exit_code == 1
    return found[0][1]


def mend(place: Place, fix: str, **keys: str) -> None:
    """Do what a fix says, in the repository as a person would, with the keys in it filled in."""
    for key, value in keys.items():
        assert f"{key}=…" in fix, fix
        fix = fix.replace(f"{key}=…", f"{key}={value}")
    env = {"PATH": os.environ["PATH"], "HOME": str(place.server.workdir), "KUBECONFIG": str(place.server.kubeconfig())}
    done = subprocess.run(["bash", "-eo", "pipefail", "-c", fix], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{fix}\n{done.stderr}"


def test_a_healthy_cluster_gives_no_finding_and_everything_is_looked_at(place: Place) -> None:
    place.isvc("entrance", {}, {"deploymentMode": "Standard", "modelStatus": {"transitionStatus": "UpToDate"}})
    place.pod("train", trainer(), {"phase": "Running"})
    diagnosis = place.examine()
    assert [(result.check, result.findings, result.unseen) for result in diagnosis.results] == [
        (name, (), "") for name in CLUSTER_CHECKS
    ]
    skipped = {result.check for result in diagnosis.results if result.skipped}
    assert skipped == {"store", "mlflow", "label-studio", "pipelines-api"}
    assert diagnosis.exit_code == 0


# pods -------------------------------------------------------------------------------------------------------------

TAINT = {"key": GPU, "value": "present", "effect": "NoSchedule"}
WAITING = [
    ({"container": gpus(1)}, {}, "no node offers nvidia.com/gpu", "device plugin|install the plugin"),
    ({"container": gpus(1)}, {"gpus": 2, "resource": "amd.com/gpu"}, "there is amd.com/gpu", "gpu_type=amd.com/gpu"),
    ({"container": gpus(4)}, {"gpus": 2}, "no node has more than 2", "gpu_count=2"),
    (
        {"container": gpus(1), "nodeSelector": {"pool": "a100"}},
        {"gpus": 1, "labels": {"pool": "h100"}},
        "pool=a100 (nodes have h100)",
        "node_selector={pool: 'h100'}",
    ),
    (
        {"container": gpus(1), "nodeSelector": {"pool": "a100"}},
        {"gpus": 1},
        "no such label",
        "kubectl label node gpu-1 pool=a100",
    ),
    (
        {"container": gpus(1)},
        {"gpus": 1, "taints": [TAINT]},
        "nvidia.com/gpu=present:NoSchedule",
        "tolerations=[{key: nvidia.com/gpu, operator: Equal, value: 'present', effect: NoSchedule}]",
    ),
    (
        {"container": gpus(1)},
        {"gpus": 1, "taints": [{"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"}]},
        "cordoned or not ready: gpu-1",
        "kubectl describe node gpu-1",
    ),
    ({"container": gpus(1)}, {"gpus": 1}, "other pods hold what it asks for (1 nvidia.com/gpu)", "gpu-1"),
    (
        {"container": {"resources": {"requests": {"cpu": "64"}, "limits": {GPU: "1"}}}},
        {"gpus": 1},
        "it asks for 64 CPUs, and no node that suits it has more than 8",
        "train_cpu=…   # below 8",
    ),
    (
        {"container": {"resources": {"requests": {"memory": "48Gi"}, "limits": {GPU: "1"}}}},
        {"gpus": 1},
        "it asks for 48.0Gi of memory, and no node that suits it has more than 32Gi",
        "train_memory=…   # below 32Gi",
    ),
    (
        {"container": gpus(1), "schedulingGates": [{"name": "kueue.x-k8s.io/admission"}]},
        {"gpus": 1},
        "its gates are lifted: kueue.x-k8s.io/admission (Kueue",
        "workloads,localqueues",
    ),
    (
        {"container": gpus(1), "schedulingGates": [{"name": "example.com/review"}]},
        {"gpus": 1},
        "its gates are lifted: example.com/review",
        "describe pod train",
    ),
]


@pytest.mark.parametrize(("pod", "node", "cause", "fix"), WAITING)
def test_a_pod_that_waits_for_a_gpu_is_told_why(
    place: Place, nodes: Callable[..., None], pod: dict[str, Any], node: dict[str, Any], cause: str, fix: str
) -> None:
    nodes("gpu-1", **node)
    nodes("cpu-1")
    place.pod("train", trainer(**pod), unschedulable("0/2 nodes are available: …"))
    finding = only(place.examine(), "pending")
    assert cause in finding.cause
    assert any(word in finding.fix for word in fix.split("|"))


@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize(
    ("words", "cause", "fix"),
    [
        ("1 node(s) didn't match pod anti-affinity rules.", "pod anti-affinity", "get pod train"),
        ("1 node(s) didn't satisfy existing pods anti-affinity rules.", "pod anti-affinity", "get pod train"),
        ("1 node(s) didn't match pod affinity rules.", "pod affinity wants it beside", "get pod train"),
        ("1 node(s) didn't match pod topology spread constraints.", "topology spread", "get pod train"),
        ("1 node(s) had volume node affinity conflict.", "a volume that it mounts is in a zone", "get pvc"),
        ("1 node(s) exceed max volume count.", "as many volumes as they may", "csinodes"),
        ("1 node(s) didn't have free ports for the requested pod ports.", "host port", "hostPort"),
        ("1 Too many pods.", "as many pods as they may", "allocatable.pods"),
    ],
)
def test_what_only_the_scheduler_knows_is_told_in_its_words(seen: bool, words: str, cause: str, fix: str) -> None:
    pod = {"metadata": {"namespace": "runs", "name": "train"}, "spec": {"containers": [gpus(1)]}}
    node = {"metadata": {"name": "a"}, "spec": {}, "status": {"allocatable": {GPU: "1", "cpu": "8"}}}
    told = why_pending(pod, [node] if seen else None, f"0/1 nodes are available: {words}")
    assert cause in told[0]
    assert fix in told[1]


def test_of_what_is_taken_that_is_told_which_the_scheduler_calls_short(
    place: Place, nodes: Callable[..., None]
) -> None:
    nodes("gpu-1", gpus=1)
    place.pod("train", trainer(container=gpus(1)), unschedulable("0/1 nodes are available: 1 Insufficient cpu."))
    assert "other pods hold what it asks for (cpu)" in only(place.examine(), "pending").cause


def test_a_detector_that_asks_too_much_is_mended_in_its_runtime(place: Place, nodes: Callable[..., None]) -> None:
    nodes("cpu-1")
    container = {"name": "kserve-container", "image": "haechi/serving:0.1.0", "resources": {"requests": {"cpu": "9"}}}
    place.pod("entrance-1", {"containers": [container]}, unschedulable("0/1 nodes are available"), serves="entrance")
    assert "resources.requests.cpu: …   # below 8" in only(place.examine(), "pending").fix


def test_tolerations_that_are_there_already_are_not_asked_for_again(place: Place, nodes: Callable[..., None]) -> None:
    nodes("gpu-1", gpus=1, taints=[TAINT, {"key": "spot", "effect": "NoExecute"}])
    tolerations = [{"key": GPU, "operator": "Exists"}]
    place.pod("train", trainer(container=gpus(1), tolerations=tolerations), unschedulable("0/1 nodes are available"))
    finding = only(place.examine(), "pending")
    assert "tolerations=[{key: spot, operator: Exists, effect: NoExecute}]" in finding.fix
    assert GPU not in finding.cause


@pytest.mark.parametrize(
    "toleration",
    [
        {"key": GPU, "operator": "Exists", "effect": "NoExecute"},
        {"key": GPU, "operator": "Equal", "value": "other", "effect": "NoSchedule"},
    ],
)
def test_a_toleration_of_another_effect_or_value_does_not_count(
    place: Place, nodes: Callable[..., None], toleration: dict[str, str]
) -> None:
    nodes("gpu-1", gpus=1, taints=[TAINT])
    place.pod("train", trainer(container=gpus(1), tolerations=[toleration]), unschedulable("0/1 nodes are available"))
    assert "does not tolerate nvidia.com/gpu=present" in only(place.examine(), "pending").cause


@pytest.mark.parametrize(
    ("message", "cause"),
    [
        ("0/3 nodes are available: 3 node(s) had untolerated taint {nvidia.com/gpu: present}.", "taint nvidia.com/gpu"),
        ("0/3 nodes are available: 3 node(s) didn't match Pod's node affinity/selector.", "node selector"),
        ("0/3 nodes are available: 3 Insufficient nvidia.com/gpu.", "enough nvidia.com/gpu"),
        ('0/3 nodes are available: persistentvolumeclaim "haechi-cache" not found.', "volume"),
    ],
)
def test_without_the_right_to_see_nodes_the_schedulers_words_tell(place: Place, message: str, cause: str) -> None:
    viewer = _viewer(place)
    place.pod("train", trainer(container=gpus(1)), unschedulable(message))
    diagnosis = place.examine(viewer)
    [finding] = _findings(diagnosis, "pending")
    assert cause in finding.cause


def test_a_detector_that_waits_is_mended_in_its_runtime(place: Place, nodes: Callable[..., None]) -> None:
    nodes("gpu-1", gpus=1, taints=[TAINT])
    spec = {"containers": [{"name": "kserve-container", "image": "haechi/serving:0.1.0", **gpus(1)}]}
    place.pod("entrance-predictor-1", spec, unschedulable("0/1 nodes are available"), serves="entrance")
    assert "ServingRuntime haechi-yolo" in only(place.examine(), "pending").fix


@pytest.mark.parametrize(
    ("change", "symptom"),
    [
        ({"container": {"volumeMounts": []}, "volumes": []}, "64 MiB"),
        ({"volumes": [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "64Mi"}}]}, "64Mi"),
        ({"volumes": [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "0.05Gi"}}]}, "53687091200m"),
    ],
)
def test_training_with_little_shared_memory_is_found(place: Place, change: dict[str, Any], symptom: str) -> None:
    ended = {"exitCode": 135, "reason": "Error"}
    container = {"name": "main", "image": "a", "imageID": "", "ready": False, "restartCount": 0}
    status = {"phase": "Failed", "containerStatuses": [{**container, "state": {"terminated": ended}}]}
    place.pod("train", trainer(**change), status)
    finding = only(place.examine(), "train-shm")
    assert symptom in finding.symptom
    assert "bus error" in finding.symptom
    assert "medium: Memory" in finding.fix


@pytest.mark.parametrize(
    ("reason", "message", "cause", "fix"),
    [
        (
            "ImagePullBackOff",
            "failed to resolve reference: haechi/train:0.1.0: not found",
            "not under this name",
            "then push",
        ),
        ("ErrImagePull", "unauthorized: authentication required", "not under this name", "kind load"),
        ("ErrImagePull", "tls: failed to verify certificate: x509: unknown authority", "certificate", "CA"),
        ("ErrImagePull", "dial tcp: lookup registry.example.com: no such host", "does not reach", "train_image="),
        ("ErrImageNeverPull", "Container image is not present with pull policy of Never", "no such image", "kind load"),
        ("InvalidImageName", "couldn't parse image reference", "no image name", "train_image="),
        ("ErrImagePull", "no match for platform in manifest: not found", "no variant", "kubernetes.io/arch"),
        (
            "ErrImagePull",
            "toomanyrequests: You have reached your pull rate limit",
            "limits how often",
            "docker-registry",
        ),
        ("ErrImagePull", "write /var/lib/containerd/x: no space left on device", "disk of node NODE is full", "rmi"),
        ("ErrImagePull", "lookup registry on 10.96.0.10:53: server misbehaving", "does not reach", "train_image="),
        ("ErrImagePull", "http: server gave HTTP response to HTTPS client", "plain HTTP", "hosts.toml"),
        ("ImagePullBackOff", 'Back-off pulling image "haechi/train:0.1.0"', "no reason that we know", "describe pod"),
    ],
)
def test_an_image_that_cannot_be_pulled_is_told_with_the_reason(
    place: Place, reason: str, message: str, cause: str, fix: str
) -> None:
    waiting = {"waiting": {"reason": reason, "message": message}}
    container = {"name": "main", "image": "haechi/train:0.1.0", "imageID": "", "ready": False, "restartCount": 0}
    place.pod("train", trainer(), {"phase": "Pending", "containerStatuses": [{**container, "state": waiting}]})
    finding = only(place.examine(), "image-pull")
    assert cause in finding.cause
    assert fix in finding.fix


DENIED = "failed to pull: pull access denied, repository does not exist or may require authorization"


@pytest.mark.parametrize(
    ("image", "said", "cause", "fix"),
    [
        ("haechi/steps:0.1.0", DENIED, "not under this name", "kind load docker-image haechi/steps:0.1.0"),
        ("docker.io/haechi/train:0.1.0", DENIED, "not under this name", "kind load docker-image haechi/train:0.1.0"),
        (
            "haechi/serving:0.1.0",
            "haechi/serving:0.1.0: not found",
            "not under this name",
            "newName: REGISTRY/haechi/s",
        ),
        ("registry.example.com/haechi/steps:r7", DENIED, "wants credentials", "docker-registry"),
        ("registry.example.com/haechi/steps:r7", "not found", "no such repository or tag", "make images"),
        ("postgres:17", DENIED, "wants credentials", "docker-registry"),
    ],
)
def test_an_image_that_nobody_pushed_is_told_from_one_that_wants_credentials(
    image: str, said: str, cause: str, fix: str
) -> None:
    labels = {"serving.kserve.io/inferenceservice": "a"} if "serving" in image else {}
    pod = {"metadata": {"namespace": "runs", "name": "a", "labels": labels}, "spec": {}}
    told = why_not_pulled(pod, image, "ErrImagePull", said)
    assert cause in told[0]
    assert fix in told[1]


def test_pods_that_pod_security_refuses_are_found_where_no_pod_is(place: Place) -> None:
    label = {"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "restricted"}}}
    place.patch(f"/api/v1/namespaces/{place.serving}", label)
    said = place.refused(place.serving, {"containers": [{"name": "storage-initializer", "image": "a:1"}]})
    place.replica_set(place.serving, "entrance-predictor", said)
    finding = only(place.examine(), "pod-security")
    assert "restricted" in finding.cause
    assert "allowPrivilegeEscalation" in finding.cause
    assert "clusterstoragecontainer-patch.yaml" in finding.fix


def test_a_job_that_pod_security_refuses_is_found_by_its_event(place: Place) -> None:
    place.patch(
        f"/api/v1/namespaces/{place.runs}", {"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "baseline"}}}
    )
    said = place.refused(place.runs, {"hostNetwork": True, "containers": [{"name": "main", "image": "a:1"}]})
    owner = {"kind": "Job", "name": "warm-up", "namespace": place.runs}
    event = {"metadata": {"name": "warm-up.1"}, "type": "Warning", "reason": "FailedCreate"}
    event |= {"message": f"Error creating: {said}", "involvedObject": owner}
    place.create(f"/api/v1/namespaces/{place.runs}/events", {"apiVersion": "v1", "kind": "Event", **event})
    finding = only(place.examine(), "pod-security")
    assert f"Job {place.runs}/warm-up" in finding.symptom
    assert "'baseline'" in finding.cause


@pytest.mark.parametrize(("level", "exit_code"), [("restricted", 1), ("baseline", 0)])
def test_what_pod_security_refused_counts_as_long_as_that_level_holds(place: Place, level: str, exit_code: int) -> None:
    said = 'pods "x" is forbidden: violates PodSecurity "restricted:latest": allowPrivilegeEscalation != false'
    workflow(place, "training-1", "Failed", {"n1": {"type": "Pod", "phase": "Error", "message": said}})
    label = {"metadata": {"labels": {"pod-security.kubernetes.io/enforce": level}}}
    place.patch(f"/api/v1/namespaces/{place.runs}", label)
    assert place.examine().exit_code == exit_code


def test_a_quota_that_is_used_up_is_found_in_the_workflow(place: Place) -> None:
    hard = {f"requests.{GPU}": "0"}
    path = f"/api/v1/namespaces/{place.runs}/resourcequotas"
    body = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "gpus"}, "spec": {"hard": hard}}
    place.create(path, body, {"hard": hard, "used": {f"requests.{GPU}": "0"}})
    said = place.refused(place.runs, trainer(container=gpus(1)))
    node = {"type": "Pod", "phase": "Pending", "displayName": "executor", "message": said}
    workflow(place, "training-1", "Running", {"n1": node})
    finding = only(place.examine(), "quota")
    assert f"Workflow {place.runs}/training-1" in finding.symptom
    assert "exceeded quota: gpus" in finding.cause
    assert "requests.nvidia.com/gpu=1" in finding.cause
    assert f"kubectl -n {place.runs} describe resourcequota gpus" in finding.fix


@pytest.mark.parametrize(
    ("hard", "used", "still"), [("0", "0", True), ("4", "4", True), ("4", "3", False), (None, "", False)]
)
@pytest.mark.parametrize("phase", ["Running", "Failed"])
def test_what_a_quota_refused_counts_as_long_as_it_would_refuse_it_again(
    place: Place, phase: str, hard: str | None, used: str, still: bool
) -> None:
    said = (
        'pods "x" is forbidden: exceeded quota: gpus, requested: limits.cpu=1,requests.nvidia.com/gpu=1, '
        "used: limits.cpu=0,requests.nvidia.com/gpu=0, limited: limits.cpu=9,requests.nvidia.com/gpu=0"
    )
    node = {"type": "Pod", "phase": "Error", "displayName": "executor", "message": said}
    workflow(place, "training-1", phase, {"n1": node, "n2": node})
    if hard:
        spec = {"hard": {f"requests.{GPU}": hard}}
        body = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "gpus"}, "spec": spec}
        status = {**spec, "used": {f"requests.{GPU}": used}}
        place.create(f"/api/v1/namespaces/{place.runs}/resourcequotas", body, status)
    diagnosis = place.examine()
    if still:
        assert "exceeded quota: gpus" in only(diagnosis, "quota").cause
    else:
        assert diagnosis.exit_code == 0


def test_a_quota_that_wants_limits_where_none_are_given_is_found(place: Place) -> None:
    hard = {"limits.cpu": "4"}
    path = f"/api/v1/namespaces/{place.runs}/resourcequotas"
    body = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "cpus"}, "spec": {"hard": hard}}
    place.create(path, body, {"hard": hard, "used": {"limits.cpu": "0"}})
    said = place.refused(place.runs, trainer())
    workflow(place, "training-1", "Running", {"n1": {"type": "Pod", "message": said}})
    assert "must specify limits.cpu" in only(place.examine(), "quota").cause


# runs -------------------------------------------------------------------------------------------------------------


def workflow(place: Place, name: str, phase: str, nodes: dict[str, Any], status: Any = None) -> None:
    body: dict[str, Any] = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "spec": {}}
    body |= {"metadata": {"name": name}, "status": status or {"phase": phase, "nodes": nodes}}
    place.create(f"/apis/argoproj.io/v1alpha1/namespaces/{place.runs}/workflows", body)


def drivers(condition: str = "true", **decisions: str) -> dict[str, Any]:
    """The nodes that KFP's drivers leave in a Workflow: one a step, with its decision as an output."""

    def outputs(decision: str) -> dict[str, Any]:
        values = {"cached-decision": decision, "condition": condition}
        return {"parameters": [{"name": key, "value": value} for key, value in values.items()]}

    return {
        name: {"type": "Pod", "phase": "Succeeded", "displayName": f"{name}-driver", "outputs": outputs(decision)}
        for name, decision in decisions.items()
    }


def test_a_green_run_whose_deploy_came_from_the_cache_is_found(place: Place) -> None:
    workflow(place, "training-1", "Succeeded", drivers(resolve="false", train="true", evaluate="true", deploy="true"))
    finding = only(place.examine(), "cached-steps")
    assert "deploy never ran" in finding.symptom
    assert "haechi compile" in finding.fix


def test_a_green_run_in_which_nothing_ran_is_found(place: Place) -> None:
    workflow(place, "measure", "Succeeded", drivers(train="true", evaluate="true"))
    assert "none of its 2 steps ran" in only(place.examine(), "cached-steps").symptom


def test_a_run_that_took_its_training_from_the_cache_is_healthy(place: Place) -> None:
    nodes = drivers(resolve="false", build="false", train="true", deploy="false")
    workflow(place, "training-1", "Succeeded", nodes | drivers(condition="false", refuse="true"))
    workflow(place, "training-2", "Failed", drivers(deploy="true"))
    assert place.examine().exit_code == 0


def test_other_peoples_runs_may_come_from_the_cache_as_a_whole(place: Place) -> None:
    workflow(place, "theirs", "Succeeded", drivers(preprocess="true", deploy="true"))
    assert place.examine().exit_code == 0


def test_one_workflow_that_is_none_hides_nothing_that_the_others_show(place: Place) -> None:
    said = 'violates PodSecurity "restricted:latest": allowPrivilegeEscalation != false'
    workflow(place, "odd", "", {}, status="text")
    workflow(place, "stale", "Succeeded", drivers(resolve="false", deploy="true"))
    workflow(place, "refused", "Running", {"n1": {"type": "Pod", "message": said}})
    diagnosis = place.examine()
    assert "deploy never ran" in _findings(diagnosis, "cached-steps")[0].symptom
    assert "allowPrivilegeEscalation" in _findings(diagnosis, "pod-security")[0].cause
    unseen = {result.check: result.unseen for result in diagnosis.results if result.unseen}
    assert set(unseen) == {"quota", "pod-security", "cached-steps"}
    assert all(f"Workflow {place.runs}/odd is not built as its kind is" in problem for problem in unseen.values())


# serving ----------------------------------------------------------------------------------------------------------

SECOND = {"name": "b", "modelFormat": {"name": "yolo-onnx"}, "storageUri": "s3://haechi/models/a/2"}
CANARY = {"canary": [{"predictor": {"name": "b", "model": SECOND}, "trafficPercent": 10}]}


def kserve_config(place: Place, where: str = "kserve", **ingress: Any) -> None:
    place.config(
        where,
        "inferenceservice-config",
        deploy=json.dumps({"defaultDeploymentMode": "Standard"}),
        ingress=json.dumps(ingress),
    )


def test_canary_traffic_percent_in_standard_mode_is_told_as_ignored(place: Place) -> None:
    place.isvc("entrance", {"predictor": {"canaryTrafficPercent": 10}}, {"deploymentMode": "Standard"})
    finding = only(place.examine(), "canary-mode")
    assert "Knative only" in finding.cause
    assert '"op": "remove"' in finding.fix


def test_the_mode_of_kserves_config_counts_where_the_object_names_none(place: Place) -> None:
    kserve_config(place, enableGatewayApi=True)
    place.isvc("entrance", {"predictor": {"canaryTrafficPercent": 10}}, {})
    assert "its mode is Standard" in only(place.examine(), "canary-mode").cause


@pytest.mark.parametrize(
    ("ingress", "cause"),
    [
        ({"enableGatewayApi": False}, "enableGatewayApi"),
        ({"enableGatewayApi": True, "kserveIngressGateway": "kserve/gone"}, "kserve/gone"),
    ],
)
def test_a_canary_without_its_gateway_is_found(place: Place, ingress: dict[str, Any], cause: str) -> None:
    kserve_config(place, **ingress)
    place.isvc("entrance", CANARY, {"deploymentMode": "Standard"})
    assert cause in only(place.examine(), "canary-mode").cause


def test_the_kserve_of_the_kubeflow_platform_is_found_beside_pipelines(place: Place) -> None:
    kserve_config(place, "kubeflow", enableGatewayApi=False)
    place.isvc("entrance", CANARY, {})
    finding = only(place.examine(), "canary-mode")
    assert "enableGatewayApi" in finding.cause
    assert "kubectl -n kubeflow edit configmap inferenceservice-config" in finding.fix
    assert '"kubeflow/kserve-ingress-gateway"' in finding.fix


def test_settings_of_kserve_that_are_no_mappings_are_passed_over(place: Place) -> None:
    place.config("kserve", "inferenceservice-config", deploy='"Standard"', ingress="[1]")
    place.isvc("entrance", CANARY, {"deploymentMode": "Standard"})
    assert place.examine().exit_code == 0


def route(place: Place, *backends: str) -> None:
    """The HTTPRoute that KServe makes of service entrance."""
    rules = [{"backendRefs": [{"name": name, "port": 80, "weight": 1} for name in backends]}]
    meta = {"name": "entrance", "namespace": place.serving}
    entry = {"apiVersion": f"{GATEWAY}/v1", "kind": "HTTPRoute", "metadata": meta, "spec": {"rules": rules}}
    place.server.apply(entry)


@pytest.mark.parametrize(
    ("backends", "ready", "share", "found"),
    [
        (["entrance-predictor"], True, 10, True),
        ([], True, 10, True),
        (["entrance-predictor", "entrance-b-predictor"], True, 10, False),
        (["entrance-predictor"], False, 10, False),
        (["entrance-predictor"], True, 0, False),
    ],
)
def test_a_canary_that_the_route_of_kserve_020_passes_by_is_found(
    place: Place, backends: list[str], ready: bool, share: int, found: bool
) -> None:
    kserve_config(place, enableGatewayApi=True)
    canary = {"canary": [{**CANARY["canary"][0], "trafficPercent": share}]}
    told = [{"name": "b", "ready": ready, "trafficPercent": share}]
    place.isvc("entrance", canary, {"deploymentMode": "Standard", "canaryStatuses": told})
    if backends:
        route(place, *backends)
    if not found:
        assert place.examine().exit_code == 0
        return
    finding = only(place.examine(), "canary-mode")
    assert f"leads to {backends[0] if backends else 'nothing'} alone" in finding.cause
    mend(place, finding.fix.splitlines()[-1])
    assert place.examine().exit_code == 0


def test_a_deploy_that_may_not_see_routes_is_found_where_kserve_makes_them(place: Place) -> None:
    path = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{place.serving}/roles/haechi-deploy"
    rules = place.server.get(path)["rules"]
    place.patch(path, {"rules": [rule for rule in rules if rule["resources"] != ["httproutes"]]})
    assert place.examine().exit_code == 0
    kserve_config(place, enableGatewayApi=True)
    finding = only(place.examine(), "rights")
    assert "deploy cannot see whether traffic follows a canary" in finding.symptom
    mend(place, finding.fix)
    assert place.examine().exit_code == 0


def test_mode_knative_without_knative_and_with_the_other_canary_is_found_twice(place: Place) -> None:
    place.isvc("entrance", CANARY, {"deploymentMode": "Knative"})
    diagnosis = place.examine()
    causes = [finding.cause for finding in _findings(diagnosis, "canary-mode")]
    assert any("spec.canary is of mode Standard" in cause for cause in causes)
    assert "Knative Serving is not installed" in causes


@pytest.mark.parametrize(
    ("status", "fix"),
    [
        ({}, "annotate inferenceservice entrance --overwrite serving.kserve.io/deploymentMode=Standard"),
        # KServe's webhook refuses another mode than the status tells.
        ({"deploymentMode": "Knative"}, "delete inferenceservice entrance"),
    ],
)
def test_the_mode_of_a_service_is_changed_only_where_kserve_lets_it(
    place: Place, status: dict[str, str], fix: str
) -> None:
    place.isvc("entrance", {}, status, {"serving.kserve.io/deploymentMode": "Knative"})
    assert fix in only(place.examine(), "canary-mode").fix


def test_a_missing_runtime_is_found(place: Place) -> None:
    path = f"/apis/serving.kserve.io/v1alpha1/namespaces/{place.serving}/servingruntimes/haechi-yolo"
    assert place.server.request("DELETE", path).status == 200
    place.isvc("entrance", {}, {})
    finding = only(place.examine(), "runtime")
    assert "selects itself for format 'yolo-onnx'" in finding.cause
    mend(place, finding.fix)
    assert place.examine().exit_code == 0


def test_a_namespace_without_a_runtime_is_mended_there(place: Place) -> None:
    path = f"/apis/serving.kserve.io/v1alpha1/namespaces/{place.serving}/servingruntimes/haechi-yolo"
    assert place.server.request("DELETE", path).status == 200
    finding = only(place.examine(), "runtime")
    assert "has no runtime for format yolo-onnx" in finding.symptom
    mend(place, finding.fix)
    assert place.examine().exit_code == 0


ONNX = {"modelFormat": {"name": "onnx"}, "storageUri": "s3://haechi/models/a/1"}


@pytest.fixture
def triton(place: Place) -> Iterator[None]:
    """The runtime that KServe brings, in short."""
    formats = [{"name": "onnx", "version": "1", "autoSelect": True, "priority": 1}]
    spec = {"supportedModelFormats": formats, "containers": [{"name": "kserve-container", "image": "triton:1"}]}
    path, kind = "/apis/serving.kserve.io/v1alpha1/clusterservingruntimes", "ClusterServingRuntime"
    meta = {"name": "kserve-tritonserver"}
    place.create(path, {"apiVersion": "serving.kserve.io/v1alpha1", "kind": kind, "metadata": meta, "spec": spec})
    yield
    place.server.request("DELETE", f"{path}/kserve-tritonserver")


@pytest.mark.parametrize("former", [False, True])
def test_triton_that_takes_onnx_by_itself_is_found_and_the_fix_mends_it(
    place: Place, triton: None, former: bool
) -> None:
    if former:
        body = {"apiVersion": "serving.kserve.io/v1beta1", "kind": "InferenceService", "metadata": {"name": "entrance"}}
        body["spec"] = {"predictor": {"onnx": {"storageUri": "s3://haechi/models/a/1"}}}
        place.create(ISVC.format(place.serving), body)
    else:
        place.isvc("entrance", {"predictor": {"model": ONNX}}, {})
    finding = only(place.examine(), "runtime")
    assert "kserve-tritonserver" in finding.cause
    place.server.kubectl(*shlex.split(finding.fix)[1:])
    assert place.examine().exit_code == 0


@pytest.mark.parametrize(
    ("runtime", "model", "symptom", "cause"),
    [
        (
            {},
            {**ONNX, "runtime": "haechi-yolo"},
            "names runtime haechi-yolo",
            "takes yolo-onnx, and the model's format",
        ),
        ({"protocolVersions": ["v1"]}, {"protocolVersion": "v2"}, "finds no runtime", "speaks protocol v1, and the"),
        (
            {"protocolVersions": ["v1"]},
            {"protocolVersion": "v2", "runtime": "haechi-yolo"},
            "names runtime haechi-yolo",
            "speaks protocol v1, and the model's protocolVersion is v2",
        ),
        ({"multiModel": True}, {}, "finds no runtime", "haechi-yolo is for many models in one pod"),
    ],
)
def test_a_runtime_that_does_not_take_the_model_is_found(
    place: Place, runtime: dict[str, Any], model: dict[str, Any], symptom: str, cause: str
) -> None:
    path = f"/apis/serving.kserve.io/v1alpha1/namespaces/{place.serving}/servingruntimes/haechi-yolo"
    place.patch(path, {"spec": runtime})
    usual = {"modelFormat": {"name": "yolo-onnx"}, "storageUri": "s3://haechi/models/a/1"}
    place.isvc("entrance", {"predictor": {"model": {**usual, **model}}}, {})
    finding = only(place.examine(), "runtime")
    assert symptom in finding.symptom
    assert cause in finding.cause


def test_a_runtime_that_is_named_and_not_there_is_found(place: Place) -> None:
    model = {"modelFormat": {"name": "yolo-onnx"}, "storageUri": "s3://haechi/models/a/1", "runtime": "gone"}
    place.isvc("entrance", {"predictor": {"model": model}}, {})
    assert "runtime gone" in only(place.examine(), "runtime").symptom


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        ("An error occurred (403) when calling HeadObject: Forbidden", "refuses the keys"),
        ("NoSuchKey: s3://haechi/models/a/1", "is not in the store"),
        ("Could not connect to the endpoint URL: http://minio.minio:9000", "nothing answers the pod"),
    ],
)
def test_a_model_that_does_not_load_is_told_with_its_cause(place: Place, said: str, cause: str) -> None:
    failure = {"reason": "ModelLoadFailed", "message": said}
    states = {"activeModelState": "", "targetModelState": "FailedToLoad"}
    model = {"transitionStatus": "BlockedByFailedLoad", "lastFailureInfo": failure, "states": states}
    place.isvc("entrance", {}, {"deploymentMode": "Standard", "modelStatus": model})
    assert cause in only(place.examine(), "model-load").cause


def unreached(place: Place) -> None:
    """Service entrance, whose pod does not reach the store."""
    failure = {"reason": "ModelLoadFailed", "message": "Could not connect to the endpoint URL"}
    place.isvc("entrance", {}, {"modelStatus": {"transitionStatus": "BlockedByFailedLoad", "lastFailureInfo": failure}})


def test_a_store_that_kserve_seeks_elsewhere_than_the_settings_is_mended_to_theirs(place: Place) -> None:
    unreached(place)
    place.kserve_secret("127.0.0.1:9")
    [finding] = _findings(place.examine(), "model-load")
    assert "asks http://127.0.0.1:9, by Secret haechi-s3; HAECHI_S3_ENDPOINT of ConfigMap" in finding.cause
    mend(place, finding.fix)
    [finding] = _findings(place.examine(), "model-load")
    assert f"nothing answers the pod at {place.settings.s3_endpoint}" in finding.cause
    assert finding.fix == f"kubectl -n {place.serving} get networkpolicies"


def test_a_way_to_the_store_that_is_shut_is_sought_where_the_store_is(place: Place) -> None:
    unreached(place)
    service(place.server, place.runs, "minio", 9000)
    for namespace, name in ((place.runs, "haechi-settings"), (place.serving, "haechi-serving-settings")):
        path = f"/api/v1/namespaces/{namespace}/configmaps/{name}"
        place.patch(path, {"data": {"HAECHI_S3_ENDPOINT": f"http://minio.{place.runs}:9000"}})
    place.kserve_secret(f"minio.{place.runs}:9000")
    [finding] = _findings(place.examine(), "model-load")
    assert f"kubectl -n {place.runs} get pods,networkpolicies" in finding.fix
    # Who may not see the Secret is told by the settings.
    kinds = {"": ["configmaps", "serviceaccounts"], "serving.kserve.io": ["inferenceservices"]}
    rules = [{"apiGroups": [group], "resources": some, "verbs": ["get", "list"]} for group, some in kinds.items()]
    [finding] = _findings(place.examine(_viewer(place, rules=rules)), "model-load")
    assert f"nothing answers the pod at http://minio.{place.runs}:9000" in finding.cause
    # And who may not see those either learns of the model all the same.
    [finding] = _findings(place.examine(_viewer(place, rules=rules[1:])), "model-load")
    assert "does not load its model" in finding.symptom


def test_autoscalers_that_kserve_leaves_behind_are_found_and_those_at_work_are_not(place: Place) -> None:
    names = ("entrance-v-0123456789ab-predictor", "entrance-predictor")
    for name in names:
        target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": name}
        meta = {"name": name, "namespace": place.serving}
        entry = {"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "metadata": meta}
        place.server.apply({**entry, "spec": {"scaleTargetRef": target, "minReplicas": 1, "maxReplicas": 2}})
    labels = {"app": "isvc.entrance-predictor"}
    template = {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "kserve-container", "image": "a:1"}]}}
    meta = {"name": names[1], "namespace": place.serving}
    entry = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": meta}
    place.server.apply({**entry, "spec": {"selector": {"matchLabels": labels}, "template": template}})
    finding = only(place.examine(), "left-overs")
    assert finding.symptom.endswith(": 1")
    mend(place, finding.fix)
    assert place.examine().exit_code == 0


# settings, keys, rights -------------------------------------------------------------------------------------------


def test_a_service_account_without_rights_is_found(place: Place) -> None:
    path = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{place.serving}/rolebindings/haechi-deploy"
    assert place.server.request("DELETE", path).status == 200
    finding = only(place.examine(), "rights")
    assert f"system:serviceaccount:{place.runs}:pipeline-runner may not" in finding.symptom
    assert "delete inferenceservices.serving.kserve.io" in finding.symptom
    assert f"--serviceaccount={place.runs}:pipeline-runner" in finding.fix


def test_a_reconciler_without_rights_is_found(place: Place) -> None:
    manifest = ROOT / "manifests" / "components" / "reconciler" / "serviceaccount.yaml"
    name = yaml.safe_load(manifest.read_text())["metadata"]["name"]
    user = place.server.make_service_account(place.runs, name)
    finding = only(place.examine(), "rights")
    assert f"system:serviceaccount:{place.runs}:{name} may not" in finding.symptom
    assert "the reconciler will fail" in finding.symptom
    place.server.kubectl(*shlex.split(finding.fix.splitlines()[-1])[1:])
    assert place.examine().exit_code == 0
    assert not _findings(place.examine(user), "rights")


def test_the_steps_own_account_may_ask_about_itself(place: Place) -> None:
    path = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{place.serving}/rolebindings/haechi-deploy"
    assert place.server.request("DELETE", path).status == 200
    diagnosis = place.examine(f"{place.runs}/pipeline-runner")
    assert len(_findings(diagnosis, "rights")) == 1


def test_a_namespace_that_does_not_exist_is_found(place: Place) -> None:
    name = f"nowhere-{uuid.uuid4().hex[:8]}"
    [finding] = _findings(place.examine(serving=name), "namespaces")
    assert f"namespace {name} does not exist" in finding.symptom
    mend(place, finding.fix)
    diagnosis = place.examine(serving=name)
    assert not _findings(diagnosis, "namespaces") + _findings(diagnosis, "runtime")


def test_the_steps_settings_are_mended_in_the_namespace_that_lacks_them(place: Place) -> None:
    path = f"/api/v1/namespaces/{place.runs}/configmaps/haechi-settings"
    assert place.server.request("DELETE", path).status == 200
    mend(place, _findings(place.examine(), "step-settings")[0].fix)
    assert not _findings(place.examine(), "step-settings")


@pytest.mark.parametrize(
    ("plant", "symptom", "fix"),
    [
        (
            lambda p: p.config(p.runs, "haechi-settings", HAECHI_S3_ENDPOINT="minio:9000"),
            "has no HAECHI_BUCKET",
            "patch",
        ),
        (
            lambda p: p.server.request("DELETE", f"/api/v1/namespaces/{p.runs}/configmaps/haechi-settings"),
            "ConfigMap .* does not exist",
            "manifests/base/pipeline",
        ),
        (
            lambda p: p.server.request("DELETE", f"/api/v1/namespaces/{p.runs}/secrets/haechi-s3"),
            "Secret .* does not exist",
            "create secret generic haechi-s3",
        ),
    ],
)
def test_settings_that_are_not_whole_are_found(place: Place, plant: Any, symptom: str, fix: str) -> None:
    import re

    plant(place)
    found = _findings(place.examine(), "step-settings")
    assert any(re.search(symptom, item.symptom) and fix in item.fix for item in found), found


def test_an_endpoint_without_a_scheme_in_the_config_map_is_found(place: Place) -> None:
    place.patch(
        f"/api/v1/namespaces/{place.runs}/configmaps/haechi-settings", {"data": {"HAECHI_S3_ENDPOINT": "minio:9000"}}
    )
    [finding] = _findings(place.examine(), "step-settings")
    assert "'minio:9000', not a URL" in finding.symptom


@pytest.mark.parametrize(
    ("keys", "check", "cause"),
    [
        ({"secret_key": "of somebody else"}, "step-keys", "the secret key is another"),
        ({"access_key": "UNKNOWNACCESSKEY"}, "step-keys", "no such access key"),
        ({"secret_key": "\n"}, "step-settings", "line break"),
    ],
)
def test_wrong_keys_in_the_steps_secret_are_found_and_never_shown(
    place: Place, keys: dict[str, str], check: str, cause: str, capsys: pytest.CaptureFixture[str]
) -> None:
    right = {"access_key": place.settings.s3_access_key, "secret_key": place.settings.s3_secret_key}
    if keys.get("secret_key") == "\n":
        keys = {"secret_key": right["secret_key"] + "\n"}
    place.secret(place.runs, "haechi-s3", **(right | keys))
    [finding] = _findings(place.examine(), check)
    assert cause in finding.cause
    for extra in ([], ["--json"]):
        words = ["doctor", "--kubeconfig", str(place.server.kubeconfig()), "--namespace", place.runs]
        assert main([*words, "--serving", place.serving, *extra]) == 1
    shown = capsys.readouterr()
    for secret in (place.settings.s3_secret_key, "of somebody else", "UNKNOWNACCESSKEY", place.server.token("admin")):
        assert secret not in shown.out + shown.err


def test_the_steps_bucket_that_does_not_exist_is_found(place: Place) -> None:
    path = f"/api/v1/namespaces/{place.runs}/configmaps/haechi-settings"
    place.patch(path, {"data": {"HAECHI_BUCKET": "nobody-made-this"}})
    finding = only(place.examine(), "step-keys")
    assert "'nobody-made-this' does not exist" in finding.symptom


def test_wrong_keys_that_two_accounts_list_are_told_once(place: Place) -> None:
    place.server.make_service_account(place.serving, "models")
    path = f"/api/v1/namespaces/{place.serving}/serviceaccounts/models"
    place.patch(path, {"secrets": [{"name": "haechi-s3"}]})
    place.isvc("entrance", {}, {"deploymentMode": "Standard"})
    place.isvc("exit", {"predictor": {"serviceAccountName": "models"}}, {"deploymentMode": "Standard"})
    place.kserve_secret(place.settings.s3_endpoint.removeprefix("http://"), secret_key="of somebody else")
    assert "AWS_SECRET_ACCESS_KEY" in only(place.examine(), "kserve-keys").fix


def test_wrong_keys_of_kserves_storage_initializer_are_found(place: Place) -> None:
    place.kserve_secret(place.settings.s3_endpoint.removeprefix("http://"), secret_key="of somebody else")
    assert "AWS_SECRET_ACCESS_KEY" in only(place.examine(), "kserve-keys").fix


def test_an_endpoint_with_a_scheme_for_kserve_is_found(place: Place) -> None:
    place.kserve_secret("http://minio.minio:9000")
    assert "s3-endpoint=minio.minio:9000" in only(place.examine(), "kserve-keys").fix


@pytest.mark.parametrize("endpoint", ["minio.minio:9000/haechi", "minio.minio:90000", "[::1"])
def test_an_endpoint_for_kserve_that_is_none_is_told_of_its_secret(place: Place, endpoint: str) -> None:
    place.kserve_secret(endpoint)
    finding = only(place.examine(), "kserve-keys")
    assert finding.symptom == f"Secret {place.serving}/haechi-s3 names the store as http://{endpoint}"
    assert "annotate secret haechi-s3" in finding.fix


@pytest.mark.parametrize(
    ("keys", "symptom"),
    [
        ({"access_key": "a", "secret_key": "b"}, "has no AWS_ACCESS_KEY_ID and no AWS_SECRET_ACCESS_KEY"),
        ({"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b "}, "AWS_SECRET_ACCESS_KEY has blanks around it"),
        (
            {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""},
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY is empty",
        ),
        (None, "does not exist"),
    ],
)
def test_kserves_secret_that_is_not_whole_is_found(place: Place, keys: dict[str, str] | None, symptom: str) -> None:
    path = f"/api/v1/namespaces/{place.serving}/secrets/haechi-s3"
    assert place.server.request("DELETE", path).status == 200
    if keys:
        place.secret(place.serving, "haechi-s3", **keys)
    finding = only(place.examine(), "kserve-keys")
    assert symptom in finding.symptom
    right = {"AWS_ACCESS_KEY_ID": place.settings.s3_access_key, "AWS_SECRET_ACCESS_KEY": place.settings.s3_secret_key}
    mend(place, finding.fix, **right)
    assert place.examine().exit_code == 0


def test_an_empty_key_of_the_steps_is_told_as_empty(place: Place) -> None:
    place.secret(place.runs, "haechi-s3", access_key="", secret_key=place.settings.s3_secret_key)
    finding = only(place.examine(), "step-settings")
    assert finding.symptom == f"Secret {place.runs}/haechi-s3: access_key is empty"
    mend(place, finding.fix, access_key=place.settings.s3_access_key, secret_key=place.settings.s3_secret_key)
    assert place.examine().exit_code == 0


def test_a_service_account_that_does_not_list_the_keys_is_found(place: Place) -> None:
    place.patch(f"/api/v1/namespaces/{place.serving}/serviceaccounts/default", {"secrets": []})
    assert "patch serviceaccount default" in only(place.examine(), "kserve-keys").fix


def test_a_predictors_own_service_account_may_list_the_keys(place: Place) -> None:
    accounts = f"/api/v1/namespaces/{place.serving}/serviceaccounts"
    place.server.make_service_account(place.serving, "models")
    place.patch(f"{accounts}/models", {"secrets": [{"name": "haechi-s3"}]})
    place.patch(f"{accounts}/default", {"secrets": []})
    place.isvc("entrance", {"predictor": {"serviceAccountName": "models"}}, {"deploymentMode": "Standard"})
    assert place.examine().exit_code == 0
    place.patch(f"{accounts}/models", {"secrets": []})
    assert f"{place.serving}/models does not list" in only(place.examine(), "kserve-keys").symptom


def test_a_protocol_other_than_the_steps_is_found_from_where_the_store_has_no_address(place: Place) -> None:
    service(place.server, place.runs, "minio", 9000)
    host = f"minio.{place.runs}.svc:9000"
    for namespace, name in ((place.runs, "haechi-settings"), (place.serving, "haechi-serving-settings")):
        path = f"/api/v1/namespaces/{namespace}/configmaps/{name}"
        place.patch(path, {"data": {"HAECHI_S3_ENDPOINT": f"http://{host}"}})
    place.kserve_secret(host)
    assert place.examine(env=place.settings.to_env() | {"MLFLOW_TRACKING_URI": ""}).exit_code == 0
    note = {"metadata": {"annotations": {"serving.kserve.io/s3-usehttps": "1"}}}
    place.patch(f"/api/v1/namespaces/{place.serving}/secrets/haechi-s3", note)
    finding = only(place.examine(env=place.settings.to_env()), "kserve-keys")
    assert f"asks {host} by https" in finding.cause
    assert "s3-usehttps=0" in finding.fix


def test_a_store_of_kserves_that_is_not_the_settings_is_not_judged_by_the_way_to_theirs(place: Place) -> None:
    env = place.settings.to_env() | {"MLFLOW_TRACKING_URI": ""}
    service(place.server, place.runs, "minio", 9000)
    for namespace, name in ((place.runs, "haechi-settings"), (place.serving, "haechi-serving-settings")):
        path = f"/api/v1/namespaces/{namespace}/configmaps/{name}"
        place.patch(path, {"data": {"HAECHI_S3_ENDPOINT": f"http://minio.{place.runs}:9000"}})
    place.kserve_secret(f"minio.{place.runs}.svc.cluster.local:9000")
    assert place.examine(env=env).exit_code == 0
    place.kserve_secret(f"gateway.{place.runs}:9000")
    finding = only(place.examine(env=env), "kserve-keys")
    assert f"Service {place.runs}/gateway does not exist" in finding.symptom
    assert f"ConfigMap {place.serving}/haechi-serving-settings is http://minio.{place.runs}:9000" in finding.cause
    # A gateway before the same store, or another store: that shows in the cluster only.
    service(place.server, place.runs, "gateway", 9000)
    diagnosis = place.examine(env=env)
    assert "whether they are one store was not tried" in _result(diagnosis, "kserve-keys").unseen
    assert diagnosis.exit_code == 2
    mend(place, finding.fix.splitlines()[0])
    assert place.examine(env=env).exit_code == 0


def test_the_way_to_mlflow_that_the_environment_names_is_taken_with_the_steps_credentials(
    place: Place, mlflow_uri: str
) -> None:
    service(place.server, place.runs, "mlflow", 5000)
    path = f"/api/v1/namespaces/{place.runs}/configmaps/haechi-settings"
    place.patch(path, {"data": {"MLFLOW_TRACKING_URI": f"http://mlflow.{place.runs}:5000"}})
    assert "port-forward service/mlflow" in _result(place.examine(), "step-mlflow").remedy
    assert place.examine(env={"MLFLOW_TRACKING_URI": mlflow_uri}).exit_code == 0
    with HttpStandIn({SEARCH: (401, "no"), "/health": (200, "OK")}) as url:
        [finding] = _findings(place.examine(env={"MLFLOW_TRACKING_URI": url}), "step-mlflow")
    assert "refuses nobody" in finding.symptom


def test_services_of_haechi_up_are_no_way_to_the_clusters_store(
    place: Place, monkeypatch: pytest.MonkeyPatch, store: Store
) -> None:
    others = type("Services", (), {"settings": lambda _: dataclasses.replace(store.settings, s3_secret_key="another")})
    monkeypatch.setattr("haechi.pipelines.services.running", lambda _: others())
    path = f"/api/v1/namespaces/{place.runs}/configmaps/haechi-settings"
    place.patch(path, {"data": {"HAECHI_S3_ENDPOINT": f"http://minio.{place.runs}.svc:9000"}})
    assert "has no address here" in _result(place.examine(), "step-keys").unseen


def test_an_address_of_ipv6_is_no_service_and_credentials_in_a_uri_are_used_and_never_told(place: Place) -> None:
    def mlflow(headers: Any) -> tuple[int, Any]:
        right = base64.b64encode(b"haechi:p@ss of the test").decode()
        return (200, {}) if headers.get("Authorization") == f"Basic {right}" else (401, "no")

    path = f"/api/v1/namespaces/{place.runs}/configmaps/haechi-settings"
    with HttpStandIn({SEARCH: (200, mlflow)}) as url:
        there = url.replace("://", "://haechi:p%40ss%20of%20the%20test@")
        place.patch(path, {"data": {"MLFLOW_TRACKING_URI": there}})
        assert place.examine().exit_code == 0
    place.patch(path, {"data": {"MLFLOW_TRACKING_URI": "http://haechi:of-the-test@[::1]:9"}})
    world = World(place.aim(), env={})
    diagnosis = examine(world, checks=CLUSTER_CHECKS)
    assert "nothing listens at ::1:9" in only(diagnosis, "step-mlflow").cause
    assert "of-the-test" not in "\n".join(as_lines(diagnosis, world.redact))


def test_an_mlflow_that_is_away_is_found_for_the_steps(place: Place) -> None:
    path = f"/api/v1/namespaces/{place.runs}/configmaps/haechi-settings"
    place.patch(path, {"data": {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}})
    assert "nothing listens at 127.0.0.1:9" in only(place.examine(), "step-mlflow").cause


SEARCH = "/api/2.0/mlflow/registered-models/search"


@pytest.mark.parametrize(
    ("answers", "symptom"),
    [
        ({SEARCH: (401, "no")}, "refuses Secret"),
        ({SEARCH: (403, "Invalid Host header - possible DNS rebinding attack detected")}, "Invalid Host header"),
        ({}, "not like MLflow"),
    ],
)
def test_an_mlflow_that_does_not_serve_the_steps_is_told_with_its_cause(
    place: Place, answers: Answers, symptom: str
) -> None:
    place.secret(place.runs, "haechi-mlflow", username="haechi", password="of-the-test")
    with HttpStandIn(answers) as url:
        path = f"/api/v1/namespaces/{place.runs}/configmaps/haechi-settings"
        place.patch(path, {"data": {"MLFLOW_TRACKING_URI": url}})
        assert symptom in only(place.examine(), "step-mlflow").symptom


def test_half_of_mlflows_credentials_are_found(place: Place) -> None:
    place.secret(place.runs, "haechi-mlflow", username="haechi")
    assert "only one of" in only(place.examine(), "step-mlflow").symptom


@pytest.mark.parametrize(
    ("port", "ready", "symptom"),
    [(0, True, "does not exist"), (9001, True, "has no port 9000"), (9000, False, "no ready pod behind it")],
)
def test_a_service_that_settings_name_and_that_cannot_answer_is_found(
    place: Place, port: int, ready: bool, symptom: str
) -> None:
    if port:
        service(place.server, place.runs, "minio", port, ready)
    path = f"/api/v1/namespaces/{place.runs}/configmaps/haechi-settings"
    place.patch(path, {"data": {"HAECHI_S3_ENDPOINT": f"http://minio.{place.runs}.svc:9000"}})
    diagnosis = place.examine()
    finding = only(diagnosis, "service-endpoints")
    assert symptom in finding.symptom
    assert ready or f"kubectl -n {place.runs} describe pods -l app=minio" in finding.fix
    # The name has no address here, so the keys are told as not tried.
    assert {result.check: result.unseen for result in diagnosis.results}["step-keys"].startswith("minio.")


# what cannot be seen ----------------------------------------------------------------------------------------------


def test_what_we_may_not_see_is_told_as_such_and_is_not_health(place: Place) -> None:
    nobody = place.server.make_service_account(place.runs, "nobody")
    diagnosis = place.examine(nobody)
    unseen = {result.check: result.unseen for result in diagnosis.results if result.unseen}
    assert diagnosis.exit_code == 2
    assert {"pending", "train-shm", "image-pull", "rights", "step-settings", "runtime", "namespaces"} <= set(unseen)
    assert 'cannot list resource "pods"' in unseen["train-shm"]
    assert all(result.remedy for result in diagnosis.results if result.check == "train-shm")


def test_one_namespace_that_we_may_not_see_hides_no_finding_of_the_other(place: Place) -> None:
    viewer = _viewer(place, place.runs)
    place.pod("train", trainer(), unschedulable("0/3 nodes are available: 3 Insufficient nvidia.com/gpu."))
    [result] = [item for item in place.examine(viewer).results if item.check == "pending"]
    assert len(result.findings) == 1
    assert place.serving in result.unseen


def test_a_cluster_that_is_away_is_told_once_and_quickly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = {
        "clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:9"}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "users": [{"name": "u", "user": {"token": "secret-of-the-test"}}],
    }
    path = tmp_path / "config"
    path.write_text(json.dumps({"apiVersion": "v1", "kind": "Config", "current-context": "x", **entries}))
    assert main(["doctor", "--kubeconfig", str(path), "--workdir", str(tmp_path)]) == 2
    out = capsys.readouterr().out
    assert out.count("http://127.0.0.1:9 cannot be reached") == 1
    assert "secret-of-the-test" not in out


# a cluster that lacks parts ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bare(cluster: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """A second API server, without any kind but Kubernetes' own."""
    with ApiServer(tmp_path_factory.mktemp("bare")) as server:
        server.make_namespace("runs")
        server.make_namespace("serving")
        yield server


def test_a_cluster_without_kserve_is_found_and_one_without_gateway_api_cannot_split(bare: ApiServer) -> None:
    aim = Aim(namespace="runs", serving="serving", kubeconfig=str(bare.kubeconfig()))
    [finding] = _findings(examine(World(aim, env={}), checks=CLUSTER_CHECKS), "kserve")
    assert "KServe is not installed" in finding.cause
    crds.load(bare, [item for item in crds.definitions(CRDS) if item["spec"]["group"] == "serving.kserve.io"])
    model = {"modelFormat": {"name": "yolo-onnx"}, "storageUri": "s3://haechi/models/a/1"}
    spec = {"predictor": {"model": model}, **CANARY}
    body = {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": "a"},
        "spec": spec,
    }
    body["metadata"]["annotations"] = {"serving.kserve.io/deploymentMode": "Standard"}
    assert bare.request("POST", ISVC.format("serving"), body).status == 201
    diagnosis = examine(World(aim, env={}), checks=CLUSTER_CHECKS)
    assert not _findings(diagnosis, "kserve")
    [finding] = _findings(diagnosis, "canary-mode")
    assert "no Gateway API" in finding.cause


def _result(diagnosis: Diagnosis, check: str) -> Result:
    return next(result for result in diagnosis.results if result.check == check)


def _findings(diagnosis: Diagnosis, check: str) -> list[Any]:
    return [finding for result in diagnosis.results if result.check == check for finding in result.findings]


PODS = [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list"]}]


def _viewer(place: Place, *namespaces: str, rules: list[dict[str, Any]] = PODS) -> str:
    """A user who may see pods, or what the rules say, and nothing else, in some or both namespaces."""
    user = place.server.make_service_account(place.runs, "viewer")
    for namespace in namespaces or (place.runs, place.serving):
        role = {"apiVersion": "rbac.authorization.k8s.io/v1", "metadata": {"name": "viewer", "namespace": namespace}}
        place.server.apply({**role, "kind": "Role", "rules": rules})
        subject = {"kind": "ServiceAccount", "name": "viewer", "namespace": place.runs}
        reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "viewer"}
        place.server.apply({**role, "kind": "RoleBinding", "roleRef": reference, "subjects": [subject]})
    return user
