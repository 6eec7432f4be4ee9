"""Which way a cluster can bring a model into service: its mode of KServe, and whether anything splits traffic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from haechi.components.shared.errors import DeployError, DeployRefused
from haechi.components.shared.progress import say

from .canary_standard import LONGEST_NAME, StandardCanary
from .job import Job
from .kserve_settings import Sections, kserve_settings, told_mode
from .kubernetes_api import Forbidden
from .rollout_state import RolloutState

__all__ = ["Choice", "choose"]

_MAY_READ = "Role haechi-kserve-mode of manifests/base/kserve"
_MODES = {"Standard": "Standard", "RawDeployment": "Standard", "Knative": "Knative", "Serverless": "Knative"}


@dataclass(frozen=True)
class Choice:
    """The way to go.

    Attributes:
        strategy: `canary` (mode Standard), `canary-knative`, `shadow` or `rolling`.
        why: why it is no canary, where none was asked for by name; else empty.
    """

    strategy: str
    why: str = ""


def choose(job: Job, found: dict[str, Any], state: RolloutState) -> Choice:
    """Choose the strategy for a service that exists. Changes nothing, and tells of missing rights and conflicts.

    Args:
        job: the model and the service.
        found: the service.
        state: names the model that comes and the one that goes, and what is known of former canaries.

    Raises:
        DeployRefused: `rollout.strategy` is `canary`, and the cluster cannot split traffic.
        Conflict, Forbidden, DeployError: the service could not be changed as it must be.
    """
    wanted = job.rollout.strategy
    if wanted == "rolling":
        return Choice("rolling")
    config = _config(job)
    told = told_mode(found, config or {})
    mode = _MODES.get(told, told)
    if wanted == "shadow":
        if mode == "Knative":
            raise DeployRefused(
                "rollout.strategy is 'shadow', and this service is in mode Knative, which has canaries",
                "Set it to 'auto', 'canary' or 'rolling'.",
            )
        return Choice("shadow")
    if mode == "Knative":
        return Choice("canary-knative")
    if wanted == "auto" and state.unsplit:
        why = f"KServe's route followed no canary at {state.unsplit}; rollout.strategy=canary tries again"
        return Choice("shadow", why)
    why = _why_not(job, found, state, mode, config)
    if why and wanted == "canary":
        raise DeployRefused(
            f"rollout.strategy is 'canary', and traffic of {job.api.namespace}/{job.api.name} cannot be split: {why}",
            "Mend that (option gateway-canary of the manifests), or set it to 'auto', 'shadow' or 'rolling'.",
        )
    if why:
        return Choice("shadow", why)
    _tell_whose_pods(job, found["spec"]["predictor"])
    return Choice("canary")


def _tell_whose_pods(job: Job, stable: dict[str, Any]) -> None:
    """KServe scales a service of a fixed size down by its canary's pods, before those have the traffic."""
    least = int(stable.get("minReplicas") or 1)
    if least > 1 and not stable.get("maxReplicas"):
        say(
            f"{job.api.namespace}/{job.api.name}: KServe takes the canary's pods from the {least} of the stable model, "
            "since spec.predictor.maxReplicas is not set: set it, and the stable model keeps what its traffic needs"
        )


def _config(job: Job) -> Sections | None:
    """KServe's settings by section; None where they are not there or may not be read."""

    def read(namespace: str, name: str) -> dict[str, str] | None:
        try:
            return job.persist(lambda: job.api.config_map(namespace, name))
        except Forbidden:
            return None

    found = kserve_settings(read)
    return found[1] if found else None


def _why_not(job: Job, found: dict[str, Any], state: RolloutState, mode: str, config: Sections | None) -> str:
    """Why traffic cannot be split in mode Standard; empty where it can."""
    api = job.api
    if mode != "Standard":
        unread = (
            "" if config is not None else f"; it may stand in KServe's settings, which cannot be read ({_MAY_READ})"
        )
        return f"KServe's mode is {mode or f'not known yet{unread}'}"
    if len(api.name) > LONGEST_NAME:
        return f"the service's name has more than {LONGEST_NAME} characters"
    if not job.persist(lambda: api.serves_group("gateway.networking.k8s.io")):
        return "the cluster has no Gateway API"
    if config is not None and config.get("ingress", {}).get("enableGatewayApi") is not True:
        return "KServe's ingress.enableGatewayApi is not true"
    try:
        if job.persist(api.route) is None:
            return f"there is no HTTPRoute {api.name}, so nothing splits its traffic"
    except Forbidden:
        if config is None:
            return f"neither HTTPRoutes (option gateway-canary) nor KServe's settings ({_MAY_READ}) may be read"
    way = StandardCanary(job, found, state)
    return job.persist(way.too_small) or _unknown_field(job, way)


def _unknown_field(job: Job, way: StandardCanary) -> str:
    """Let the API server check canary and promotion, without doing them."""
    try:
        job.persist(lambda: job.api.apply(way.at(0), dry_run=True))
    except DeployError as error:
        if "spec.canary" in error.problem and ("unknown field" in error.problem or "not declared" in error.problem):
            return "this KServe has no spec.canary (it came with 0.20)"
        raise
    job.persist(lambda: job.api.apply(way.promoted(), dry_run=True))
    return ""
