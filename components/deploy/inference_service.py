"""The target `kserve:<namespace>/<name>`: apply an InferenceService, wait until it is ready, or put the old one back.

Only the fields in `manifest` are ours (server-side apply, manager `haechi-deploy`); replicas, resources, service
account and the rest belong to whoever set them, and stay. The S3 credentials of KServe's storage initializer come with
the predictor's service account, which a person sets on the object or on the namespace.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from haechi.components.shared.errors import DeployError, HaechiError
from haechi.components.shared.model_folder import ModelFolder
from haechi.components.shared.progress import say

from .kserve_settings import MODE
from .kubernetes_api import MANAGER, Away, InferenceServiceApi
from .lease import LeaseLost
from .readiness import Look, latest_revision, look, storage_uri
from .rollout_state import STATE

__all__ = [
    "PREVIOUS",
    "TAG_ROUTING",
    "Patience",
    "TakenOver",
    "bare",
    "explained",
    "manifest",
    "ours",
    "own_name",
    "owned",
    "persist",
    "refuse_canary",
    "roll_out",
    "wait",
    "worn",
]

PREVIOUS = "haechi.io/previous-storage-uri"  # lets a repeated step, killed while it waited, still go back
TAG_ROUTING = "serving.kserve.io/enable-tag-routing"
_OUR_LABELS, _OUR_NOTES = "app.kubernetes.io/", "haechi.io/"
_DIGESTS = tuple(f"haechi.io/{name}" for name in ("onnx-sha256", "checkpoint-sha256", "dataset-digest", "run-id"))
# KServe writes the service's labels and annotations on every pod, stable and canary, and a changed template replaces
# them all. A predictor's own win over those, so each has its own: what its pods are then follows from the model alone.
# Not empty: KServe takes an empty one of a canary for none, and gives it the stable predictor's.
_ELSEWHERE = "see-the-inferenceservice"
_ON_PODS = dict.fromkeys((STATE, PREVIOUS, *_DIGESTS), _ELSEWHERE)
_LABEL_LENGTH = 63

_Result = TypeVar("_Result")


class TakenOver(DeployError):
    """Somebody else changed the service meanwhile: theirs stays."""


@dataclass(frozen=True)
class Patience:
    """How long to wait for the service.

    Attributes:
        timeout: seconds until it must be ready; covers a node that must start first.
        poll: seconds between looks.
        blocked: seconds that KServe may report a failed load before we believe it (a pod is retried meanwhile).
        lease: seconds after which the lease of a killed deploy expires.
    """

    timeout: float = 900.0
    poll: float = 2.0
    blocked: float = 60.0
    lease: float = 60.0

    def __post_init__(self) -> None:
        if min(self.timeout, self.poll, self.lease) <= 0 or self.blocked < 0:
            raise ValueError("timeout, poll and lease are positive, blocked is not negative")


def manifest(namespace: str, name: str, model: ModelFolder, storage_uri: str) -> dict[str, Any]:
    """The InferenceService for a stored model folder, as a plain dict.

    Args:
        namespace, name: of the object.
        model: the model folder's description.
        storage_uri: `s3://<bucket>/models/<name>/<version>`, without a slash at the end.
    """
    body = bare(namespace, name, model.name, model.version, storage_uri)
    digests = (model.onnx_sha256, model.checkpoint_sha256, model.dataset_digest, model.run_id)
    body["metadata"]["annotations"] = dict(zip(_DIGESTS, digests, strict=True))
    return body


def ours(found: dict[str, Any]) -> dict[str, Any]:
    """Our part of an InferenceService as it stands, without a canary and without what is told of a rollout.

    To be applied again with a change: what an apply leaves out is removed.
    """
    meta, predictor = found["metadata"], found["spec"]["predictor"]
    model = predictor.get("model") or {}
    served = {key: model[key] for key in ("modelFormat", "protocolVersion", "storageUri") if key in model}
    links = {"enableServiceLinks": False} if predictor.get("enableServiceLinks") is False else {}
    notes = meta.get("annotations") or {}
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {
            "name": meta["name"],
            "namespace": meta["namespace"],
            "labels": {key: value for key, value in (meta.get("labels") or {}).items() if key.startswith(_OUR_LABELS)},
            "annotations": {
                key: value
                for key, value in notes.items()
                if (key.startswith(_OUR_NOTES) and key != STATE) or key in (MODE, TAG_ROUTING)
            },
        },
        "spec": {"predictor": {"model": served, **links, **own_name(predictor), **worn(found)}},
    }


def owned(found: dict[str, Any], *path: str) -> bool:
    """Whether we own a field of the spec: an apply without it would remove it. Named as `managedFields` does."""
    *way, last = path
    for entry in found["metadata"].get("managedFields") or []:
        fields = entry.get("fieldsV1", {}).get("f:spec", {}) if entry.get("manager") == MANAGER else {}
        for name in way:
            fields = fields.get(name, {})
        if last in fields:
            return True
    return False


def worn(found: dict[str, Any]) -> dict[str, dict[str, str]]:
    """The labels and annotations of ours that the stable pods have: kept as the predictor's own, no pod is replaced.

    Where the predictor has none of its own (people or a former version made it), they are the service's. Only a service
    without any rollout yet has its pods replaced once, with the first annotation that it gets.
    """
    both = (found["metadata"], found["spec"]["predictor"])
    kept: dict[str, dict[str, str]] = {}
    for field, mark in (("labels", _OUR_LABELS), ("annotations", _OUR_NOTES)):
        entries = [item for part in both for item in (part.get(field) or {}).items()]
        kept[field] = {key: value for key, value in entries if key.startswith(mark)}
    kept["annotations"].setdefault(STATE, _ELSEWHERE)
    return kept


def roll_out(
    api: InferenceServiceApi, wanted: dict[str, Any], patience: Patience, tick: Callable[[], None] = lambda: None
) -> None:
    """Apply `wanted` and wait until KServe serves it; where it does not, put the previous model back.

    A repeated call finds its own object and only waits.

    Args:
        api: the service.
        wanted: what `manifest` makes.
        patience: how long to wait.
        tick: called with each look.

    Raises:
        DeployError: refused, or not ready in time (then with the conditions' messages, and what was put back).
    """
    before, uri = persist(api.get, patience, tick), storage_uri(wanted)
    refuse_canary(api, before)
    # May we look at all? Told before anything changes.
    persist(lambda: api.deployment(f"{api.name}-predictor"), patience, tick)
    previous = _previous_uri(before, uri)
    if previous:
        wanted["metadata"]["annotations"][PREVIOUS] = previous
    # Without the name that a canary left, the Deployment would be renamed and the old one deleted at once.
    wanted["spec"]["predictor"] |= own_name(((before or {}).get("spec") or {}).get("predictor") or {})
    stale = latest_revision(before) if storage_uri(before) != uri else ""
    try:
        persist(lambda: api.apply(wanted), patience, tick)
    except Away as error:  # it may have been done all the same
        raise DeployError(f"{error.problem}. {_go_back(api, wanted, previous)}", error.remedy) from error
    say(f"InferenceService {api.namespace}/{api.name} names {uri}; waiting until it is ready")
    try:
        wait(api, patience, lambda found: _look_for(api, found, uri, stale), uri, tick)
    except LeaseLost:
        raise
    except DeployError as error:
        raise DeployError(f"{error.problem}. {_go_back(api, wanted, previous)}", error.remedy) from error


def persist(work: Callable[[], _Result], patience: Patience, tick: Callable[[], None] = lambda: None) -> _Result:
    """Call the API; for as long as a quarter of the patience lasts, try again where it is away.

    Args:
        work: the call; a write must be one that may be done twice, since the answer to the first may be lost.
        patience: how long, and how often.
        tick: called between two tries.
    """
    end = time.monotonic() + patience.timeout / 4
    while True:
        try:
            return work()
        except Away:
            if time.monotonic() > end:
                raise
        time.sleep(patience.poll)
        tick()


def own_name(predictor: dict[str, Any]) -> dict[str, str]:
    """The field `name` of a predictor, where it has one: by another name it would be another Deployment."""
    return {"name": predictor["name"]} if predictor.get("name") else {}


def _look_for(api: InferenceServiceApi, found: dict[str, Any], uri: str, stale: str) -> Look | None:
    return look(found, stale, api.deployment) if storage_uri(found) == uri else None


def bare(namespace: str, name: str, model: str, version: str, storage_uri: str) -> dict[str, Any]:
    """An InferenceService of a model of which only name, version and place are known."""
    labels = {
        "app.kubernetes.io/name": model[:_LABEL_LENGTH].rstrip("-._"),
        "app.kubernetes.io/instance": name,
        "app.kubernetes.io/version": version,
        "app.kubernetes.io/component": "detector",
        "app.kubernetes.io/part-of": "haechi",
        "app.kubernetes.io/managed-by": MANAGER,
    }
    served = {"modelFormat": {"name": "yolo-onnx"}, "protocolVersion": "v2", "storageUri": storage_uri}
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": name, "namespace": namespace, "labels": labels},
        # Kubernetes would put the address of every Service of the namespace into the runtime's environment.
        "spec": {
            "predictor": {
                "model": served,
                "enableServiceLinks": False,
                "labels": dict(labels),
                "annotations": dict(_ON_PODS),
            }
        },
    }


def _previous_uri(before: dict[str, Any] | None, wanted: str) -> str:
    current = storage_uri(before)
    if before is None or current != wanted:
        return current
    return str((before["metadata"].get("annotations") or {}).get(PREVIOUS, ""))


def explained(error: Exception) -> DeployError:
    """Any error as one that has a remedy; what nobody thought of must not keep a model in service either."""
    if isinstance(error, HaechiError):
        return DeployError(error.problem, error.remedy)
    return DeployError(
        f"deploy itself failed: {type(error).__name__}: {error}", "Please report it, with the log of this step."
    )


def refuse_canary(api: InferenceServiceApi, before: dict[str, Any] | None) -> None:
    """Raise where traffic is split: a switch would send part of it to something that nobody judged.

    Raises:
        DeployError: somebody's canary is under way.
    """
    spec = (before or {}).get("spec") or {}
    share = (spec.get("predictor") or {}).get("canaryTrafficPercent")
    if spec.get("canary") or share not in (None, 100):
        raise DeployError(
            f"InferenceService {api.namespace}/{api.name} has a canary under way",
            "Promote or remove the canary (spec.canary, canaryTrafficPercent), then run deploy again.",
        )


def wait(
    api: InferenceServiceApi,
    patience: Patience,
    looks: Callable[[dict[str, Any]], Look | None],
    what: str,
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Look again and again until it is ready.

    Args:
        api: the service.
        patience: how long, and how often.
        looks: what is seen of the object; None where it is no longer what we applied.
        what: we wait for, in a few words.
        tick: called with each look.

    Raises:
        TakenOver: somebody changed or deleted the service.
        DeployError: not ready in time, or KServe has given up.
    """
    where = f"InferenceService {api.namespace}/{api.name}"
    start, blocked_since, state = time.monotonic(), 0.0, "nothing was reported"
    while time.monotonic() - start < patience.timeout:
        time.sleep(patience.poll)
        tick()
        try:
            found = api.get()
            seen = looks(found) if found else None
        except DeployError as error:  # an API server that restarts must not undo a good rollout
            state = error.problem
            continue
        if seen is None:
            raise TakenOver(f"{where} was changed or deleted while {what} was rolled out", "Run deploy again.")
        if seen.ready:
            say(f"{where}: {what} is ready after {time.monotonic() - start:.0f} s")
            return
        state = seen.reason
        blocked_since = (blocked_since or time.monotonic()) if seen.blocked else 0.0
        if blocked_since and time.monotonic() - blocked_since >= patience.blocked:
            break
    raise DeployError(
        f"{where} did not become ready in {time.monotonic() - start:.0f} s: {state}",
        "Look at its events and at the predictor pod's log, then run deploy again.",
    )


def _go_back(api: InferenceServiceApi, wanted: dict[str, Any], previous: str) -> str:
    """Put the previous model back, unless somebody took over; a sentence that tells what was done."""
    labels = wanted["metadata"]["labels"]
    version = previous.rstrip("/").rsplit("/", 1)[-1]
    try:
        now = storage_uri(api.get())
        if now != storage_uri(wanted):
            return f"It names {now or 'no model'} now, so it was left as it is"
        if not previous:
            return "There was no model before it, so the object stays for you to look at"
        former = bare(api.namespace, api.name, labels["app.kubernetes.io/name"], version, previous)
        former["spec"]["predictor"] |= own_name(wanted["spec"]["predictor"])
        api.apply(former)
    except DeployError as error:
        return f"Going back to {previous or 'no model'} failed too: {error.problem}"
    return f"{previous} was put back"
