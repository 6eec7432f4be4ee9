"""deploy and refuse: real object store, real MLflow; Kubernetes by a stand-in API server (no cluster runs here)."""

from __future__ import annotations

import gc
import itertools
import json
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import urllib3
from cluster_stand_in import ClusterStandIn
from tiny_models import tiny_model_folder

from haechi.components.deploy import step, switch
from haechi.components.deploy.inference_service import PREVIOUS, Patience, manifest
from haechi.components.deploy.kubernetes_api import MANAGER
from haechi.components.deploy.step import DeployResult, deploy, refuse
from haechi.components.deploy.target import Target
from haechi.components.shared.errors import (
    DeployError,
    DeployRefused,
    HaechiError,
    InputError,
    IntegrityError,
    ModelError,
    StorageError,
    TrackingError,
)
from haechi.components.shared.files import read_json, sha256_bytes, sha256_file, write_json
from haechi.components.shared.model_folder import ModelFolder
from haechi.components.shared.settings import Settings
from haechi.components.shared.storage import Store
from haechi.components.shared.tracking import Tracker
from haechi.pipelines.submitting import Package

CLASSES = ["smoke", "fire"]
REPORT = "<!doctype html><p>evaluation</p>"
QUICK = Patience(timeout=5, poll=0.02, blocked=0.1)
CRD = Path(__file__).resolve().parents[3] / "shared/crds/serving.kserve.io_v1beta1_InferenceService.json"
SCORES = {
    "map50_95": 0.5,
    "map50": 0.75,
    "precision": 0.8,
    "recall": 0.6,
    "per_class": {"smoke": {"map50_95": 0.5, "map50": 0.75}, "fire": {"map50_95": None, "map50": None}},
}


@dataclass(frozen=True)
class World:
    """One test's model name, settings and folders."""

    name: str
    settings: Settings
    root: Path

    @property
    def store(self) -> Store:
        return Store(self.settings)

    @property
    def tracker(self) -> Tracker:
        return Tracker(self.settings)

    def model(
        self,
        shift: float = 0.0,
        champion: str = "",
        decision: str = "promote",
        golden: bool = True,
        **changes: Any,
    ) -> ModelFolder:
        """Write the artifacts of one challenger; `shift` makes another graph, so another version."""
        made = tiny_model_folder(
            self.folder, CLASSES, name=self.name, shift=shift, checkpoint=b"weights", golden=golden
        )
        made = replace(made, training={"epochs": 12, "model": "yolo11n", "augment": [0.5, 1]}, **changes)
        made.write(self.folder)
        write_json(self.folder / "parity.json", {"ok": True, "images": 2})
        card = {"challenger": SCORES, "champion": None}
        words = {"decision": decision, "reasons": ["fire has no box in test"]}
        write_json(self.verdict / "verdict.json", {**words, "challenger": made.version, "champion": champion})
        write_json(self.verdict / "scorecard.json", card)
        self.report.write_text(REPORT)
        return made

    @property
    def folder(self) -> Path:
        return self.root / "onnx_model"

    @property
    def verdict(self) -> Path:
        return self.root / "verdict"

    @property
    def report(self) -> Path:
        return self.root / "report"  # kfp's path of an HTML artifact has no suffix

    def deploy(
        self, champion: str = "", target: str = "none", patience: Patience = QUICK, strategy: str = "rolling"
    ) -> DeployResult:
        return deploy(
            onnx_model=self.folder,
            verdict=self.verdict,
            report=self.report,
            name=self.name,
            champion=champion,
            target=target,
            run_id="kfp-run-1",
            out=self.root / "deployed",
            settings=self.settings,
            rollout={"strategy": strategy},
            patience=patience,
        )

    def refuse(self) -> str:
        return refuse(self.folder, self.verdict, self.name, "kfp-run-1", self.settings)

    def alias(self, alias: str) -> str:
        found = self.tracker.alias(self.name, alias)
        return found.version if found else ""


@pytest.fixture
def world(settings: Settings, store: Store, mlflow_uri: str, tmp_path: Path) -> World:
    return World(f"gate-{uuid.uuid4().hex[:8]}", replace(settings, mlflow_tracking_uri=mlflow_uri), tmp_path)


# --- store, registry, aliases ---------------------------------------------------------------------------------------


def test_a_promoted_model_is_stored_registered_and_the_champion(world: World) -> None:
    model = world.model(dataset_digest="d" * 64)
    result = world.deploy()

    prefix = f"models/{world.name}/{model.version}/"
    assert result == DeployResult(world.name, model.version, world.store.uri(prefix), "none", 1, "")
    assert read_json(world.root / "deployed" / "deployed.json") == vars(result)
    stored = {
        item.key.removeprefix(prefix): sha256_bytes(world.store.get(item.key)) for item in world.store.list(prefix)
    }
    local = {
        path.relative_to(world.folder).as_posix(): sha256_file(path)
        for path in world.folder.rglob("*")
        if path.is_file()
    }
    assert stored == {**local, "report.html": sha256_bytes(REPORT.encode())}

    (registered,) = world.tracker.versions(world.name)
    assert (registered.version, registered.source) == (model.version, result.uri)
    assert registered.tags == {
        "haechi.version": model.version,
        "haechi.onnx_sha256": model.onnx_sha256,
        "haechi.checkpoint_sha256": model.checkpoint_sha256,
        "haechi.dataset_digest": "d" * 64,
        "haechi.verdict": "promote",
        "haechi.compared_with": "",
        "haechi.run": "kfp-run-1",
    }
    assert "**promote** against no champion" in registered.description
    assert (world.alias("challenger"), world.alias("champion")) == (model.version, model.version)


def test_the_run_of_the_training_gets_the_test_scores_and_keeps_its_own_words(world: World) -> None:
    run_id = world.tracker.start_run("training", "yolo11n")
    world.tracker.log_params(run_id, {"epochs": 12.0})  # the training's own spelling of a parameter that we know too
    world.tracker.log_metrics(run_id, {"val/mAP50-95": 0.4375}, step=11)
    world.tracker.finish(run_id)
    world.model(run_id=run_id)
    world.deploy()
    run = world.tracker.run(run_id)
    assert run is not None
    assert run.params == {"epochs": "12.0", "model": "yolo11n", "augment": "[0.5, 1]"}
    assert run.metrics == {
        "val/mAP50-95": 0.4375,
        "val/mAP50": 0.5,
        "test/mAP50-95": 0.5,
        "test/mAP50": 0.75,
        "test/precision": 0.8,
        "test/recall": 0.6,
        "test/mAP50-95/smoke": 0.5,
    }
    assert [item.path for item in world.tracker._client.list_artifacts(run_id)] == ["report.html"]


def test_a_second_champion_follows_the_first(world: World) -> None:
    first = world.model()
    world.deploy()
    second = world.model(shift=1.0, champion=first.version)
    result = world.deploy(champion=first.version)
    assert (result.previous, result.registered_version) == (first.version, 2)
    assert world.alias("champion") == second.version != first.version
    assert world.store.exists(f"models/{world.name}/{first.version}/model.json")


def test_deploying_again_changes_nothing(world: World) -> None:
    world.model()
    first, before = world.deploy(), observe(world)
    assert world.deploy() == first
    assert observe(world) == before


def test_the_same_graph_trained_again_is_the_same_model(world: World) -> None:
    first = world.model(created_at="2026-01-01T00:00:00+00:00")
    world.deploy()
    again = world.model(created_at="2026-02-02T00:00:00+00:00")
    assert again.version == first.version
    world.deploy()
    kept = world.store.get_json(f"models/{world.name}/{first.version}/model.json")
    assert kept["created_at"] == first.created_at
    assert len(world.tracker.versions(world.name)) == 1


# --- what deploy refuses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "entry", "error", "message"),
    [
        ("verdict/verdict.json", {"decision": "refuse"}, DeployRefused, "the verdict is refuse: fire has no box"),
        ("verdict/verdict.json", {"decision": "not_enough_data"}, DeployRefused, "the verdict is not_enough_data"),
        ("verdict/verdict.json", {"decision": 'promote"'}, InputError, "has decision 'promote\"'"),
        ("verdict/verdict.json", {"challenger": "f" * 12}, DeployRefused, "is about model 'ffffffffffff', not about"),
        ("verdict/verdict.json", {"champion": "e" * 12}, DeployRefused, "compares with eeeeeeeeeeee, not with none"),
        ("verdict/verdict.json", None, InputError, "is not a verdict"),
        ("verdict/scorecard.json", None, InputError, "is not a verdict"),
        ("onnx_model/parity.json", {"ok": False}, DeployRefused, "give different boxes"),
        ("onnx_model/parity.json", {"ok": None}, DeployRefused, "compares no image"),
        ("onnx_model/parity.json", None, DeployRefused, "nothing proves the export"),
        ("onnx_model/model.json", {"name": "another"}, InputError, "is of 'another', not of"),
        ("onnx_model/model.json", {"checkpoint_sha256": "0" * 64}, IntegrityError, "checkpoint.pt is not the file"),
        ("onnx_model/model.json", None, ModelError, "is not a model folder"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    world: World, file: str, entry: dict[str, Any] | None, error: type[HaechiError], message: str
) -> None:
    world.model()
    path = world.root / file
    if entry is None:
        path.unlink()
    else:
        write_json(path, {**read_json(path), **entry})
    with pytest.raises(error, match=message) as caught:
        world.deploy()
    assert caught.value.remedy
    assert list(world.store.list("")) == []
    assert world.tracker.versions(world.name) == []


def test_a_champion_that_changed_since_the_run_began_is_not_overrun(world: World) -> None:
    first = world.model()
    world.deploy()
    world.model(shift=1.0)
    with pytest.raises(DeployRefused, match=f"changed from none to {first.version} since this run began.*again"):
        world.deploy(champion="")
    assert world.alias("champion") == first.version


@pytest.mark.parametrize(
    ("module", "act", "serves"), [(step, "record", "first"), (switch, "place", "second")], ids=["copied", "switched"]
)
def test_whom_a_person_makes_champion_meanwhile_stays(
    world: World, monkeypatch: pytest.MonkeyPatch, module: Any, act: str, serves: str
) -> None:
    target, versions = world.root / "served", {"first": world.model().version}
    world.deploy(target=f"dir:{target}")
    theirs = world.model(shift=2.0, champion=versions["first"], decision="refuse")
    world.refuse()
    versions["second"] = world.model(shift=1.0, champion=versions["first"]).version
    work = getattr(module, act)

    def meanwhile(*arguments: Any, **options: Any) -> Any:
        done = work(*arguments, **options)
        (found,) = world.tracker.versions(world.name, theirs.version)
        world.tracker.set_alias(world.name, "champion", found.number)
        return done

    monkeypatch.setattr(module, act, meanwhile)
    with pytest.raises(DeployRefused, match=f"changed from {versions['first']} to {theirs.version}"):
        world.deploy(champion=versions["first"], target=f"dir:{target}")
    assert world.alias("champion") == theirs.version
    assert (target / "current").readlink().name == versions[serves]


def test_another_model_in_its_place_is_an_error(world: World) -> None:
    model = world.model()
    world.deploy()
    world.model(thresholds={"smoke": 0.9, "fire": 0.9})
    with pytest.raises(IntegrityError, match="was written with another thresholds"):
        world.deploy()
    world.model()
    world.store.put(f"models/{world.name}/{model.version}/model.onnx", b"damaged")
    with pytest.raises(IntegrityError, match=r"model\.onnx has SHA-256"):
        world.deploy()


def test_services_that_are_away_are_told(world: World) -> None:
    world.model()
    broken = [({"bucket": "not-there"}, StorageError), ({"mlflow_tracking_uri": "http://127.0.0.1:9"}, TrackingError)]
    for change, error in broken:
        with pytest.raises(error):
            replace(world, settings=replace(world.settings, **change)).deploy()
    assert list(world.store.list("")) == []


# --- refuse ---------------------------------------------------------------------------------------------------------


def test_a_refused_challenger_is_recorded_and_the_champion_stays(world: World) -> None:
    first = world.model()
    world.deploy()
    second = world.model(shift=1.0, champion=first.version, decision="not_enough_data")
    assert [world.refuse() for _ in range(2)] == ["not_enough_data"] * 2
    assert (world.alias("champion"), world.alias("challenger")) == (first.version, second.version)
    registered = world.tracker.versions(world.name)[-1]
    assert (registered.number, registered.tags["haechi.verdict"]) == (2, "not_enough_data")
    assert f"**not_enough_data** against {first.version}" in registered.description
    assert world.store.get_json(f"models/{world.name}/{second.version}/model.json")["version"] == second.version


def test_a_refused_challenger_may_be_promoted_later(world: World) -> None:
    model = world.model(decision="refuse")
    assert world.refuse() == "refuse"
    world.model()
    result = world.deploy()
    assert result.registered_version == 1
    (registered,) = world.tracker.versions(world.name)
    assert registered.tags["haechi.verdict"] == "promote"
    assert "**promote**" in registered.description
    assert world.store.get(f"models/{world.name}/{model.version}/report.html") == REPORT.encode()


def test_refusing_the_champions_very_file_leaves_what_is_said_of_it(world: World) -> None:
    model = world.model()
    world.deploy()
    before = world.tracker.versions(world.name)
    world.model(champion=model.version, decision="refuse")
    assert world.refuse() == "refuse"
    assert world.tracker.versions(world.name) == before


def test_refuse_does_not_take_a_promotion(world: World) -> None:
    world.model()
    with pytest.raises(InputError, match="says promote"):
        world.refuse()


# --- targets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("", Target()),
        ("none", Target()),
        ("dir:/srv/models", Target("dir", path="/srv/models")),
        ("kserve:models/entrance", Target("kserve", namespace="models", name="entrance")),
        (
            "git:git@example.org:team/models.git#env/prod:entrance/service.yaml",
            Target("git", "entrance/service.yaml", "", "", "git@example.org:team/models.git", "env/prod"),
        ),
    ],
)
def test_targets_are_read(text: str, parsed: Target) -> None:
    assert Target.parse(text) == Target.parse(str(parsed)) == parsed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dir:models", "is not an absolute path"),
        ("dir:", "is not an absolute path"),
        ("dir:/", "is not an absolute path"),
        ("dir:/srv/../etc", "is not an absolute path"),
        ("kserve:entrance", "cannot be read.*dir:/absolute/path"),
        ("kserve:Models/entrance", "namespace 'Models'"),
        ("kserve:models/entrance_1", "name 'entrance_1'"),
        (f"kserve:models/{'a' * 60}", "at most 53 characters"),
        ("git:https://example.org/repo", "lacks repository, branch or path"),
        ("git:https://user:s3cret@example.org/repo#main:a.yaml", "holds credentials, and parameters are logged"),
        ("git:ext::sh -c evil#main:a.yaml", "is not one that we know"),
        ("git:https://[bad#main:a.yaml", "is no URL"),
        (
            "git:https://example.org/repo?private_token=s3cret#main:a.yaml",
            "holds credentials, and parameters are logged",
        ),
        ("git:--upload-pack=evil#main:a.yaml", "is not one that we know"),
        ("git:https://example.org/repo#-f:a.yaml", "branch '-f'"),
        ("git:https://example.org/repo#main:../a.yaml", "is not a YAML file of the repository"),
        ("git:https://example.org/repo#main:.git/config", "is not a YAML file of the repository"),
        ("ftp://somewhere", "cannot be read"),
        ("none:x", "cannot be read"),
    ],
)
def test_a_target_that_cannot_be_read_is_told_before_any_work(world: World, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        world.deploy(target=text)  # no artifact is there: the target is looked at first
    assert "s3cret" not in str(caught.value)


def test_a_directory_holds_versions_and_names_the_current_one(world: World) -> None:
    root = world.root / "served"
    first = world.model()
    world.deploy(target=f"dir:{root}")
    assert (root / "current").readlink() == Path("versions") / first.version
    assert ModelFolder.load(root / "current") == first
    assert (root / "current" / "report.html").read_text() == REPORT
    second = world.model(shift=1.0, champion=first.version)
    world.deploy(champion=first.version, target=f"dir:{root}")
    assert ModelFolder.load(root / "current") == second
    assert ModelFolder.load(root / "versions" / first.version) == first
    assert sorted(path.name for path in root.iterdir()) == ["current", "versions"]


def test_a_directory_that_cannot_be_used_leaves_the_champion_alone(world: World) -> None:
    root = world.root / "served"
    model = world.model()
    (root / "current").mkdir(parents=True)
    with pytest.raises(InputError, match="current is not a symlink"):
        world.deploy(target=f"dir:{root}")
    (root / "current").rmdir()
    (root / "versions" / model.version).mkdir(parents=True)
    (root / "versions" / model.version / "model.json").write_text("{}")
    with pytest.raises(IntegrityError, match=f"does not hold model {model.version}"):
        world.deploy(target=f"dir:{root}")
    (root / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        world.deploy(target=f"dir:{root / 'file' / 'models'}")
    assert (world.alias("challenger"), world.alias("champion")) == (model.version, "")


# --- kill -9 --------------------------------------------------------------------------------------------------------


def observe(world: World) -> dict[str, Any]:
    """Everything that a deploy leaves behind, free of names, times and ids."""
    tracker, prefix = world.tracker, f"models/{world.name}/"
    (model,) = [ModelFolder.load(world.folder)]
    run_id = tracker.find_run("training", {"haechi.model": world.name})
    run = tracker.run(run_id)
    assert run is not None
    served = world.root / "served"

    def neutral(data: bytes) -> str:
        return sha256_bytes(data.replace(str(world.root).encode(), b"ROOT").replace(world.name.encode(), b"NAME"))

    return {
        "objects": {
            item.key.removeprefix(prefix): neutral(world.store.get(item.key)) for item in world.store.list(prefix)
        },
        "versions": [(item.number, item.version, item.tags, item.description) for item in tracker.versions(world.name)],
        "aliases": {alias: world.alias(alias) for alias in ("challenger", "champion")},
        "params": run.params,
        "metrics": run.metrics,
        "history": {
            key: [item.value for item in tracker._client.get_metric_history(run_id, key)]
            for key in ("val/mAP50", "test/mAP50")
        },
        "status": run.status,
        "artifacts": [item.path for item in tracker._client.list_artifacts(run_id)],
        "served": {
            path.relative_to(served).as_posix(): neutral(path.read_bytes())
            for path in served.rglob("*")
            if path.is_file()
        },
        "current": (served / "current").readlink().as_posix() if served.exists() else "",
        "deployed": neutral((world.root / "deployed" / "deployed.json").read_bytes()),
        "version": model.version,
    }


def in_a_process_of_its_own(work: Callable[[], object], kill_at: int) -> int:
    """Run `work` in a forked process that kills itself with SIGKILL just before its `kill_at`-th act.

    An act is an HTTP request that may change something, or a rename. Returns the number of acts that it began
    (`kill_at` where it was killed).
    """
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            _count_acts(write, kill_at)
            work()
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        acts = len(pipe.read())
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) == (acts == kill_at)
    return acts


def _count_acts(pipe: int, kill_at: int) -> None:
    numbers, one_at_a_time = itertools.count(1), threading.Lock()
    urlopen, rename = urllib3.connectionpool.HTTPConnectionPool.urlopen, Path.replace

    def act() -> None:
        with one_at_a_time:  # uploads run in several threads
            os.write(pipe, b".")
            if next(numbers) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)  # the signal ends all threads, this one not always at once

    def counted_urlopen(self: Any, method: str, *args: Any, **options: Any) -> Any:
        if method not in ("GET", "HEAD"):
            act()
        return urlopen(self, method, *args, **options)

    def counted_rename(self: Path, target: Path) -> Path:
        act()
        return rename(self, target)

    urllib3.connectionpool.HTTPConnectionPool.urlopen = counted_urlopen  # type: ignore[method-assign]
    Path.replace = counted_rename  # type: ignore[method-assign,assignment]


def test_killed_before_any_act_and_run_again_ends_as_if_never_killed(world: World) -> None:
    def fresh(number: int) -> World:
        one = World(f"{world.name}-{number}", world.settings, world.root / str(number))
        one.model(golden=False)  # fewer files, fewer acts to be killed before
        return one

    def run(one: World) -> None:
        one.deploy(target=f"dir:{one.root / 'served'}")

    world.tracker.start_run("training", "so that the experiment exists")
    reference = fresh(0)
    gc.collect()
    acts = in_a_process_of_its_own(lambda: run(reference), kill_at=-1)
    assert acts > 20, "objects, runs, versions, aliases, folders"
    expected = observe(reference)
    for number in range(1, acts + 1):
        one = fresh(number)
        assert in_a_process_of_its_own(lambda one=one: run(one), kill_at=number) == number
        run(one)
        assert observe(one) == expected, f"killed before act {number} of {acts}"


# --- kserve ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ClusterStandIn]:
    """The stand-in API server, and a kubeconfig that leads there."""
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with ClusterStandIn(["models"]) as cluster:
        use(cluster.write_kubeconfig(tmp_path / "kubeconfig"), monkeypatch)
        yield cluster


def use(kubeconfig: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The client reads KUBECONFIG once, when it is imported; a process of its own would set the variable.
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(kubeconfig))


KEY = ("models", "entrance")
SERVICE = "kserve:models/entrance"


def uri_of(world: World, version: str) -> str:
    return f"s3://{world.settings.bucket}/models/{world.name}/{version}"


def test_an_inference_service_is_applied_and_awaited(world: World, cluster: ClusterStandIn) -> None:
    model = world.model(dataset_digest="d" * 64)
    world.deploy(target=SERVICE)
    manager, content_type, body = cluster.applied[0]
    assert (manager, content_type) == (MANAGER, "application/apply-patch+yaml")
    assert body["spec"] == {
        "predictor": {
            "model": {
                "modelFormat": {"name": "yolo-onnx"},
                "protocolVersion": "v2",
                "storageUri": uri_of(world, model.version),
            },
            "enableServiceLinks": False,
            "labels": body["metadata"]["labels"],
            # KServe writes the service's own on all pods, where the predictor has none: they would restart with each.
            "annotations": dict.fromkeys([*body["metadata"]["annotations"], PREVIOUS], "see-the-inferenceservice"),
        }
    }
    assert body["metadata"]["labels"]["app.kubernetes.io/version"] == model.version
    assert body["metadata"]["annotations"]["haechi.io/onnx-sha256"] == model.onnx_sha256
    assert cluster.objects[KEY]["status"]["observedGeneration"] == 1, "it was waited for"
    assert world.alias("champion") == model.version


def test_the_manifest_is_what_kserve_takes(world: World) -> None:
    if not CRD.is_file():
        pytest.skip(f"KServe's schema is not present at {CRD}")
    import jsonschema

    body = manifest("models", "entrance", world.model(), "s3://haechi/models/entrance/0123456789ab")
    schema = jsonschema.Draft7Validator(closed(json.loads(CRD.read_text())))
    schema.validate(body)
    body["spec"]["predictor"]["model"]["storageURI"] = "misspelt"
    with pytest.raises(jsonschema.ValidationError):
        schema.validate(body)


def closed(schema: Any) -> Any:
    """The schema with unknown fields refused, as the API server does under fieldValidation=Strict."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type", "object") == "object":
        found.setdefault("additionalProperties", False)
    return found


def test_fields_of_others_stay_and_deploying_again_rolls_nothing(world: World, cluster: ClusterStandIn) -> None:
    apply_as("kubectl", cluster, {"spec": {"predictor": {"minReplicas": 2, "serviceAccountName": "reader"}}})
    world.model()
    world.deploy(target=SERVICE)
    generation = cluster.objects[KEY]["metadata"]["generation"]
    world.deploy(target=SERVICE)
    found = cluster.objects[KEY]
    assert found["metadata"]["generation"] == generation
    assert (found["spec"]["predictor"]["minReplicas"], found["spec"]["predictor"]["serviceAccountName"]) == (
        2,
        "reader",
    )


def apply_as(manager: str, cluster: ClusterStandIn, body: dict[str, Any]) -> None:
    url = f"/apis/serving.kserve.io/v1beta1/namespaces/{KEY[0]}/inferenceservices/{KEY[1]}?fieldManager={manager}"
    headers = {"Authorization": "Bearer let-me-in", "Content-Type": "application/apply-patch+yaml"}
    assert cluster.answer("PATCH", url, headers, json.dumps(body).encode())[0] == 200


def test_a_model_that_does_not_load_is_rolled_back(world: World, cluster: ClusterStandIn) -> None:
    first = world.model()
    world.deploy(target=SERVICE)
    second = world.model(shift=1.0, champion=first.version)
    bad = uri_of(world, second.version)
    cluster.outcomes[bad] = "BlockedByFailedLoad"
    with pytest.raises(DeployError) as caught:
        world.deploy(champion=first.version, target=SERVICE)
    assert f"cannot load {bad}" in str(caught.value)
    assert "kserve-container crashed" in str(caught.value)
    assert f"{uri_of(world, first.version)} was put back" in str(caught.value)
    found = cluster.objects[KEY]
    assert found["spec"]["predictor"]["model"]["storageUri"] == uri_of(world, first.version)
    assert found["metadata"]["labels"]["app.kubernetes.io/version"] == first.version
    assert PREVIOUS not in found["metadata"].get("annotations", {})
    assert (world.alias("champion"), world.alias("challenger")) == (first.version, second.version)

    cluster.outcomes.clear()  # mended, and run again
    world.deploy(champion=first.version, target=SERVICE)
    assert cluster.objects[KEY]["spec"]["predictor"]["model"]["storageUri"] == bad
    assert world.alias("champion") == second.version


def test_killed_while_it_waits_it_can_still_roll_back(world: World, cluster: ClusterStandIn) -> None:
    first = world.model()
    world.deploy(target=SERVICE)
    second = world.model(shift=1.0, champion=first.version)
    bad = uri_of(world, second.version)
    cluster.outcomes[bad] = "BlockedByFailedLoad"
    with pytest.raises(DeployError):
        world.deploy(first.version, SERVICE)

    def again() -> None:
        world.deploy(first.version, SERVICE)

    acts = in_a_process_of_its_own(again, kill_at=-1)
    # The last acts of the failing deploy: the first model is put back, the failure is noted, the lease given back. Die
    # just before the first of them.
    assert in_a_process_of_its_own(again, kill_at=acts - 2) == acts - 2
    assert cluster.objects[KEY]["spec"]["predictor"]["model"]["storageUri"] == bad
    with pytest.raises(DeployError, match=f"{uri_of(world, first.version)} was put back"):
        world.deploy(first.version, SERVICE)
    assert cluster.objects[KEY]["spec"]["predictor"]["model"]["storageUri"] == uri_of(world, first.version)


def test_a_first_model_that_is_never_ready_stays_to_be_looked_at(world: World, cluster: ClusterStandIn) -> None:
    model = world.model()
    cluster.outcomes[uri_of(world, model.version)] = "InProgress"
    with pytest.raises(DeployError, match=r"did not become ready in .*PredictorReady is False.*no model before it"):
        world.deploy(target=SERVICE, patience=replace(QUICK, timeout=1.5))
    assert world.alias("champion") == ""


def test_a_controller_that_never_looks_is_told(world: World, cluster: ClusterStandIn) -> None:
    world.model()
    cluster.delay = 10_000
    with pytest.raises(DeployError, match="controller has not looked at it yet"):
        world.deploy(target=SERVICE, patience=replace(QUICK, timeout=1.5))


def test_a_canary_under_way_is_not_overrun(world: World, cluster: ClusterStandIn) -> None:
    apply_as("kubectl", cluster, {"spec": {"predictor": {"canaryTrafficPercent": 10}}})
    world.model()
    with pytest.raises(DeployError, match="has a canary under way"):
        world.deploy(target=SERVICE)


def forbid(cluster: ClusterStandIn) -> None:
    cluster.refuse["PATCH"] = (403, 'inferenceservices is forbidden: User "pipeline-runner" cannot patch')


def no_namespace(cluster: ClusterStandIn) -> None:
    cluster.namespaces.clear()


def no_kserve(cluster: ClusterStandIn) -> None:
    cluster.kserve = False


def invalid(cluster: ClusterStandIn) -> None:
    cluster.refuse["PATCH"] = (422, "admission webhook denied the request: no runtime supports yolo-onnx")


def owned(cluster: ClusterStandIn) -> None:
    apply_as("argocd", cluster, {"spec": {"predictor": {"model": {"storageUri": "s3://theirs"}}}})


def failing(cluster: ClusterStandIn) -> None:
    cluster.refuse["GET"] = (500, "etcd is away")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (forbid, r"may not patch InferenceService models/entrance.*Give the step's service account"),
        (no_namespace, r"namespace 'models' does not exist"),
        (no_kserve, r"knows no InferenceService .*Install KServe"),
        (invalid, r"refused InferenceService models/entrance: admission webhook denied"),
        (owned, r"someone else manages: .*conflict with .argocd.*storageUri"),
        (failing, r"answered 500 .*etcd is away"),
    ],
)
def test_what_the_cluster_refuses_is_told(
    world: World, cluster: ClusterStandIn, change: Callable[[ClusterStandIn], None], message: str
) -> None:
    model = world.model()
    change(cluster)
    with pytest.raises(DeployError, match=message) as caught:
        world.deploy(target=SERVICE)
    assert caught.value.exit_code == 10
    assert (world.alias("challenger"), world.alias("champion")) == (model.version, "")


def test_a_cluster_that_cannot_be_reached_is_told(
    world: World, cluster: ClusterStandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    world.model()
    use(cluster.write_kubeconfig(tmp_path / "expired", token="expired"), monkeypatch)
    with pytest.raises(DeployError, match="does not accept our credentials"):
        world.deploy(target=SERVICE)
    away = json.loads((tmp_path / "expired").read_text().replace(cluster.url, "http://127.0.0.1:9"))
    write_json(tmp_path / "away", away)
    use(tmp_path / "away", monkeypatch)
    with pytest.raises(DeployError, match=r"cannot reach the Kubernetes API server at http://127\.0\.0\.1:9"):
        world.deploy(target=SERVICE)
    use(tmp_path / "nothing-here", monkeypatch)
    with pytest.raises(DeployError, match="neither a pod's service account nor a kubeconfig"):
        world.deploy(target=SERVICE)


# --- contract -------------------------------------------------------------------------------------------------------


def test_the_components_have_the_pipelines_contract() -> None:
    from haechi.components.deploy import component

    spec = component.deploy.component_spec
    assert sorted(spec.inputs) == ["champion", "name", "onnx_model", "report", "rollout", "run_id", "target", "verdict"]
    assert sorted(spec.outputs) == ["Output", "deployed"]
    assert sorted(component.refuse.component_spec.inputs) == ["name", "onnx_model", "run_id", "verdict"]
    assert sorted(component.refuse.component_spec.outputs) == ["Output"]


def test_the_component_bodies_do_what_the_steps_do(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from kfp import dsl

    from haechi.components.deploy import component
    from haechi.components.resolve import component as first

    for key, value in world.settings.to_env().items():
        monkeypatch.setenv(key, value)
    model = world.model()
    onnx_model, verdict = dsl.Model(uri=str(world.folder)), dsl.Artifact(uri=str(world.verdict))
    deployed = dsl.Artifact(uri=str(world.root / "deployed"))
    said = component.deploy.python_func(
        onnx_model=onnx_model,
        verdict=verdict,
        report=dsl.HTML(uri=str(world.report)),
        name=world.name,
        champion="",
        target="none",
        run_id="",
        deployed=deployed,
    )
    assert said == "promote"
    assert deployed.metadata == read_json(world.root / "deployed" / "deployed.json")
    asked = {name: Package.read().parameters[name] for name in first.resolve.component_spec.inputs}
    assert first.resolve.python_func(**asked | {"name": world.name}) == (model.version, "")
    world.model(shift=1.0, champion=model.version, decision="refuse")
    refused = component.refuse.python_func(onnx_model=onnx_model, verdict=verdict, name=world.name, run_id="")
    assert refused == "refuse"
