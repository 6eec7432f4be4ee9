"""The test's frames: fetched from the store, verified, decoded and shown to the detectors, a bounded number at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import TypeVar

import numpy as np

from ..shared.dataset import Box
from ..shared.detections import Detections, Detector, Letterbox, Pixels
from ..shared.errors import InputError
from ..shared.images import decode
from ..shared.progress import Progress
from ..shared.storage import ordered_map
from .score import TestFrame

__all__ = ["CONF", "MAX_DET", "detect_all", "test_frame"]

CONF = 0.001  # AP wants the whole curve
MAX_DET = 300
_BATCH = 8

_Item = TypeVar("_Item")


def test_frame(name: str, group: str, covers: Sequence[str], boxes: Sequence[Box], classes: Sequence[str]) -> TestFrame:
    """The truth of one frame in terms of the evaluated classes; boxes of uncovered or other classes are left out."""
    place = {item: index for index, item in enumerate(classes)}
    mine = [box for box in boxes if box.class_name in place and box.class_name in covers]
    corners = [(box.x1, box.y1, box.x2, box.y2) for box in mine]
    return TestFrame(
        name=name,
        group=group or name,
        covers=np.asarray([item in covers for item in classes], dtype=bool),
        boxes=np.asarray(corners, dtype=np.float64).reshape(-1, 4),
        class_ids=np.asarray([place[box.class_name] for box in mine], dtype=np.int64),
    )


def detect_all(
    items: Sequence[_Item],
    read: Callable[[_Item], bytes],
    name: Callable[[_Item], str],
    detectors: Sequence[tuple[Detector, float]],
    workers: int,
    conf: float = CONF,
) -> list[list[Detections]]:
    """Run every detector over every item, decoding each once.

    Threads fetch, decode and letterbox while the networks work; only letterboxed pictures wait in memory.

    Args:
        items: what to detect in.
        read: an item's encoded bytes; runs in threads.
        name: how to call an item in an error.
        detectors: with the IoU of their suppression.
        workers: threads.
        conf: drop what scores lower.

    Returns:
        For each detector, its detections in the items' order.

    Raises:
        InputError: an item that cannot be decoded, named.
    """
    found: list[list[Detections]] = [[] for _ in detectors]
    progress = Progress("frames scored", len(items))

    def prepare(item: _Item) -> list[tuple[Pixels, Letterbox]]:
        try:
            pixels = decode(read(item))
        except InputError as error:
            raise InputError(f"{name(item)}: {error.problem}", error.remedy) from error
        return [detector.prepare(pixels) for detector, _ in detectors]

    stream = ordered_map(prepare, items, workers)
    while batch := list(islice(stream, _BATCH)):
        for index, (detector, iou) in enumerate(detectors):
            found[index] += detector.detect_prepared([entry[index] for entry in batch], conf, iou, MAX_DET)
        progress.step(len(batch))
    if items:
        progress.close()
    return found
