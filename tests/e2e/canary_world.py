"""The service `entrance` of a namespace, real runtimes behind its Services, and deploy on its way there: for rollouts' tests.

def test_x(place: Place, models: Models) -> None:
    place.deploy(models.old)                        # the first model
    place.kserve.fates[models.uri(models.new)] = NEVER
    place.deploy(models.new)                        # raises; place.only(models.old)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from api_server import ApiServer
from kserve_stand_in import KserveStandIn
from kserve_webhook import KserveWebhook
from pod_network import PodNetwork
from tiny_models import tiny_model_folder

from haechi.components.deploy.credential import Credential
from haechi.components.deploy.inference_service import Patience
from haechi.components.deploy.job import Job
from haechi.components.deploy.kubernetes_api import InferenceServiceApi
from haechi.components.deploy.lease import Lease
from haechi.components.deploy.rollout import Rollout
from haechi.components.deploy.rollout_state import RolloutState
from haechi.components.deploy.swap import swap
from haechi.components.shared.model_folder import ModelFolder
from tests.serving_process import running

__all__ = ["HASTY", "QUICK", "STEADY", "STEPS", "Models", "Place", "may_see_routes", "models", "place", "until"]

ROOT = Path(__file__).resolve().parents[2]
QUICK = Patience(timeout=30, poll=0.05, blocked=0.3)
HASTY = replace(QUICK, timeout=3)  # for what is waited for in vain
STEADY = replace(QUICK, blocked=10)  # where the route must be seen to follow
STEPS = Rollout(steps=(10, 50, 100), bake=0.3, poll=0.05, min_requests=20)


@dataclass
class Models:
    """Two models that run, and one that may be asked for and runs nowhere."""

    old: ModelFolder
    new: ModelFolder
    newest: ModelFolder
    folders: dict[str, Path]
    urls: dict[str, str] = field(default_factory=dict)

    def uri(self, model: ModelFolder) -> str:
        return f"s3://models/entrance/{model.version}"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    root = tmp_path_factory.mktemp("models")
    made = [tiny_model_folder(root / str(shift), ["person"], name="entrance", shift=shift) for shift in (0, 1, 2)]
    models = Models(*made, {model.version: root / str(shift) for shift, model in enumerate(made)})
    arguments = ("--name", "entrance")
    with running(root / "0", *arguments) as old, running(root / "1", *arguments) as new:
        models.urls = {models.uri(made[0]): old.url, models.uri(made[1]): new.url}
        yield models


@dataclass
class Place:
    """The service `entrance` of a namespace, and who deploys to it."""

    cluster: ApiServer
    namespace: str
    kserve: KserveStandIn
    network: PodNetwork
    models: Models
    asked: list[str] = field(default_factory=list)

    @property
    def api(self) -> InferenceServiceApi:
        return InferenceServiceApi(self.namespace, "entrance")

    def deploy(
        self,
        model: ModelFolder,
        rollout: Rollout = STEPS,
        patience: Patience = QUICK,
        owner: str = "run-1",
        folder: Path | None = None,
        credential: Credential | None = None,
    ) -> str:
        with Lease(self.api, owner, patience.lease) as lease:
            return self.swap(model, lease, rollout, patience, folder, credential)

    def swap(
        self,
        model: ModelFolder,
        lease: Lease,
        rollout: Rollout = STEPS,
        patience: Patience = QUICK,
        folder: Path | None = None,
        credential: Credential | None = None,
    ) -> str:
        rollout = replace(rollout, address=self.network.address)
        folder = folder or self.models.folders[model.version]
        uri, known = self.models.uri(model), credential or Credential()
        return swap(Job(self.api, lease, model, folder, uri, rollout, patience, known))

    def service(self, name: str = "entrance") -> dict[str, Any]:
        return self.cluster.get(self._path(name))

    def there(self, name: str) -> bool:
        return self.cluster.request("GET", self._path(name)).status == 200

    def names(self) -> str:
        return str(self.service()["spec"]["predictor"]["model"]["storageUri"])

    def serving(self) -> str:
        """What the stable predictor's ready pods serve."""
        own = self.service()["spec"]["predictor"].get("name", "")
        return self.kserve.serving("-".join(part for part in ("entrance", own, "predictor") if part))

    def state(self) -> RolloutState:
        return RolloutState.of(self.service())

    def shares(self) -> dict[str, int]:
        """The route's weights."""
        path = f"/apis/gateway.networking.k8s.io/v1/namespaces/{self.namespace}/httproutes/entrance"
        found = self.cluster.request("GET", path)
        rules = found.body["spec"]["rules"] if found.status == 200 else [{"backendRefs": []}]
        return {item["name"]: item["weight"] for item in rules[0]["backendRefs"]}

    def only(self, model: ModelFolder) -> bool:
        """Whether a model is named, serves and has all traffic."""
        uri = self.models.uri(model)
        return (self.names(), self.serving()) == (uri, uri) and list(self.shares().values()) == [100]

    def apply_as(self, manager: str, spec: dict[str, Any]) -> None:
        meta = {"name": "entrance", "namespace": self.namespace}
        body = {"apiVersion": "serving.kserve.io/v1beta1", "kind": "InferenceService", "metadata": meta, "spec": spec}
        self.cluster.apply(body, manager=manager)

    def _path(self, name: str) -> str:
        return f"/apis/serving.kserve.io/v1beta1/namespaces/{self.namespace}/inferenceservices/{name}"


@pytest.fixture
def place(
    cluster: ApiServer, namespace: str, runner: str, webhook: KserveWebhook, kserve: KserveStandIn, models: Models
) -> Iterator[Place]:
    """A namespace where the option gateway-canary is applied; nothing serves yet."""
    may_see_routes(cluster, namespace)
    kserve.gateway = kserve.pods = True
    with PodNetwork(kserve, dict(models.urls)) as network:
        yield Place(cluster, namespace, kserve, network, models)


def may_see_routes(cluster: ApiServer, namespace: str) -> None:
    """Grant the rule that the option gateway-canary adds."""
    option = yaml.safe_load((ROOT / "manifests/components/gateway-canary/kustomization.yaml").read_text())
    (added,) = [yaml.safe_load(patch["patch"])[0]["value"] for patch in option["patches"]]
    kind, meta = "rbac.authorization.k8s.io/v1", {"name": "routes", "namespace": namespace}
    cluster.apply({"apiVersion": kind, "kind": "Role", "metadata": meta, "rules": [added]})
    subjects = [{"kind": "ServiceAccount", "name": "pipeline-runner", "namespace": "kubeflow"}]
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "routes"}
    cluster.apply({"apiVersion": kind, "kind": "RoleBinding", "metadata": meta, "roleRef": role, "subjects": subjects})


def until(is_so: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)
