"""promote, rollback, status and the reconciler: real MLflow, real store, real API server, real runtimes behind Services."""

from __future__ import annotations

import re
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from api_server import ApiServer
from canary_world import until
from kserve_stand_in import NEVER, KserveStandIn
from kserve_webhook import KserveWebhook
from pod_network import PodNetwork
from tiny_models import tiny_model_folder

from haechi.components.deploy.inference_service import Patience
from haechi.components.deploy.kubernetes_api import InferenceServiceApi
from haechi.components.deploy.lease import Lease
from haechi.components.deploy.publish import publish
from haechi.components.deploy.reconciler import SITUATION, Pair, Reconciler
from haechi.components.deploy.rollout import Rollout
from haechi.components.deploy.rollout_state import RolloutState
from haechi.components.deploy.target import Target
from haechi.components.shared.errors import DeployError, InputError
from haechi.components.shared.model_folder import ModelFolder
from haechi.components.shared.settings import Settings
from haechi.components.shared.storage import Store
from haechi.components.shared.tracking import Tracker
from haechi.pipelines import operations
from tests.serving_process import running

pytestmark = pytest.mark.e2e

QUICK = Patience(timeout=30, poll=0.05, blocked=0.3)
NAMES = ("first", "second", "third")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[ModelFolder, Path, str]]]:
    """Three models and their runtimes' URLs; the third has none."""
    root = tmp_path_factory.mktemp("models")
    made = {
        name: (tiny_model_folder(root / name, ["person"], name="entrance", shift=shift), root / name)
        for shift, name in enumerate(NAMES)
    }
    with (
        running(root / "first", "--name", "entrance") as one,
        running(root / "second", "--name", "entrance") as two,
    ):
        urls = {"first": one.url, "second": two.url, "third": ""}
        yield {name: (*made[name], urls[name]) for name in NAMES}


@dataclass
class World:
    """Three registered models called `entrance`, and the service of that name."""

    cluster: ApiServer
    namespace: str
    kserve: KserveStandIn
    network: PodNetwork
    settings: Settings
    versions: dict[str, str]
    patience: Patience = QUICK

    @property
    def target(self) -> Target:
        return Target("kserve", namespace=self.namespace, name="entrance")

    @property
    def rollout(self) -> Rollout:
        return Rollout(steps=(50,), bake=0.1, poll=0.05, address=self.network.address)

    def round(self) -> str:
        """One round of a reconciler that was just started, as in a CronJob."""
        pairs = [("entrance", self.target)]
        return operations.reconcile(self.settings, pairs, 0, self.rollout, self.patience)["entrance"]

    def promote(self, name: str, target: Target | None = None, **options: Any) -> dict[str, Any]:
        version = self.versions[name][:8]
        options = {"rollout": self.rollout, "patience": self.patience, **options}
        return operations.promote(self.settings, "entrance", version, target, **options)

    def rollback(self, **options: Any) -> dict[str, Any]:
        return operations.rollback(
            self.settings, "entrance", self.target, self.rollout, patience=self.patience, **options
        )

    def status(self) -> dict[str, Any]:
        return operations.status(self.settings, "entrance", self.target)

    def champion_is(self, name: str) -> None:
        """What a person does in MLflow's page."""
        tracker = Tracker(self.settings)
        (found,) = tracker.versions("entrance", self.versions[name])
        tracker.set_alias("entrance", "champion", found.number)

    def situation(self, name: str) -> str:
        (found,) = Tracker(self.settings).versions("entrance", self.versions[name])
        return found.tags.get(SITUATION, "")

    def alias(self) -> str:
        found = Tracker(self.settings).alias("entrance", "champion")
        assert found is not None
        return {version: name for name, version in self.versions.items()}[found.version]

    def serving(self) -> str:
        """The model that the pods serve."""
        own = self.service()["spec"]["predictor"].get("name", "")
        uri = self.kserve.serving("-".join(part for part in ("entrance", own, "predictor") if part))
        return {version: name for name, version in self.versions.items()}.get(uri.rsplit("/", 1)[-1], uri)

    def service(self) -> dict[str, Any]:
        path = f"/apis/serving.kserve.io/v1beta1/namespaces/{self.namespace}/inferenceservices/entrance"
        return self.cluster.get(path)

    def uri(self, name: str) -> str:
        return f"s3://{self.settings.bucket}/models/entrance/{self.versions[name]}"


@pytest.fixture
def world(
    cluster: ApiServer,
    namespace: str,
    runner: str,
    webhook: KserveWebhook,
    kserve: KserveStandIn,
    settings: Settings,
    store: Store,
    mlflow_uri: str,
    folders: dict[str, tuple[ModelFolder, Path, str]],
) -> Iterator[World]:
    """All three stored and registered; the first one is champion and serves."""
    settings = replace(settings, mlflow_tracking_uri=mlflow_uri)
    versions = {}
    for name, (model, folder, _) in folders.items():
        publish(store, model, folder)
        uri = f"s3://{settings.bucket}/models/entrance/{model.version}"
        Tracker(settings).register("entrance", model.version, uri, "", {"haechi.verdict": "refuse"})
        versions[name] = model.version
    runtimes = {
        f"s3://{settings.bucket}/models/entrance/{model.version}": url for model, _, url in folders.values() if url
    }
    grant_routes(cluster, namespace)
    kserve.gateway = True
    with PodNetwork(kserve, runtimes) as network:
        world = World(cluster, namespace, kserve, network, settings, versions)
        world.champion_is("first")
        assert world.round().endswith(" serves")
        until(lambda: "HTTPRoute" in route(world))
        yield world
    Tracker(settings)._client.delete_registered_model("entrance")


def grant_routes(cluster: ApiServer, namespace: str) -> None:
    """The right that the option gateway-canary gives."""
    group, meta = "rbac.authorization.k8s.io", {"name": "routes", "namespace": namespace}
    rule = {"apiGroups": ["gateway.networking.k8s.io"], "resources": ["httproutes"], "verbs": ["get", "list"]}
    cluster.apply({"apiVersion": f"{group}/v1", "kind": "Role", "metadata": meta, "rules": [rule]})
    subjects = [{"kind": "ServiceAccount", "name": "pipeline-runner", "namespace": "kubeflow"}]
    role = {"apiGroup": group, "kind": "Role", "name": "routes"}
    binding = {"apiVersion": f"{group}/v1", "kind": "RoleBinding", "metadata": meta, "roleRef": role}
    cluster.apply({**binding, "subjects": subjects})


def route(world: World) -> str:
    path = f"/apis/gateway.networking.k8s.io/v1/namespaces/{world.namespace}/httproutes/entrance"
    return str(world.cluster.request("GET", path).body.get("kind"))


# --- the reconciler ---------------------------------------------------------------------------------------------------


def test_an_alias_that_a_person_moves_is_followed_through_a_canary(world: World) -> None:
    assert world.round() == f"champion {world.versions['first']} is what the target names"
    world.champion_is("second")
    assert world.round() == f"champion {world.versions['second']} serves"
    until(lambda: world.serving() == "second")
    state = RolloutState.of(world.service())
    assert (state.phase, state.strategy) == ("done", "canary")
    assert world.situation("second").startswith("serving at reconciler ")
    assert world.status()["former"] == world.versions["first"]
    assert world.status()["in_sync"] is True


def test_a_champion_that_fails_is_not_tried_again_until_the_alias_changes(world: World) -> None:
    world.kserve.fates[world.uri("third")] = NEVER
    world.patience = replace(QUICK, timeout=1.5)
    world.champion_is("third")
    assert "did not become ready" in world.round()
    assert world.serving() == "first"
    assert world.situation("third").startswith("failed: ")
    assert (world.alias(), world.status()["in_sync"]) == ("third", False), "a person's alias is nobody else's to move"
    generation = world.service()["metadata"]["generation"]
    assert "is not tried again until the alias changes: InferenceService" in world.round(), "nor by a new process"
    assert world.service()["metadata"]["generation"] == generation
    world.patience = QUICK
    world.champion_is("second")
    assert world.round().endswith(" serves")
    until(lambda: world.serving() == "second")
    del world.kserve.fates[world.uri("third")]
    world.network._runtimes[world.uri("third")] = world.network._runtimes[world.uri("first")]
    world.champion_is("third")
    assert "serves model" in world.round(), "it is tried again, and now its pods answer as another model"
    assert world.serving() == "second"


def test_a_champion_that_failed_and_comes_back_is_tried_though_nothing_else_was_deployed(world: World) -> None:
    world.kserve.fates[world.uri("second")] = NEVER
    world.patience = replace(QUICK, timeout=1.5)
    world.champion_is("second")
    assert "did not become ready" in world.round()
    world.champion_is("first")
    assert world.round() == f"champion {world.versions['first']} is what the target names"
    del world.kserve.fates[world.uri("second")]
    world.patience = QUICK
    world.champion_is("second")
    assert world.round().endswith(" serves")
    until(lambda: world.serving() == "second")


def test_a_failed_promotion_by_hand_is_nothing_against_the_alias(world: World) -> None:
    world.kserve.fates[world.uri("second")] = NEVER
    with pytest.raises(DeployError, match="has all traffic again"):
        world.promote("second", world.target, patience=replace(QUICK, timeout=1.5))
    del world.kserve.fates[world.uri("second")]
    world.champion_is("second")
    assert world.round().endswith(" serves")
    until(lambda: world.serving() == "second")


def test_a_missing_right_is_no_fault_of_the_model(world: World) -> None:
    cluster, path = (
        world.cluster,
        f"/apis/rbac.authorization.k8s.io/v1/namespaces/{world.namespace}/roles/haechi-deploy",
    )
    role = cluster.get(path)
    less = [rule for rule in role["rules"] if "serving.kserve.io" not in rule["apiGroups"]]
    reading = {"apiGroups": ["serving.kserve.io"], "resources": ["inferenceservices"], "verbs": ["get"]}
    cluster.request("PATCH", path, {"rules": [*less, reading]}, kind="application/merge-patch+json")
    world.champion_is("second")
    until(lambda: "cannot be followed now: we may not patch" in world.round())
    assert world.serving() == "first"
    cluster.request("PATCH", path, {"rules": role["rules"]}, kind="application/merge-patch+json")
    until(lambda: world.round().endswith((" serves", "is what the target names")))
    until(lambda: world.serving() == "second")


def test_a_target_that_a_pipeline_deploys_to_is_left_to_it(world: World) -> None:
    api = InferenceServiceApi(world.namespace, "entrance")
    world.champion_is("second")
    with Lease(api, "run 7"):
        assert world.round() == "run 7 is deploying; waiting until that has ended"
        assert world.serving() == "first"
    assert world.round().endswith(" serves")


def test_an_alias_that_moves_while_the_target_is_awaited_is_seen(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipeline that lets the target go between our look at MLflow and our turn has moved the alias itself."""
    world.champion_is("second")
    enter = Lease.__enter__

    def late(self: Lease) -> Lease:
        world.champion_is("first")
        return enter(self)

    monkeypatch.setattr(Lease, "__enter__", late)
    assert world.round() == "the alias changed meanwhile; the next round follows it"
    assert (world.serving(), RolloutState.of(world.service()).version) == ("first", world.versions["first"])


def no_folder(world: World) -> str:
    world.champion_is("third")
    store = Store(world.settings)
    store.remove(f"models/entrance/{world.versions['third']}/model.json")
    return "cannot be followed now: .* is not a model folder"


def not_ours(world: World) -> str:
    client = Tracker(world.settings)._client
    number = client.create_model_version("entrance", "s3://elsewhere/model", await_creation_for=0).version
    client.set_registered_model_alias("entrance", "champion", number)
    return "which Haechi did not register; nothing is changed"


def none_at_all(world: World) -> str:
    Tracker(world.settings)._client.delete_registered_model_alias("entrance", "champion")
    return "MLflow names no champion, so nothing is changed"


def no_cluster(world: World) -> str:
    world.champion_is("second")
    world.namespace = f"not-there-{uuid.uuid4().hex[:6]}"
    return "cannot be followed now: we may not get"


@pytest.mark.parametrize("spoil", [no_folder, not_ours, none_at_all, no_cluster])
def test_what_cannot_be_followed_is_said_and_changes_nothing(world: World, spoil: Callable[[World], str]) -> None:
    namespace, generation = world.namespace, world.service()["metadata"]["generation"]
    expected = spoil(world)
    assert re.search(expected, world.round())
    world.namespace = namespace
    assert world.service()["metadata"]["generation"] == generation
    assert world.serving() == "first"


def test_the_loop_follows_and_says_each_thing_once(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    bringer = operations._bringer(world.settings, world.target, world.rollout, QUICK)
    reconciler, rounds = Reconciler([Pair("entrance", bringer)]), iter(range(5))

    def stop() -> bool:
        number = next(rounds)
        if number == 2:
            world.champion_is("second")
        return number == 4

    capsys.readouterr()
    reconciler.run(0.01, stop)
    said = capsys.readouterr().err
    assert said.count(f"champion {world.versions['first']} is what the target names") == 1
    assert said.count(f"champion {world.versions['second']} serves") == 1


# --- a person's hand --------------------------------------------------------------------------------------------------


def test_promote_moves_target_and_alias_and_rollback_takes_both_back(world: World) -> None:
    done = world.promote("second", world.target)
    assert done == {
        "name": "entrance",
        "version": world.versions["second"],
        "former": world.versions["first"],
        "target": f"kserve:{world.namespace}/entrance",
    }
    assert (world.serving(), world.alias()) == ("second", "second")
    assert world.rollback()["version"] == world.versions["first"]
    until(lambda: world.serving() == "first")
    assert world.alias() == "first"
    assert world.round() == f"champion {world.versions['first']} is what the target names"


def test_promote_without_a_target_is_the_reconcilers_work(world: World) -> None:
    world.promote("second")
    assert (world.serving(), world.alias()) == ("first", "second")
    assert world.status()["in_sync"] is False
    assert world.round().endswith(" serves")
    assert world.rollback()["version"] == world.versions["first"], "the reconciler keeps whom a champion follows"


def test_a_promotion_that_fails_leaves_the_alias(world: World) -> None:
    world.kserve.fates[world.uri("third")] = NEVER
    with pytest.raises(DeployError, match="has all traffic again"):
        world.promote("third", world.target, patience=replace(QUICK, timeout=1.5))
    assert (world.serving(), world.alias()) == ("first", "first")
    found = world.status()
    assert (found["served"]["state"]["phase"], found["in_sync"]) == ("failed", True)
    lines = operations.status_lines(found)
    assert any("failed since" in line and "did not become ready" in line for line in lines)


def test_rollback_takes_a_running_canary_over(world: World) -> None:
    failed: list[DeployError] = []

    def deploying() -> None:
        try:
            world.promote(
                "second", world.target, rollout=replace(world.rollout, bake=60.0), patience=replace(QUICK, lease=5)
            )
        except DeployError as error:
            failed.append(error)

    thread = threading.Thread(target=deploying)
    thread.start()
    until(lambda: RolloutState.of(world.service()).traffic == 50)
    found = world.status()
    assert (found["served"]["canary"], found["served"]["traffic"]) == (world.versions["second"], 50)
    assert found["served"]["holder"]
    world.patience = replace(QUICK, lease=60)
    assert world.rollback(take_over=True)["version"] == world.versions["first"]
    thread.join()
    assert failed
    assert (world.serving(), world.alias(), world.status()["served"]["canary"]) == ("first", "first", "")


def test_without_a_former_champion_rollback_asks_for_one(world: World) -> None:
    with pytest.raises(InputError, match=r"no champion of 'entrance' before .* is known") as caught:
        world.rollback()
    assert "haechi promote entrance VERSION" in caught.value.remedy


def test_a_version_that_is_none_is_told_with_those_that_are(world: World) -> None:
    with pytest.raises(InputError, match="'0000' is no version of model 'entrance'") as caught:
        operations.promote(world.settings, "entrance", "0000")
    assert world.versions["third"] in caught.value.remedy
