"""The YOLO text format: data.yaml, its image lists, and its label lines; read strictly, and never outside their folder.

A label line is `class cx cy w h`, all but the class as fractions of the image, or `class x1 y1 x2 y2 x3 y3 …`, a
polygon, whose bounding box is taken. An image's labels lie where Ultralytics looks for them: the last folder `images`
of its path becomes `labels`, the extension `.txt`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .dataset import Box
from .errors import InputError
from .images import IMAGE_SUFFIXES

__all__ = [
    "YoloData",
    "label_path",
    "own_label_path",
    "read_data_yaml",
    "read_labels",
    "split_images",
]

_SPLIT_KEYS = ("train", "val", "test")
_MAX_BYTES = 16 * 2**20  # of a text file; an image has hundreds of label lines at the very most
_SLACK = 0.01  # labelling tools round: Ultralytics lets values overstep by this much too


@dataclass(frozen=True)
class YoloData:
    """What a data.yaml says.

    Attributes:
        file: the data.yaml itself.
        root: folder that relative paths start from; it, and all images, lie inside the file's folder `home`.
        names: ordered class names.
        splits: split name → its entries (folders, or .txt lists of images), absolute, inside `root`.
    """

    file: Path
    root: Path
    names: tuple[str, ...]
    splits: dict[str, tuple[Path, ...]]

    @property
    def home(self) -> Path:
        """The file's own folder, which nothing may lead out of."""
        return self.file.parent.resolve()


def read_data_yaml(path: Path) -> YoloData:
    """Read a data.yaml, or the one in the folder `path`.

    `path: .` means the file's own folder. Roboflow writes `../train/images` and means `train/images` beside the file;
    that is accepted where the folder is there.

    Raises:
        InputError: unreadable, no class names, no split, or an entry that leads outside the file's folder.
    """
    file = path / "data.yaml" if path.is_dir() else path
    entry = _load(file)
    home = file.parent.resolve()
    root = _inside(file, "path", home, entry.get("path") or ".", home)
    splits = {
        name: tuple(_inside(file, name, root, item, home) for item in _as_list(entry[name]))
        for name in _SPLIT_KEYS
        if entry.get(name)
    }
    # Roboflow names the second split `valid` in some exports.
    if "val" not in splits and entry.get("valid"):
        splits["val"] = tuple(_inside(file, "valid", root, item, home) for item in _as_list(entry["valid"]))
    if not splits:
        raise InputError(f"{file} names no split", "Give at least one of train, val and test.")
    return YoloData(file, root, _names(file, entry), splits)


def split_images(data: YoloData, split: str) -> list[Path]:
    """The image files of a split, sorted, each once.

    Raises:
        InputError: no such split, a folder or list that is missing, or an image outside the dataset's folder.
    """
    if split not in data.splits:
        raise InputError(f"{data.file} has no split {split!r}", f"It has {', '.join(sorted(data.splits))}.")
    found: set[Path] = set()
    for entry in data.splits[split]:
        if entry.is_dir():
            found.update(item for item in entry.rglob("*") if item.suffix.lower() in IMAGE_SUFFIXES and item.is_file())
        elif entry.is_file() and entry.suffix == ".txt":
            found.update(_listed(data, entry))
        elif entry.is_file() and entry.suffix.lower() in IMAGE_SUFFIXES:
            found.add(entry)
        else:
            raise InputError(f"{data.file}: {split} is {entry}, which does not exist", "Correct the entry.")
    for item in found:
        _check_inside(data.file, str(item), item, data.home)
    return sorted(found)


def own_label_path(data: YoloData, image: Path) -> Path:
    """Where the labels of one of the dataset's images lie, which is never outside its folder.

    Raises:
        InputError: the label file, or a folder on the way to it, is a link that leads outside.
    """
    # Relative to the set: a folder called images above it is none of its business.
    label = data.home / label_path(image.resolve().relative_to(data.home))
    _check_inside(data.file, str(label), label, data.home)
    return label


def label_path(image: Path) -> Path:
    """Where the labels of an image lie."""
    parts = list(image.parts)
    for index in range(len(parts) - 2, -1, -1):
        if parts[index] == "images":
            parts[index] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def read_labels(path: Path, names: Sequence[str], width: int, height: int) -> list[Box]:
    """The boxes of one label file, in pixels of an upright image of `width` × `height`, clipped to it.

    A missing or empty file is a background image. A line that stands there twice counts once.

    Raises:
        InputError: naming file and line: wrong class, wrong count of numbers, NaN, out of range, zero area.
    """
    if not path.is_file():
        return []
    boxes: dict[Box, None] = {}
    for number, line in enumerate(_text(path).splitlines(), start=1):
        if line.strip():
            boxes[_box(f"{path}:{number}", line.split(), names, width, height)] = None
    return list(boxes)


def _box(where: str, fields: list[str], names: Sequence[str], width: int, height: int) -> Box:
    try:
        index, values = float(fields[0]), [float(item) for item in fields[1:]]
    except ValueError:
        raise InputError(f"{where}: {' '.join(fields)[:80]!r} are not numbers", "Write `class cx cy w h`.") from None
    if not index.is_integer() or not 0 <= index < len(names):
        raise InputError(f"{where}: class {fields[0][:20]} is none of 0 to {len(names) - 1}", "Correct the class.")
    if len(values) != 4 and (len(values) < 6 or len(values) % 2):
        raise InputError(
            f"{where}: {len(values)} numbers after the class", "Write 4 (cx cy w h), or 3 and more points of a polygon."
        )
    if not all(math.isfinite(value) for value in values):
        raise InputError(f"{where}: a number is NaN or infinite", "Correct or remove the line.")
    if not all(-_SLACK <= value <= 1 + _SLACK for value in values):
        raise InputError(f"{where}: a number is outside 0 to 1", "Write fractions of the image's width and height.")
    if len(values) == 4:
        cx, cy, w, h = values
        corners = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
    else:
        corners = (min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2]))
    x1, y1, x2, y2 = (min(1.0, max(0.0, value)) for value in corners)
    if x2 <= x1 or y2 <= y1:
        raise InputError(f"{where}: the box has no area", "Correct or remove the line.")
    return Box(names[int(index)], x1 * width, y1 * height, x2 * width, y2 * height)


def _load(file: Path) -> dict[str, Any]:
    try:
        entry = yaml.safe_load(_text(file))
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{file} is not YAML ({error})", "Correct the file.") from error
    if not isinstance(entry, dict):
        raise InputError(f"{file} holds no mapping", "Give names and at least one of train, val and test.")
    return entry


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InputError(f"{path} has more than {_MAX_BYTES} bytes", "Give a text file.")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InputError(f"{path} cannot be read ({reason})", "Check the path and the file.") from error


def _names(file: Path, entry: dict[str, Any]) -> tuple[str, ...]:
    names = entry.get("names")
    if isinstance(names, dict):
        if sorted(names, key=str) != sorted(range(len(names)), key=str):
            raise InputError(f"{file}: the keys of names are not 0 to {len(names) - 1}", "Number the classes from 0.")
        names = [names[index] for index in range(len(names))]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise InputError(f"{file} has no list of class names", "Add `names:` with one name a class.")
    if len(set(names)) != len(names):
        raise InputError(f"{file}: a class name stands twice in names", "Classes go by name: give each its own.")
    return tuple(name.strip() for name in names)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _inside(file: Path, key: str, base: Path, text: Any, home: Path) -> Path:
    # Never made text of: a few aliases in YAML are a list that would fill the memory as text.
    if not isinstance(text, str):
        raise InputError(f"{file}: {key} is no path but a {type(text).__name__}", "Write folders or .txt lists.")
    target = _resolved(file, key, base / text)
    if not target.is_relative_to(home) and text.startswith("../"):
        beside = _resolved(file, key, base / text.removeprefix("../"))
        target = beside if beside.exists() else target
    _check_inside(file, f"{key}: {text}", target, home)
    return target


def _resolved(file: Path, key: str, path: Path) -> Path:
    """`path` without links; what no file system takes (a NUL, a name too long) or lets us see is an InputError."""
    try:
        path.exists()
        return path.resolve()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{file}: {key} holds a path that cannot be used ({reason})", "Correct the entry.") from error


def _check_inside(file: Path, what: str, target: Path, home: Path) -> None:
    if not target.resolve().is_relative_to(home):
        raise InputError(f"{file}: {what!r} leads outside {home}", "Keep all images and labels beside the data.yaml.")


def _listed(data: YoloData, entry: Path) -> list[Path]:
    images = []
    for number, line in enumerate(_text(entry).splitlines(), start=1):
        if not line.strip():
            continue
        # Ultralytics reads `./x` against the list's folder, anything else against the dataset's.
        base = entry.parent if line.startswith("./") else data.root
        image = _resolved(entry, f"line {number}", base / line.strip())
        _check_inside(entry, line.strip(), image, data.home)
        if not image.is_file():
            raise InputError(f"{entry}:{number}: {line.strip()} does not exist", "Remove the line.")
        images.append(image)
    return images
