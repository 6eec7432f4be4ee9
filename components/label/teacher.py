"""The teacher: a model folder that proposes boxes, and how its classes become ours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ..shared.dataset import Box, Frame, frame_key
from ..shared.detections import Detections, Detector, Letterbox, Pixels, non_maximum_suppression
from ..shared.errors import InputError, IntegrityError
from ..shared.frames import fetch_frame
from ..shared.images import decode
from ..shared.model_folder import ModelFolder, fetch_model
from ..shared.progress import say
from ..shared.storage import Store, ordered_map
from .parameters import check_class_map

__all__ = ["Teacher", "load_teacher", "map_classes", "propose", "translate"]

_LEAST_SCORE = 0.001  # a band that starts at 0 must not turn every anchor into a box
_LEAST_SIDE = 1.0  # pixels; a thinner box is no object and breaks trainers


@dataclass(frozen=True)
class Teacher:
    """A model that proposes labels.

    Attributes:
        model: its description.
        folder: where it lies on this machine.
        uri: where it came from.
        names: its class index → our class name; its other classes are ignored.
        covers: our classes that it can speak of, in our order.
    """

    model: ModelFolder
    folder: Path
    uri: str
    names: dict[int, str]
    covers: tuple[str, ...]

    @property
    def actor(self) -> str:
        """How its labels are signed."""
        return f"model:{self.model.version}"


def load_teacher(
    store: Store,
    name: str,
    champion: str,
    teacher: str,
    classes: Sequence[str],
    class_map: Mapping[str, str],
    cache: Path,
) -> Teacher | None:
    """Fetch the teacher: `teacher` where given, else the champion, else None.

    Args:
        store: holds `models/<name>/<champion>/` and `s3://` teachers.
        name, champion: registered model and its version; the version may be empty.
        teacher: model folder as path, `file://` or `s3://`; may be empty.
        classes: our classes, ordered.
        class_map: teacher's class name → ours.
        cache: folder for fetched models.

    Raises:
        InputError: a checkpoint in place of a model folder, or no class of the teacher is one of ours.
        ModelError, IntegrityError: no usable model folder is there.
    """
    uri = teacher or (store.uri(f"models/{name}/{champion}/") if champion else "")
    if not uri:
        return None
    folder = fetch_model(store, uri, cache)
    model = ModelFolder.load(folder, verify=False)
    if not teacher and model.version != champion:
        raise IntegrityError(f"{uri} holds version {model.version}", "Deploy the champion again.")
    names = map_classes(model.classes, classes, class_map)
    return Teacher(model, folder, uri, names, tuple(item for item in classes if item in names.values()))


def map_classes(theirs: Sequence[str], ours: Sequence[str], class_map: Mapping[str, str]) -> dict[int, str]:
    """The teacher's class index → our class name.

    A class that `class_map` does not name keeps its name where that is one of ours. A map to "" ignores a class.

    Raises:
        InputError: `class_map` leads to a class that is not ours, or nothing maps.
    """
    check_class_map(class_map, ours)
    absent = sorted(set(class_map) - set(theirs))
    if absent:
        say(f"class_map: the teacher has no class {', '.join(absent)}")
    targets = [class_map.get(name, name) for name in theirs]
    names = {index: target for index, target in enumerate(targets) if target in ours}
    if not names:
        raise InputError(
            f"no class of the teacher ({', '.join(theirs)}) is one of ours ({', '.join(ours)})",
            'Say which is which with class_map, such as {"person": "visitor"}, or choose another teacher.',
        )
    return names


def propose(
    store: Store, teacher: Teacher, frames: Iterable[Frame], least: float, threads: int = 0
) -> Iterator[tuple[Frame, tuple[Box, ...]]]:
    """Run the teacher over frames; each frame with its proposals by our class names, in the frames' order.

    Fetching, hash check, decoding and letterboxing run in threads; at most 4 × workers letterboxed pictures wait.
    The network sees one frame at a time: on a CPU that is as fast as batches, and a frame's boxes cannot depend on
    which other frames are still to be labelled, which differs between a run and its repetition.

    Args:
        store: holds the frames.
        teacher: who proposes.
        frames: what to label.
        least: drop boxes that score less.
        threads: compute threads; 0 lets onnxruntime choose.

    Raises:
        IntegrityError: a frame's object is not what its name says.
        StorageError: it cannot be read.
    """
    detector = teacher.model.detector(teacher.folder, threads)
    ready = ordered_map(partial(_prepare, store, detector), frames, store.settings.workers)
    for frame, prepared in ready:
        (found,) = detector.detect_prepared([prepared], conf=max(least, _LEAST_SCORE), iou=teacher.model.iou)
        yield frame, translate(found, teacher)


def _prepare(store: Store, detector: Detector, frame: Frame) -> tuple[Frame, tuple[Pixels, Letterbox]]:
    data = fetch_frame(store, frame)
    try:
        return frame, detector.prepare(decode(data))
    except InputError as error:
        where = store.uri(frame_key(frame.sha256, frame.ext))
        raise InputError(f"{where} cannot be decoded: {error.problem}", error.remedy) from error


def translate(found: Detections, teacher: Teacher) -> tuple[Box, ...]:
    """A detection as boxes of our classes, signed by the teacher.

    Corners are rounded to 1/100 px and scores to 4 digits here, so that what is decided on is what is written down.
    """
    boxes = []
    for index in _merged(found, teacher):
        x1, y1, x2, y2 = (round(float(value), 2) for value in found.boxes[index])
        if x2 - x1 < _LEAST_SIDE or y2 - y1 < _LEAST_SIDE:
            continue
        name, score = teacher.names[int(found.class_ids[index])], round(float(found.scores[index]), 4)
        boxes.append(Box(name, x1, y1, x2, y2, score, "machine", teacher.actor))
    return tuple(boxes)


def _merged(found: Detections, teacher: Teacher) -> list[int]:
    """Indices of the detections that are ours.

    Where several teacher classes became one of ours (car, truck → vehicle), their boxes of one object are one.
    """
    kept = [index for index, name in enumerate(found.class_ids) if int(name) in teacher.names]
    if len(set(teacher.names.values())) == len(teacher.names) or not kept:
        return kept
    places = {name: place for place, name in enumerate(teacher.covers)}
    ours = np.array([places[teacher.names[int(found.class_ids[index])]] for index in kept], dtype=np.int64)
    best = non_maximum_suppression(found.boxes[kept], found.scores[kept], ours, teacher.model.iou, len(kept))
    return [kept[int(place)] for place in best]
