"""The simulated reviewer: answers the queue from the world's truth, and holds the machine's own labels against it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from haechi.components.label.review import ReviewTask, answer, list_tasks
from haechi.components.shared.dataset import Box, LabelledFrame, exported_frames
from haechi.components.shared.detections import box_iou
from haechi.components.shared.errors import IntegrityError
from haechi.components.shared.storage import Store, ordered_map

__all__ = ["REVIEWER", "Audit", "Reviewed", "answer_queue", "audit_machine"]

REVIEWER = "simulated-reviewer"
_IOU = 0.5

Truth = Mapping[str, tuple[Box, ...]]


@dataclass(frozen=True)
class Reviewed:
    """One answered task: what the teacher had proposed and what is true."""

    task: ReviewTask
    truth: tuple[Box, ...]


@dataclass(frozen=True)
class Audit:
    """How the machine's own labels compare with the truth.

    Attributes:
        frames: frames labelled without a person.
        boxes: boxes that the machine drew in them.
        right: of these, boxes of the true class with IoU of at least 0.5.
        true: boxes that are truly there.
    """

    frames: int
    boxes: int
    right: int
    true: int

    @property
    def precision(self) -> float | None:
        """Share of the machine's boxes that are right; None where it drew none."""
        return self.right / self.boxes if self.boxes else None

    @property
    def recall(self) -> float | None:
        """Share of the true boxes that the machine found; None where there is none."""
        return self.right / self.true if self.true else None


def answer_queue(store: Store, truth: Truth) -> list[Reviewed]:
    """Answer every open task with what is true of its frame.

    Args:
        store: the bucket.
        truth: frame's sha256 → its boxes.

    Raises:
        IntegrityError: a task about a frame that the world never drew.
    """
    tasks = list_tasks(store)
    for task in tasks:
        if task.sha256 not in truth:
            raise IntegrityError(f"the review queue holds frame {task.sha256}, which is not ours", "Start clean.")

    def work(task: ReviewTask) -> Reviewed:
        boxes = truth[task.sha256]
        answer(store, task.sha256, boxes, REVIEWER)
        return Reviewed(task, boxes)

    return list(ordered_map(work, tasks, store.settings.workers))


def audit_machine(store: Store, truth: Truth) -> Audit:
    """Compare what the machine labelled by itself with the truth."""
    rows = [row for row in exported_frames(store) if row.origin == "machine" and row.sha256 in truth]
    right = sum(_right(row, truth[row.sha256]) for row in rows)
    return Audit(len(rows), sum(len(row.boxes) for row in rows), right, sum(len(truth[row.sha256]) for row in rows))


def _right(row: LabelledFrame, truth: Sequence[Box]) -> int:
    """Boxes that match a true one of their class, one to one, the surest first."""
    free = list(truth)
    count = 0
    for box in sorted(row.boxes, key=lambda item: -item.score):
        same = [item for item in free if item.class_name == box.class_name]
        if not same:
            continue
        overlaps = box_iou(_corners([box]), _corners(same))[0]
        best = int(overlaps.argmax())
        if overlaps[best] >= _IOU:
            free.remove(same[best])
            count += 1
    return count


def _corners(boxes: Sequence[Box]) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return np.array([(box.x1, box.y1, box.x2, box.y2) for box in boxes], dtype=np.float64)
