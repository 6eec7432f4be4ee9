"""What evaluate is asked for: floors and margins of the promotion gate; checked on the way in.

Without numpy, so that a run can be refused before it starts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ..shared.errors import InputError

__all__ = ["Gate"]


@dataclass(frozen=True)
class Gate:
    """What the gate asks for. All AP values are fractions, 0 to 1.

    Attributes:
        min_boxes: boxes that each class must have in test, else `not_enough_data`.
        min_groups: groups that must hold a box of the class; intervals from fewer mean little.
        floors: AP50 that each class must reach: class name → value, `default` for the others; empty for no floor.
        min_gain: by how much mAP50-95 must exceed the champion's.
        noninferiority: loss of mAP50-95 that the interval must rule out.
        max_class_drop: largest loss of AP50-95 in any one class.
        confidence: of all intervals.
        draws: of the bootstrap.
        seed: of the bootstrap.
    """

    min_boxes: int = 20
    min_groups: int = 5
    floors: dict[str, float] = field(default_factory=dict)
    min_gain: float = 0.0
    noninferiority: float = 0.02
    max_class_drop: float = 0.05
    confidence: float = 0.95
    draws: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (("min_boxes", 1, 10**9), ("min_groups", 1, 10**9), ("draws", 100, 100_000)):
            _between(name, getattr(self, name), low, high)
        for name in ("min_gain", "noninferiority", "max_class_drop"):
            _between(name, getattr(self, name), 0, 1)
        _between("confidence", self.confidence, 0.5, 0.9999)
        _between("seed", self.seed, 0, 2**63)
        for name, value in self.floors.items():
            _between(f"floors.{name}", value, 0, 1)

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Gate:
        """Read a gate from a preset's or pipeline's mapping; whole numbers may come as floats, as kfp hands them.

        Raises:
            InputError: an unknown key, a wrong type or a value out of range.
        """
        known = {item.name for item in fields(cls)}
        unknown = sorted(set(entry) - known)
        if unknown:
            raise InputError(f"gate.{unknown[0]} is no parameter of the gate", f"It knows {', '.join(sorted(known))}.")
        whole = {"min_boxes", "min_groups", "draws", "seed"}
        values: dict[str, Any] = {
            name: _number(name, value, name in whole) for name, value in entry.items() if name != "floors"
        }
        floors = entry.get("floors") or {}
        if not isinstance(floors, Mapping):
            raise InputError(f"gate.floors is {floors!r}", "Give class names with their AP50, such as {default: 0.3}.")
        return cls(floors={str(k): float(_number(f"floors.{k}", v, False)) for k, v in floors.items()}, **values)

    def floor(self, class_name: str) -> float | None:
        """The AP50 floor of a class, or None."""
        return self.floors.get(class_name, self.floors.get("default"))

    def check_classes(self, classes: Sequence[str]) -> None:
        """Raise an InputError where a floor names no class of the dataset."""
        for name in self.floors:
            if name != "default" and name not in classes:
                raise InputError(
                    f"gate.floors names {name!r}, which is no class of the dataset", f"It has {', '.join(classes)}."
                )


def _number(name: str, value: Any, whole: bool) -> float | int:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"gate.{name} is {value!r}, not a number", "Give a number.")
    if not whole:
        return float(value)
    if not math.isfinite(value) or value != int(value):
        raise InputError(f"gate.{name} is {value!r}, not a whole number", "Give a whole number.")
    return int(value)


def _between(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise InputError(f"gate.{name} is {value}", f"Give a value from {low} to {high}.")
