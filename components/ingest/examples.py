"""What the importers of all formats give: pictures with a way to read their boxes, by class name."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ..shared.dataset import Box
from ..shared.errors import InputError
from ..shared.images import IMAGE_SUFFIXES

__all__ = ["Example", "Parsed", "faulty", "images_below", "inside", "pixel_boxes", "sequence_of", "split_hint"]

# Labelling tools round to whole pixels, and VOC counts from 1.
_SLACK_PX = 1.0
_ROBOFLOW = re.compile(r"[_-](jpe?g|png|bmp|webp|tiff?)\.rf\.[0-9A-Za-z]+$", re.IGNORECASE)
_NUMBERED = re.compile(r"^(?P<text>.*?)[ _.\-]*\d+$")
_VIDEO_WORDS = frozenset(
    ("mp4", "avi", "mov", "mkv", "webm", "m4v", "wmv", "flv", "video", "vid", "clip", "frame", "cam", "camera", "seq")
)


@dataclass(frozen=True)
class Example:
    """One picture of an imported set.

    Attributes:
        path: the file; it lies inside the set's folder.
        label: where its label stands, for messages.
        boxes: gives its boxes for an upright size (width, height), in pixels and by the source's class names; raises
            InputError naming what is wrong. None where the picture has no label at all.
        split: `train`, `val`, `test` or empty.
    """

    path: Path
    label: str
    boxes: Callable[[int, int], list[Box]] | None
    split: str = ""


@dataclass
class Parsed:
    """A whole imported set: its class names, its pictures, labels without a picture, and counts of what was left out."""

    names: tuple[str, ...]
    examples: list[Example]
    missing: list[str] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)


def inside(root: Path, path: Path, where: str) -> Path:
    """`path`, resolved, if it lies in `root`.

    Raises:
        InputError: it leads outside, by `..`, an absolute path or a link; or no file can have that name.
    """
    try:
        path.exists()
        target = path.resolve()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{where[:200]} is no usable path ({reason})", "Correct that name.") from error
    if not target.is_relative_to(root.resolve()):
        raise InputError(f"{where} leads outside the imported folder", "Keep all images and labels inside it.")
    return target


def images_below(root: Path) -> list[Path]:
    """All image files below `root`, sorted, that lie in it."""
    found = (path for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    return sorted(inside(root, path, str(path)) for path in found if not path.name.startswith("."))


def faulty(error: InputError) -> Callable[[int, int], list[Box]]:
    """The reader of a label that is known to be wrong: the import decides whether that refuses all or one picture."""

    def read(width: int, height: int) -> list[Box]:
        raise error

    return read


def pixel_boxes(
    boxes: Iterable[tuple[str, str, float, float, float, float]], size: tuple[int, int] | None, where: str
) -> Callable[[int, int], list[Box]]:
    """A reader for boxes that are given in pixels.

    Args:
        boxes: where it stands, class name, and corners x1, y1, x2, y2, from 0.
        size: the picture's size as the label tells it, or None.
        where: the label, for messages.
    """

    def read(width: int, height: int) -> list[Box]:
        if size and min(size) > 0 and size != (width, height):
            turned = " (the label was made for the picture before its EXIF rotation)" if size == (height, width) else ""
            problem = f"{where}: says {size[0]}x{size[1]}, the upright picture is {width}x{height}{turned}"
            raise InputError(problem, "Label the upright picture.")
        made: dict[Box, None] = {}
        for place, name, *corners in boxes:
            made[_checked(place, name, corners, width, height)] = None
        return list(made)

    return read


def _checked(where: str, name: str, corners: list[float], width: int, height: int) -> Box:
    if not all(math.isfinite(value) for value in corners):
        raise InputError(f"{where}: a number is NaN or infinite", "Correct or remove the box.")
    x1, y1, x2, y2 = corners
    if min(x1, y1) < -_SLACK_PX or x2 > width + _SLACK_PX or y2 > height + _SLACK_PX:
        raise InputError(f"{where}: the box is outside the {width}x{height} picture", "Correct or remove the box.")
    x1, y1, x2, y2 = max(0.0, x1), max(0.0, y1), min(float(width), x2), min(float(height), y2)
    if x2 <= x1 or y2 <= y1:
        raise InputError(f"{where}: the box has no area", "Correct or remove the box.")
    return Box(name, x1, y1, x2, y2)


def split_hint(text: str) -> str:
    """The split that a folder's or file's name speaks of, or empty."""
    for word in re.split(r"[^a-z]+", text.lower()):
        if word in ("train", "training"):
            return "train"
        if word in ("val", "valid", "validation"):
            return "val"
        if word in ("test", "testing"):
            return "test"
    return ""


def sequence_of(name: str, pattern: re.Pattern[str] | None) -> str:
    """The video that a labelled picture was cut from, by its file name, or empty.

    Roboflow's suffix (`_jpg.rf.<hash>`) is taken off first. Then `pattern` decides, where given: the first group of its
    first match (the whole match without groups), nothing where it does not match. Without a pattern, a numbered name
    counts as a video's frame only if the text before the number has a word that says so (`fire1_mp4-24`,
    `cam02_000123`, `video7-3`): `img_1002`, `fall001` and `000000000025` share a stem without sharing a scene, and
    tying them would put a whole collection into one split. What such sets do share, near-duplicates show.
    """
    stem = _ROBOFLOW.sub("", Path(name).stem)
    if pattern is not None:
        match = pattern.search(stem)
        return (match[1] if pattern.groups else match[0]) or "" if match else ""
    numbered = _NUMBERED.match(stem)
    if numbered is None:
        return ""
    text = numbered["text"]
    words = (word.strip("0123456789") or word for word in re.split(r"[^a-z0-9]+", text.lower()))
    # mp4 and its like end in a digit that belongs to them.
    exact = set(re.split(r"[^a-z0-9]+", text.lower()))
    return text if _VIDEO_WORDS & (exact | set(words)) else ""
