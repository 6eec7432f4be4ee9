"""What a build is asked for: name, classes, ratios, seed, and what ties frames into groups; checked on the way in."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..shared.errors import InputError
from ..shared.files import check_classes, check_name

__all__ = ["BuildConfig", "Grouping"]

_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Grouping:
    """What ties two frames into one group.

    Attributes:
        burst_gap_s: frames of one camera at most this many seconds apart are one burst.
        near_bits: near-duplicates differ in at most so many of the 64 bits of their perceptual hashes ...
        near_levels: ... and in no one of their 16×16 grey means by more than this (of 255). Looser than ingest's
            limits (8 and 16): a pair that ingest kept may still be too alike to stand in both train and test.
    """

    burst_gap_s: float = 30.0
    near_bits: int = 10
    near_levels: int = 24

    def __post_init__(self) -> None:
        for name, upper in (("burst_gap_s", math.inf), ("near_bits", 64), ("near_levels", 255)):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value <= upper or math.isinf(value):
                raise InputError(f"grouping.{name} is {value!r}", f"Set it to a number from 0 to {upper}.")
        # kfp hands every number in a dict over as a float.
        for name in ("near_bits", "near_levels"):
            object.__setattr__(self, name, int(getattr(self, name)))
        object.__setattr__(self, "burst_gap_s", float(self.burst_gap_s))

    @classmethod
    def of(cls, values: Mapping[str, Any] | None) -> Grouping:
        """From a parameter's dict; keys left out keep their defaults."""
        known = {item.name for item in fields(cls)}
        unknown = sorted(set(values or {}) - known)
        if unknown:
            raise InputError(f"grouping has no key {unknown[0]!r}", f"Use some of {', '.join(sorted(known))}.")
        return cls(**(values or {}))


@dataclass(frozen=True)
class BuildConfig:
    """The checked parameters of one build.

    Attributes:
        name: dataset name, kebab-case.
        classes: ordered class names.
        previous_dataset: digest of the dataset whose splits are kept, or empty.
        ratios: shares of `val` and `test`; the rest is train.
        seed: order in which new groups are placed.
        grouping: what ties frames.
    """

    name: str
    classes: tuple[str, ...]
    previous_dataset: str = ""
    ratios: Mapping[str, float] = field(default_factory=lambda: {"val": 0.15, "test": 0.15})
    seed: int = 0
    grouping: Grouping = field(default_factory=Grouping)

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.previous_dataset and not _DIGEST.fullmatch(self.previous_dataset):
            raise InputError(
                f"previous_dataset is {self.previous_dataset!r}, not a dataset digest",
                "Give the 64 hex digits of a folder under datasets/<name>/, or leave it empty.",
            )
        if not _is_number(self.seed) or self.seed != int(self.seed):
            raise InputError(f"seed is {self.seed!r}", "Set it to a whole number.")
        object.__setattr__(self, "seed", int(self.seed))
        object.__setattr__(self, "classes", check_classes(self.classes))
        object.__setattr__(self, "ratios", _checked_ratios(self.ratios))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _checked_ratios(ratios: Mapping[str, Any]) -> dict[str, float]:
    unknown = sorted(set(ratios) - {"val", "test"})
    if unknown:
        raise InputError(f"ratios has the key {unknown[0]!r}", "Give val and test; the rest is train.")
    for split, value in ratios.items():
        if not _is_number(value) or not 0 <= value < 1:
            raise InputError(f"ratios.{split} is {value!r}", "Set it to a share from 0 to below 1, such as 0.15.")
    checked = {split: float(ratios.get(split, 0.0)) for split in ("val", "test")}
    if sum(checked.values()) >= 1:
        raise InputError(f"ratios leave nothing to train on: {checked}", "Let val and test sum to less than 1.")
    return checked
