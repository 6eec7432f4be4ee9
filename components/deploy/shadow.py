"""Where no traffic can be split: the new model in a service of its own first, without users, then the pods are replaced."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from haechi.components.shared.errors import DeployError, DeployRefused
from haechi.components.shared.progress import say

from .inference_service import ours, wait
from .job import Job
from .kubernetes_api import InferenceServiceApi
from .lease import LeaseLost
from .readiness import look, predictor_name, storage_uri

__all__ = ["check_shadow", "prove_in_shadow", "remove_shadow"]

_SHADOW_OF = "haechi.io/shadow-of"
# A shadow has one pod, whatever the service has.
_SCALING = ("name", "minReplicas", "maxReplicas", "scaleMetric", "scaleMetricType", "scaleTarget", "autoScaling")
_NAME_LENGTH = 63 - len("-shadow-predictor")


def check_shadow(job: Job) -> None:
    """Raise where there can be no shadow; nothing is changed.

    Raises:
        DeployRefused: the name is too long, or a service of somebody else has that name.
    """
    if len(job.api.name) > _NAME_LENGTH:
        raise DeployRefused(
            f"the name {job.api.name} has more than {_NAME_LENGTH} characters, so its shadow cannot be named",
            "Use a shorter name, or set rollout.strategy to 'rolling'.",
        )
    twin = _twin(job)
    there = job.persist(twin.get)
    if there and _SHADOW_OF not in (there["metadata"].get("annotations") or {}):
        raise DeployRefused(
            f"InferenceService {twin.namespace}/{twin.name} is somebody's, and we need that name for a shadow",
            "Rename it, or set rollout.strategy to 'rolling'.",
        )


def prove_in_shadow(job: Job, found: dict[str, Any]) -> None:
    """Ask the model for its golden boxes in the InferenceService `<name>-shadow`, which is deleted in any case.

    Args:
        job: the model and the service.
        found: the service, whose settings the shadow takes over.

    Raises:
        DeployError: not ready in time, or it gives other boxes.
    """
    twin = _twin(job)
    try:
        job.persist(lambda: twin.apply(_body(job, found, twin.name)))
        say(f"shadow {twin.namespace}/{twin.name} is applied, without users; waiting until it is ready")
        wait(
            twin,
            job.patience,
            lambda seen: look(seen, "", twin.deployment) if storage_uri(seen) == job.uri else None,
            f"shadow {job.model.version}",
            job.lease.renew,
        )
        checked = job.ask(predictor_name(twin.name), twin.name)
        say(f"the shadow gives the golden boxes: {checked.boxes} on {checked.images} images")
    except LeaseLost:
        raise  # what stands there may be the shadow of whoever took over
    except BaseException:
        remove_shadow(job)
        raise
    remove_shadow(job)


def remove_shadow(job: Job) -> None:
    """Delete the shadow, if there is one; where that fails, say so: the next rollout tries again."""
    twin = _twin(job)
    try:
        found = job.persist(twin.get)
        if found and _SHADOW_OF in (found["metadata"].get("annotations") or {}):
            job.persist(twin.delete)
    except DeployError as error:
        say(f"shadow {twin.namespace}/{twin.name} stays and costs a pod: {error.problem}. Delete it, or deploy again.")


def _twin(job: Job) -> InferenceServiceApi:
    return job.api.beside(f"{job.api.name}-shadow")


def _body(job: Job, found: dict[str, Any], name: str) -> dict[str, Any]:
    body, wanted = ours(found), job.wanted()
    predictor = {key: deepcopy(value) for key, value in found["spec"]["predictor"].items() if key not in _SCALING}
    for field in ("model", "labels", "annotations"):
        predictor[field] = {**(predictor.get(field) or {}), **wanted["spec"]["predictor"][field]}
    # Without users: no host name is made for it.
    labels = {**wanted["metadata"]["labels"], "networking.kserve.io/visibility": "cluster-local"}
    owner = {"apiVersion": body["apiVersion"], "kind": body["kind"], "name": job.api.name}
    body["metadata"] |= {
        "name": name,
        "labels": labels,
        "annotations": {**wanted["metadata"]["annotations"], _SHADOW_OF: job.api.name},
        "ownerReferences": [{**owner, "uid": found["metadata"]["uid"]}],
    }
    body["spec"]["predictor"] = {**predictor, "minReplicas": 1}
    return body
