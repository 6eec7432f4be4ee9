"""Parity: do two ways of running a model give the same boxes?

Used by export (checkpoint against ONNX), by the runtime (golden images before it says ready), and by deploy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .detections import Detections, box_iou

__all__ = ["Agreement", "Tolerance", "agree", "compare"]


@dataclass(frozen=True)
class Tolerance:
    """How far two runs may differ and still count as the same.

    Attributes:
        box_px: largest move of a corner, in source pixels for an image of up to 640 px; larger images scale it.
        score: largest difference of a score.
        edge: a box whose score lies this close to the confidence limit may be missing on one side.
    """

    box_px: float = 1.0
    score: float = 0.01
    edge: float = 0.02


@dataclass(frozen=True)
class Agreement:
    """How two sets of detections compare.

    Attributes:
        images: compared images.
        boxes: boxes matched one to one.
        unmatched: boxes of either side, clear of the confidence limit, that the other lacks.
        max_box_px: largest corner difference among the matched, in source pixels.
        max_score: largest score difference among the matched.
        ok: within tolerance.
    """

    images: int
    boxes: int
    unmatched: int
    max_box_px: float
    max_score: float
    ok: bool


def compare(expected: Detections, found: Detections, conf: float, tolerance: Tolerance, longest: int) -> Agreement:
    """Compare two detections of one image, taken at the same confidence limit `conf`.

    Args:
        expected, found: the two sides; order does not matter.
        conf: the limit that both were taken at.
        tolerance: what may differ.
        longest: the image's longer side in pixels.
    """
    allowed = tolerance.box_px * max(1.0, longest / 640)
    iou = (
        box_iou(expected.boxes, found.boxes) if len(expected) and len(found) else np.zeros((len(expected), len(found)))
    )
    iou = np.where(expected.class_ids[:, None] == found.class_ids[None], iou, 0.0)
    left, right = set(range(len(expected))), set(range(len(found)))
    worst_px = worst_score = 0.0
    pairs = 0
    for flat in np.argsort(-iou, axis=None, kind="stable"):
        i, j = divmod(int(flat), max(1, len(found)))
        if iou[i, j] < 0.5:
            break
        if i in left and j in right:
            left.discard(i)
            right.discard(j)
            pairs += 1
            worst_px = max(worst_px, float(np.abs(expected.boxes[i] - found.boxes[j]).max()))
            worst_score = max(worst_score, float(abs(expected.scores[i] - found.scores[j])))
    lone = sum(expected.scores[i] > conf + tolerance.edge for i in left)
    lone += sum(found.scores[j] > conf + tolerance.edge for j in right)
    ok = lone == 0 and worst_px <= allowed and worst_score <= tolerance.score
    return Agreement(1, pairs, int(lone), worst_px, worst_score, ok)


def agree(results: Sequence[Agreement]) -> Agreement:
    """Sum up the comparisons of several images; none at all is no agreement."""
    return Agreement(
        images=len(results),
        boxes=sum(item.boxes for item in results),
        unmatched=sum(item.unmatched for item in results),
        max_box_px=max((item.max_box_px for item in results), default=0.0),
        max_score=max((item.max_score for item in results), default=0.0),
        ok=bool(results) and all(item.ok for item in results),
    )
