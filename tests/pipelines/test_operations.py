"""promote, rollback, status and reconcile on folders and Git repositories: real store, real MLflow, real files."""

from __future__ import annotations

import json
import shutil
import subprocess
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from cluster_stand_in import ClusterStandIn
from tiny_models import tiny_model_folder

from haechi.components.deploy.publish import model_prefix, publish
from haechi.components.deploy.target import Target
from haechi.components.shared.errors import (
    DeployError,
    DeployRefused,
    HaechiError,
    InputError,
    IntegrityError,
    ModelError,
    SettingsError,
    StorageError,
)
from haechi.components.shared.model_folder import ModelFolder
from haechi.components.shared.settings import Settings
from haechi.components.shared.storage import Store
from haechi.components.shared.tracking import Tracker
from haechi.pipelines import operations
from haechi.pipelines.cli import main
from haechi.pipelines.services import down, up

NAMES = ("first", "second", "third")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three models without a name yet."""
    root = tmp_path_factory.mktemp("models")
    for shift, name in enumerate(NAMES):
        tiny_model_folder(root / name, ["person"], name="entrance", shift=shift)
    return {name: root / name for name in NAMES}


@dataclass
class World:
    """Registered models called `name`, of which the first one is the champion and serves."""

    settings: Settings
    name: str
    versions: dict[str, str]
    root: Path
    target: Target

    def promote(self, which: str, **options: Any) -> dict[str, Any]:
        return operations.promote(self.settings, self.name, self.versions[which][:8], self.target, **options)

    def rollback(self) -> dict[str, Any]:
        return operations.rollback(self.settings, self.name, self.target)

    def round(self) -> str:
        """One round of a reconciler that was just started."""
        return operations.reconcile(self.settings, [(self.name, self.target)], 0)[self.name]

    def champion_is(self, which: str) -> None:
        tracker = Tracker(self.settings)
        (found,) = tracker.versions(self.name, self.versions[which])
        tracker.set_alias(self.name, "champion", found.number)

    def at(self) -> tuple[str, str]:
        """What the target names, and whom MLflow calls champion."""
        found = operations.status(self.settings, self.name, self.target)
        names = {version: name for name, version in self.versions.items()} | {"": ""}
        return names[found["served"]["version"]], names[found["champion"]]


def register(settings: Settings, name: str, folders: dict[str, Path]) -> dict[str, str]:
    store, versions = Store(settings), {}
    for which, folder in folders.items():
        model = replace(ModelFolder.load(folder), name=name)
        model.write(folder)
        publish(store, model, folder)
        Tracker(settings).register(name, model.version, store.uri(model_prefix(name, model.version)), "", {})
        versions[which] = model.version
    return versions


def in_a_folder(tmp_path: Path) -> Target:
    return Target("dir", path=str(tmp_path / "served"))


def in_git(tmp_path: Path) -> Target:
    bare, work = tmp_path / "bare.git", tmp_path / "work"
    who = ["git", "-c", "user.name=someone", "-c", "user.email=someone@localhost", "-C"]
    subprocess.run(["git", "init", "--quiet", "--bare", "--initial-branch=main", bare], check=True)
    subprocess.run(["git", "clone", "--quiet", bare, work], check=True, capture_output=True)
    subprocess.run([*who, work, "commit", "--quiet", "--allow-empty", "-m", "begin"], check=True)
    subprocess.run([*who, work, "push", "--quiet", "origin", "HEAD:main"], check=True)
    return Target("git", repository=str(bare), branch="main", path="entrance.yaml")


@pytest.fixture
def world(
    request: pytest.FixtureRequest,
    settings: Settings,
    store: Store,
    mlflow_uri: str,
    folders: dict[str, Path],
    tmp_path: Path,
) -> World:
    made: Callable[[Path], Target] = getattr(request, "param", in_a_folder)
    settings = replace(settings, mlflow_tracking_uri=mlflow_uri)
    name = f"entrance-{uuid.uuid4().hex[:8]}"
    world = World(settings, name, register(settings, name, folders), tmp_path, made(tmp_path))
    world.promote("first")
    assert world.at() == ("first", "first")
    return world


both = pytest.mark.parametrize("world", [in_a_folder, in_git], indirect=True)


@both
def test_promote_and_rollback_move_target_and_alias_together(world: World) -> None:
    done = world.promote("second")
    assert (done["former"], done["target"]) == (world.versions["first"], str(world.target))
    assert world.at() == ("second", "second")
    assert world.rollback()["version"] == world.versions["first"]
    assert world.at() == ("first", "first")
    with pytest.raises(InputError, match=r"no champion of .* before"):
        world.rollback()
    assert world.at() == ("first", "first")


@both
def test_an_alias_that_a_person_moves_is_followed(world: World) -> None:
    assert world.round() == f"champion {world.versions['first']} is what the target names"
    world.champion_is("third")
    assert world.round() == f"champion {world.versions['third']} serves"
    assert world.at() == ("third", "third")
    assert world.rollback()["version"] == world.versions["first"]


def no_folder_in_the_store(world: World) -> type[HaechiError]:
    store, prefix = Store(world.settings), model_prefix(world.name, world.versions["second"])
    store.remove(f"{prefix}model.json")
    return ModelError


def another_graph_in_the_store(world: World) -> type[HaechiError]:
    store, prefix = Store(world.settings), model_prefix(world.name, world.versions["second"])
    store.put(f"{prefix}model.onnx", b"another graph", "application/octet-stream")
    return IntegrityError


def another_model_in_the_store(world: World) -> type[HaechiError]:
    """The third one's whole folder at the place of the second."""
    store = Store(world.settings)
    theirs, prefix = (model_prefix(world.name, world.versions[which]) for which in ("third", "second"))
    for entry in list(store.list(theirs)):
        store.put(prefix + entry.key.removeprefix(theirs), store.get(entry.key), "application/octet-stream")
    return IntegrityError


def no_proof_of_the_export(world: World) -> type[HaechiError]:
    key = f"{model_prefix(world.name, world.versions['second'])}parity.json"
    Store(world.settings).put(key, b'{"ok": false}', "application/json")
    return DeployRefused


def a_folder_that_is_none(world: World) -> type[HaechiError]:
    link = Path(world.target.path) / "current"
    (Path(world.target.path) / "versions" / world.versions["second"]).mkdir()
    assert link.is_symlink()
    return IntegrityError


SPOILS = [
    no_folder_in_the_store,
    another_graph_in_the_store,
    another_model_in_the_store,
    no_proof_of_the_export,
    a_folder_that_is_none,
]


@pytest.mark.parametrize("spoil", SPOILS)
def test_what_cannot_be_promoted_leaves_target_and_alias(
    world: World, spoil: Callable[[World], type[HaechiError]]
) -> None:
    error = spoil(world)
    with pytest.raises(error) as caught:
        world.promote("second")
    assert caught.value.remedy
    assert world.at() == ("first", "first")
    assert (Path(world.target.path) / "current" / "model.onnx").is_file()
    world.champion_is("second")
    assert "cannot be followed now: " in world.round()
    assert world.at() == ("first", "second")
    world.promote("third")
    assert world.at() == ("third", "third")


@pytest.mark.parametrize(
    ("made", "told"),
    [(False, r"bucket 'other-.*' does not exist.*HAECHI_BUCKET"), (True, "s3://other-.* is not .*Check the bucket")],
)
def test_a_wrong_bucket_is_what_promote_tells_of(world: World, made: bool, told: str) -> None:
    right = world.settings
    world.settings = replace(right, bucket=f"other-{uuid.uuid4().hex[:8]}")
    if made:
        Store(world.settings).ensure_bucket()
    with pytest.raises((StorageError, ModelError), match=told):
        world.promote("second")
    world.settings = right
    assert world.at() == ("first", "first")


@pytest.mark.parametrize(
    "version", ["x" * 400, "../../etc", "a\nb", "0" * 11], ids=["long", "a path", "lines", "short"]
)
def test_a_champion_whose_version_is_none_keeps_no_other_model_from_its_turn(world: World, version: str) -> None:
    name, tracker = f"odd-{world.name}", Tracker(world.settings)
    client = tracker._client
    client.create_registered_model(name)
    tags = {"haechi.version": version}
    number = client.create_model_version(name, "s3://haechi/elsewhere", await_creation_for=0, tags=tags).version
    client.set_registered_model_alias(name, "champion", number)
    world.champion_is("second")
    found = operations.reconcile(world.settings, [(name, world.target), (world.name, world.target)], 0)
    assert "has a tag haechi.version that is no version of ours" in found[name]
    assert found[world.name] == f"champion {world.versions['second']} serves"


def test_a_fault_that_nobody_foresaw_keeps_no_other_model_from_its_turn(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alias = Tracker.alias

    def broken(tracker: Tracker, name: str, wanted: str) -> Any:
        return alias(tracker, name, wanted) if name == world.name else {}["nothing"]

    monkeypatch.setattr(Tracker, "alias", broken)
    world.champion_is("second")
    found = operations.reconcile(world.settings, [("odd", world.target), (world.name, world.target)], 0)
    assert found["odd"] == "cannot be followed now: KeyError: 'nothing'"
    assert found[world.name] == f"champion {world.versions['second']} serves"
    assert "in broken" in capsys.readouterr().err, "where it happened is for us to see"


def test_a_former_model_whose_storage_is_gone_is_told_and_the_champion_stays(world: World) -> None:
    world.promote("second")
    Store(world.settings).remove(f"{model_prefix(world.name, world.versions['first'])}model.json")
    with pytest.raises(ModelError, match=world.versions["first"]):
        world.rollback()
    assert world.at() == ("second", "second")


def test_what_fails_at_a_folder_is_tried_again_by_each_round_and_by_a_new_process(world: World) -> None:
    """It says nothing of the model: a disk that was full, a folder that somebody spoilt."""
    damaged = Path(world.target.path) / "versions" / world.versions["second"]
    damaged.mkdir()
    world.champion_is("second")
    for _ in range(2):
        assert world.round().startswith("cannot be followed now: ")
        assert world.at() == ("first", "second")
    damaged.rmdir()
    assert world.round().endswith(" serves")
    assert world.at() == ("second", "second")


@pytest.mark.parametrize("world", [in_git], indirect=True)
def test_a_repository_that_is_away_for_a_while_is_no_fault_of_the_model(world: World) -> None:
    bare = Path(world.target.repository)
    world.champion_is("second")
    hidden = bare.rename(bare.with_name("hidden"))
    for _ in range(2):
        assert world.round().startswith("cannot be followed now: git could not fetch")
    hidden.rename(bare)
    assert world.round().endswith(" serves")
    assert world.at() == ("second", "second")


@pytest.mark.parametrize("world", [in_git], indirect=True)
def test_a_push_that_is_refused_leaves_the_alias(world: World) -> None:
    hook = Path(world.target.repository) / "hooks" / "pre-receive"
    hook.write_text("#!/bin/sh\necho protected branch hook declined >&2\nexit 1\n")
    hook.chmod(0o755)
    with pytest.raises(DeployError, match="git could not push"):
        world.promote("second")
    assert world.at() == ("first", "first")
    hook.unlink()
    world.promote("second")
    assert world.at() == ("second", "second")


def test_a_link_that_names_nothing_is_told_and_mended(world: World) -> None:
    shutil.rmtree(Path(world.target.path) / "versions" / world.versions["first"])
    found = operations.status(world.settings, world.name, world.target)
    assert (found["served"]["ready"], found["in_sync"]) == (False, False)
    assert any("a folder that is gone" in line for line in operations.status_lines(found))
    assert world.round().endswith(" serves")
    assert world.at() == ("first", "first")


def test_the_verbs_work_on_a_workdir_of_one_machine(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("HAECHI_S3_ENDPOINT", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    workdir, served = tmp_path / "work", tmp_path / "served"
    rest = ["--target", f"dir:{served}", "--workdir", str(workdir)]
    started = up(workdir)
    try:
        Store(started.settings()).ensure_bucket()
        versions = register(started.settings(), "entrance", folders)
        for which in ("first", "second"):
            assert main(["promote", "entrance", versions[which][:6], *rest]) == 0
            assert (served / "current").readlink().name == versions[which]
        assert main(["rollback", "entrance", *rest]) == 0
        assert (served / "current").readlink().name == versions["first"]
        capsys.readouterr()
        assert main(["status", "entrance", *rest, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert (told["champion"], told["in_sync"]) == (versions["first"], True)
        assert main(["reconcile", f"entrance=dir:{served}", "--once", "--workdir", str(workdir)]) == 0
        assert main(["promote", "entrance", "0000", *rest]) == InputError.exit_code
        for name, value in CLUSTER.items():
            monkeypatch.setenv(name, value)
        with operations.settings_of(workdir) as found:
            assert (found.s3_endpoint, found.mlflow_tracking_uri) == (*CLUSTER.values(),), "the environment goes first"
    finally:
        down(workdir)


def test_the_status_of_a_namespace_that_is_not_there_is_an_error(
    settings: Settings, mlflow_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    settings = replace(settings, mlflow_tracking_uri=mlflow_uri)

    def waits(namespace: str) -> str:
        found = operations.status(settings, "safety", Target("kserve", namespace=namespace, name="safety"))
        return str(found["served"]["waits"])

    with ClusterStandIn(["models"]) as cluster:
        path = str(cluster.write_kubeconfig(tmp_path / "kubeconfig"))
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", path)
        assert waits("models") == "there is no such InferenceService"
        with pytest.raises(DeployError, match="namespace 'model' does not exist"):
            waits("model")
        cluster.refuse["GET namespace"] = (403, 'namespaces "model" is forbidden: User "one" cannot get resource')
        assert waits("model") == "there is no such InferenceService", "nobody may tell"


CLUSTER = {"HAECHI_S3_ENDPOINT": "http://127.0.0.1:9", "MLFLOW_TRACKING_URI": "http://127.0.0.1:7"}
STORE, MLFLOW = CLUSTER
KSERVE = "kserve:haechi-serving/safety"


@pytest.mark.parametrize(
    ("named", "target", "told"),
    [
        ([STORE], "none", f"{MLFLOW} is not set, and the other one is"),
        ([MLFLOW], "none", f"{STORE} is not set, and the other one is"),
        ([MLFLOW], KSERVE, f"{STORE} is not set, and {KSERVE} needs"),
        ([], KSERVE, f"{STORE} and {MLFLOW} are not set, and {KSERVE} needs"),
    ],
)
@pytest.mark.parametrize("verb", ["status", "promote", "rollback", "reconcile"])
def test_no_empty_services_stand_in_for_those_of_a_cluster(
    verb: str,
    named: list[str],
    target: str,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in CLUSTER.items():
        monkeypatch.setenv(name, value if name in named else "")
    workdir = tmp_path / "work"
    words = {
        "promote": ["safety", "3f2a", "--target", target],
        "reconcile": [f"safety={target if target == KSERVE else f'dir:{tmp_path}'}", "--once"],
    }.get(verb, ["safety", "--target", target])
    assert main([verb, *words, "--workdir", str(workdir)]) == SettingsError.exit_code
    assert told in capsys.readouterr().err
    assert not workdir.exists()
