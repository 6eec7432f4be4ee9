"""The canary of mode Knative: `canaryTrafficPercent`, which splits traffic between two revisions of one predictor.

The spec names the new model from the beginning; Knative keeps the former revision. Tags give both addresses of their own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from haechi.components.shared.errors import DeployRefused

from .inference_service import PREVIOUS, TAG_ROUTING, TakenOver, bare, wait
from .job import Job
from .readiness import Look, latest_revision, look, storage_uri
from .rollout_state import RolloutState, now

__all__ = ["KnativeCanary"]


class KnativeCanary:
    """One canary of one service.

    Args:
        job: the model and the service.
        found: the service as it is.
        state: names the model that comes (the job's, or one that was left on its way) and the one that goes.

    Raises:
        DeployRefused: Prometheus is asked for, whose labels do not tell two revisions apart.
    """

    strategy = "canary-knative"
    drains = False

    def __init__(self, job: Job, found: dict[str, Any], state: RolloutState) -> None:
        self._job, self._state = job, state
        # The revision that cannot be the new one; a step that goes on with a canary finds the canary's own here.
        self._stale = latest_revision(found) if storage_uri(found) != state.uri else ""
        if job.rollout.prometheus:
            raise DeployRefused(
                "rollout.prometheus is set, and in mode Knative its labels do not tell canary and stable apart",
                "Leave it empty: the revisions' own /metrics are read then.",
            )
        predictor = f"{job.api.name}-predictor"
        self.services = (f"latest-{predictor}", f"prev-{predictor}")
        self.pods = self.services
        # At 100 % KServe drops the former revision: that is the promotion.
        self.steps = tuple(step for step in job.rollout.steps if step < 100)

    def at(self, traffic: int, coming: int = 0) -> dict[str, Any]:
        """The new model with a share of traffic; its pods follow the requests."""
        body = self.promoted()
        body["spec"]["predictor"]["canaryTrafficPercent"] = traffic
        return body

    def stands(self, found: dict[str, Any]) -> bool:
        """The new model, at the share that the state tells."""
        share = found["spec"]["predictor"].get("canaryTrafficPercent")
        return storage_uri(found) == self._state.uri and share == self._state.traffic

    def look(self, found: dict[str, Any]) -> Look | None:
        """The newest revision."""
        if storage_uri(found) != self._state.uri:
            return None
        return look(found, self._stale, self._job.api.deployment)

    def too_small(self) -> str:
        """Never: Knative's autoscaler makes the pods of each revision."""
        return ""

    def routed(self, found: dict[str, Any], traffic: int) -> Look | None:
        """Knative's own word on the newest revision's share."""
        seen = self.look(found)
        if seen is None or not seen.ready:
            return seen
        shares = ((found.get("status") or {}).get("components") or {}).get("predictor", {}).get("traffic") or []
        given = sum(int(item.get("percent") or 0) for item in shares if item.get("latestRevision"))
        return seen if given == traffic else Look(reason=f"the route gives it {given} %, not {traffic} %")

    def promoted(self) -> dict[str, Any]:
        """The new model without a percent, which means all."""
        body = self._job.wanted()
        body["metadata"]["annotations"] |= {TAG_ROUTING: "true", PREVIOUS: self._state.former}
        return body

    def serves(self, found: dict[str, Any]) -> Look | None:
        """The newest revision, alone."""
        if "canaryTrafficPercent" in found["spec"]["predictor"]:
            return None
        return self.routed(found, 100)

    def withdraw(self, state: RolloutState) -> None:
        """The former model as a new revision without traffic first: without the percent, what is ready gets all."""
        job, former = self._job, state.former
        found = job.persist(job.api.get)
        named = storage_uri(found)
        if found is None or named not in (former, self._state.uri):
            raise TakenOver(f"the service names {named or 'no model'} now", "Look at it with `haechi status`.")
        bad = latest_revision(found) if named == self._state.uri else ""
        name = (found["metadata"].get("labels") or {}).get("app.kubernetes.io/name", job.model.name)
        version = former.rstrip("/").rsplit("/", 1)[-1]
        body = bare(job.api.namespace, job.api.name, name, version, former)
        body["metadata"]["annotations"] = {TAG_ROUTING: "true"}
        body["spec"]["predictor"]["canaryTrafficPercent"] = 0
        job.apply(body, replace(state, phase="back", since=now()))
        wait(job.api, job.patience, lambda seen: self._former_ready(seen, bad), former, job.lease.renew)
        del body["spec"]["predictor"]["canaryTrafficPercent"]
        job.apply(body, state)

    def _former_ready(self, found: dict[str, Any], bad: str) -> Look | None:
        return look(found, bad, self._job.api.deployment) if storage_uri(found) == self._state.former else None
