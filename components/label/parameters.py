"""What label is asked for: bands, the teacher's class names, and how long the queue may grow; checked on the way in.

Without numpy, so that a run can be refused before it starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..shared.errors import InputError

__all__ = ["UNLIMITED", "Band", "check_class_map", "check_review_limit", "parse_bands"]

_DEFAULT = "default"
UNLIMITED = -1


@dataclass(frozen=True)
class Band:
    """The doubtful range of one class's scores: `low` ≤ score < `high`."""

    low: float
    high: float

    def uncertainty(self, score: float) -> float:
        """How near `score` lies to the band's middle: 1 there, 0 at its edges and outside."""
        half = (self.high - self.low) / 2
        return max(0.0, 1 - abs(score - self.low - half) / half) if half > 0 else 0.0


def parse_bands(bands: Mapping[str, Any], classes: Sequence[str]) -> dict[str, Band]:
    """Check the parameter `bands` and give every class its band.

    Args:
        bands: `{"default": [low, high], "<class>": [low, high]}`; `default` is for the classes that are not named.
        classes: ordered class names.

    Raises:
        InputError: an unknown class, a class without a band, or a band that is not 0 ≤ low ≤ high ≤ 1.
    """
    unknown = sorted(set(bands) - {_DEFAULT, *classes})
    if unknown:
        raise InputError(
            f"bands names {', '.join(map(repr, unknown))}, which is no class", f"Use {', '.join([_DEFAULT, *classes])}."
        )
    parsed = {name: _band(name, value) for name, value in bands.items()}
    missing = [name for name in classes if name not in parsed and _DEFAULT not in parsed]
    if missing:
        raise InputError(
            f"bands has neither {_DEFAULT!r} nor an entry for {', '.join(map(repr, missing))}",
            'Add "default": [low, high].',
        )
    return {name: parsed[name] if name in parsed else parsed[_DEFAULT] for name in classes}


def _band(name: str, value: Any) -> Band:
    numbers = list(value) if isinstance(value, list | tuple) else []
    numeric = all(isinstance(item, int | float) and not isinstance(item, bool) for item in numbers)
    if len(numbers) != 2 or not numeric or not 0 <= numbers[0] <= numbers[1] <= 1:
        raise InputError(
            f"bands[{name!r}] is {value!r}, not [low, high] with 0 ≤ low ≤ high ≤ 1",
            "Write it like [0.25, 0.6]: review from 0.25 on, accept from 0.6 on.",
        )
    return Band(float(numbers[0]), float(numbers[1]))


def check_class_map(class_map: Mapping[str, str], classes: Sequence[str]) -> None:
    """Refuse a map from the teacher's class names that leads to a class which is not ours.

    Raises:
        InputError: it does.
    """
    strange = sorted({str(target) for target in class_map.values()} - {"", *classes})
    if strange:
        raise InputError(
            f"class_map leads to {', '.join(map(repr, strange))}, which is no class of ours",
            f"Map to one of {', '.join(classes)}.",
        )


def check_review_limit(review_limit: int) -> None:
    """Refuse a limit of open review tasks that is neither a count nor -1.

    Raises:
        InputError: it is negative otherwise, or not whole.
    """
    if review_limit < UNLIMITED or review_limit != int(review_limit):
        raise InputError(f"review_limit is {review_limit}", "Give a whole number, or -1 for no limit.")
