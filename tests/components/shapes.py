"""Tiny drawn datasets for the tests of train and export: grey discs, red triangles and blue bars, in a real store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import yaml

from haechi.components.shared.dataset import Box, ManifestRow, frame_key, write_rows
from haechi.components.shared.files import sha256_bytes
from haechi.components.shared.images import encode_jpeg
from haechi.components.shared.storage import Store

CLASSES = ("smoke", "fire", "person_down")


def draw(index: int, width: int = 128, height: int = 96) -> tuple[bytes, list[Box]]:
    """A JPEG with one to three shapes, and their boxes."""
    rng = np.random.default_rng(index)
    pixels = rng.normal(110, 10, (height, width, 3)).clip(0, 255).astype(np.uint8)
    boxes = []
    for _ in range(int(rng.integers(1, 4))):
        kind, (w, h) = int(rng.integers(3)), (int(value) for value in rng.integers(24, 48, 2))
        x, y = int(rng.integers(width - w)), int(rng.integers(height - h))
        if kind == 0:
            cv2.ellipse(pixels, (x + w // 2, y + h // 2), (w // 2, h // 2), 0, 0, 360, (210, 210, 210), -1)
        elif kind == 1:
            corners = np.array([[x, y + h], [x + w, y + h], [x + w // 2, y]], dtype=np.int32)
            cv2.fillPoly(pixels, [corners], (250, 70, 20))
        else:
            cv2.rectangle(pixels, (x, y), (x + w, y + h), (20, 50, 190), -1)
        boxes.append(Box(CLASSES[kind], x, y, x + w, y + h))
    return encode_jpeg(pixels), boxes


def write_dataset(
    store: Store,
    folder: Path,
    train: int,
    val: int,
    classes: Sequence[str] = CLASSES,
    covers: Callable[[int], Sequence[str]] = lambda _: CLASSES,
) -> Path:
    """A dataset artifact as `build` writes it, its frames in the store."""
    rows = []
    for index in range(train + val):
        data, boxes = draw(index)
        sha256, known = sha256_bytes(data), tuple(covers(index))
        store.put_if_absent(frame_key(sha256, "jpg"), data)
        rows.append(
            ManifestRow(
                sha256=sha256,
                ext="jpg",
                width=128,
                height=96,
                key=f"file:///{index}.jpg",
                source="shapes",
                camera=f"cam{index % 3}",
                boxes=tuple(box for box in boxes if box.class_name in known),
                covers=known,
                split="train" if index < train else "val",
                group=str(index),
            )
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "manifest.parquet", ManifestRow, rows)
    (folder / "data.yaml").write_text(yaml.safe_dump({"names": dict(enumerate(classes))}))
    return folder
