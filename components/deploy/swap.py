"""Another model into an InferenceService: first what a killed rollout left, then the strategy that fits the cluster."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from haechi.components.shared.errors import DeployError
from haechi.components.shared.progress import say

from .canary import NotSplit, Outgrown, Way, finish, walk
from .canary_knative import KnativeCanary
from .canary_standard import StandardCanary
from .inference_service import (
    PREVIOUS,
    TAG_ROUTING,
    TakenOver,
    explained,
    ours,
    owned,
    refuse_canary,
    roll_out,
    worn,
)
from .job import Job
from .kserve_settings import MODE
from .lease import LeaseLost
from .readiness import look, predictor_name, storage_uri
from .rollout_state import RolloutState, now
from .shadow import check_shadow, prove_in_shadow, remove_shadow
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
        strategy = _go_on(job, found, state) if state.uri == job.uri else ""
        if strategy:
            return strategy
        found = _clean_up(job, found, state)
    elif found and _lost(found):
        found = _clean_up(job, found, _guess(found))
    return _begin(job, found)


def _go_on(job: Job, found: dict[str, Any], state: RolloutState) -> str:
    """The strategy, where a killed rollout of this very model was brought to its end; empty where it must begin again."""
    state = replace(state, owner=job.lease.holder)
    if state.phase == "promoting" and storage_uri(found) == job.uri:
        say(f"{state.version} was named, and nobody saw whether it serves: going on")
        if state.strategy in _CANARIES:
            finish(job, _way(job, found, state), state)
        else:
            _replace(job, found, state)
        return state.strategy
    # Whoever took the canary away, or gave it another share, wanted no more of it: from the beginning then.
    if state.phase == "canary" and state.strategy in _CANARIES and _way(job, found, state).stands(found):
        say(f"going on with the canary that was left at {state.traffic} %")
        return _walk(job, found, state)
    return ""


def _lost(found: dict[str, Any]) -> bool:
    """Whether traffic is split by us, and our note of it cannot be read any more."""
    return owned(found, "f:canary") or owned(found, "f:predictor", "f:canaryTrafficPercent")


def _guess(found: dict[str, Any]) -> RolloutState:
    """What a rollout without a readable note must have been."""
    canary, named = found["spec"].get("canary") or [], storage_uri(found)
    if canary:
        uri, strategy, former = storage_uri({"spec": canary[0]}), "canary", named
    else:
        notes = found["metadata"].get("annotations") or {}
        uri, strategy, former = named, "canary-knative", str(notes.get(PREVIOUS, ""))
    name = str(found["spec"]["predictor"].get("name") or "")
    version = uri.rstrip("/").rsplit("/", 1)[-1]
    return RolloutState("canary", strategy, version, uri, former, name, reason="its note could not be read")


def _begin(job: Job, found: dict[str, Any] | None) -> str:
    former = storage_uri(found)
    if found is None or former in ("", job.uri):
        _replace(job, found, _again(job, RolloutState.of(found)))
        return "" if former else "rolling"
    name = str(found["spec"]["predictor"].get("name") or "")
    refuse_canary(job.api, found)
    _would_take(job, name)
    if job.rollout.strategy != "rolling":
        # A key that is missing would be told after the new pods' start otherwise.
        job.endpoint(predictor_name(job.api.name, name)).check_known()
    known = {"former": former, "former_name": name, "unsplit": RolloutState.of(found).unsplit}
    choice = choose(job, found, job.state("canary", "canary", **known))
    state = job.state("canary", choice.strategy, **known)
    if choice.why:
        say(
            f"NO CANARY: {choice.why}. The model is proven in a shadow without users; then its pods replace the old ones."
        )
    if choice.strategy in _CANARIES:
        return _walk(job, found, replace(state, unsplit=""))
    if choice.strategy == "shadow":
        check_shadow(job)
        _in_shadow(job, found, state)
    _replace(job, found, replace(state, phase="promoting"))
    return choice.strategy


def _walk(job: Job, found: dict[str, Any], state: RolloutState) -> str:
    """By a canary; where that cannot have the traffic, it has proven the model all the same, and the pods are replaced."""
    try:
        walk(job, _way(job, found, state), state)
        return state.strategy
    except (NotSplit, Outgrown) as error:
        if job.rollout.strategy == "canary":
            raise
        unsplit = now() if isinstance(error, NotSplit) else ""
        say(
            f"NO CANARY: {error.problem}. The model was proven beside the former one; now its pods replace the old ones."
        )
    known = {"former": state.former, "former_name": state.former_name, "unsplit": unsplit}
    _replace(job, job.persist(job.api.get), job.state("promoting", "shadow", **known))
    return "shadow"


def _again(job: Job, before: RolloutState) -> RolloutState:
    """The state of a model that is named already, which keeps how it came there."""
    begun = job.state("promoting", "rolling", unsplit=before.unsplit)
    if before.uri != job.uri or before.phase != "done":
        return begun
    return replace(before, phase="promoting", owner=begun.owner, since=begun.since)


def _would_take(job: Job, name: str) -> None:
    """Let rights, owners of fields and webhooks speak before anything changes."""
    wanted = job.wanted()
    wanted["spec"]["predictor"] |= {"name": name} if name else {}
    job.persist(lambda: job.api.apply(wanted, dry_run=True))
    job.persist(lambda: job.api.deployment(predictor_name(job.api.name, name)))


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
    try:
        if state.phase == "promoting" and _serves(job, found, state):
            return found  # it had passed all checks
        if state.strategy in _CANARIES:
            _way(job, found, state).withdraw(failed)
        elif storage_uri(found) == state.uri and state.former not in ("", state.uri):
            job.restore(found, failed)
        else:
            job.apply(ours(found), failed)
    except TakenOver as error:
        say(error.problem)
    return job.persist(job.api.get)


def _serves(job: Job, found: dict[str, Any], state: RolloutState) -> bool:
    if state.strategy in _CANARIES:
        seen = job.persist(lambda: _way(job, found, state).serves(found))
    else:
        seen = job.persist(lambda: look(found, "", job.api.deployment)) if storage_uri(found) == state.uri else None
    return seen is not None and seen.ready


def _in_shadow(job: Job, found: dict[str, Any], state: RolloutState) -> None:
    job.apply(ours(found), state)
    try:
        prove_in_shadow(job, found)
    except (LeaseLost, TakenOver):
        raise
    except Exception as error:
        told = explained(error)
        job.apply(ours(found), replace(state, phase="failed", reason=told.problem))
        raise DeployError(f"{told.problem}. {state.former} was never touched", told.remedy) from error


def _replace(job: Job, found: dict[str, Any] | None, state: RolloutState) -> None:
    """Replace all pods; then the service must give the golden boxes, unless that is not wanted."""
    wanted = job.wanted()
    kept = (found or {"metadata": {}})["metadata"].get("annotations") or {}
    wanted["metadata"]["annotations"] |= {key: kept[key] for key in (MODE, TAG_ROUTING) if key in kept}
    wanted["metadata"]["annotations"] |= state.to_annotation()
    if found and storage_uri(found) == job.uri:
        wanted["spec"]["predictor"] |= worn(found)
    failed = replace(state, phase="failed")
    try:
        roll_out(job.api, wanted, job.patience, job.lease.renew)
    except (LeaseLost, TakenOver):
        raise
    except DeployError as error:
        try:
            _note(job, replace(failed, reason=error.problem))
        except DeployError as other:
            say(f"that it failed could not be noted: {other.problem}")
        raise
    if job.rollout.strategy != "rolling":
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
        job.ask(predictor_name(job.api.name, name))
        return
    except LeaseLost:
        raise
    except Exception as error:
        told = explained(error)
        problem, remedy = told.problem, told.remedy
    failed = replace(failed, reason=problem, former=previous)
    found = job.persist(job.api.get)
    if not previous or not found:
        _note(job, failed)
        raise DeployError(f"{problem}. There was no model before it, so the object stays for you to look at", remedy)
    try:
        job.restore(found, failed)
    except (LeaseLost, TakenOver):
        raise
    except DeployError as error:
        raise DeployError(f"{problem}. Putting {previous} back failed too: {error.problem}", remedy) from error
    raise DeployError(f"{problem}. {previous} was put back", remedy)
