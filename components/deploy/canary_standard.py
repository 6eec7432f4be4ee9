"""The canary of mode Standard: `spec.canary[]` of KServe, whose traffic Gateway API splits (not yet in 0.20.0).

The canary `v-<version>` is a Deployment and a Service of its own. Promoting makes it the stable predictor by its name:
its pods go on serving, and the former Deployment goes. Users reach the service through its HTTPRoute, which keeps its
name; the stable predictor's Service does not.
"""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace
from typing import Any

from haechi.components.shared.errors import DeployError
from haechi.components.shared.progress import say

from .inference_service import PREVIOUS, TakenOver, ours, owned, wait
from .job import Job
from .kserve_settings import MODE
from .kubernetes_api import Forbidden
from .lease import LeaseLost
from .readiness import Look, look, look_at_canary, predictor_name, storage_uri
from .rollout_state import RolloutState

__all__ = ["LONGEST_NAME", "StandardCanary"]

# <name>-v-<12 hex>-predictor is a Service's name, which has 63 characters.
LONGEST_NAME = 63 - len("-v-0123456789ab-predictor")
_AUTOSCALER = "serving.kserve.io/autoscalerClass"
_TOLD = ("Accepted", "ResolvedRefs")  # what every gateway says of a route; words of its own it may leave as they were


class StandardCanary:
    """One canary of one service.

    Args:
        job: the model and the service.
        found: the service as it is.
        state: names the model that comes (the job's, or one that was left on its way) and the one that goes.
    """

    strategy = "canary"
    drains = True  # KServe deletes the former Deployment and Service before it moves the route

    def __init__(self, job: Job, found: dict[str, Any], state: RolloutState) -> None:
        self._job, self._found, self._state = job, found, state
        # A stable predictor that was replaced in place still bears the name of the canary that it once was.
        self._name = f"{'w' if state.former_name == f'v-{state.version}' else 'v'}-{state.version}"
        self.services = (predictor_name(job.api.name, self._name), predictor_name(job.api.name, state.former_name))
        self.pods = self.services
        self.steps = job.rollout.steps
        least = found["spec"]["predictor"].get("minReplicas")
        self._least = 1 if least is None else int(least)

    def at(self, traffic: int, coming: int = 0) -> dict[str, Any]:
        """The stable predictor as it is, and ours beside it, with the pods for the larger of both shares."""
        body = ours(self._found)
        body["metadata"]["annotations"][MODE] = "Standard"
        canary = {**deepcopy(self._job.wanted()["spec"]["predictor"]), "name": self._name}
        # The schema wants the container's name here; an empty one is what KServe fills in.
        canary["model"]["name"] = ""
        # At 0 % too it needs one, to be proven; more than the stable predictor's minReplicas KServe refuses.
        canary["minReplicas"] = min(self._least, max(1, math.ceil(self._least * max(traffic, coming) / 100)))
        body["spec"]["canary"] = [{"trafficPercent": traffic, "predictor": canary}]
        return body

    def stands(self, found: dict[str, Any]) -> bool:
        """One entry, ours, at the share that the state tells."""
        entries = found["spec"].get("canary") or []
        shares = [(storage_uri({"spec": entry}), int(entry.get("trafficPercent") or 0)) for entry in entries]
        return shares == [(self._state.uri, self._state.traffic)] and storage_uri(found) == self._state.former

    def look(self, found: dict[str, Any]) -> Look | None:
        """Its pods, its Deployment and KServe's word."""
        entries = [
            entry["predictor"]
            for entry in found["spec"].get("canary") or []
            if storage_uri({"spec": entry}) == self._state.uri
        ]
        if not entries:
            return None
        api, deployment = self._job.api, self.services[0]
        try:
            pods = api.pods(deployment)
        except Forbidden:
            pods = []  # then a failure's reason stays unknown
        status, least = found.get("status") or {}, int(entries[0].get("minReplicas") or 1)
        return look_at_canary(api.deployment(deployment), pods, self._state.uri, status, self._name, least)

    def too_small(self) -> str:
        """KServe gives a canary no more pods than minReplicas, and an autoscaler that never adds to them."""
        stable = self._job.api.deployment(self.services[1]) or {"metadata": {}, "spec": {}}
        scaled_by = (stable["metadata"].get("annotations") or {}).get(_AUTOSCALER, "hpa")
        if scaled_by not in ("hpa", "none"):
            return f"{_AUTOSCALER} is {scaled_by!r}, and that scales no canary"
        pods, most = int(stable["spec"].get("replicas") or 0), max(1, self._least)
        if pods <= most:
            return ""
        return f"the stable model has {pods} pods now, and a canary no more than minReplicas, {most}"

    def routed(self, found: dict[str, Any], traffic: int) -> Look | None:
        """Whether the HTTPRoute has the weight."""
        seen = self.look(found)
        if seen is None or not seen.ready:
            return seen
        try:
            route = self._job.api.route()
        except Forbidden as error:
            say(f"whether traffic follows the canary cannot be seen: {error.problem}")
            return seen
        # Where it is to get nothing, it is enough that the route knows it.
        weights, behind = self._weights(route), _behind(route) if traffic else ""
        if weights and all(weight == traffic for weight in weights) and not behind:
            return seen
        given = f"HTTPRoute {self._job.api.name} gives it {weights or 'nothing'}"
        return Look(reason=f"{given}{f', and {behind}' if behind else f', not {traffic} %'}")

    def promoted(self) -> dict[str, Any]:
        """Our predictor by its name, and no canary."""
        body = self._job.wanted()
        body["metadata"]["annotations"] |= {MODE: "Standard", PREVIOUS: self._state.former}
        body["spec"]["predictor"]["name"] = self._name
        return body

    def serves(self, found: dict[str, Any]) -> Look | None:
        """As every rollout of this mode."""
        if storage_uri(found) != self._state.uri or found["spec"].get("canary"):
            return None
        return look(found, "", self._job.api.deployment)

    def withdraw(self, state: RolloutState) -> None:
        """Without the canary; after a promotion, the former model in place of ours. What others named stays."""
        job, former = self._job, state.former
        found = job.persist(job.api.get)
        if found is None:
            raise TakenOver("the service was deleted meanwhile", "Run deploy again to make it anew.")
        named = storage_uri(found)
        if named == self._state.uri:
            job.restore(found, state)
            return
        body = ours(found)
        theirs = named != former and not owned(found, "f:predictor", "f:model", "f:storageUri")
        if theirs:  # we only take our canary away
            body["spec"]["predictor"]["model"].pop("storageUri", None)
        self._drain(found, body, state)
        job.apply(body, state)
        left = job.persist(job.api.get) or {"spec": {}}
        if left["spec"].get("canary"):
            raise TakenOver("the canary is somebody else's by now, and stays", "Look at it with `haechi status`.")
        if theirs:
            raise TakenOver(
                f"the canary was withdrawn, and the service names {named or 'no model'} now, which somebody else set",
                "Look at it with `haechi status`.",
            )

    def _drain(self, found: dict[str, Any], body: dict[str, Any], state: RolloutState) -> None:
        """Take all traffic from our canary first: KServe deletes what the spec no longer names before it moves the route."""
        job = self._job
        canaries = found["spec"].get("canary") or []
        if [storage_uri({"spec": entry}) for entry in canaries] != [state.uri]:
            return
        # As it stands, which another run may have made: its pods serve what they get until the route has moved.
        there = canaries[0]["predictor"]
        canary = ours({**found, "spec": {"predictor": there}})["spec"]["predictor"]
        canary["model"]["name"] = ""
        canary["minReplicas"] = there.get("minReplicas", 1)
        spec = {**body["spec"], "canary": [{"trafficPercent": 0, "predictor": canary}]}
        patience = replace(job.patience, timeout=max(job.patience.blocked, 3 * job.patience.poll))
        try:
            if canaries[0].get("trafficPercent"):
                job.apply({**body, "spec": spec}, replace(state, phase="back"))
            # A killed withdrawal may have come this far, and KServe may not have seen it yet.
            wait(job.api, patience, self._drained, "the canary without traffic", job.lease.renew)
        except LeaseLost:
            raise
        except DeployError as error:  # it is taken away all the same, and that tells whose it is
            say(f"the canary may get traffic to the last: {error.problem}")

    def _drained(self, found: dict[str, Any]) -> Look | None:
        if not found["spec"].get("canary"):
            return None
        try:
            route = self._job.api.route()
        except Forbidden:
            return Look(ready=True)  # nobody can tell
        weights, behind = self._weights(route), _behind(route)
        given = f"HTTPRoute {self._job.api.name} gives it {weights}"
        return Look(ready=not any(weights) and not behind, reason=f"{given} still, {behind}" if behind else given)

    def _weights(self, route: dict[str, Any] | None) -> list[Any]:
        """What a route gives our canary, by rule."""
        return [
            backend.get("weight")
            for rule in ((route or {}).get("spec") or {}).get("rules") or []
            for backend in rule.get("backendRefs") or []
            if backend.get("name") == self.services[0]
        ]


def _behind(route: dict[str, Any] | None) -> str:
    """What its gateways do not do yet of a route; empty where one of them does all, or none says anything."""
    generation = int(((route or {}).get("metadata") or {}).get("generation") or 0)
    told = []
    for parent in ((route or {}).get("status") or {}).get("parents") or []:
        wrong = ""
        for item in [item for item in parent.get("conditions") or [] if item.get("type") in _TOLD]:
            if int(item.get("observedGeneration") or generation) < generation:
                wrong = "the gateway has not seen its last change"
            elif item.get("status") == "False":
                wrong = f"the gateway says {item['type']} is False ({item.get('reason')}: {item.get('message') or '-'})"
        told.append(wrong)
    # A controller that was removed leaves its words behind.
    return "" if "" in told or not told else told[0]
