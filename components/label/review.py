"""Reviewing: list the open tasks, look at a frame, answer it. What `haechi review` and the demo's reviewer call.

task = list_tasks(store)[0]
picture = frame_bytes(store, task)
answer(store, task.sha256, [Box("fire", 10, 20, 60, 90)], "minji")
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from ..shared.dataset import Box
from ..shared.detections import box_iou
from ..shared.errors import InputError
from ..shared.frames import fetch_frame
from ..shared.storage import Store
from .tasks import ReviewAnswer, ReviewTask, answered, put_answer, read_task, read_tasks, to_millis

__all__ = ["ReviewAnswer", "ReviewTask", "accept_proposals", "answer", "frame_bytes", "list_tasks"]

_SAME_IOU = 0.95  # a proposal that a person moved less than this stays the proposal's child
_SLACK = 0.5  # pixels by which a drawing tool may round over the picture's edge


def list_tasks(store: Store, include_answered: bool = False) -> list[ReviewTask]:
    """The open review tasks, most uncertain first (ties by hash).

    Args:
        store: the bucket.
        include_answered: also those with an answer that no run has collected yet.
    """
    done = set() if include_answered else answered(store)
    tasks = [task for task in read_tasks(store) if task.sha256 not in done]
    return sorted(tasks, key=lambda task: (-task.priority, task.sha256))


def frame_bytes(store: Store, task: ReviewTask) -> bytes:
    """The encoded picture of a task, checked against its hash."""
    return fetch_frame(store, task.frame)


def answer(
    store: Store,
    sha256: str,
    boxes: Sequence[Box | Mapping[str, Any]],
    reviewer: str,
    covers: Sequence[str] | None = None,
    now: datetime | None = None,
) -> ReviewAnswer:
    """Answer a task. An earlier answer that no run has collected yet is replaced: the newest wins.

    Args:
        store: the bucket.
        sha256: the frame.
        boxes: all its objects, as Box or as `{"class": name, "box": [x1, y1, x2, y2]}`, in pixels of the upright
            image; none says that no covered class is there. Score, origin and actor are set here.
        reviewer: who answers.
        covers: the classes that the answer speaks of; default all that were asked.
        now: time of the answer, default the present.

    Returns:
        The answer as written. A box that equals a proposal (same class, IoU > 0.95) has the teacher as its parent.

    Raises:
        InputError: no such task, no reviewer, or a box that cannot be.
    """
    task = _task(store, sha256)
    if not reviewer.strip():
        raise InputError("the reviewer's name is empty", "Give the name that is to stay with the labels.")
    spoken = _covered(task, covers)
    checked = tuple(_check(item, place, task, spoken) for place, item in enumerate(boxes))
    written = ReviewAnswer(
        frame=task.frame,
        boxes=tuple(_signed(box, task, reviewer.strip()) for box in checked),
        covers=spoken,
        reviewer=reviewer.strip(),
        answered_at=to_millis(now or datetime.now(UTC)),
        teacher=task.teacher,
    )
    put_answer(store, written)
    return written


def accept_proposals(store: Store, sha256: str, reviewer: str, now: datetime | None = None) -> ReviewAnswer:
    """Answer that the proposals are right and complete: nothing else of any class that was asked is in the picture.

    Raises:
        InputError: no such task, or one without a teacher, whose proposals say nothing.
    """
    task = _task(store, sha256)
    if not task.teacher:
        raise InputError(f"no teacher proposed anything for frame {sha256}", "Answer it with boxes, or with none.")
    return answer(store, sha256, task.proposals, reviewer, now=now)


def _task(store: Store, sha256: str) -> ReviewTask:
    task = read_task(store, sha256)
    if task is None:
        raise InputError(f"frame {sha256} is not in the review queue", "See the open tasks with `haechi review list`.")
    return task


def _covered(task: ReviewTask, covers: Sequence[str] | None) -> tuple[str, ...]:
    if covers is None:
        return task.classes
    unknown = sorted(set(covers) - set(task.classes))
    if unknown:
        raise InputError(
            f"covers names {', '.join(map(repr, unknown))}, which was not asked", f"Use {', '.join(task.classes)}."
        )
    return tuple(name for name in task.classes if name in covers)


def _check(item: Box | Mapping[str, Any], place: int, task: ReviewTask, covers: tuple[str, ...]) -> Box:
    box = item if isinstance(item, Box) else _from_mapping(item, place)
    frame, name = task.frame, f"box {place} of frame {task.sha256}"
    if box.class_name not in covers:
        raise InputError(f"{name} has class {box.class_name!r}", f"Use one of {', '.join(covers)}.")
    corners = (box.x1, box.y1, box.x2, box.y2)
    if not all(math.isfinite(value) for value in corners):
        raise InputError(f"{name} has a corner that is not a finite number: {corners}", "Give pixels.")
    limits = (frame.width, frame.height, frame.width, frame.height)
    if any(not -_SLACK <= value <= limit + _SLACK for value, limit in zip(corners, limits, strict=True)):
        raise InputError(
            f"{name} leaves the {frame.width}x{frame.height} image: {corners}", "Give pixels of the upright image."
        )
    x1, y1, x2, y2 = (min(max(float(value), 0.0), limit) for value, limit in zip(corners, limits, strict=True))
    if x2 <= x1 or y2 <= y1:
        raise InputError(f"{name} has no area: {corners}", "Give x1 < x2 and y1 < y2.")
    return replace(box, x1=x1, y1=y1, x2=x2, y2=y2)


def _from_mapping(item: Mapping[str, Any], place: int) -> Box:
    try:
        x1, y1, x2, y2 = (float(value) for value in item["box"])
        return Box(str(item["class"]), x1, y1, x2, y2)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"box {place} is {item!r} ({type(error).__name__}: {error})",
            'Write it as {"class": name, "box": [x1, y1, x2, y2]}.',
        ) from error


def _signed(box: Box, task: ReviewTask, reviewer: str) -> Box:
    proposed = [item for item in task.proposals if item.class_name == box.class_name]
    corners = np.array([(item.x1, item.y1, item.x2, item.y2) for item in proposed], dtype=np.float64).reshape(-1, 4)
    drawn = np.array([(box.x1, box.y1, box.x2, box.y2)], dtype=np.float64)
    same = bool(proposed) and float(box_iou(drawn, corners).max()) > _SAME_IOU
    return replace(box, score=1.0, origin="review", actor=reviewer, parent=task.teacher if same else "")
