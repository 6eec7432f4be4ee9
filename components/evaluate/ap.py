"""Average precision by COCO's protocol, for one sample and for many resamples of it at once.

Protocol (Lin et al. 2014; pycocotools' COCOeval, `bbox`, area `all`): detections of one class in one image, best first,
at most 100, are matched greedily to the truth at IoU 0.50, 0.55 … 0.95; precision is made monotone and read at 101
recalls 0.00, 0.01 … 1.00. A test compares with pycocotools to 1e-6.

A resample draws whole groups with replacement, so each detection and each box counts as often as its group was drawn.
That weighted count gives the AP of the literal resample (up to the order of tied scores): copies of a true positive
end in the same recall and precision, copies of a false positive only lower a precision that the monotone curve never
reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..shared.detections import box_iou

__all__ = [
    "IOUS",
    "MAX_DETS",
    "RECALLS",
    "Curve",
    "Matches",
    "average_precision",
    "match_class",
    "match_frame",
    "pr_curve",
]

IOUS: NDArray[np.float64] = np.linspace(0.5, 0.95, 10)
RECALLS: NDArray[np.float64] = np.linspace(0.0, 1.0, 101)
MAX_DETS = 100

_CHUNK = 4_000_000  # weights held at once: 16 MB of int32


@dataclass(frozen=True)
class Matches:
    """All detections of one class over the frames that cover it, best first, with what became of them.

    Attributes:
        scores: float64 (n,), falling.
        frame: int64 (n,), position of the detection's frame.
        group: int64 (n,), index of that frame's group.
        hit: bool (10, n), whether it matched a box, a row an IoU of `IOUS`.
        boxes: int64 (groups,), boxes of this class in each group.
        frames: number of frames that cover the class.
    """

    scores: NDArray[np.float64]
    frame: NDArray[np.int64]
    group: NDArray[np.int64]
    hit: NDArray[np.bool_]
    boxes: NDArray[np.int64]
    frames: int


@dataclass(frozen=True)
class Curve:
    """Precision over recall at one IoU: `precision[i]` is read at `RECALLS[i]`; 0 where that recall is not reached."""

    recall: NDArray[np.float64]
    precision: NDArray[np.float64]


def match_frame(boxes: NDArray[np.float64], truth: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which detections of one class in one frame match a box, at each IoU.

    Args:
        boxes: (n, 4) detections, best first.
        truth: (m, 4) labelled boxes.

    Returns:
        bool (10, n).
    """
    hit = np.zeros((len(IOUS), len(boxes)), dtype=bool)
    if not len(boxes) or not len(truth):
        return hit
    iou = box_iou(boxes, truth)
    # Most detections at conf 0.001 touch nothing: only those that could match are walked through.
    candidates = np.flatnonzero(iou.max(axis=1) >= IOUS[0] - 1e-10)
    for row, limit in enumerate(IOUS):
        free = np.ones(len(truth), dtype=bool)
        for index in candidates:
            overlap = np.where(free, iou[index], -1.0)
            # Of equal overlaps pycocotools takes the last box.
            best = len(overlap) - 1 - int(np.argmax(overlap[::-1]))
            if overlap[best] >= min(limit, 1 - 1e-10):
                free[best] = False
                hit[row, index] = True
    return hit


def match_class(
    found: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]],
    truth: Sequence[NDArray[np.float64]],
    groups: Sequence[int],
    group_count: int,
) -> Matches:
    """Match one class over the frames that cover it.

    Args:
        found: a frame's detections of this class: boxes (n, 4) and scores (n,), in any order.
        truth: a frame's labelled boxes of this class, (m, 4).
        groups: a frame's group index.
        group_count: number of groups in the whole test.
    """
    scores, frames, hits = [], [], []
    for position, ((boxes, score), wanted) in enumerate(zip(found, truth, strict=True)):
        order = np.argsort(-score, kind="stable")[:MAX_DETS]
        scores.append(score[order])
        frames.append(np.full(len(order), position, dtype=np.int64))
        hits.append(match_frame(boxes[order], wanted))
    group = np.asarray(groups, dtype=np.int64)
    count = np.zeros(group_count, dtype=np.int64)
    np.add.at(count, group, np.asarray([len(item) for item in truth], dtype=np.int64))
    if not scores:
        return Matches(np.empty(0), _no_index(), _no_index(), np.empty((len(IOUS), 0), dtype=bool), count, 0)
    score = np.concatenate(scores).astype(np.float64)
    order = np.argsort(-score, kind="stable")
    frame = np.concatenate(frames)[order]
    return Matches(score[order], frame, group[frame], np.concatenate(hits, axis=1)[:, order], count, len(truth))


def average_precision(matches: Matches, weights: NDArray[np.int32] | None = None) -> NDArray[np.float64]:
    """AP at each IoU of `IOUS`, for the sample itself or for resamples.

    Args:
        matches: one class.
        weights: int32 (draws, groups), how often each group was drawn; None for the sample itself.

    Returns:
        (draws, 10); NaN in a draw that holds no box of the class.
    """
    if weights is None:
        weights = np.ones((1, len(matches.boxes)), dtype=np.int32)
    last = np.flatnonzero(matches.hit.any(axis=0))
    # What scores lower than the last true positive changes no value of the curve.
    end = int(last[-1]) + 1 if len(last) else 0
    step = max(1, _CHUNK // max(1, end))
    parts = [_weighted(matches, weights[start : start + step], end) for start in range(0, len(weights), step)]
    return np.concatenate(parts) if parts else np.empty((0, len(IOUS)))


def _weighted(matches: Matches, weights: NDArray[np.int32], end: int) -> NDArray[np.float64]:
    group = matches.group[:end]
    boxes = weights.astype(np.int64) @ matches.boxes
    result = np.zeros((len(weights), len(IOUS)))
    seen = np.cumsum(weights[:, group], axis=1)
    for row in range(len(IOUS)):
        at = np.flatnonzero(matches.hit[row, :end])
        if not len(at):
            continue
        true = np.cumsum(weights[:, group[at]], axis=1).astype(np.float64)
        precision = true / np.maximum(seen[:, at], 1)
        monotone = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        recall = true / np.maximum(boxes, 1)[:, None]
        # A true positive is read at every recall of the 101 that it is the first to reach.
        reached = np.searchsorted(RECALLS, recall, side="right")
        result[:, row] = (monotone * np.diff(reached, axis=1, prepend=0)).sum(axis=1) / len(RECALLS)
    result[boxes == 0] = np.nan
    return result


def pr_curve(matches: Matches, row: int = 0) -> Curve:
    """Precision at the 101 recalls at IoU `IOUS[row]`; its mean is the AP."""
    total = int(matches.boxes.sum())
    precision = np.zeros(len(RECALLS))
    at = np.flatnonzero(matches.hit[row])
    if total and len(at):
        true = np.arange(1, len(at) + 1)
        monotone = np.maximum.accumulate((true / (at + 1))[::-1])[::-1]
        first = np.searchsorted(true / total, RECALLS, side="left")
        inside = first < len(at)
        precision[inside] = monotone[first[inside]]
    return Curve(RECALLS, precision)


def _no_index() -> NDArray[np.int64]:
    return np.empty(0, dtype=np.int64)
