"""How far a rollout has come, kept on the InferenceService itself, so that whoever comes next knows.

It is an annotation of the same apply that changes the spec: the two can never tell different things. That KServe writes it
on no pod is up to inference_service.py.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from typing import Any

__all__ = ["PHASES", "STATE", "RolloutState", "now"]

STATE = "haechi.io/rollout"
# canary, promoting and back are under way; the others are ends.
PHASES = ("canary", "promoting", "back", "done", "failed")
_REASON_LENGTH = 1000
_NAME = re.compile(r"[A-Za-z0-9.-]{0,63}")  # becomes a part of names, and of addresses


@dataclass(frozen=True)
class RolloutState:
    """The last rollout of a service, running or ended.

    Attributes:
        phase: `canary` (the former model is the stable one), `promoting` (the new one is named), `back` (the former is
            being put back), `done` or `failed`.
        strategy: `canary`, `canary-knative`, `shadow` or `rolling`.
        version, uri: of the new model.
        former: storageUri of the model before; empty where there was none.
        former_name: `predictor.name` of that time; empty where it had none.
        traffic: percent that the canary gets.
        owner: who does it.
        since: when this phase, or this share of traffic, began; ISO 8601, UTC.
        reason: of a failure, for a person.
        unsplit: since when it is known that KServe's route follows no canary here; empty where nobody saw that.
    """

    phase: str = ""
    strategy: str = ""
    version: str = ""
    uri: str = ""
    former: str = ""
    former_name: str = ""
    traffic: int = 0
    owner: str = ""
    since: str = ""
    reason: str = ""
    unsplit: str = ""

    @classmethod
    def of(cls, found: dict[str, Any] | None) -> RolloutState:
        """What an InferenceService tells; nothing where it tells nothing, or what cannot be read."""
        notes = ((found or {}).get("metadata") or {}).get("annotations") or {}
        try:
            entry = json.loads(notes.get(STATE, "{}"))
            state = cls(**{item.name: entry[item.name] for item in fields(cls) if item.name in entry})
        except (ValueError, TypeError, RecursionError):
            return cls()
        kinds = all(
            isinstance(getattr(state, item.name), int if item.name == "traffic" else str) for item in fields(cls)
        )
        sound = kinds and state.phase in PHASES and 0 <= state.traffic <= 100
        return state if sound and all(map(_NAME.fullmatch, (state.version, state.former_name))) else cls()

    @property
    def under_way(self) -> bool:
        """Whether somebody is at it, or was killed in the middle of it."""
        return self.phase in ("canary", "promoting", "back")

    def to_annotation(self) -> dict[str, str]:
        """The annotation as it is applied."""
        entry = {**asdict(self), "reason": self.reason[:_REASON_LENGTH]}
        return {STATE: json.dumps({key: value for key, value in entry.items() if value}, sort_keys=True)}


def now() -> str:
    """The time of day for `since`."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
