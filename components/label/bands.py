"""Bands: per class, from which score on a machine's box is believed, doubted or ignored; and what that makes of a frame.

A score of at least `high` is accepted, from `low` up to `high` it is doubtful, below `low` it is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..shared.dataset import Box
from ..shared.detections import box_iou
from .parameters import Band

__all__ = ["CONFLICT_IOU", "WHOLE_IMAGE", "Decision", "decide"]

CONFLICT_IOU = 0.7  # two classes at one place: at least one of them is wrong
WHOLE_IMAGE = 0.98  # share of the picture above which a box is more often a glitch than an object


@dataclass(frozen=True)
class Decision:
    """What is to be done with a frame.

    Attributes:
        kind: `accept` (label it by machine), `background` (the machine sees nothing), or `review` (ask a person).
        boxes: boxes that go with it: those of at least `high` for `accept`, of at least `low` for `review`.
        reason: why a person is asked; empty otherwise.
        priority: 0 to 1, the most uncertain first; 0 where no person is asked.
    """

    kind: str
    boxes: tuple[Box, ...] = ()
    reason: str = ""
    priority: float = 0.0


def decide(boxes: Sequence[Box], bands: Mapping[str, Band], width: int, height: int) -> Decision:
    """Decide a frame by its proposed boxes.

    Any doubtful box sends the frame to review: with one box unsure, the frame's label as a whole would be wrong or
    incomplete. So do two boxes of different classes at one place (IoU ≥ 0.7), and a box over nearly the whole
    picture (more than 98 %), whatever their scores.

    Args:
        boxes: proposals by our class names, with scores.
        bands: a band for every class.
        width, height: of the image, in pixels.
    """
    seen = tuple(box for box in boxes if box.score >= bands[box.class_name].low)
    doubts = [(bands[box.class_name].uncertainty(box.score), _doubt(box)) for box in seen if _doubtful(box, bands)]
    # A contradiction is as uncertain as a score in the middle of its band.
    doubts += [(1.0, text) for text in [*_conflicts(seen), *_too_large(seen, width * height)]]
    if doubts:
        reason = "; ".join(text for _, text in sorted(doubts, key=lambda item: (-item[0], item[1])))
        return Decision("review", seen, reason, round(max(value for value, _ in doubts), 4))
    return Decision("accept", seen) if seen else Decision("background")


def _doubtful(box: Box, bands: Mapping[str, Band]) -> bool:
    return box.score < bands[box.class_name].high


def _doubt(box: Box) -> str:
    return f"{box.class_name} {box.score:.2f} is in its band"


def _conflicts(boxes: Sequence[Box]) -> list[str]:
    corners = np.array([(box.x1, box.y1, box.x2, box.y2) for box in boxes], dtype=np.float64).reshape(-1, 4)
    overlap = np.triu(box_iou(corners, corners) >= CONFLICT_IOU, k=1)
    pairs = [(boxes[i], boxes[j]) for i, j in zip(*np.nonzero(overlap), strict=True)]
    return [f"{a.class_name} and {b.class_name} at one place" for a, b in pairs if a.class_name != b.class_name]


def _too_large(boxes: Sequence[Box], area: int) -> list[str]:
    shares = [(box, (box.x2 - box.x1) * (box.y2 - box.y1) / area) for box in boxes]
    return [f"{box.class_name} covers {share:.0%} of the picture" for box, share in shares if share > WHOLE_IMAGE]
