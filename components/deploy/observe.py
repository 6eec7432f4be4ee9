"""What a deploy target serves now, and how its last rollout went."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .git_target import named_version
from .inference_service import PREVIOUS
from .kubernetes_api import InferenceServiceApi
from .lease import holder_of, lease_name
from .readiness import look, storage_uri
from .rollout_state import RolloutState
from .target import Target

__all__ = ["Served", "observe"]


@dataclass(frozen=True)
class Served:
    """One look at a target.

    Attributes:
        version: that the target names for all users but a canary's; empty for none.
        ready: whether it serves, as far as the target can tell.
        waits: why it does not.
        canary, traffic: version of a canary under way, and its percent.
        former: version before, as the target knows it; empty where it does not.
        state: of the last rollout.
        holder: who is deploying right now.
    """

    version: str = ""
    ready: bool = True
    waits: str = ""
    canary: str = ""
    traffic: int = 0
    former: str = ""
    state: RolloutState = field(default_factory=RolloutState)
    holder: str = ""


def observe(target: Target, credentials: Path) -> Served:
    """Look at a target.

    Args:
        target: any; nothing is known of `none`.
        credentials: folder for `git`, as `git_target.commit` takes it.

    Raises:
        DeployError, InputError: it cannot be looked at.
    """
    if target.kind == "dir":
        link = Path(target.path) / "current"
        if link.is_symlink() and link.exists():
            return Served(link.readlink().name)
        return Served(ready=False, waits="current names a folder that is gone" if link.is_symlink() else "nothing yet")
    if target.kind == "git":
        return Served(named_version(target.repository, target.branch, target.path, credentials))
    if target.kind == "kserve":
        return _service(InferenceServiceApi(target.namespace, target.name))
    return Served()


def _service(api: InferenceServiceApi) -> Served:
    found = api.get()
    holder = holder_of(api.lease(lease_name(api.name)))
    if found is None:
        api.check_namespace()
        return Served(ready=False, waits="there is no such InferenceService", holder=holder)
    state, seen = RolloutState.of(found), look(found, "", api.deployment)
    named, canary, traffic = storage_uri(found), "", 0
    if found["spec"].get("canary"):
        entry = found["spec"]["canary"][0]
        canary, traffic = _version(storage_uri({"spec": entry})), int(entry.get("trafficPercent", 0))
    elif found["spec"]["predictor"].get("canaryTrafficPercent") not in (None, 100):
        canary, traffic = _version(named), int(found["spec"]["predictor"]["canaryTrafficPercent"])
        named = state.former
    return Served(
        version=_version(named),
        ready=seen.ready,
        waits="" if seen.ready else seen.reason,
        canary=canary,
        traffic=traffic,
        former=_version(_note(found, PREVIOUS) or state.former),
        state=state,
        holder=holder,
    )


def _version(uri: str) -> str:
    return uri.rstrip("/").rsplit("/", 1)[-1]


def _note(found: dict[str, Any], name: str) -> str:
    return str((found["metadata"].get("annotations") or {}).get(name, ""))
