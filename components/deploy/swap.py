"""Another model into an InferenceService: first what a killed rollout left, then the strategy that fits the cluster."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from haechi.components.shared.errors import DeployError
from haechi.components.shared.progress import say

from .canary import Way, walk
from .canary_knative import KnativeCanary
from .canary_standard import StandardCanary
from .endpoint import check_golden_at
from .inference_service import MODE, PREVIOUS, TAG_ROUTING, TakenOver, ours, refuse_canary, roll_out
from .job import Job
from .lease import LeaseLost
from .readiness import predictor_name, storage_uri
from .rollout_state import RolloutState
from .shadow import prove_in_shadow, remove_shadow
from .strategy import choose

__all__ = ["swap"]

_CANARIES = ("canary", "canary-knative")


def swap(job: Job) -> str:
    """Bring a model into service; the job's lease is held.

    Returns:
        The strategy that was taken; empty where the model serves already.

    Raises:
        DeployRefused: the settings and the cluster do not fit.
        LeaseLost, TakenOver: somebody else is at it now.
        DeployError: why the model does not serve; the former one does, where there was one.
    """
    found = job.persist(job.api.get)
    state = RolloutState.of(found)
    if found and state.under_way:
        if state.version == job.model.version and state.strategy in _CANARIES and state.phase == "canary":
            say(f"going on with the canary of {state.owner or 'a former run'}, at {state.traffic} %")
            walk(job, _way(job, found, state), state)
            return state.strategy
        found = _clean_up(job, found, state)
    return _begin(job, found)


def _begin(job: Job, found: dict[str, Any] | None) -> str:
    former = storage_uri(found)
    if found is None or former in ("", job.uri):
        _replace(job, found, job.state("promoting", "rolling"), asked=job.rollout.strategy != "rolling")
        return "" if former else "rolling"
    name = str(found["spec"]["predictor"].get("name") or "")
    refuse_canary(job.api, found)
    _would_take(job, name)
    choice = choose(job, found, job.state("canary", "canary", former=former, former_name=name))
    state = job.state("canary", choice.strategy, former=former, former_name=name)
    if choice.why:
        say(
            f"NO CANARY: {choice.why}. The model is proven in a shadow without users; then its pods replace the old ones."
        )
    if choice.strategy in _CANARIES:
        walk(job, _way(job, found, state), state)
        return choice.strategy
    if choice.strategy == "shadow":
        _in_shadow(job, found, state)
    _replace(job, found, replace(state, phase="promoting"), asked=choice.strategy == "shadow")
    return choice.strategy


def _would_take(job: Job, name: str) -> None:
    """Let rights, owners of fields and webhooks speak before anything changes."""
    wanted = job.wanted()
    wanted["spec"]["predictor"] |= {"name": name} if name else {}
    job.persist(lambda: job.api.apply(wanted, dry_run=True))


def _way(job: Job, found: dict[str, Any], state: RolloutState) -> Way:
    return StandardCanary(job, found, state) if state.strategy == "canary" else KnativeCanary(job, found, state)


def _clean_up(job: Job, found: dict[str, Any], state: RolloutState) -> dict[str, Any] | None:
    """Bring what a killed rollout left to an end that one can begin from; the service as it is then."""
    say(
        f"the rollout of {state.version} by {state.owner or 'a former run'} was left in phase {state.phase}: cleaning up"
    )
    failed = replace(state, phase="failed", traffic=0, reason=state.reason or f"it was left in phase {state.phase}")
    if state.strategy == "shadow":
        remove_shadow(job)
    way = _way(job, found, state)
    try:
        if state.phase == "promoting":
            _finish(job, way, found, failed)
        elif state.strategy in _CANARIES or state.phase == "back":
            way.withdraw(failed)
        else:
            job.apply(ours(found), failed)
    except TakenOver as error:
        # What somebody else named meanwhile stays; a canary of ours, if any, goes.
        job.apply(ours(found), replace(failed, reason=error.problem))
    return job.persist(job.api.get)


def _finish(job: Job, way: Way, found: dict[str, Any], failed: RolloutState) -> None:
    """A promotion that nobody saw the end of: if it serves it stays, since it had passed all checks."""
    if failed.version == job.model.version:
        return  # waited for, and asked, by what follows
    seen = way.serves(found)
    if seen is None or not seen.ready:
        way.withdraw(failed)


def _in_shadow(job: Job, found: dict[str, Any], state: RolloutState) -> None:
    job.apply(ours(found), state)
    try:
        prove_in_shadow(job, found)
    except (LeaseLost, TakenOver):
        raise
    except DeployError as error:
        job.apply(ours(found), replace(state, phase="failed", reason=error.problem))
        raise DeployError(f"{error.problem}. {state.former} was never touched", error.remedy) from error


def _replace(job: Job, found: dict[str, Any] | None, state: RolloutState, asked: bool) -> None:
    """Replace all pods; with `asked`, the service must give the golden boxes afterwards."""
    wanted = job.wanted()
    kept = (found or {"metadata": {}})["metadata"].get("annotations") or {}
    wanted["metadata"]["annotations"] |= {key: kept[key] for key in (MODE, TAG_ROUTING) if key in kept}
    wanted["metadata"]["annotations"] |= state.to_annotation()
    failed = replace(state, phase="failed")
    try:
        roll_out(job.api, wanted, job.patience, job.lease.renew)
    except (LeaseLost, TakenOver):
        raise
    except DeployError as error:
        _note(job, replace(failed, reason=error.problem))
        raise
    if asked:
        _ask(job, wanted, failed)
    _note(job, replace(state, phase="done"))


def _note(job: Job, state: RolloutState) -> None:
    """Write a state without a change, unless the service is somebody else's by now."""
    found = job.persist(job.api.get)
    if found and storage_uri(found) in (job.uri, state.former):
        job.apply(ours(found), state)


def _ask(job: Job, wanted: dict[str, Any], failed: RolloutState) -> None:
    """The golden images at the service's own address; the former model is put back where it gives other boxes."""
    name = str(wanted["spec"]["predictor"].get("name") or "")
    previous = str(wanted["metadata"]["annotations"].get(PREVIOUS, ""))
    try:
        check_golden_at(job.endpoint(predictor_name(job.api.name, name)), job.folder, job.model.version)
        return
    except DeployError as error:
        problem, remedy = error.problem, error.remedy
    failed = replace(failed, reason=problem, former=previous)
    found = job.persist(job.api.get)
    if not previous or not found:
        _note(job, failed)
        raise DeployError(f"{problem}. There was no model before it, so the object stays for you to look at", remedy)
    job.restore(found, name, failed)
    raise DeployError(f"{problem}. {previous} was put back", remedy)
