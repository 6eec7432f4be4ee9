"""A canary: the new model beside the old one, asked for its golden boxes, then given traffic step by step, then promoted.

Every step is one apply that also writes how far we are (rollout_state.py), so that a killed step is gone on with or
cleaned up by the next one. Whatever fails, traffic is with the former model when the error is raised.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

from haechi.components.shared.errors import DeployError
from haechi.components.shared.model_folder import read_golden
from haechi.components.shared.progress import say

from .endpoint import Unanswered, disagreement
from .inference_service import TakenOver, explained, wait
from .job import Job
from .lease import LeaseLost
from .readiness import Look
from .rollout_state import RolloutState, now
from .traffic import Measured, Pods, Prometheus, Source, judge

__all__ = ["NotSplit", "Outgrown", "Way", "finish", "walk"]

_MOST_IMAGES = 8


class NotSplit(DeployError):
    """KServe made the canary, and its route never learns of it."""


class Outgrown(DeployError):
    """The stable model has more pods by now than a canary may have; that is no word on the new model."""


class Way(Protocol):
    """How one mode of KServe has a canary. Bodies are complete: what they leave out is removed.

    Attributes:
        strategy: its name in the state.
        services: the canary's and the stable predictor's Service.
        pods: the names of their Deployments, for Prometheus.
        steps: percents that this mode can give.
        drains: promoting takes the former predictor away at once, so no traffic may go to it any more.
    """

    strategy: str
    services: tuple[str, str]
    pods: tuple[str, str]
    steps: tuple[int, ...]
    drains: bool

    def at(self, traffic: int, coming: int = 0) -> dict[str, Any]:
        """The service with the canary at a share of traffic, and with the pods for a larger one that is coming."""

    def stands(self, found: dict[str, Any]) -> bool:
        """Whether the spec has the canary at the very share that the state tells."""

    def look(self, found: dict[str, Any]) -> Look | None:
        """Whether the canary is ready; None where it is no longer there."""

    def too_small(self) -> str:
        """Why the canary cannot have the pods that the traffic needs; empty where it can."""

    def routed(self, found: dict[str, Any], traffic: int) -> Look | None:
        """Whether the traffic is split as the spec says."""

    def promoted(self) -> dict[str, Any]:
        """The service with the new model alone."""

    def serves(self, found: dict[str, Any]) -> Look | None:
        """Whether the new model serves, alone; None where something else is named."""

    def withdraw(self, state: RolloutState) -> None:
        """Give all traffic to the former model, and write the state, whatever was done before."""


def walk(job: Job, way: Way, state: RolloutState) -> None:
    """Bring the model into service.

    Args:
        job: the model and the service.
        way: of the mode.
        state: of phase `canary`; its traffic is what a killed step had come to, or 0.

    Raises:
        LeaseLost, TakenOver: somebody else is at it now; the service is theirs.
        NotSplit: no traffic can reach the canary here, which is right; the former model has all of it.
        Outgrown: the canary is right, and cannot carry the traffic; the former model has all of it.
        DeployError: why not; the former model has all traffic again.
    """
    with _withdrawn_if_worse(job, way, state):
        _prove(job, way, state)
        # Where a killed step had come further than these steps go, its share was not watched to the end.
        for traffic in [step for step in way.steps if step >= state.traffic] or [state.traffic][: len(way.steps)]:
            state = _give(job, way, state, traffic)
        if way.drains:
            state = _route(job, way, state, 100)
        _promote(job, way, state)


def finish(job: Job, way: Way, state: RolloutState) -> None:
    """Go on with a promotion that was killed.

    Args:
        job, way: as in `walk`.
        state: of phase `promoting`.

    Raises:
        LeaseLost, TakenOver, DeployError: as `walk`.
    """
    with _withdrawn_if_worse(job, way, state):
        _promote(job, way, state, asked=True)


@contextmanager
def _withdrawn_if_worse(job: Job, way: Way, state: RolloutState) -> Iterator[None]:
    try:
        yield
    except (LeaseLost, TakenOver):
        raise
    except Exception as error:
        told = explained(error)
        kind = type(error) if isinstance(error, NotSplit | Outgrown) else DeployError
        raise kind(f"{told.problem}. {_back(job, way, state, told.problem)}", told.remedy) from error
    except (KeyboardInterrupt, SystemExit):  # nobody would watch it any more
        say(_back(job, way, state, "it was interrupted"))
        raise


def _prove(job: Job, way: Way, state: RolloutState) -> None:
    """The canary without traffic: ready, and its own address gives the golden boxes."""
    # Gone on with, the canary keeps its share meanwhile: it was proven before it got any.
    job.apply(way.at(state.traffic), replace(state, owner=job.lease.holder, since=now()))
    say(
        f"{job.api.namespace}/{job.api.name}: canary {job.model.version} is applied, with {state.traffic} % of the traffic"
    )
    wait(job.api, job.patience, way.look, f"canary {job.model.version}", job.lease.renew)
    found = job.ask(way.services[0])
    say(f"the canary gives the golden boxes: {found.boxes} on {found.images} images")
    if not state.traffic:
        _must_be_split(job, way)


def _must_be_split(job: Job, way: Way) -> None:
    """Raise where the route does not even name the canary: KServe 0.20.0 makes canaries, and splits nothing."""
    # KServe writes the route before it says that the canary is ready.
    patience = replace(job.patience, timeout=max(job.patience.blocked, 3 * job.patience.poll))
    try:
        wait(job.api, patience, lambda found: way.routed(found, 0), "0 % of traffic", job.lease.renew)
    except (LeaseLost, TakenOver):
        raise
    except DeployError as error:
        if not _still_there(job, way).ready:
            raise
        raise NotSplit(
            f"KServe made the canary, and traffic does not follow it: {error.problem}",
            "Take a KServe that splits it (docs/deploying.md), or set rollout.strategy to 'auto', 'shadow' or 'rolling'.",
        ) from error


def _give(job: Job, way: Way, state: RolloutState, traffic: int) -> RolloutState:
    """Give the canary a share of traffic, and watch; the state by then."""
    state = _route(job, way, state, traffic)
    say(f"the canary gets {traffic} % of the traffic for {job.rollout.bake:.0f} s")
    reason = _bake(job, way)
    if reason:
        raise DeployError(f"at {traffic} % of traffic: {reason}", "Look at the canary's log and metrics of that time.")
    return state


def _route(job: Job, way: Way, state: RolloutState, traffic: int) -> RolloutState:
    """Give the canary its pods and then a share of traffic, the state by then; nothing changes where it has both."""
    reason = job.persist(way.too_small)
    if reason:
        raise Outgrown(
            f"before {traffic} % of traffic: {reason}",
            "Set spec.predictor.minReplicas to what the traffic needs, or rollout.strategy to 'auto' or 'shadow'.",
        )
    if way.at(state.traffic, traffic) != way.at(state.traffic):
        job.apply(way.at(state.traffic, traffic), replace(state, since=now()))
        wait(job.api, job.patience, way.look, f"canary with the pods for {traffic} %", job.lease.renew)
    state = replace(state, traffic=traffic, since=now())
    job.apply(way.at(traffic), state)
    wait(job.api, job.patience, lambda found: way.routed(found, traffic), f"{traffic} % of traffic", job.lease.renew)
    return state


def _bake(job: Job, way: Way) -> str:
    """Watch canary and stable for a while; why the canary is worse, or empty."""
    begun = time.monotonic()
    canary, stable = (job.endpoint(service) for service in way.services)
    sources = [_source(job, pods, service, begun) for pods, service in zip(way.pods, way.services, strict=True)]
    images = read_golden(job.folder)[:_MOST_IMAGES]
    pairs, place, broken_since = [], 0, 0.0
    while True:
        job.lease.renew()
        image = images[place % len(images)]
        place += 1
        found, version = canary.detect(image)
        if version != job.model.version:
            return f"the canary's address answered as model {version}, not {job.model.version}"
        try:
            pairs.append((stable.detect(image)[0], found))
        except Unanswered as error:
            say(f"the stable model does not answer, so it is not compared: {error.problem}")
        for source in sources:
            source.look()
        look = _still_there(job, way)
        broken_since = 0.0 if look.ready else broken_since or time.monotonic()
        if broken_since and time.monotonic() - broken_since >= job.patience.blocked:
            return f"the canary is no longer ready: {look.reason}"
        # One look alone measures nothing: it is what the next ones are compared with.
        if time.monotonic() - begun >= job.rollout.bake and place >= max(2, len(images)):
            break
        time.sleep(job.rollout.poll)
    ours, theirs, differ = sources[0].total(), _total_of_stable(sources[1]), disagreement(pairs)
    say(
        f"canary: {ours.requests:.0f} requests, {ours.failing:.1%} failed; stable: {theirs.requests:.0f}, {theirs.failing:.1%}; "
        f"{differ:.1%} of their boxes differ"
    )
    return judge(ours, theirs, differ, job.rollout)


def _total_of_stable(source: Source) -> Measured:
    try:
        return source.total()
    except Unanswered as error:
        say(f"of the stable model nothing is measured, so it counts as without failures: {error.problem}")
        return Measured()


def _still_there(job: Job, way: Way) -> Look:
    seen = job.persist(lambda: _look(job, way))
    if seen is None:
        raise TakenOver(
            f"the canary of {job.api.namespace}/{job.api.name} was changed or removed by somebody else",
            "Look at the service with `haechi status`, then run deploy again.",
        )
    return seen


def _look(job: Job, way: Way) -> Look | None:
    found = job.api.get()
    return way.look(found) if found else None


def _source(job: Job, pods: str, service: str, begun: float) -> Source:
    if job.rollout.prometheus:
        seconds = lambda: time.monotonic() - begun  # noqa: E731
        return Prometheus(job.rollout.prometheus, job.api.namespace, pods, seconds)
    return Pods(job.endpoint(service).metrics)


def _promote(job: Job, way: Way, state: RolloutState, asked: bool = False) -> None:
    job.apply(way.promoted(), replace(state, phase="promoting", traffic=100, since=now()))
    say(f"{job.model.version} is promoted; waiting until it alone serves")
    wait(job.api, job.patience, way.serves, f"model {job.model.version}", job.lease.renew)
    if asked:
        job.ask(way.services[0])
    job.apply(way.promoted(), replace(state, phase="done", traffic=100, since=now()))


def _back(job: Job, way: Way, state: RolloutState, reason: str) -> str:
    """Withdraw; a sentence that tells what was done."""
    try:
        way.withdraw(replace(state, phase="failed", traffic=0, since=now(), reason=reason))
    except (LeaseLost, TakenOver) as error:
        return f"Not all is as it was: {error.problem}"
    except Exception as error:
        return f"Withdrawing it failed too: {explained(error).problem}; the next run does that first"
    return f"{state.former} has all traffic again"
