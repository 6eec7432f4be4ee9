"""A canary on a real API server, with real runtimes behind its Services: what moves traffic, and what takes it back."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from canary_world import HASTY, QUICK, STEADY, STEPS, Models, Place, until
from kserve_stand_in import NEVER, Fate
from kserve_webhook import MODE, KserveWebhook
from tiny_models import tiny_model_folder

from haechi.components.deploy.inference_service import Patience, manifest
from haechi.components.deploy.job import Job
from haechi.components.deploy.kubernetes_api import MANAGER, Conflict
from haechi.components.deploy.lease import Busy, Lease, LeaseLost
from haechi.components.deploy.rollout import Rollout
from haechi.components.deploy.rollout_state import RolloutState
from haechi.components.shared.errors import DeployError, DeployRefused
from haechi.components.shared.files import read_json, write_json
from haechi.components.shared.model_folder import ModelFolder
from tests.serving_process import running

pytestmark = pytest.mark.e2e


@pytest.fixture
def serving_old(place: Place, models: Models) -> Iterator[Place]:
    """A place where the old model serves, and must serve again, alone, when the test ends."""
    assert place.deploy(models.old) == "rolling"
    until(lambda: place.only(models.old))
    yield place
    until(lambda: place.only(models.old))


# --- the way to the end ----------------------------------------------------------------------------------------------


def test_a_model_gets_its_traffic_step_by_step_and_then_all(place: Place, models: Models) -> None:
    place.deploy(models.old)
    canary, seen = f"entrance-v-{models.new.version}-predictor", []

    def watch(path: str) -> None:
        if canary in path and path.endswith("infer?conf=0.1&iou=0.7"):
            seen.append(place.shares().get(canary, 0))

    place.network.watch = watch
    made = len(place.kserve.made)
    assert place.deploy(models.new) == "canary"
    assert sorted(set(seen)) == [0, 10, 50, 100], "it is asked before it gets any, and at every step"
    until(lambda: place.only(models.new))
    assert place.kserve.made[made:] == [(canary, models.uri(models.new))], "no pod is made but the canary's"
    assert place.service()["spec"]["predictor"]["name"] == f"v-{models.new.version}"
    assert place.service()["metadata"]["labels"]["app.kubernetes.io/version"] == models.new.version
    state = place.state()
    assert (state.phase, state.version, state.former) == ("done", models.new.version, models.uri(models.old))
    place.network.watch = lambda path: None
    # And back: the next canary stands beside the promoted one.
    assert place.deploy(models.old, replace(STEPS, steps=())) == "canary"
    until(lambda: place.only(models.old))


def test_a_service_of_a_former_version_of_deploy_keeps_its_pods(place: Place, models: Models) -> None:
    """Its predictor says nothing of its own, so its pods have the service's annotations, and the note of that time."""
    place.deploy(models.old)
    before = place.service()
    for field in ("labels", "annotations"):
        del before["spec"]["predictor"][field]
    path = f"{place._path('entrance')}?fieldManager={MANAGER}"
    assert place.cluster.request("PUT", path, before).status == 200
    until(lambda: len(place.kserve.made) == 2)
    until(lambda: place.only(models.old))
    assert place.deploy(models.old) == ""
    assert place.deploy(models.new, replace(STEPS, steps=(50,))) == "canary"
    until(lambda: place.only(models.new))
    canary = (f"entrance-v-{models.new.version}-predictor", models.uri(models.new))
    assert place.kserve.made[2:] == [canary]


@pytest.mark.parametrize("steps", [(), (10,)])
def test_all_traffic_is_with_the_canary_before_the_former_goes(
    place: Place, models: Models, steps: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    place.deploy(models.old)
    apply, shares = Job.apply, []

    def watch(job: Job, body: dict[str, Any], state: RolloutState) -> None:
        if state.phase == "promoting":
            shares.append(place.shares())
        apply(job, body, state)

    monkeypatch.setattr(Job, "apply", watch)
    place.deploy(models.new, replace(STEPS, steps=steps))
    assert shares[0] == {"entrance-predictor": 0, f"entrance-v-{models.new.version}-predictor": 100}
    until(lambda: place.only(models.new))


def test_a_canary_has_its_pods_before_it_has_their_traffic(
    place: Place, models: Models, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place.deploy(models.old)
    place.apply_as("operations", {"predictor": {"minReplicas": 3}})
    place.kserve.scales_after = 0.5
    canary, apply, pods = f"entrance-v-{models.new.version}-predictor", Job.apply, {}

    def watch(job: Job, body: dict[str, Any], state: RolloutState) -> None:
        found = place.kserve.deployment(canary)
        for entry in body["spec"].get("canary") or []:
            if found and entry["trafficPercent"] > place.shares().get(canary, 0):
                pods[entry["trafficPercent"]] = found["status"]["availableReplicas"]
        apply(job, body, state)

    monkeypatch.setattr(Job, "apply", watch)
    assert place.deploy(models.new, STEPS) == "canary"
    assert pods == {10: 1, 50: 2, 100: 3}
    until(lambda: place.only(models.new))
    told = "KServe takes the canary's pods from the 3 of the stable model, since spec.predictor.maxReplicas is not set"
    assert told in capsys.readouterr().err
    place.apply_as("operations", {"predictor": {"minReplicas": 3, "maxReplicas": 6}})
    assert place.deploy(models.old, STEPS) == "canary"
    assert told not in capsys.readouterr().err


def test_a_service_that_has_grown_does_not_shrink_to_a_canary(
    place: Place, models: Models, capsys: pytest.CaptureFixture[str]
) -> None:
    place.deploy(models.old)
    stable, canary = "entrance-predictor", f"entrance-v-{models.new.version}-predictor"
    grown(place, stable)
    with pytest.raises(
        DeployRefused, match="the stable model has 3 pods now, and a canary no more than minReplicas, 1"
    ):
        place.deploy(models.new, replace(STEPS, strategy="canary"))
    assert place.deploy(models.new) == "shadow"
    assert "NO CANARY: the stable model has 3 pods now" in capsys.readouterr().err
    found = place.kserve.deployment(stable)
    assert found is not None
    assert found["status"]["availableReplicas"] == 3, "all of them were replaced, none was taken"
    # And where it grows while a canary is under way, the canary gets no more of the traffic.
    canary = f"entrance-v-{models.old.version}-predictor"
    place.network.watch = lambda path: grown(place, stable) if place.shares().get(canary) == 10 else None
    shrunk(place, stable)
    with pytest.raises(
        DeployError, match=r"before 50 % of traffic: the stable model has 3 pods .*all traffic"
    ) as caught:
        place.deploy(models.old, replace(STEPS, strategy="canary"))
    assert "minReplicas" in caught.value.remedy
    until(lambda: place.only(models.new))
    shrunk(place, stable)
    assert place.deploy(models.old) == "shadow"
    assert "NO CANARY: before 50 % of traffic" in capsys.readouterr().err
    until(lambda: place.only(models.old))
    assert not place.state().unsplit, "the next one has its canary again"


def grown(place: Place, deployment: str) -> None:
    place.kserve.grown[deployment] = 3
    until(lambda: _pods(place, deployment) == 3)


def shrunk(place: Place, deployment: str) -> None:
    del place.kserve.grown[deployment]
    until(lambda: _pods(place, deployment) == 1)


def _pods(place: Place, deployment: str) -> int:
    found = place.kserve.deployment(deployment)
    return int(found["status"]["availableReplicas"]) if found else 0


def test_an_autoscaler_that_knows_the_deployment_by_name_keeps_it(
    place: Place, models: Models, capsys: pytest.CaptureFixture[str]
) -> None:
    """A canary is promoted under a name of its own, which such a one does not scale."""
    place.deploy(models.old)
    notes = {"metadata": {"annotations": {"serving.kserve.io/autoscalerClass": "external"}}}
    kind = "application/merge-patch+json"
    assert place.cluster.request("PATCH", place._path("entrance"), notes, kind=kind).status == 200
    until(lambda: "external" in str((place.kserve.deployment("entrance-predictor") or {})["metadata"]["annotations"]))
    until(lambda: place.only(models.old))
    assert place.deploy(models.new) == "shadow"
    assert "NO CANARY: serving.kserve.io/autoscalerClass is 'external'" in capsys.readouterr().err
    assert place.kserve.deployment("entrance-predictor")


def test_a_service_that_may_have_no_pod_gets_its_canary(place: Place, models: Models) -> None:
    """KServe refuses a canary with more pods than minReplicas, which is 0 here."""
    place.deploy(models.old)
    place.apply_as("operations", {"predictor": {"minReplicas": 0}})
    assert place.deploy(models.new, replace(STEPS, steps=(50,))) == "canary"
    until(lambda: place.only(models.new))


def test_no_traffic_is_with_a_worse_canary_when_it_goes(
    serving_old: Place, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    many_failures(serving_old, models)
    apply, shares = Job.apply, []

    def watch(job: Job, body: dict[str, Any], state: RolloutState) -> None:
        if state.phase == "failed":
            shares.append(serving_old.shares())
        apply(job, body, state)

    monkeypatch.setattr(Job, "apply", watch)
    with pytest.raises(DeployError, match="requests failed"):
        serving_old.deploy(models.new, replace(STEPS, steps=(50,), bake=1.0), STEADY)
    assert shares == [{"entrance-predictor": 100, f"entrance-v-{models.new.version}-predictor": 0}]


def test_deploying_the_same_again_changes_nothing_but_is_asked(serving_old: Place, models: Models) -> None:
    before = serving_old.service()["metadata"]["generation"]
    asked = serving_old.network.asked[models.uri(models.old)]
    assert serving_old.deploy(models.old) == ""
    assert serving_old.service()["metadata"]["generation"] == before
    assert serving_old.network.asked[models.uri(models.old)] > asked


# --- each of these ends with the old model serving, and a reason ------------------------------------------------------


def never_ready(place: Place, models: Models) -> None:
    place.kserve.fates[models.uri(models.new)] = NEVER


def unreachable_storage(place: Place, models: Models) -> None:
    place.kserve.fates[models.uri(models.new)] = Fate(load_error="NoSuchKey: model.onnx")


def another_model_answers(place: Place, models: Models) -> None:
    place.network._runtimes[models.uri(models.new)] = models.urls[models.uri(models.old)]


def many_failures(place: Place, models: Models) -> None:
    place.network.failing = {models.uri(models.new): 0.5, models.uri(models.old): 0.01}


def mad_under_traffic(place: Place, models: Models) -> None:
    def watch(path: str) -> None:
        if place.shares().get(f"entrance-v-{models.new.version}-predictor"):
            place.network.broken[models.uri(models.new)] = 500

    place.network.watch = watch


def crashing_under_traffic(place: Place, models: Models) -> None:
    def watch(path: str) -> None:
        if place.shares().get(f"entrance-v-{models.new.version}-predictor"):
            place.kserve.fates[models.uri(models.new)] = Fate(ready_after=0.0, fails_after=0.0)

    place.network.watch = watch


def route_that_stays(place: Place, models: Models) -> None:
    """It names the canary, and then nobody changes it any more."""
    canary = f"entrance-v-{models.new.version}-predictor"

    def watch(path: str) -> None:
        if canary in path:
            until(lambda: canary in place.shares())
            place.kserve.gateway = False

    place.network.watch = watch


def gateway_that_sleeps(place: Place, models: Models) -> None:
    place.kserve.gateway_sees = False


def sleeping_controller(place: Place, models: Models) -> None:
    place.kserve.asleep = True


# Those that are waited for in vain have little patience; the others must not depend on haste.
WORSE = [
    (never_ready, HASTY, r"did not become ready in .* s: 0 of 1 pods"),
    (unreachable_storage, QUICK, r"storage-initializer: CrashLoopBackOff NoSuchKey: model\.onnx"),
    (another_model_answers, QUICK, r"serves model {old}, not {new}"),
    (
        many_failures,
        QUICK,
        r"at 10 % of traffic: \d\d\.\d% of the canary's \d+ requests failed, [01]\.\d% of the stable",
    ),
    (mad_under_traffic, QUICK, r"answered 500: the graph went mad"),
    (crashing_under_traffic, QUICK, r"the canary is no longer ready: .*0 of 1 pods"),
    (route_that_stays, HASTY, r"HTTPRoute entrance gives it \[0\], not 10 %"),
    (gateway_that_sleeps, HASTY, r"HTTPRoute entrance gives it \[10\], and the gateway has not seen its last change"),
    (sleeping_controller, HASTY, r"controller has not looked at it yet"),
]


@pytest.mark.parametrize(("spoil", "patience", "message"), WORSE, ids=[spoil.__name__ for spoil, *_ in WORSE])
def test_a_worse_canary_is_withdrawn_and_the_next_run_goes_on(
    place: Place, models: Models, spoil: Callable[[Place, Models], None], patience: Patience, message: str
) -> None:
    place.deploy(models.old)
    until(lambda: place.only(models.old))
    spoil(place, models)
    message = message.replace("{old}", models.old.version).replace("{new}", models.new.version)
    with pytest.raises(DeployError, match=message) as caught:
        place.deploy(models.new, replace(STEPS, bake=0.5 if spoil is many_failures else 10.0), patience)
    assert f"{models.uri(models.old)} has all traffic again" in str(caught.value)
    assert caught.value.remedy
    state = place.state()
    assert (state.phase, state.version) == ("failed", models.new.version)
    assert state.reason in str(caught.value)
    mend(place, models)
    until(lambda: place.only(models.old))
    assert place.deploy(models.new, replace(STEPS, steps=())) == "canary"
    until(lambda: place.only(models.new))


def mend(place: Place, models: Models) -> None:
    place.kserve.fates.clear()
    place.kserve.gateway, place.kserve.gateway_sees, place.kserve.asleep = True, True, False
    place.network.failing, place.network.broken = {}, {}
    place.network.watch = lambda path: None
    place.network._runtimes = dict(models.urls)


def test_other_boxes_than_the_golden_ones_get_no_traffic(serving_old: Place, models: Models, tmp_path: Path) -> None:
    shutil.copytree(models.folders[models.new.version], tmp_path / "model")
    golden = read_json(tmp_path / "model/golden/golden.json")
    for box in golden["images"][0]["boxes"]:
        box["box"] = [value + 3 for value in box["box"]]
    write_json(tmp_path / "model/golden/golden.json", golden)
    with pytest.raises(DeployError, match=r"gives other boxes than the golden ones.*corners up to 3\.00 px"):
        serving_old.deploy(models.new, folder=tmp_path / "model")
    assert serving_old.state().phase == "failed"


def test_disagreement_is_a_reason_where_it_is_limited(serving_old: Place, models: Models, tmp_path: Path) -> None:
    far = tiny_model_folder(tmp_path / "far", ["person"], name="entrance", shift=24)
    with running(tmp_path / "far", "--name", "entrance") as server:
        serving_old.network._runtimes[models.uri(far)] = server.url
        with pytest.raises(DeployError, match=r"100\.0% of the boxes on the golden images are found by only one"):
            serving_old.deploy(far, replace(STEPS, max_disagreement=0.5), folder=tmp_path / "far")


def test_a_promotion_that_does_not_serve_is_undone(
    serving_old: Place, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply = Job.apply

    def apply_and_break(job: Job, body: dict[str, Any], state: RolloutState) -> None:
        if state.phase == "promoting":
            serving_old.kserve.fates[models.uri(models.new)] = NEVER
            until(lambda: not serving_old.service()["status"]["canaryStatuses"][0]["ready"])
        apply(job, body, state)

    monkeypatch.setattr(Job, "apply", apply_and_break)
    with pytest.raises(DeployError, match=r"did not become ready .*has all traffic again"):
        serving_old.deploy(models.new, replace(STEPS, steps=(100,)), HASTY)
    until(lambda: serving_old.only(models.old))
    assert serving_old.service()["spec"]["predictor"]["name"] == f"v-{models.new.version}", "in place"


def test_a_controller_that_restarts_meanwhile_is_waited_for(place: Place, models: Models) -> None:
    place.deploy(models.old)
    place.kserve.asleep = True
    threading.Timer(1.5, lambda: setattr(place.kserve, "asleep", False)).start()
    assert place.deploy(models.new) == "canary"
    until(lambda: place.only(models.new))


@pytest.mark.parametrize("strategy", ["auto", "shadow", "rolling"])
def test_what_would_be_refused_later_is_told_before_anything_changes(
    place: Place, models: Models, strategy: str
) -> None:
    place.apply_as("argocd", {"predictor": {"model": {"modelFormat": {"name": "yolo-onnx"}, "storageUri": "s3://a/b"}}})
    until(lambda: "status" in place.service())
    until(lambda: place.shares())
    generation = place.service()["metadata"]["generation"]
    with pytest.raises(Conflict, match=r"someone else manages: .*\"argocd\".*storageUri"):
        place.deploy(models.new, replace(STEPS, strategy=strategy))
    meta = place.service()["metadata"]
    assert meta["generation"] == generation
    assert MANAGER not in [entry["manager"] for entry in meta["managedFields"]], "we own nothing of theirs"


def test_a_canary_of_a_person_is_not_overrun(serving_old: Place, models: Models) -> None:
    theirs = {"name": "", "modelFormat": {"name": "yolo-onnx"}, "storageUri": "s3://models/entrance/canary"}
    serving_old.apply_as("a-person", {"canary": [{"trafficPercent": 10, "predictor": {"name": "v2", "model": theirs}}]})
    with pytest.raises(DeployError, match="has a canary under way"):
        serving_old.deploy(models.new)
    serving_old.apply_as("a-person", {})


# --- one at a time ----------------------------------------------------------------------------------------------------


def test_of_two_deploys_at_once_the_second_is_told_of_the_first(place: Place, models: Models) -> None:
    place.deploy(models.old)
    first = threading.Thread(target=lambda: place.deploy(models.new, owner="run-1"))
    first.start()
    until(lambda: place.state().under_way)
    with pytest.raises(Busy, match=rf"run-1 is deploying to {place.namespace}/entrance since 20") as caught:
        place.deploy(models.newest, owner="run-2")
    assert "Run again" in caught.value.remedy
    first.join()
    until(lambda: place.only(models.new))
    assert place.deploy(models.old, owner="run-2") == "canary", "the lease was given back"


def test_who_lost_the_lease_touches_nothing_more(place: Place, models: Models) -> None:
    place.deploy(models.old)
    lost: list[BaseException] = []

    def first() -> None:
        try:
            place.deploy(models.new, replace(STEPS, bake=30), replace(QUICK, lease=1), owner="run-1")
        except DeployError as error:
            lost.append(error)

    thread = threading.Thread(target=first)
    thread.start()
    until(lambda: place.state().traffic == 10)
    path = f"/apis/coordination.k8s.io/v1/namespaces/{place.namespace}/leases/haechi-entrance"
    stolen = {"spec": {"holderIdentity": "run-2", "leaseDurationSeconds": 3600}}
    assert place.cluster.request("PATCH", path, stolen, kind="application/merge-patch+json").status == 200
    generation = place.service()["metadata"]["generation"]
    thread.join()
    assert isinstance(lost[0], LeaseLost)
    assert "run-2 took" in str(lost[0])
    assert place.service()["metadata"]["generation"] == generation


# --- killed, and run again --------------------------------------------------------------------------------------------


def killed_at(place: Place, model: ModelFolder, phase: str, traffic: int = 0, **options: Any) -> None:
    """Deploy in a process of its own, and kill that once the state has come so far."""
    child = os.fork()
    if not child:
        try:
            place.deploy(model, **{"owner": "killed", "rollout": replace(STEPS, bake=60), **options})
        finally:
            os._exit(0)
    try:
        until(lambda: (place.state().phase, place.state().traffic) == (phase, traffic))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_repeated_step_goes_on_where_it_was_killed(place: Place, models: Models) -> None:
    place.deploy(models.old)
    killed_at(place, models.new, "canary", 50, rollout=replace(STEPS, steps=(50,), bake=60))
    canary, seen = f"entrance-v-{models.new.version}-predictor", []
    place.network.watch = lambda path: seen.append(place.shares().get(canary, 0)) if canary in path else None
    assert place.deploy(models.new, owner="killed") == "canary", "its own lease, at once"
    assert min(seen) == 50, "it was neither taken back nor begun again"
    until(lambda: place.only(models.new))


def test_another_run_waits_for_the_lease_and_cleans_up(place: Place, models: Models) -> None:
    place.deploy(models.old)
    killed_at(place, models.newest, "canary", patience=replace(QUICK, lease=4))
    with pytest.raises(Busy, match="killed is deploying"):
        place.deploy(models.new, owner="next")
    until(lambda: not _busy(place))
    assert place.deploy(models.new, owner="next") == "canary"
    until(lambda: place.only(models.new))
    assert place.kserve.deployment(f"entrance-v-{models.newest.version}-predictor") is None


def _busy(place: Place) -> bool:
    try:
        with Lease(place.api, "asking"):
            return False
    except Busy:
        return True


@pytest.mark.parametrize("again", ["new", "old"])
def test_a_promotion_whose_end_nobody_saw_is_finished_or_taken_over(place: Place, models: Models, again: str) -> None:
    place.deploy(models.old)
    # So that it stays in this phase: the promoted pods are not ready for a while.
    place.kserve.fates[models.uri(models.new)] = Fate(ready_after=0.1)
    rollout = replace(STEPS, steps=(100,))
    place.network.watch = lambda path: _sleep_on(place, models, path)
    killed_at(place, models.new, "promoting", 100, rollout=rollout)
    place.kserve.asleep = False
    place.network.watch = lambda path: None
    model = getattr(models, again)
    place.deploy(model, rollout, owner="killed")
    until(lambda: place.only(model))
    assert (place.state().phase, place.state().version) == ("done", model.version)


def _sleep_on(place: Place, models: Models, path: str) -> None:
    """The controller goes away once the canary has all traffic, so that it does not see the promotion."""
    canary = f"entrance-v-{models.new.version}-predictor"
    if canary in path and place.shares().get(canary) == 100:
        place.kserve.asleep = True


# --- where no traffic can be split ------------------------------------------------------------------------------------


@pytest.fixture
def without_gateway(place: Place, models: Models) -> Place:
    place.kserve.gateway = False
    place.deploy(models.old)
    return place


def test_without_a_route_the_model_is_proven_in_a_shadow(
    without_gateway: Place, models: Models, capsys: pytest.CaptureFixture[str]
) -> None:
    place = without_gateway
    place.apply_as("operations", {"predictor": {"minReplicas": 2, "serviceAccountName": "reader"}})
    shadows: list[dict[str, Any]] = []

    def watch(path: str) -> None:
        if "entrance-shadow-predictor" in path:
            assert place.names() == models.uri(models.old), "nothing is replaced yet"
            shadows.append(place.service("entrance-shadow"))

    place.network.watch = watch
    assert place.deploy(models.new) == "shadow"
    assert "NO CANARY: there is no HTTPRoute entrance" in capsys.readouterr().err
    predictor = shadows[0]["spec"]["predictor"]
    assert (predictor["minReplicas"], predictor["serviceAccountName"]) == (1, "reader")
    assert shadows[0]["metadata"]["ownerReferences"][0]["name"] == "entrance"
    assert not place.there("entrance-shadow")
    assert (place.names(), place.serving()) == (models.uri(models.new), models.uri(models.new))
    assert place.state().phase == "done"


def test_a_shadow_that_fails_never_touches_what_serves(without_gateway: Place, models: Models) -> None:
    place = without_gateway
    place.kserve.fates[models.uri(models.new)] = NEVER
    generation = place.service()["metadata"]["generation"]
    with pytest.raises(DeployError, match=r"did not become ready .* was never touched"):
        place.deploy(models.new, patience=HASTY)
    assert place.service()["metadata"]["generation"] == generation
    assert not place.there("entrance-shadow")
    assert place.state().phase == "failed"


def test_a_shadow_that_was_left_behind_is_removed(without_gateway: Place, models: Models) -> None:
    place = without_gateway
    place.kserve.fates[models.uri(models.newest)] = NEVER
    killed_at(place, models.newest, "canary")
    place.deploy(models.new, owner="killed")
    assert not place.there("entrance-shadow")
    assert place.serving() == models.uri(models.new)


def test_a_shadow_of_somebody_else_is_left_alone(without_gateway: Place, models: Models) -> None:
    place = without_gateway
    theirs = manifest(place.namespace, "entrance-shadow", models.old, "s3://theirs")
    place.cluster.apply(theirs, manager="a-person")
    with pytest.raises(DeployRefused, match="is somebody's, and we need that name"):
        place.deploy(models.new)
    assert place.service("entrance-shadow")["spec"]["predictor"]["model"]["storageUri"] == "s3://theirs"
    assert place.state().phase == "done", "nothing was begun"


def test_boxes_that_differ_after_the_pods_were_replaced_take_it_back(without_gateway: Place, models: Models) -> None:
    place = without_gateway

    def watch(path: str) -> None:
        if path.startswith("/entrance-predictor") and place.names() == models.uri(models.new):
            place.network.broken[models.uri(models.new)] = 500

    place.network.watch = watch
    with pytest.raises(DeployError, match=r"answered 500.*was put back"):
        place.deploy(models.new)
    assert (place.names(), place.serving()) == (models.uri(models.old), models.uri(models.old))
    assert place.state().phase == "failed"


def no_route(place: Place) -> str:
    return "there is no HTTPRoute entrance"


def settings_say_no(place: Place, namespace: str = "kserve") -> str:
    """KServe's own settings, in a namespace that every test shares: read-only to our user, made here."""
    place.kserve.gateway = True
    until(lambda: place.shares())
    cluster = place.cluster
    cluster.make_namespace(namespace)
    meta = {"name": "inferenceservice-config", "namespace": namespace}
    data = {"ingress": '{"enableGatewayApi": false}'}
    cluster.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": data})
    group, meta = "rbac.authorization.k8s.io", {"name": "haechi-settings", "namespace": namespace}
    rule = {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["get"]}
    cluster.apply({"apiVersion": f"{group}/v1", "kind": "Role", "metadata": meta, "rules": [rule]})
    subjects = [{"kind": "ServiceAccount", "name": "pipeline-runner", "namespace": "kubeflow"}]
    role = {"apiGroup": group, "kind": "Role", "name": "haechi-settings"}
    binding = {"apiVersion": f"{group}/v1", "kind": "RoleBinding", "metadata": meta, "roleRef": role}
    cluster.apply({**binding, "subjects": subjects})
    return "ingress.enableGatewayApi is not true"


def settings_beside_pipelines_say_no(place: Place) -> str:
    """As the Kubeflow platform installs KServe."""
    return settings_say_no(place, "kubeflow")


def test_a_kserve_that_makes_canaries_and_splits_nothing_is_seen_once(
    place: Place, models: Models, capsys: pytest.CaptureFixture[str]
) -> None:
    place.kserve.splits = False
    place.deploy(models.old)
    assert place.deploy(models.new) == "shadow"
    assert "NO CANARY: KServe made the canary, and traffic does not follow it" in capsys.readouterr().err
    until(lambda: place.only(models.new))
    canary = f"entrance-v-{models.new.version}-predictor"
    assert [name for name, _ in place.kserve.made] == ["entrance-predictor", canary, "entrance-predictor"]
    assert place.state().phase == "done"
    assert place.deploy(models.old) == "shadow"
    assert "followed no canary at 20" in capsys.readouterr().err
    assert [name for name, _ in place.kserve.made][3:] == ["entrance-shadow-predictor", "entrance-predictor"]
    with pytest.raises(DeployError, match="traffic does not follow it") as caught:
        place.deploy(models.new, replace(STEPS, strategy="canary"))
    assert "rollout.strategy" in caught.value.remedy
    until(lambda: place.only(models.old))
    place.kserve.splits = True
    assert place.deploy(models.new, replace(STEPS, strategy="canary", steps=())) == "canary"
    assert place.state().unsplit == "", "and auto takes canaries again"
    until(lambda: place.only(models.new))


@pytest.mark.parametrize("failure", [OverflowError("int too large"), RecursionError("too deep")], ids=type)
def test_an_error_that_nobody_thought_of_withdraws_the_canary(
    serving_old: Place, models: Models, failure: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judge(*details: object) -> str:
        raise failure

    monkeypatch.setattr("haechi.components.deploy.canary.judge", judge)
    with pytest.raises(DeployError, match=rf"{type(failure).__name__}: {failure}.*has all traffic again"):
        serving_old.deploy(models.new)
    assert serving_old.state().phase == "failed"


@pytest.mark.parametrize("spoil", [no_route, settings_say_no, settings_beside_pipelines_say_no])
def test_a_canary_that_is_asked_for_by_name_is_refused(
    without_gateway: Place, models: Models, spoil: Callable[[Place], str]
) -> None:
    place, generation = without_gateway, without_gateway.service()["metadata"]["generation"]
    try:
        with pytest.raises(DeployRefused, match=f"rollout.strategy is 'canary', and .*{spoil(place)}") as caught:
            place.deploy(models.new, replace(STEPS, strategy="canary"))
    finally:
        for namespace in ("kserve", "kubeflow"):
            path = f"/api/v1/namespaces/{namespace}/configmaps/inferenceservice-config"
            place.cluster.request("DELETE", path)
    assert "gateway-canary" in caught.value.remedy
    assert place.service()["metadata"]["generation"] == generation


def no_rights(place: Place, webhook: KserveWebhook) -> str:
    path = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{place.namespace}/rolebindings/routes"
    assert place.cluster.request("DELETE", path).status == 200
    return "neither HTTPRoutes .option gateway-canary. nor KServe's settings"


def no_mode(place: Place, webhook: KserveWebhook) -> str:
    """KServe has never looked at the service, and wrote its mode nowhere."""
    webhook.mode, place.kserve.asleep = "", True
    return "KServe's mode is not known yet; it may stand in KServe's settings, which cannot be read"


@pytest.mark.parametrize("spoil", [no_rights, no_mode])
def test_where_a_right_keeps_the_canary_away_its_role_is_named(
    place: Place, models: Models, webhook: KserveWebhook, spoil: Callable[[Place, KserveWebhook], str]
) -> None:
    expected = spoil(place, webhook)
    with suppress(DeployError):
        place.deploy(models.old, patience=HASTY)
    with pytest.raises(DeployRefused, match=rf"{expected} \(Role haechi-kserve-mode of manifests/base/kserve\)"):
        place.deploy(models.new, replace(STEPS, strategy="canary"))


def test_a_kserve_without_canaries_is_noticed(serving_old: Place, models: Models) -> None:
    cluster, path = serving_old.cluster, "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
    path += "/inferenceservices.serving.kserve.io"
    whole = cluster.get(path)
    less = {"apiVersion": whole["apiVersion"], "kind": whole["kind"], "metadata": {"name": whole["metadata"]["name"]}}
    versions = yaml.safe_load(yaml.safe_dump(whole["spec"]["versions"]))
    for version in versions:
        version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"].pop("canary", None)
    less["spec"] = {**whole["spec"], "versions": versions}
    try:
        cluster.request("PUT", path, {**less, "metadata": whole["metadata"]})
        rollout = replace(STEPS, strategy="canary")
        until(lambda: "no spec.canary" in _refusal(serving_old, models, rollout))
    finally:
        now = cluster.get(path)
        cluster.request("PUT", path, {**now, "spec": whole["spec"]})
        until(lambda: _knows_canary(serving_old, models))


def _refusal(place: Place, models: Models, rollout: Rollout) -> str:
    try:
        place.deploy(models.new, replace(rollout, bake=0))
    except DeployError as error:
        return str(error)
    except DeployRefused as error:
        return str(error)
    place.deploy(models.old, replace(rollout, steps=()))
    return ""


def _knows_canary(place: Place, models: Models) -> bool:
    theirs = {"name": "", "modelFormat": {"name": "yolo-onnx"}, "storageUri": "s3://models/entrance/canary"}
    body = manifest(place.namespace, "entrance", models.old, models.uri(models.old))
    body["metadata"].setdefault("annotations", {})[MODE] = "Standard"
    body["spec"]["canary"] = [{"trafficPercent": 10, "predictor": {"name": "v2", "model": theirs}}]
    path = f"{place._path('entrance')}?fieldManager=asking&fieldValidation=Strict&dryRun=All&force=true"
    return place.cluster.request("PATCH", path, body, kind="application/apply-patch+yaml").status == 200
