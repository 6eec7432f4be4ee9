"""End-to-end tests against a real Kubernetes API server: how to write one.

Ask for the fixtures; without kube-apiserver, etcd, kubectl or the schemas in shared/crds the test skips and says which.
`make e2e` builds kube-apiserver first (.ci/kube-apiserver), and then nothing may skip but for absent schemas.

    cluster        the API server with KServe's, Gateway API's, Istio's, KEDA's, KFP's and Trainer's kinds; once a session
    namespace      a fresh namespace with the Role `haechi-deploy` of manifests/base, bound to kubeflow/pipeline-runner
    runner         the name of that service account as a user; our own Kubernetes client speaks as it from here on
    kserve         the stand-in for KServe's controller in that namespace (kserve_stand_in.py lists its modes)
    place, models  a service with real runtimes behind it (canary_world.py)
    webhook        the stand-in for KServe's admission webhooks (kserve_webhook.py)
    speak_as       speak_as("kubeflow/nobody"): from here on our own client is another user

    def test_x(cluster, namespace, runner, kserve):
        kserve.fates["s3://models/bad"] = Fate(load_error="no such key")      # or NEVER, Fate(fails_after=1), …
        roll_out(InferenceServiceApi(namespace, "entrance"), manifest(…), Patience(…))
        assert cluster.request("DELETE", f"/api/v1/namespaces/{namespace}", user=runner).status == 403

Namespaces are never deleted (no controller would finish it): take a fresh one each. A new user is
`cluster.make_service_account(namespace, name)`; kubectl as a user is `cluster.kubectl("get", "pods", user=…)`.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import crds
import pytest
import yaml
from api_server import ApiServer, why_absent
from canary_world import models, place  # noqa: F401 - fixtures
from kserve_stand_in import KserveStandIn
from kserve_webhook import KserveWebhook

ROOT = Path(__file__).resolve().parents[2]
CRDS = ROOT.parent / "shared" / "crds"
REQUIRED = "HAECHI_E2E_REQUIRED"  # set by `make e2e`: what is absent fails instead of skipping


@pytest.fixture(scope="session")
def can_start() -> None:
    """Skips where no API server can be started, and says why."""
    absent = why_absent() or ("" if shutil.which("kubectl") else "kubectl is not installed")
    if absent:
        assert not os.environ.get(REQUIRED), absent
        pytest.skip(absent)


@pytest.fixture(scope="session")
def api_server(can_start: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """An API server that knows no kinds but Kubernetes' own."""
    with ApiServer(tmp_path_factory.mktemp("cluster")) as server:
        yield server


@pytest.fixture(scope="session")
def cluster(api_server: ApiServer) -> ApiServer:
    """The API server with all kinds that our manifests name, and the namespace kubeflow with its pipeline-runner."""
    if not CRDS.is_dir():
        pytest.skip(f"the schemas of KServe and others are not present at {CRDS}")
    crds.load(api_server, crds.definitions(CRDS) + crds.without_schema())
    api_server.make_namespace("kubeflow")
    api_server.make_service_account("kubeflow", "pipeline-runner")
    return api_server


@pytest.fixture
def namespace(cluster: ApiServer) -> str:
    """A fresh namespace where kubeflow/pipeline-runner may deploy."""
    name = cluster.make_namespace(f"test-{uuid.uuid4().hex[:8]}")
    entries = [yaml.safe_load(path.read_text()) for path in (ROOT / "manifests" / "base").rglob("role*.yaml")]
    granted = [entry for entry in entries if entry["metadata"]["name"] == "haechi-deploy"]
    assert sorted(entry["kind"] for entry in granted) == ["Role", "RoleBinding"]
    for entry in granted:
        entry["metadata"]["namespace"] = name
        cluster.apply(entry)
    return name


@pytest.fixture
def speak_as(cluster: ApiServer, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes our own Kubernetes client speak as a user of this cluster."""
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)

    def speak(user: str) -> None:
        # The client reads KUBECONFIG once, when it is imported; a process of its own would set the variable.
        path = str(cluster.kubeconfig(user))
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", path)

    return speak


@pytest.fixture
def runner(speak_as: Callable[[str], None]) -> str:
    """The user that pipeline steps are in a cluster; our own client speaks as it."""
    speak_as("kubeflow/pipeline-runner")
    return "kubeflow/pipeline-runner"


@pytest.fixture
def kserve(cluster: ApiServer, namespace: str) -> Iterator[KserveStandIn]:
    """KServe's controller at work in the namespace."""
    with KserveStandIn(cluster, namespace) as controller:
        yield controller


@pytest.fixture
def webhook(cluster: ApiServer, tmp_path: Path) -> Iterator[KserveWebhook]:
    """KServe's admission webhooks, for every namespace of the cluster."""
    with KserveWebhook(cluster, tmp_path) as hook:
        yield hook
