"""The test's frames: fetched from the store, verified, decoded and shown to the detectors, a bounded number at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np

from ..shared.dataset import Box, ManifestRow, frame_key
from ..shared.detections import Detections, Detector, Letterbox, Pixels
from ..shared.errors import InputError, IntegrityError
from ..shared.files import sha256_bytes, write_bytes
from ..shared.images import MAX_BYTES, decode
from ..shared.progress import Progress
from ..shared.storage import Store, ordered_map
from .score import TestFrame

__all__ = ["CONF", "MAX_DET", "detect_all", "read_frame", "test_frame"]

CONF = 0.001  # AP wants the whole curve
MAX_DET = 300
_BATCH = 8
_SAFE = re.compile(r"[0-9a-f]{64}\.[a-z0-9]{1,5}")

_Item = TypeVar("_Item")


def read_frame(store: Store, row: ManifestRow, cache: Path | None) -> bytes:
    """A frame's bytes, from the cache where they are whole there, else from the store (and into the cache).

    Raises:
        IntegrityError: the stored object is not what its name says.
        StorageError: it is missing, or the store cannot be reached.
    """
    if not _SAFE.fullmatch(f"{row.sha256}.{row.ext}"):
        raise IntegrityError(f"the manifest has a frame {row.sha256!r}.{row.ext!r}", "Build the dataset again.")
    key = frame_key(row.sha256, row.ext)
    # The layout of the cache that training shares.
    kept = cache / row.sha256[:2] / f"{row.sha256}.{row.ext}" if cache else None
    if kept and kept.is_file():
        data = kept.read_bytes()
        if sha256_bytes(data) == row.sha256:
            return data
    data = store.get(key, limit=MAX_BYTES)
    if sha256_bytes(data) != row.sha256:
        raise IntegrityError(
            f"{store.uri(key)} does not hold the bytes that its name says", "Ingest that frame again, or restore it."
        )
    if kept:
        write_bytes(kept, data)
    return data


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
