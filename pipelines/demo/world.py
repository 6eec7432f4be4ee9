"""A small synthetic camera world with known truth: a labelled set to begin with, and raw frames as cameras send them.

The same seed gives the same bytes. Raw keys read
`raw/<camera>/<YYYY>/<MM>/<DD>/<camera>_<HHMMSS>_<ms>.jpg`, which RAW_PATTERN parses below the prefix `raw/`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import yaml

from haechi.components.shared.dataset import Box
from haechi.components.shared.errors import InputError
from haechi.components.shared.files import atomic_folder
from haechi.components.shared.images import encode_jpeg

from .scenes import CAMERAS, CLASSES, HEIGHT, WIDTH, Scene, paint, random_scene

__all__ = ["CAMERAS", "CLASSES", "RAW_PATTERN", "RawFrame", "draw_labelled", "draw_raw"]

RAW_PATTERN = "{camera}/{year}/{month}/{day}/{_}_{time}_{ms}.jpg"
_FIRST_DAY = datetime(2026, 5, 4, tzinfo=UTC)
_NIGHT_SHARE = 0.25  # of the labelled set: what a team has at hand was mostly taken by day


@dataclass(frozen=True)
class RawFrame:
    """A frame as a camera sent it.

    Attributes:
        key: object key.
        data: the file's bytes, which may be damaged.
        boxes: the truth in pixels; None where there is no picture to judge.
        burst: frames with the same number show the same scene.
    """

    key: str
    data: bytes
    boxes: tuple[Box, ...] | None
    burst: int


def draw_labelled(folder: Path, seed: int, count: int) -> Path:
    """Write a labelled set in YOLO's layout: data.yaml, images/train, labels/train; one scene an image.

    About one image in ten is empty; the camera stands in the file's name.

    Args:
        folder: takes the set's place when it is complete.
        seed: of everything drawn.
        count: images, at least 1.

    Returns:
        The folder.
    """
    if count < 1:
        raise InputError(f"count is {count}", "Draw at least one image.")
    rng = np.random.default_rng([seed, 1])
    with atomic_folder(folder) as partial:
        images, labels = partial / "images" / "train", partial / "labels" / "train"
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        for number in range(count):
            camera = CAMERAS[number % len(CAMERAS)]
            scene = _labelled_scene(rng, camera, empty=number % 10 == 9)
            pixels, boxes = paint(scene, 0)
            name = f"{camera}_{number:04}"
            (images / f"{name}.jpg").write_bytes(encode_jpeg(pixels))
            (labels / f"{name}.txt").write_text("".join(_yolo_line(box) for box in boxes))
        entry = {"path": ".", "train": "images/train", "val": "images/train", "names": dict(enumerate(CLASSES))}
        (partial / "data.yaml").write_text(yaml.safe_dump(entry, sort_keys=False))
    return folder


def _labelled_scene(rng: np.random.Generator, camera: str, empty: bool) -> Scene:
    wanted = 0 if empty else int(rng.integers(1, 3))
    return random_scene(rng, camera, bool(rng.random() < _NIGHT_SHARE), wanted, int(rng.integers(0, 2)))


def _yolo_line(box: Box) -> str:
    cx, cy = (box.x1 + box.x2) / 2 / WIDTH, (box.y1 + box.y2) / 2 / HEIGHT
    width, height = (box.x2 - box.x1) / WIDTH, (box.y2 - box.y1) / HEIGHT
    return f"{CLASSES.index(box.class_name)} {cx:.6f} {cy:.6f} {width:.6f} {height:.6f}\n"


def draw_raw(seed: int, day: int = 0, bursts: int = 8, frames: int = 4) -> Iterator[RawFrame]:
    """What all cameras send in one day: bursts of near-duplicates by day and night, empty scenes, and broken files.

    Args:
        seed: of everything drawn.
        day: number of the day, so that days differ in keys and scenes.
        bursts: a camera; half of them at night, one in six without any safety class.
        frames: a burst, 0.5 to 1 s apart.

    Yields:
        Frames in each camera's order of time.
    """
    if bursts < 1 or frames < 1:
        raise InputError(f"bursts is {bursts} and frames {frames}", "Draw at least one of each.")
    rng = np.random.default_rng([seed, 2, day])
    for index, camera in enumerate(CAMERAS):
        yield from _camera_day(rng, camera, _FIRST_DAY + timedelta(days=day), index * bursts, bursts, frames)


def _camera_day(
    rng: np.random.Generator, camera: str, date: datetime, first: int, bursts: int, frames: int
) -> Iterator[RawFrame]:
    for number in range(bursts):
        night = number < bursts // 2
        # Nights from 00:00, days from 10:00; half an hour and more between bursts.
        moment = date + timedelta(hours=0 if night else 10, minutes=35 * (number % max(1, bursts - bursts // 2)))
        moment += timedelta(seconds=float(rng.uniform(0, 300)))
        wanted = 0 if (first + number) % 6 == 5 else int(rng.integers(1, 4))
        scene = random_scene(rng, camera, night, wanted, int(rng.integers(0, 2)))
        for step in range(frames):
            pixels, boxes = paint(scene, step + 1)
            yield RawFrame(_key(camera, moment), encode_jpeg(pixels), boxes, first + number)
            moment += timedelta(seconds=float(rng.uniform(0.5, 1.0)))
    yield from _broken(rng, camera, date + timedelta(hours=20), first)


def _broken(rng: np.random.Generator, camera: str, moment: datetime, first: int) -> Iterator[RawFrame]:
    """What cameras really send beside pictures: a cut upload, nothing, an error page, a covered lens."""
    whole = encode_jpeg(paint(random_scene(rng, camera, False, 1, 0), 0)[0])
    black = encode_jpeg(np.clip(rng.normal(2, 1.5, (HEIGHT, WIDTH, 3)), 0, 255).astype(np.uint8))
    page = b"<html><title>502 Bad Gateway</title></html>"
    for number, data in enumerate((whole[: len(whole) // 3], b"", page, black)):
        yield RawFrame(_key(camera, moment + timedelta(minutes=number)), data, None, -1 - first * 10 - number)


def _key(camera: str, moment: datetime) -> str:
    return f"raw/{camera}/{moment:%Y/%m/%d}/{camera}_{moment:%H%M%S}_{moment.microsecond // 1000:03}.jpg"
