"""A rollout under attack: an API server that stumbles, notes that are tampered with, people who meddle, clocks that differ."""

from __future__ import annotations

import itertools
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from canary_world import HASTY, STEPS, Models, Place, until
from kserve_stand_in import NEVER

from haechi.components.deploy import canary
from haechi.components.deploy.credential import Credential
from haechi.components.deploy.endpoint import Denied
from haechi.components.deploy.kubernetes_api import Forbidden, InferenceServiceApi
from haechi.components.deploy.lease import Busy, Lease, LeaseLost
from haechi.components.deploy.readiness import storage_uri
from haechi.components.deploy.rollout_state import STATE, RolloutState
from haechi.components.shared.errors import DeployError
from haechi.components.shared.kubernetes_caller import KubernetesCaller, Refused, Unreachable
from haechi.serving.api_keys import new_key
from haechi.serving.service import Role
from tests.serving_process import running

pytestmark = pytest.mark.e2e

SHORT = replace(STEPS, steps=(50,), bake=0.1)
MERGE = "application/merge-patch+json"
KUBECTL = "?fieldManager=kubectl-edit"


@pytest.fixture
def serving_old(place: Place, models: Models) -> Place:
    place.deploy(models.old)
    until(lambda: place.only(models.old))
    return place


def edit(place: Place, change: dict[str, Any]) -> None:
    """What `kubectl edit` does: what is changed becomes the person's."""
    answer = place.cluster.request("PATCH", place._path("entrance") + KUBECTL, change, kind=MERGE)
    assert answer.status == 200, answer.message


def at_half(place: Place, models: Models, meddle: Callable[[], None]) -> list[BaseException]:
    """Deploy the new model, and meddle once it has half of the traffic; what the deploy raised."""
    raised: list[BaseException] = []

    def deploy() -> None:
        try:
            place.deploy(models.new, replace(STEPS, steps=(50, 100), bake=4.0), owner="run-1")
        except DeployError as error:
            raised.append(error)

    thread = threading.Thread(target=deploy)
    thread.start()
    until(lambda: 50 in place.shares().values())
    meddle()
    thread.join()
    return raised


# --- an API server that stumbles -------------------------------------------------------------------------------------


@contextmanager
def stumbling(monkeypatch: pytest.MonkeyPatch, faults: Iterator[Exception | None], after: bool) -> Iterator[None]:
    """Every call meets the next fault: before it is made, or after (its answer is lost)."""
    call = KubernetesCaller.call

    def stumble(caller: KubernetesCaller, *arguments: Any, **more: Any) -> dict[str, Any]:
        fault = next(faults)
        if fault and not after:
            raise fault
        found = call(caller, *arguments, **more)
        if fault:
            raise fault
        return found

    with monkeypatch.context() as patch:
        patch.setattr(KubernetesCaller, "call", stumble)
        yield


RACE = Refused(409, "Operation cannot be fulfilled on inferenceservices: the object has been modified")
FAULTS = [Refused(429, "too many requests"), Refused(500, "etcd is away"), Unreachable("Read timed out"), RACE]


@pytest.mark.parametrize("after", [False, True], ids=["asked in vain", "answers lost"])
def test_one_call_in_five_fails_and_the_rollout_goes_on(
    serving_old: Place, models: Models, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    place = serving_old
    with Lease(place.api, "run-1") as lease:
        faults = itertools.cycle(itertools.chain.from_iterable((*[None] * 4, fault) for fault in FAULTS))
        with stumbling(monkeypatch, faults, after):
            assert place.swap(models.new, lease, SHORT) == "canary"
    until(lambda: place.only(models.new))
    assert (place.state().phase, place.state().former) == ("done", models.uri(models.old))


@pytest.mark.parametrize("calls", [3, 10, 20, 30])
def test_an_api_server_that_goes_away_for_good_ends_in_a_reason_and_the_next_run_mends_it(
    serving_old: Place, models: Models, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    place = serving_old
    gone = itertools.chain(itertools.repeat(None, calls), itertools.repeat(Unreachable("Connection refused")))
    with stumbling(monkeypatch, gone, after=False), pytest.raises(DeployError, match="cannot reach the Kubernetes API"):
        place.deploy(models.new, SHORT, replace(HASTY, lease=1), owner="run-1")
    assert place.names() == models.uri(models.old)
    assert place.serving() == models.uri(models.old)
    place.deploy(models.new, SHORT, owner="run-1")
    until(lambda: place.only(models.new))


# --- notes that are tampered with ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "note",
    [
        "{",
        json.dumps({"phase": "done"}),
        json.dumps({"phase": "canary", "strategy": "canary", "version": "../x", "uri": "s3://evil", "traffic": 50}),
        json.dumps({"phase": "promoting", "strategy": "rolling", "version": "0" * 12, "uri": "s3://evil/x"}),
        json.dumps(
            {"phase": "back", "strategy": "shadow", "version": "0" * 12, "uri": "s3://a", "former": "s3://evil"}
        ),
        json.dumps({"phase": "canary", "strategy": "canary", "version": "0" * 12, "uri": "s3://a", "former": "s3://b"}),
        None,
    ],
    ids=["garbage", "an end", "a path", "another promotion", "a way back", "another canary", "none"],
)
def test_a_canary_whose_note_was_tampered_with_is_withdrawn_and_the_next_run_goes_on(
    serving_old: Place, models: Models, note: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, apply, named = serving_old, InferenceServiceApi.apply, set()
    left_at_half(place, models)
    edit(place, {"metadata": {"annotations": {STATE: note}}})

    def watch(api: InferenceServiceApi, *arguments: Any, **more: Any) -> dict[str, Any]:
        stored = apply(api, *arguments, **more)
        named.add(storage_uri(stored))
        return stored

    monkeypatch.setattr(InferenceServiceApi, "apply", watch)
    place.deploy(models.old, SHORT, owner="run-1")
    assert named == {models.uri(models.old)}, "at no moment is the stable model another one, or none"
    until(lambda: place.only(models.old))
    assert "canary" not in place.service()["spec"]
    place.deploy(models.new, SHORT, owner="run-1")
    until(lambda: place.only(models.new))


def left_at_half(place: Place, models: Models) -> None:
    """A rollout that ends without a word once its canary has half of the traffic."""

    class Killed(BaseException):
        pass

    def kill(job: object, way: object) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canary, "_still_there", kill)
        with pytest.raises(Killed):
            place.deploy(models.new, replace(STEPS, steps=(50,)), owner="run-1")
    assert 50 in place.shares().values()


def test_who_takes_a_canary_away_after_a_kill_does_not_get_it_back_at_once(serving_old: Place, models: Models) -> None:
    place, shares = serving_old, []
    service = f"entrance-v-{models.new.version}-predictor"
    left_at_half(place, models)
    edit(place, {"spec": {"canary": None}})
    until(lambda: place.only(models.old))
    place.network.watch = lambda path: shares.append(place.shares().get(service, 0)) if service in path else None
    place.deploy(models.new, SHORT, owner="run-1")
    assert shares[0] == 0, "it is proven again before it gets traffic"
    until(lambda: place.only(models.new))


# --- people who meddle -----------------------------------------------------------------------------------------------


def test_a_service_that_is_deleted_while_it_bakes_is_not_made_again(serving_old: Place, models: Models) -> None:
    place = serving_old
    raised = at_half(place, models, lambda: place.cluster.request("DELETE", place._path("entrance")))
    # Seen while it bakes, or while the route still has to follow.
    assert re.search("was changed or (removed|deleted)", str(raised[0]))
    assert not place.there("entrance")
    place.deploy(models.new, SHORT, owner="run-1")
    until(lambda: place.only(models.new))


def test_a_person_who_changes_the_canarys_share_keeps_it(serving_old: Place, models: Models) -> None:
    place = serving_old

    def more() -> None:
        entries = place.service()["spec"]["canary"]
        entries[0]["trafficPercent"] = 90
        edit(place, {"spec": {"canary": entries}})

    raised = at_half(place, models, more)
    assert "someone else manages" in str(raised[0])
    assert "the canary is somebody else's by now, and stays" in str(raised[0])
    assert place.service()["spec"]["canary"][0]["trafficPercent"] == 90
    with pytest.raises(DeployError, match="has a canary under way"):
        place.deploy(models.new, SHORT, owner="run-1")
    edit(place, {"spec": {"canary": None}})
    place.deploy(models.new, SHORT, owner="run-1")
    until(lambda: place.only(models.new))


def test_a_person_who_names_another_stable_model_keeps_it_and_our_canary_goes(
    serving_old: Place, models: Models
) -> None:
    place, theirs = serving_old, "s3://models/entrance/theirs"
    raised = at_half(place, models, lambda: edit(place, {"spec": {"predictor": {"model": {"storageUri": theirs}}}}))
    assert f"the canary was withdrawn, and the service names {theirs} now, which somebody else set" in str(raised[0])
    assert place.names() == theirs
    assert "canary" not in place.service()["spec"]
    owners = [entry for entry in place.service()["metadata"]["managedFields"] if "storageUri" in json.dumps(entry)]
    assert [entry["manager"] for entry in owners] == ["kubectl-edit"], "we own nothing of theirs"


def test_a_name_that_a_canary_left_behind_is_no_hindrance_to_the_same_model_later(
    serving_old: Place, models: Models
) -> None:
    place = serving_old
    place.deploy(models.new, SHORT, owner="run-1")
    until(lambda: place.only(models.new))
    place.deploy(models.old, replace(SHORT, strategy="rolling"), owner="run-1")
    assert place.service()["spec"]["predictor"]["name"] == f"v-{models.new.version}", "in place, under its name"
    until(lambda: place.only(models.old))
    assert place.deploy(models.new, SHORT, owner="run-1") == "canary"
    until(lambda: place.only(models.new))


def test_a_former_model_whose_storage_is_gone_does_not_stop_the_next_run(
    serving_old: Place, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promoted, crashed, and what was before cannot be loaded any more: that is said, and a good model can come."""
    place = serving_old
    promote = canary._promote

    def storage_goes(job: Any, way: Any, state: RolloutState, asked: bool = False) -> None:
        for model in (models.old, models.new):
            place.kserve.fates[models.uri(model)] = NEVER
        until(lambda: not place.service()["status"]["canaryStatuses"][0]["ready"])
        promote(job, way, state, asked)

    with monkeypatch.context() as patch:
        patch.setattr(canary, "_promote", storage_goes)
        with pytest.raises(DeployError, match=r"Withdrawing it failed too: .* the next run does that first"):
            place.deploy(models.new, SHORT, HASTY, owner="run-1")
    place.kserve.fates.clear()
    place.deploy(models.new, SHORT, owner="run-1")
    until(lambda: place.only(models.new))


def test_a_person_who_interrupts_leaves_no_canary_unwatched(
    serving_old: Place, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(job: object, way: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(canary, "_still_there", interrupt)
    with pytest.raises(KeyboardInterrupt):
        serving_old.deploy(models.new, SHORT)
    until(lambda: serving_old.only(models.old))
    assert serving_old.state().reason == "it was interrupted"


# --- leases and clocks -----------------------------------------------------------------------------------------------


def lease_path(place: Place) -> str:
    return f"/apis/coordination.k8s.io/v1/namespaces/{place.namespace}/leases/haechi-entrance"


@pytest.mark.parametrize("hours", [-3, 3], ids=["slow", "fast"])
def test_a_holder_whose_clock_is_wrong_keeps_its_lease_while_it_lives(
    place: Place, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    wrong = time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", time.gmtime(time.time() + hours * 3600))
    with Lease(place.api, "run-1", 1) as first:
        ended = threading.Event()

        def live() -> None:
            while not ended.wait(0.05):
                first.renew()
                answer = place.cluster.get(lease_path(place))
                answer["spec"]["renewTime"] = wrong.replace("000000", f"{time.time_ns() // 1000 % 10**6:06d}")
                found = place.cluster.request("PUT", lease_path(place), answer)
                first._lease = found.body if found.status == 200 else first._lease

        thread = threading.Thread(target=live)
        thread.start()
        try:
            time.sleep(0.2)
            with pytest.raises(Busy, match="run-1 is deploying"):
                Lease(place.api, "run-2", 1).__enter__()
        finally:
            ended.set()
            thread.join()


def test_a_lease_that_is_deleted_is_made_again_and_one_of_the_same_name_is_another(place: Place) -> None:
    with Lease(place.api, "run-1", 1) as lease:
        assert place.cluster.request("DELETE", lease_path(place)).status == 200
        time.sleep(0.4)
        lease.renew()
        assert place.cluster.get(lease_path(place))["spec"]["holderIdentity"] == "run-1"
        with Lease(place.api, "run-1", 60):
            time.sleep(0.4)
            with pytest.raises(LeaseLost):
                lease.renew()


# --- rights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "verbs", "error"),
    [
        ("inferenceservices", ["patch", "create", "update"], "we may not patch .*cannot patch resource"),
        ("leases", ["create", "update", "patch"], "we may not (put|post) .*leases"),
        ("leases", ["get"], "we may not get .*leases"),
        ("deployments", ["get"], "we may not get .*deployments"),
    ],
)
def test_a_verb_that_is_forbidden_leaves_the_old_model_and_is_named(
    serving_old: Place, models: Models, kind: str, verbs: list[str], error: str
) -> None:
    place = serving_old
    generation = place.service()["metadata"]["generation"]
    path = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{place.namespace}/roles/haechi-deploy"
    rules = place.cluster.get(path)["rules"]
    less = [
        {**rule, "verbs": [verb for verb in rule["verbs"] if kind not in rule["resources"] or verb not in verbs]}
        for rule in rules
    ]
    place.cluster.request("PATCH", path, {"rules": [rule for rule in less if rule["verbs"]]}, kind=MERGE)
    until(lambda: _refused(place, models, error))
    until(lambda: place.only(models.old))
    assert place.service()["metadata"]["generation"] == generation
    place.cluster.request("PATCH", path, {"rules": rules}, kind=MERGE)
    until(lambda: not _refused(place, models, error))
    until(lambda: place.only(models.new))


def _refused(place: Place, models: Models, error: str) -> bool:
    try:
        place.deploy(models.new, SHORT, HASTY, owner="run-1")
    except Forbidden as found:
        assert re.search(error, str(found)), found
        assert "Role haechi-deploy" in found.remedy
        return True
    return False


# --- a runtime that asks who calls -----------------------------------------------------------------------------------


def test_a_guarded_service_is_asked_with_our_key_and_refuses_before_anything_changes(
    place: Place, models: Models, tmp_path: Path
) -> None:
    key, line = new_key("deploy", [Role.PREDICT])
    (tmp_path / "keys.jsonl").write_text(line)
    (tmp_path / "mine").mkdir()
    mine = Credential(tmp_path / "mine")
    env = {"HAECHI_SERVING_API_KEYS": str(tmp_path / "keys.jsonl")}
    folders, name = models.folders, ("--name", "entrance")
    with (
        running(folders[models.old.version], *name, env=env) as old,
        running(folders[models.new.version], *name, env=env) as new,
    ):
        place.network._runtimes = {models.uri(models.old): old.url, models.uri(models.new): new.url}
        place.deploy(models.old, replace(SHORT, strategy="rolling"))
        until(lambda: place.only(models.old))
        generation = place.service()["metadata"]["generation"]
        with pytest.raises(Denied, match=r"answered 401 .*no key or token was sent") as caught:
            place.deploy(models.new, SHORT, credential=mine)
        assert "HAECHI_ENDPOINT_CREDENTIALS" in caught.value.remedy
        assert place.service()["metadata"]["generation"] == generation
        (tmp_path / "mine" / "api_key").write_text(key)
        assert place.deploy(models.new, SHORT, credential=mine) == "canary"
        until(lambda: place.only(models.new))
        asked = place.network.asked.copy()
        # Withdrawn while it bakes: then the canary goes, and the reason is no fault of the model's.
        place.network.watch = lambda path: _lose(place, tmp_path / "mine" / "api_key")
        with pytest.raises(DeployError, match=r"answered 401 .*has all traffic again"):
            place.deploy(models.old, replace(STEPS, steps=(50,), bake=5), credential=mine)
        until(lambda: place.only(models.new))
    assert asked[models.uri(models.new)]


def _lose(place: Place, key: Path) -> None:
    if 50 in place.shares().values():
        key.unlink(missing_ok=True)
