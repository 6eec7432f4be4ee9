"""kill -9 after each write to the API server, and again: the end is as if nothing had happened, and users notice nothing."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from canary_world import STEADY, STEPS, Models, Place, until
from kserve_stand_in import Fate

from haechi.components.deploy import canary
from haechi.components.deploy.canary import Way
from haechi.components.deploy.job import Job
from haechi.components.deploy.rollout_state import STATE, RolloutState
from haechi.components.shared.errors import DeployError
from haechi.components.shared.kubernetes_caller import KubernetesCaller
from haechi.components.shared.model_folder import ModelFolder

pytestmark = pytest.mark.e2e

SHORT = replace(STEPS, steps=(50,), bake=0.0)
WRITES = ("POST", "PUT", "PATCH", "DELETE")
MOST = 12  # more writes than any rollout here has


@contextmanager
def users(place: Place, models: Models) -> Iterator[list[str]]:
    """Somebody who looks all the time where traffic goes; what is wrong with it."""
    wrong: list[str] = []
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.04):
            shares = place.shares()
            for service, share in shares.items():
                serving = place.kserve.serving(service)
                lost = share and serving not in (models.uri(models.old), models.uri(models.new))
                # The route may have moved between the two looks.
                if lost and place.shares().get(service):
                    wrong.append(f"{share} % of the traffic go to {service}, which serves {serving or 'nothing'}")
            if shares and sum(shares.values()) != 100:
                wrong.append(f"the traffic is split as {shares}")

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield wrong
    finally:
        ended.set()
        thread.join()


def killed_after(writes: int, deploy: Callable[[], object]) -> bool:
    """Deploy in a process of its own, and kill that right after so many writes; whether it came so far."""
    child = os.fork()
    if not child:
        call, left = KubernetesCaller.call, [writes]

        def counted(caller: KubernetesCaller, verb: str, path: str, *rest: Any, **more: Any) -> dict[str, Any]:
            found = call(caller, verb, path, *rest, **more)
            query = rest[1] if len(rest) > 1 else ()
            if verb in WRITES and ("dryRun", "All") not in query:
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
            return found

        KubernetesCaller.call = counted  # type: ignore[method-assign]
        try:
            deploy()
        except DeployError:
            pass
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def end_of(place: Place, before: ModelFolder, after: ModelFolder) -> Any:
    """What is there when all has come to rest, but for times, names of processes, and which of the models is which."""
    found = place.service()
    state = place.state()
    notes = {key: value for key, value in found["metadata"]["annotations"].items() if key != STATE}
    end = {
        "spec": found["spec"],
        "notes": notes,
        "labels": found["metadata"]["labels"],
        "state": (state.phase, state.version, state.former, state.strategy, state.traffic, state.reason),
        "shares": place.shares(),
        "serving": place.serving(),
        "shadow": place.there("entrance-shadow"),
    }
    text = json.dumps(end, sort_keys=True)
    for model, name in ((before, "before"), (after, "after")):
        for digest in (model.onnx_sha256, model.version):
            text = text.replace(digest, name)
    return json.loads(text)


def wait_for(place: Place, model: ModelFolder) -> None:
    uri = place.models.uri(model)
    until(lambda: (place.names(), place.serving(), len(place.shares()) in (0, 1)) == (uri, uri, True))


@pytest.mark.parametrize("strategy", ["canary", "shadow", "rolling"])
def test_killed_after_any_write_and_run_again_ends_as_if_never_killed(
    place: Place, models: Models, strategy: str
) -> None:
    place.kserve.gateway = strategy == "canary"
    rollout, ends = replace(SHORT, strategy=strategy), {}
    place.deploy(models.old, owner="run")
    there, comes = models.old, models.new
    with users(place, models) as wrong:
        for writes in [MOST, *range(1, MOST)]:
            place.network.asked.clear()
            killed = killed_after(writes, partial(place.deploy, comes, rollout, STEADY, owner="run"))
            if killed:
                place.deploy(comes, rollout, STEADY, owner="run")
            wait_for(place, comes)
            ends[writes] = end_of(place, there, comes)
            if writes < MOST and not killed:
                break
            there, comes = comes, there
    assert len(ends) > 4
    assert not wrong
    for writes, end in ends.items():
        assert end == ends[MOST], f"killed after write {writes}"


@pytest.mark.parametrize("strategy", ["canary", "shadow", "rolling"])
def test_killed_after_any_write_another_model_can_be_deployed(place: Place, models: Models, strategy: str) -> None:
    place.kserve.gateway = strategy == "canary"
    rollout, reached = replace(SHORT, strategy=strategy), 0
    place.deploy(models.old, owner="run")
    wait_for(place, models.old)
    with users(place, models) as wrong:
        for writes in range(1, MOST):
            if not killed_after(writes, partial(place.deploy, models.new, rollout, STEADY, owner="run")):
                break
            reached += 1
            place.deploy(models.old, rollout, STEADY, owner="run")
            wait_for(place, models.old)
            assert (place.state().phase, place.state().version) == ("done", models.old.version)
            assert not place.there("entrance-shadow")
    assert reached >= 4
    assert not wrong


def test_killed_after_any_write_of_a_withdrawal_it_is_withdrawn_by_the_next_run(place: Place, models: Models) -> None:
    place.deploy(models.old, owner="run")
    until(lambda: place.only(models.old))
    place.network.failing = {models.uri(models.new): 0.5}
    rollout, reached = replace(SHORT, bake=0.1, min_requests=1), 0
    with users(place, models) as wrong:
        for writes in range(1, MOST):
            if not killed_after(writes, partial(place.deploy, models.new, rollout, STEADY, owner="run")):
                break
            reached += 1
            with pytest.raises(DeployError, match="requests failed"):
                place.deploy(models.new, rollout, STEADY, owner="run")
            until(lambda: place.only(models.old))
            assert place.state().phase == "failed"
    assert reached >= 4
    assert not wrong


def test_a_promotion_that_is_taken_back_late_leaves_no_moment_without_pods(
    place: Place, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed once the new model alone is named; KServe has taken the former Deployment away before the next run."""

    class Killed(BaseException):
        pass

    def promote_and_die(job: Job, way: Way, state: RolloutState) -> None:
        job.apply(way.promoted(), replace(state, phase="promoting", traffic=100))
        raise Killed

    place.deploy(models.old, owner="run")
    wait_for(place, models.old)
    with users(place, models) as wrong:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(canary, "_promote", promote_and_die)
            place.deploy(models.new, SHORT, STEADY, owner="run")
        until(lambda: place.kserve.deployment("entrance-predictor") is None)
        place.kserve.fates[models.uri(models.old)] = Fate(ready_after=1.0)
        # As where a pod of the new model is away for a moment: then it is not kept, though it was proven.
        monkeypatch.setattr("haechi.components.deploy.swap._serves", lambda *_: False)
        place.deploy(models.old, SHORT, STEADY, owner="run")
        until(lambda: place.only(models.old))
    assert not wrong
    assert place.service()["spec"]["predictor"]["name"] == f"v-{models.new.version}", "in place"
    place.deploy(models.new, SHORT, STEADY, owner="run")
    until(lambda: place.only(models.new))
