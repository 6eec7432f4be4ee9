"""Scores of one model on one test: AP, precision and recall per class, and the confusion matrix.

A class is judged only on frames whose label covers it: elsewhere its absence from the label means nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..shared.detections import Detections, box_iou
from .ap import Matches, average_precision, match_class

__all__ = ["BACKGROUND", "ClassScore", "ModelScore", "TestFrame", "confusion_matrix", "remap", "score_model"]

BACKGROUND = "background"
MATCH_IOU = 0.5


@dataclass(frozen=True)
class TestFrame:
    """What is known to be true of one frame.

    Attributes:
        name: how a person finds it: the frame's key or file name.
        group: what is resampled together; never straddles splits.
        covers: bool (classes,), which classes the label speaks of.
        boxes: float64 (n, 4), corners in pixels.
        class_ids: int64 (n,), index into the evaluated classes.
        camera: camera name, or empty.
    """

    __test__ = False  # the name is no test case

    name: str
    group: str
    covers: NDArray[np.bool_]
    boxes: NDArray[np.float64]
    class_ids: NDArray[np.int64]
    camera: str = ""


@dataclass(frozen=True)
class ClassScore:
    """One class of one model; values are None where they have no meaning.

    Attributes:
        map50_95, map50: AP at IoU 0.50:0.95 and 0.50; None without a box in test or where the model lacks the class.
        precision, recall: at the class's threshold and IoU 0.5; a class of which nothing is reported has precision 0.
        boxes: labelled boxes; frames: frames that cover the class; groups: groups that hold a box of it.
        threshold: confidence at which the model reports the class.
        known: whether the model has the class at all.
    """

    map50_95: float | None
    map50: float | None
    precision: float | None
    recall: float | None
    boxes: int
    frames: int
    groups: int
    threshold: float
    known: bool = True

    def to_json(self) -> dict[str, Any]:
        """The entry of scorecard.json."""
        return {
            "map50_95": self.map50_95,
            "map50": self.map50,
            "precision": self.precision,
            "recall": self.recall,
            "boxes": self.boxes,
            "frames": self.frames,
        }


@dataclass(frozen=True)
class ModelScore:
    """One model on the whole test.

    Attributes:
        classes: class names, in the order of the arrays.
        per_class: a score for each of them.
        matches: what the scores were computed from; the bootstrap resamples it.
    """

    classes: tuple[str, ...]
    per_class: dict[str, ClassScore]
    matches: tuple[Matches, ...]

    def mean(self, what: str) -> float | None:
        """Mean of a metric over the classes that have it; None where none has."""
        values = [getattr(item, what) for item in self.per_class.values()]
        present = [value for value in values if value is not None]
        return sum(present) / len(present) if present else None

    def to_json(self) -> dict[str, Any]:
        """This model's half of scorecard.json."""
        means = {name: self.mean(name) for name in ("map50_95", "map50", "precision", "recall")}
        return means | {"per_class": {name: item.to_json() for name, item in self.per_class.items()}}


def remap(found: Detections, model_classes: Sequence[str], classes: Sequence[str]) -> Detections:
    """The detections with class ids of `classes`, matched by name; classes that are not there are left out."""
    place = {name: index for index, name in enumerate(classes)}
    table = np.asarray([place.get(name, -1) for name in model_classes], dtype=np.int64)
    ids = table[found.class_ids] if len(found) else found.class_ids
    keep = ids >= 0
    return Detections(found.boxes[keep], found.scores[keep], ids[keep])


def score_model(
    frames: Sequence[TestFrame],
    found: Sequence[Detections],
    classes: Sequence[str],
    known: Sequence[str],
    thresholds: dict[str, float],
) -> ModelScore:
    """Score one model.

    Args:
        frames: the test.
        found: its detections in each frame, class ids as in `classes`, at a confidence near 0.
        classes: the evaluated classes.
        known: the model's own classes.
        thresholds: the model's reporting confidence by class.
    """
    names = sorted({frame.group for frame in frames})
    place = {name: index for index, name in enumerate(names)}
    groups = [place[frame.group] for frame in frames]
    matches = tuple(_matches(frames, found, groups, len(names), index) for index in range(len(classes)))
    per_class = {
        name: _class_score(item, name in known, thresholds.get(name, 1.0))
        for name, item in zip(classes, matches, strict=True)
    }
    return ModelScore(tuple(classes), per_class, matches)


def _matches(
    frames: Sequence[TestFrame], found: Sequence[Detections], groups: Sequence[int], group_count: int, index: int
) -> Matches:
    covering = [position for position, frame in enumerate(frames) if frame.covers[index]]
    detections = []
    for position in covering:
        mine = found[position].class_ids == index
        detections.append(
            (found[position].boxes[mine].astype(np.float64), found[position].scores[mine].astype(np.float64))
        )
    truth = [frames[position].boxes[frames[position].class_ids == index] for position in covering]
    return match_class(detections, truth, [groups[position] for position in covering], group_count)


def _class_score(matches: Matches, known: bool, threshold: float) -> ClassScore:
    boxes, groups = int(matches.boxes.sum()), int((matches.boxes > 0).sum())
    if not boxes or not known:
        return ClassScore(None, None, None, None, boxes, matches.frames, groups, threshold, known)
    precisions = average_precision(matches)[0]
    reported = matches.scores >= np.float32(threshold)
    true = int((matches.hit[0] & reported).sum())
    return ClassScore(
        map50_95=float(precisions.mean()),
        map50=float(precisions[0]),
        precision=true / int(reported.sum()) if reported.any() else 0.0,
        recall=true / boxes,
        boxes=boxes,
        frames=matches.frames,
        groups=groups,
        threshold=threshold,
    )


def confusion_matrix(
    frames: Sequence[TestFrame], found: Sequence[Detections], classes: Sequence[str], limits: Sequence[float]
) -> NDArray[np.int64]:
    """Counts of truth (rows) against prediction (columns), background last, at the reporting thresholds and IoU 0.5.

    Same-class pairs are matched first, best score first, so that the diagonal is what precision and recall count;
    what is left is matched across classes, largest overlap first. Detections of a class that the frame's label does
    not cover are left out.
    """
    matrix = np.zeros((len(classes) + 1, len(classes) + 1), dtype=np.int64)
    for frame, item in zip(frames, found, strict=True):
        for truth, guess in pair_frame(frame, item.above(limits) if len(limits) else item):
            matrix[truth[1] if truth else -1, guess[1] if guess else -1] += 1
    return matrix


Place = tuple[int, int]  # position in the frame's arrays, class id


def pair_frame(frame: TestFrame, reported: Detections) -> list[tuple[Place | None, Place | None]]:
    """Pair each box of a frame with each reported detection, one to one; None stands for background."""
    shown = [index for index in range(len(reported)) if frame.covers[reported.class_ids[index]]]
    iou = box_iou(frame.boxes, reported.boxes[shown].astype(np.float64))
    same = frame.class_ids[:, None] == reported.class_ids[shown][None]
    left, right = set(range(len(frame.boxes))), set(range(len(shown)))
    pairs: list[tuple[Place | None, Place | None]] = []

    def take(i: int, j: int) -> None:
        left.discard(i)
        right.discard(j)
        index = shown[j]
        pairs.append(((i, int(frame.class_ids[i])), (index, int(reported.class_ids[index]))))

    for j in range(len(shown)):  # detections come best first
        overlaps = [(iou[i, j], i) for i in left if same[i, j] and iou[i, j] >= MATCH_IOU]
        if overlaps:
            take(max(overlaps)[1], j)
    for overlap, i, j in sorted(((iou[i, j], i, j) for i in left for j in right), reverse=True):
        if overlap >= MATCH_IOU and i in left and j in right:
            take(i, j)
    pairs += [((i, int(frame.class_ids[i])), None) for i in sorted(left)]
    pairs += [(None, (shown[j], int(reported.class_ids[shown[j]]))) for j in sorted(right)]
    return pairs
