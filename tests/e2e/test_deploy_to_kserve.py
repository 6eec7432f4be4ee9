"""deploy to `kserve:` on a real API server, as the pipeline's service account: whatever fails, the old model serves on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from api_server import ApiServer
from kserve_stand_in import NEVER, Fate, KserveStandIn
from kserve_webhook import KserveWebhook
from tiny_models import tiny_model_folder

from haechi.components.deploy.inference_service import Patience, manifest, roll_out
from haechi.components.deploy.kubernetes_api import MANAGER, InferenceServiceApi
from haechi.components.deploy.step import deploy
from haechi.components.shared.errors import DeployError
from haechi.components.shared.files import write_json
from haechi.components.shared.model_folder import ModelFolder
from haechi.components.shared.settings import Settings
from haechi.components.shared.storage import Store
from haechi.components.shared.tracking import Tracker

pytestmark = pytest.mark.e2e

QUICK = Patience(timeout=60, poll=0.05, blocked=0.3)
HASTY = replace(QUICK, timeout=3)  # for what is waited for in vain
SERVING = "entrance-predictor"
OLD, NEW = "s3://models/entrance/old", "s3://models/entrance/new"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """Some exported model; what differs from version to version here is its place."""
    return tiny_model_folder(tmp_path_factory.mktemp("model"), ["person"], name="entrance")


class Deployer:
    """deploy's target `kserve:<namespace>/entrance`."""

    def __init__(self, cluster: ApiServer, namespace: str, model: ModelFolder) -> None:
        self.cluster, self.namespace, self.model = cluster, namespace, model

    def roll_out(self, uri: str, patience: Patience = QUICK) -> None:
        wanted = manifest(self.namespace, "entrance", self.model, uri)
        roll_out(InferenceServiceApi(self.namespace, "entrance"), wanted, patience)

    def service(self) -> dict[str, Any]:
        return self.cluster.get(
            f"/apis/serving.kserve.io/v1beta1/namespaces/{self.namespace}/inferenceservices/entrance"
        )

    def names(self) -> str:
        """The storageUri that the InferenceService names."""
        return str(self.service()["spec"]["predictor"]["model"]["storageUri"])

    def apply_as(self, manager: str, spec: dict[str, Any]) -> None:
        meta = {"name": "entrance", "namespace": self.namespace}
        body = {"apiVersion": "serving.kserve.io/v1beta1", "kind": "InferenceService", "metadata": meta, "spec": spec}
        self.cluster.apply(body, manager=manager)


@pytest.fixture
def deployer(
    cluster: ApiServer, namespace: str, runner: str, webhook: KserveWebhook, kserve: KserveStandIn, model: ModelFolder
) -> Deployer:
    return Deployer(cluster, namespace, model)


@pytest.fixture
def serving_old(deployer: Deployer, kserve: KserveStandIn) -> Iterator[Deployer]:
    """A deployer where OLD is served, and must be served again when the test ends."""
    deployer.roll_out(OLD)
    yield deployer
    deadline = time.monotonic() + 20
    while (kserve.serving(SERVING), deployer.names()) != (OLD, OLD):
        assert time.monotonic() < deadline, f"{kserve.serving(SERVING)} serves, {deployer.names()} is named"
        time.sleep(0.05)


def test_the_first_model_and_an_update_are_applied_and_awaited(deployer: Deployer, kserve: KserveStandIn) -> None:
    kserve.fates = {OLD: Fate(ready_after=0.5), NEW: Fate(ready_after=0.5)}
    for uri in (OLD, NEW):
        deployer.roll_out(uri)
        assert kserve.serving(SERVING) == uri, "its pods are the ones that serve when deploy returns"
    (entry,) = [item for item in deployer.service()["metadata"]["managedFields"] if item["manager"] == MANAGER]
    assert entry["operation"] == "Apply"
    assert set(entry["fieldsV1"]["f:spec"]["f:predictor"]["f:model"]) == {
        "f:modelFormat",
        "f:protocolVersion",
        "f:storageUri",
    }


def test_deploying_again_changes_nothing(deployer: Deployer) -> None:
    deployer.roll_out(OLD)
    before = deployer.service()["metadata"]["generation"]
    deployer.roll_out(OLD)
    assert deployer.service()["metadata"]["generation"] == before


def test_fields_of_others_stay(deployer: Deployer, kserve: KserveStandIn) -> None:
    deployer.roll_out(OLD)
    deployer.apply_as("kubectl", {"predictor": {"minReplicas": 3, "serviceAccountName": "reader"}})
    deployer.roll_out(NEW)
    predictor = deployer.service()["spec"]["predictor"]
    assert (predictor["minReplicas"], predictor["serviceAccountName"]) == (3, "reader")
    found = kserve.deployment(SERVING)
    assert found is not None
    assert found["status"]["availableReplicas"] == 3


def test_generations_that_drift_apart_do_not_confuse(deployer: Deployer, kserve: KserveStandIn) -> None:
    """status.observedGeneration is the Deployment's: behind after a canary, ahead after an autoscaler."""
    deployer.roll_out(OLD)
    for canary in ([_canary()], [], [_canary()], []):
        deployer.apply_as("a-person", {"canary": canary})
    assert deployer.service()["metadata"]["generation"] == 5
    kserve.fates[NEW] = Fate(ready_after=0.3)
    deployer.roll_out(NEW)
    assert kserve.serving(SERVING) == NEW


def _canary() -> dict[str, Any]:
    model = {"name": "", "modelFormat": {"name": "yolo-onnx"}, "storageUri": "s3://models/entrance/canary"}
    return {"trafficPercent": 10, "predictor": {"name": "v2", "model": model}}


@dataclass(frozen=True)
class Step:
    """The step `deploy` with real store and MLflow, for models of one name."""

    name: str
    target: str
    settings: Settings
    root: Path

    def challenger(self, shift: float, champion: str = "") -> tuple[ModelFolder, str]:
        """Write a promoted model's artifacts; its description and the storageUri that it will have."""
        folder = self.root / "onnx_model"
        model = tiny_model_folder(folder, ["person"], name=self.name, shift=shift, checkpoint=b"weights", golden=False)
        write_json(folder / "parity.json", {"ok": True, "images": 2})
        verdict = {"decision": "promote", "reasons": [], "challenger": model.version, "champion": champion}
        write_json(self.root / "verdict.json", verdict)
        write_json(self.root / "scorecard.json", {"challenger": {}})
        (self.root / "report").write_text("<!doctype html>")
        return model, f"s3://{self.settings.bucket}/models/{self.name}/{model.version}"

    def deploy(self, champion: str, patience: Patience) -> None:
        deploy(
            onnx_model=self.root / "onnx_model",
            verdict=self.root,
            report=self.root / "report",
            name=self.name,
            champion=champion,
            target=self.target,
            run_id="run-1",
            out=self.root / "deployed",
            settings=self.settings,
            rollout={"strategy": "rolling"},
            patience=patience,
        )

    def aliases(self) -> tuple[str, ...]:
        found = [Tracker(self.settings).alias(self.name, alias) for alias in ("champion", "challenger")]
        return tuple(alias.version for alias in found if alias)


def test_the_step_moves_the_alias_only_once_the_new_pods_serve(
    settings: Settings, store: Store, mlflow_uri: str, deployer: Deployer, kserve: KserveStandIn, tmp_path: Path
) -> None:
    target = f"kserve:{deployer.namespace}/entrance"
    step = Step(deployer.namespace, target, replace(settings, mlflow_tracking_uri=mlflow_uri), tmp_path)
    old, place = step.challenger(shift=0.0)
    step.deploy("", QUICK)
    assert (kserve.serving(SERVING), step.aliases()) == (place, (old.version, old.version))
    new, never = step.challenger(shift=1.0, champion=old.version)
    kserve.fates[never] = NEVER
    with pytest.raises(DeployError, match=f"{place} was put back"):
        step.deploy(old.version, HASTY)
    assert (kserve.serving(SERVING), step.aliases()) == (place, (old.version, new.version))


# --- each of these ends with the old model serving -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fate", "looks_at", "patience", "message"),
    [
        (NEVER, "old", HASTY, r"did not become ready in .* s: .*0 of 1 pods"),
        (NEVER, "new", HASTY, r"did not become ready in .* s: .*0 of 1 pods"),
        (Fate(load_error="NoSuchKey: model.onnx"), "new", QUICK, "NoSuchKey: model.onnx"),
        (Fate(load_error="NoSuchKey: model.onnx"), "old", HASTY, "0 of 1 pods"),
    ],
    ids=["never", "never, told of the new pod", "unloadable, told of the new pod", "unloadable"],
)
def test_a_model_that_is_never_ready_is_rolled_back(
    serving_old: Deployer, kserve: KserveStandIn, fate: Fate, looks_at: str, patience: Patience, message: str
) -> None:
    kserve.fates[NEW], kserve.looks_at = fate, looks_at
    with pytest.raises(DeployError, match=message) as caught:
        serving_old.roll_out(NEW, patience)
    assert f"{OLD} was put back" in str(caught.value)


def test_the_deployments_deadline_is_told(serving_old: Deployer, kserve: KserveStandIn) -> None:
    kserve.fates[NEW], kserve.progress_deadline = NEVER, 0.3
    with pytest.raises(DeployError, match="ProgressDeadlineExceeded"):
        serving_old.roll_out(NEW)


def test_a_controller_that_is_away_is_told(serving_old: Deployer, kserve: KserveStandIn) -> None:
    kserve.asleep = True
    with pytest.raises(DeployError, match="controller has not looked at it yet"):
        serving_old.roll_out(NEW, HASTY)
    kserve.asleep = False


def test_a_controller_that_comes_back_in_time_is_waited_for(deployer: Deployer, kserve: KserveStandIn) -> None:
    deployer.roll_out(OLD)
    kserve.asleep = True
    threading.Timer(1.0, lambda: setattr(kserve, "asleep", False)).start()
    deployer.roll_out(NEW)
    assert kserve.serving(SERVING) == NEW


def test_another_field_manager_is_not_overrun(deployer: Deployer, kserve: KserveStandIn) -> None:
    deployer.apply_as("argocd", {"predictor": {"model": {"modelFormat": {"name": "yolo-onnx"}, "storageUri": OLD}}})
    with pytest.raises(DeployError, match=r"someone else manages: .*\"argocd\".*storageUri") as caught:
        deployer.roll_out(NEW)
    assert "Remove those fields" in caught.value.remedy
    assert deployer.names() == OLD


def test_a_canary_of_a_person_is_not_overrun(serving_old: Deployer) -> None:
    serving_old.apply_as("a-person", {"canary": [_canary()]})
    with pytest.raises(DeployError, match="has a canary under way"):
        serving_old.roll_out(NEW)


def test_what_a_webhook_denies_is_no_missing_right(serving_old: Deployer, webhook: KserveWebhook) -> None:
    webhook.deny = "no runtime supports model format yolo-onnx"
    try:
        with pytest.raises(DeployError, match=r"refused .*denied the request: no runtime supports") as caught:
            serving_old.roll_out(NEW)
    finally:
        webhook.deny = ""
    assert "service account" not in caught.value.remedy


def test_a_later_deploy_is_not_undone_by_an_earlier_one(serving_old: Deployer, kserve: KserveStandIn) -> None:
    """Two deploys at once: the first waits for a model that is never ready, the second one's is what is wanted."""
    kserve.fates[NEW] = NEVER
    failed: list[DeployError] = []

    def first() -> None:
        try:
            serving_old.roll_out(NEW)
        except DeployError as error:
            failed.append(error)

    thread = threading.Thread(target=first)
    thread.start()
    while serving_old.names() != NEW:
        time.sleep(0.02)
    newest = "s3://models/entrance/newest"
    serving_old.roll_out(newest)
    thread.join()
    assert "put back" not in str(failed[0])
    assert newest in str(failed[0])
    assert (serving_old.names(), kserve.serving(SERVING)) == (newest, newest)
    serving_old.roll_out(OLD)


def test_a_service_that_is_deleted_meanwhile_is_not_made_again(deployer: Deployer, kserve: KserveStandIn) -> None:
    deployer.roll_out(OLD)
    kserve.fates[NEW] = NEVER
    path = f"/apis/serving.kserve.io/v1beta1/namespaces/{deployer.namespace}/inferenceservices/entrance"

    def delete() -> None:
        while deployer.names() != NEW:
            time.sleep(0.02)
        deployer.cluster.request("DELETE", path)

    thread = threading.Thread(target=delete)
    thread.start()
    with pytest.raises(DeployError, match=r"deleted while .* was rolled out\. It names no model now"):
        deployer.roll_out(NEW)
    thread.join()
    assert deployer.cluster.request("GET", path).status == 404


# --- what the cluster forbids ----------------------------------------------------------------------------------------


def test_a_namespace_that_does_not_exist_is_told(deployer: Deployer, speak_as: Callable[[str], None]) -> None:
    nowhere = Deployer(deployer.cluster, "not-there", deployer.model)
    # Who may not look into a namespace is not told that there is none.
    with pytest.raises(DeployError, match="may not get") as caught:
        nowhere.roll_out(NEW)
    assert "not-there exists" in caught.value.remedy
    speak_as("admin")
    with pytest.raises(DeployError, match="namespace 'not-there' does not exist"):
        nowhere.roll_out(NEW)


@pytest.mark.parametrize("verb", ["get", "patch", "create"])
def test_a_forbidden_verb_is_named(
    cluster: ApiServer, deployer: Deployer, speak_as: Callable[[str], None], verb: str
) -> None:
    user = f"{deployer.namespace}/almost"
    cluster.make_service_account(deployer.namespace, "almost")
    grant(cluster, deployer.namespace, [name for name in ("get", "patch", "create") if name != verb])
    speak_as(user)
    with pytest.raises(DeployError, match=rf"may not .* cannot {verb} resource .*inferenceservices") as caught:
        deployer.roll_out(NEW)
    assert "Give the step's service account" in caught.value.remedy


def grant(cluster: ApiServer, namespace: str, verbs: list[str]) -> None:
    """Let the service account `almost` do these to InferenceServices."""
    kind, meta = "rbac.authorization.k8s.io/v1", {"name": "almost", "namespace": namespace}
    rules = [
        {"apiGroups": ["serving.kserve.io"], "resources": ["inferenceservices"], "verbs": verbs},
        {"apiGroups": ["apps"], "resources": ["deployments"], "verbs": ["get"]},
    ]
    cluster.apply({"apiVersion": kind, "kind": "Role", "metadata": meta, "rules": rules})
    subjects = [{"kind": "ServiceAccount", "name": "almost", "namespace": namespace}]
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "almost"}
    cluster.apply({"apiVersion": kind, "kind": "RoleBinding", "metadata": meta, "roleRef": role, "subjects": subjects})


def test_a_cluster_without_kserve_is_told(
    api_server: ApiServer, deployer: Deployer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = InferenceServiceApi(deployer.namespace, "entrance")
    monkeypatch.setattr(api, "_path", api._path.replace("v1beta1", "v1"))  # a version that the server does not know
    with pytest.raises(DeployError, match="knows no InferenceService"):
        roll_out(api, manifest(deployer.namespace, "entrance", deployer.model, NEW), QUICK)
