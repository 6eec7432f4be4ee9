"""What export is asked for: confidence per class, the suppression's overlap, golden images; checked on the way in.

Without torch, so that a run can be refused before it starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..shared.errors import InputError

__all__ = ["check_golden_images", "check_iou", "spread_thresholds"]


def check_iou(iou: float) -> None:
    """Refuse an overlap that no two boxes can have, or that all have.

    Raises:
        InputError: it is not above 0 and up to 1.
    """
    if not 0 < iou <= 1:
        raise InputError(f"iou is {iou!r}", "Give a number above 0 and up to 1.")


def check_golden_images(golden_images: int) -> None:
    """Refuse a negative count of golden images.

    Raises:
        InputError: it is negative.
    """
    if golden_images < 0:
        raise InputError(f"golden_images is {golden_images}", "Give 0 or more.")


def spread_thresholds(thresholds: Mapping[str, Any], classes: Sequence[str]) -> dict[str, float]:
    """One confidence per class from `{"default": x, "<class>": y}`.

    Raises:
        InputError: a class that the model lacks, a value outside 0 to 1, or a class that is left without one.
    """
    unknown = sorted(set(thresholds) - set(classes) - {"default"})
    if unknown:
        raise InputError(
            f"thresholds name classes that the model lacks: {', '.join(unknown)}",
            f"It has {', '.join(classes)}; give others by `default`.",
        )
    for key, value in thresholds.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise InputError(f"threshold of {key} is {value!r}", "Give a number from 0 to 1.")
    lacking = [item for item in classes if item not in thresholds and "default" not in thresholds]
    if lacking:
        raise InputError(f"thresholds say nothing of {', '.join(lacking)}", "Add them, or a `default`.")
    return {item: float(thresholds.get(item, thresholds.get("default"))) for item in classes}
