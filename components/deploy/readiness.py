"""Does KServe serve the model that an InferenceService names? What its status says, and what it does not.

In mode Standard the status cannot tell: its `observedGeneration` is that of the predictor's Deployment, which drifts
from the InferenceService's with every canary and every scaled replica, and `Ready` and `modelStatus` speak for the old
pods until a failing rollout meets its deadline. There we look at the Deployment itself, canary or stable, which also
says where a quota or Pod Security refuses its pods. In mode Knative the revisions
tell.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Look", "latest_revision", "look", "look_at_canary", "predictor_name", "storage_uri"]

_SOURCE = "internal.serving.kserve.io/storage-initializer-sourceuri"  # KServe's note on the pods of what they load
_UNSEEN = "KServe's controller has not looked at it yet"
_BLOCKED = ("BlockedByFailedLoad", "InvalidSpec")
_GIVEN_UP = (("Progressing", "ProgressDeadlineExceeded"), ("ReplicaFailure", "FailedCreate"))


@dataclass(frozen=True)
class Look:
    """What one look at the service showed.

    Attributes:
        ready: the wanted model serves, alone.
        blocked: KServe or Kubernetes has given up, or is about to.
        reason: why it is not ready, for a person.
    """

    ready: bool = False
    blocked: bool = False
    reason: str = ""


def look(found: dict[str, Any], stale: str, deployment: Callable[[str], dict[str, Any] | None]) -> Look:
    """Look at an InferenceService.

    Args:
        found: the object.
        stale: in mode Knative, the revision that cannot be the wanted one; empty where any may be.
        deployment: gets a Deployment of its namespace by name.
    """
    status = found.get("status") or {}
    mode = status.get("deploymentMode")
    if not mode:
        return Look(reason=_UNSEEN)
    refused = ""
    if mode in ("Standard", "RawDeployment"):
        own = str(found["spec"]["predictor"].get("name") or "")
        pods_of = deployment(predictor_name(found["metadata"]["name"], own))
        waits, refused = _waits_for_pods(pods_of, storage_uri(found)), _refused(pods_of)
    else:
        waits = _waits_for_revision(status, stale)
    if waits == _UNSEEN:
        return Look(reason=_UNSEEN)
    transition = str((status.get("modelStatus") or {}).get("transitionStatus") or "")
    ready = not waits and _condition(status, "Ready").get("status") == "True" and transition in ("", "UpToDate")
    gave_up = refused or _condition(status, "PredictorReady").get("reason") == "ProgressDeadlineExceeded"
    reasons = dict.fromkeys(filter(None, [waits, refused, *_complaints(status)]))
    return Look(ready, transition in _BLOCKED or bool(gave_up), "; ".join(reasons))


def look_at_canary(
    deployment: dict[str, Any] | None,
    pods: list[dict[str, Any]],
    uri: str,
    status: dict[str, Any],
    name: str,
    least: int = 1,
) -> Look:
    """Look at a canary of mode Standard, of which KServe says no more than `ready`, and that with its first pod.

    Args:
        deployment, pods: its own.
        uri: the storageUri that it must serve.
        status: of the InferenceService.
        name: the canary's `predictor.name`.
        least: pods that must serve; an autoscaler brings the Deployment there a while after it was made.
    """
    waits = _waits_for_pods(deployment, uri, least)
    told: dict[str, Any] = next((item for item in status.get("canaryStatuses") or [] if item.get("name") == name), {})
    trouble, stuck = _trouble(pods)
    refused = _refused(deployment)
    waits_for = waits or ("" if told.get("ready") else "KServe does not call it ready")
    reason = "; ".join(filter(None, [waits_for, trouble, refused]))
    return Look(not waits and bool(told.get("ready")), stuck or bool(refused), reason)


def _refused(deployment: dict[str, Any] | None) -> str:
    """Why a Deployment gets no further, in Kubernetes' words; empty where it may yet."""
    status = (deployment or {}).get("status") or {}
    return "; ".join(
        str(item.get("message") or item["reason"])
        for item in status.get("conditions") or []
        if (item.get("type"), item.get("reason")) in _GIVEN_UP
    )


def _trouble(pods: list[dict[str, Any]]) -> tuple[str, bool]:
    """What the containers of pods that are not ready say, and whether one of them has failed already."""
    said: list[str] = []
    failed = False
    for pod in pods:
        status = pod.get("status") or {}
        for item in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]:
            waiting, last = (
                item.get("state", {}).get("waiting") or {},
                item.get("lastState", {}).get("terminated") or {},
            )
            ended = item.get("state", {}).get("terminated") or last
            if waiting.get("reason", "") not in ("", "PodInitializing", "ContainerCreating") or ended.get("exitCode"):
                words = (ended.get("message") or waiting.get("message") or "").strip()[-500:]
                said.append(
                    f"{item.get('name')}: {waiting.get('reason') or ended.get('reason') or 'ended'} {words}".strip()
                )
                failed = True
        said += [
            str(item["message"])
            for item in status.get("conditions") or []
            if item.get("type") == "PodScheduled" and item.get("status") == "False" and item.get("message")
        ]
    return "; ".join(dict.fromkeys(said)), failed


def predictor_name(service: str, own: str = "") -> str:
    """The name of a predictor's Deployment and Service; `own` is its `name` in the spec, if it has one."""
    return "-".join(part for part in (service, own, "predictor") if part)


def storage_uri(found: dict[str, Any] | None) -> str:
    """The storageUri that an InferenceService names, or empty."""
    predictor = ((found or {}).get("spec") or {}).get("predictor") or {}
    return str((predictor.get("model") or {}).get("storageUri") or "")


def latest_revision(found: dict[str, Any] | None) -> str:
    """The newest Knative revision of its predictor, or empty."""
    return str(_predictor_status((found or {}).get("status") or {}).get("latestCreatedRevision") or "")


def _waits_for_pods(deployment: dict[str, Any] | None, uri: str, least: int = 0) -> str:
    """What the rollout still waits for, judged as `kubectl rollout status` does; empty where it is done."""
    if deployment is None:
        return _UNSEEN
    meta, spec, status = deployment["metadata"], deployment["spec"], deployment.get("status") or {}
    template = spec["template"].get("metadata") or {}
    if (template.get("annotations") or {}).get(_SOURCE) != uri:
        return _UNSEEN
    if int(status.get("observedGeneration") or 0) < int(meta["generation"]):
        return f"Deployment {meta['name']} is not rolled yet"
    pods, new = max(least, int(spec.get("replicas", 1))), int(status.get("updatedReplicas") or 0)
    old = int(status.get("replicas") or 0) - new
    good = max(0, int(status.get("availableReplicas") or 0) - old)
    if good < pods or old:
        return f"{good} of {pods} pods of Deployment {meta['name']} serve it, {old} of the old ones are there"
    return ""


def _waits_for_revision(status: dict[str, Any], stale: str) -> str:
    predictor = _predictor_status(status)
    created, ready = predictor.get("latestCreatedRevision"), predictor.get("latestReadyRevision")
    if not created or created == stale:
        return _UNSEEN
    return "" if created == ready else f"revision {created} is not ready"


def _predictor_status(status: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = (status.get("components") or {}).get("predictor") or {}
    return found


def _condition(status: dict[str, Any], kind: str) -> dict[str, Any]:
    return next((item for item in status.get("conditions") or [] if item.get("type") == kind), {})


def _complaints(status: dict[str, Any]) -> list[str]:
    """The conditions that are not as they should be, and what KServe says of a failed load."""
    parts = [
        f"{item.get('type')} is {item.get('status')} ({item.get('reason') or 'no reason'}: {item.get('message') or '-'})"
        for item in status.get("conditions") or []
        if item.get("status") != ("False" if item.get("type") == "Stopped" else "True")
    ]
    model = status.get("modelStatus") or {}
    failure = model.get("lastFailureInfo") or {}
    # KServe never clears its last failure, so it counts only while it blocks.
    if failure and model.get("transitionStatus") in _BLOCKED:
        parts.append(f"{failure.get('reason')}: {failure.get('message')}")
    return parts or [f"model is {model.get('transitionStatus') or 'without status'}"]
