"""The worst errors as pictures: what the model missed, saw where nothing is, or saw where the label may be wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import cv2
import numpy as np
from numpy.typing import NDArray

from ..shared.detections import Detections, box_iou
from ..shared.images import decode, encode_jpeg
from .score import TestFrame, pair_frame

__all__ = ["KINDS", "Mark", "Mistake", "Picture", "draw", "worst"]

KINDS = ("label suspect", "false alarm", "miss")
PER_KIND = 8
MAX_BYTES = 1_400_000  # of JPEG in all; base64 adds a third
_WIDTH, _HEIGHT = 480, 360
_SUSPECT_SCORE = 0.7


@dataclass(frozen=True)
class Mistake:
    """One error: its kind, the frame's position, the box and class it is about, and how bad it is (larger is worse)."""

    kind: str
    frame: int
    box: tuple[float, float, float, float]
    class_name: str
    weight: float
    note: str


@dataclass(frozen=True)
class Mark:
    """A box to draw, in the picture's own pixels; `kind` is `truth`, `guess` or `error`."""

    kind: str
    x: float
    y: float
    width: float
    height: float
    text: str


@dataclass(frozen=True)
class Picture:
    """A cut-out around an error: JPEG bytes, its size, the boxes in it, and what to say of it."""

    mistake: Mistake
    frame_name: str
    jpeg: bytes
    width: int
    height: int
    marks: tuple[Mark, ...]


def worst(
    frames: Sequence[TestFrame],
    found: Sequence[Detections],
    champion: Sequence[Detections] | None,
    classes: Sequence[str],
    limits: Sequence[float],
    champion_limits: Sequence[float] = (),
) -> list[Mistake]:
    """The worst errors at the reporting thresholds, at most `PER_KIND` of each kind, two of a group, one of a frame.

    A label is suspect where the model is sure of an object that the label does not have: with a champion, where both
    report it; without, where the score is at least 0.7.
    """
    mistakes: list[Mistake] = []
    for position, frame in enumerate(frames):
        reported = found[position].above(limits)
        other = champion[position].above(champion_limits) if champion is not None else None
        for truth, guess in pair_frame(frame, reported):
            if truth is None and guess is not None:
                mistakes.append(_false_alarm(position, frame, reported, guess[0], other, classes, limits))
            elif truth is not None and (guess is None or guess[1] != truth[1]):
                mistakes.append(_miss(position, frame, truth[0], reported, guess, classes))
    chosen: list[list[Mistake]] = []
    for kind in KINDS:
        chosen.append([])
        taken: Counter[str] = Counter()
        shown: set[int] = set()
        ranked = sorted((item for item in mistakes if item.kind == kind), key=lambda item: (-item.weight, item.frame))
        for item in ranked:
            group = frames[item.frame].group
            if taken.total() < PER_KIND and taken[group] < 2 and item.frame not in shown:
                taken[group] += 1
                shown.add(item.frame)
                chosen[-1].append(item)
    # Worst of each kind first, so that no kind eats up the room for pictures.
    return [item for rank in zip_longest(*chosen) for item in rank if item]


def _false_alarm(
    position: int,
    frame: TestFrame,
    reported: Detections,
    index: int,
    other: Detections | None,
    classes: Sequence[str],
    limits: Sequence[float],
) -> Mistake:
    box = reported.boxes[index].astype(np.float64)
    class_id, score = int(reported.class_ids[index]), float(reported.scores[index])
    nothing_there = not len(frame.boxes) or box_iou(box[None], frame.boxes).max() < 0.1
    if other is None:
        agreed = score >= _SUSPECT_SCORE
    else:
        same = other.boxes[other.class_ids == class_id].astype(np.float64)
        agreed = bool(len(same)) and float(box_iou(box[None], same).max()) >= 0.5
    suspect = nothing_there and agreed
    seen_by = "both models report it" if other is not None else "the model is sure of it"
    note = f"score {score:.2f}" + (f"; {seen_by}, the label has nothing there" if suspect else "")
    kind = "label suspect" if suspect else "false alarm"
    return Mistake(kind, position, _corners(box), classes[class_id], score - limits[class_id], note)


def _miss(
    position: int,
    frame: TestFrame,
    index: int,
    reported: Detections,
    guess: tuple[int, int] | None,
    classes: Sequence[str],
) -> Mistake:
    box = frame.boxes[index]
    area = float((box[2] - box[0]) * (box[3] - box[1]))
    if guess:
        note = f"taken for {classes[guess[1]]}, score {float(reported.scores[guess[0]]):.2f}"
    else:
        same = reported.class_ids == frame.class_ids[index]
        overlap = float(box_iou(box[None], reported.boxes[same].astype(np.float64)).max()) if same.any() else 0.0
        note = f"best overlap {overlap:.2f}" if overlap > 0 else "nothing reported there"
    return Mistake("miss", position, _corners(box), classes[int(frame.class_ids[index])], area, note)


def draw(
    mistakes: Sequence[Mistake],
    frames: Sequence[TestFrame],
    found: Sequence[Detections],
    classes: Sequence[str],
    limits: Sequence[float],
    read: Callable[[int], bytes],
) -> list[Picture]:
    """Cut out each error with what is around it, within `MAX_BYTES` of JPEG in all.

    Args:
        mistakes: of `worst`.
        frames, found, classes, limits: as there.
        read: encoded bytes of the frame at a position.
    """
    pictures, spent = [], 0
    for mistake in mistakes:
        picture = _cut(mistake, frames[mistake.frame], found[mistake.frame].above(limits), classes, read(mistake.frame))
        spent += len(picture.jpeg)
        if spent > MAX_BYTES:
            break
        pictures.append(picture)
    return pictures


def _cut(mistake: Mistake, frame: TestFrame, reported: Detections, classes: Sequence[str], data: bytes) -> Picture:
    pixels = decode(data)
    height, width = pixels.shape[:2]
    left, top, right, bottom = _window(mistake.box, width, height)
    view = pixels[top:bottom, left:right]
    scale = min(_WIDTH / view.shape[1], _HEIGHT / view.shape[0])
    size = (max(1, round(view.shape[1] * scale)), max(1, round(view.shape[0] * scale)))
    shrink = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    scaled: NDArray[np.uint8] = np.asarray(cv2.resize(view, size, interpolation=shrink), dtype=np.uint8)

    def mark(kind: str, box: NDArray[np.float64], text: str) -> Mark | None:
        x1, y1, x2, y2 = (np.clip(box, [left, top] * 2, [right, bottom] * 2) - [left, top] * 2) * scale
        if x2 <= x1 or y2 <= y1:
            return None
        # In a crowd only what touches the error is named, or the names would hide the picture.
        near = bool(box_iou(box[None], error[None])[0, 0] > 0)
        return Mark(kind, float(x1), float(y1), float(x2 - x1), float(y2 - y1), text if near else "")

    error = np.asarray(mistake.box, dtype=np.float64)
    marks = [
        mark("truth", box, classes[int(class_id)]) for box, class_id in zip(frame.boxes, frame.class_ids, strict=True)
    ]
    marks += [
        mark("guess", box.astype(np.float64), f"{classes[int(class_id)]} {score:.2f}")
        for box, score, class_id in zip(reported.boxes, reported.scores, reported.class_ids, strict=True)
        if frame.covers[class_id]
    ]
    drawn = tuple(item for item in [*marks, mark("error", error, "")] if item)
    return Picture(mistake, frame.name, encode_jpeg(scaled, quality=80), size[0], size[1], drawn)


def _window(box: tuple[float, float, float, float], width: int, height: int) -> tuple[int, int, int, int]:
    """A 4:3 window around a box with room about it, inside the image: left, top, right, bottom."""
    x1, y1, x2, y2 = box
    side = max(2.5 * max(x2 - x1, (y2 - y1) * _WIDTH / _HEIGHT), 0.4 * max(width, height), 64)
    w = min(width, round(side))
    h = min(height, round(side * _HEIGHT / _WIDTH))
    left = int(np.clip(round((x1 + x2 - w) / 2), 0, width - w))
    top = int(np.clip(round((y1 + y2 - h) / 2), 0, height - h))
    return left, top, left + w, top + h


def _corners(box: NDArray[np.float64]) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = (float(value) for value in box)
    return x1, y1, x2, y2
