"""Import of COCO sets: `instances_*.json` or Roboflow's `_annotations.coco.json` and the images that they name."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from ..shared.errors import InputError
from .examples import Example, Parsed, faulty, inside, pixel_boxes, split_hint

__all__ = ["find_coco", "parse_coco"]

_Placed = tuple[str, str, float, float, float, float]


def find_coco(root: Path) -> list[Path]:
    """The annotation files: where some are called `instances_*`, these only (captions and keypoints lie beside them)."""
    files = sorted(path for path in root.rglob("*.json") if path.is_file())
    instances = [path for path in files if path.name.startswith("instances_")]
    return instances or [path for path in files if _looks_like_coco(path)]


def parse_coco(root: Path) -> Parsed:
    """Read a COCO set. A picture listed without annotations is one that holds none; crowd regions are left out.

    Raises:
        InputError: no annotation file, one that is malformed, or a file name that leads outside `root`.
    """
    files = find_coco(root)
    if not files:
        raise InputError("there is no COCO annotation file", "Add a JSON with images, annotations and categories.")
    whole = Parsed((), [])
    for file in files:
        part = _parse_file(root, inside(root, file, file.name))
        whole.names = tuple(dict.fromkeys([*whole.names, *part.names]))
        whole.examples += part.examples
        whole.missing += part.missing
        whole.notes += part.notes
    return whole


def _parse_file(root: Path, file: Path) -> Parsed:
    shown = file.relative_to(root.resolve()).as_posix()
    content = _load(file, shown)
    names: dict[int, str] = {}
    try:
        names = {int(item["id"]): str(item["name"]).strip() for item in content["categories"]}
        images = {int(item["id"]): (str(item["file_name"]), _size(item)) for item in content["images"]}
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{shown}: images or categories are malformed ({error!r})", "Correct the file.") from error
    notes: Counter[str] = Counter()
    boxes: dict[int, list[_Placed]] = defaultdict(list)
    faults: dict[int, InputError] = {}
    for position, item in enumerate(content["annotations"]):
        where = f"{shown} annotation {item.get('id', position) if isinstance(item, dict) else position}"
        if isinstance(item, dict) and item.get("iscrowd"):
            notes["crowd regions"] += 1
            continue
        image = item.get("image_id") if isinstance(item, dict) else None
        if not isinstance(image, int | float) or image not in images:
            raise InputError(f"{where}: image_id {image!r} is not listed", "Correct the annotation.")
        number = int(image)  # JSON may write it as 7.0
        try:
            boxes[number].append(_annotation(where, item, names))
        except InputError as error:
            faults.setdefault(number, error)
    whole = Parsed(tuple(names.values()), [], notes=notes)
    for image, (name, size) in images.items():
        path = _find(root, file, name, shown)
        if path is None:
            whole.missing.append(f"{shown}: image {name}")
            continue
        label = f"{shown} image {name}"
        read = faulty(faults[image]) if image in faults else pixel_boxes(boxes[image], size, label)
        whole.examples.append(Example(path, label, read, split_hint(shown)))
    return whole


def _annotation(where: str, item: dict[str, Any], names: dict[int, str]) -> _Placed:
    try:
        category = int(item["category_id"])
        x, y, width, height = (float(value) for value in item["bbox"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        problem = f"{where}: category_id or bbox is malformed ({error!r})"
        raise InputError(problem, "Write bbox as [x, y, width, height].") from error
    if category not in names:
        raise InputError(f"{where}: category_id {category} is not listed", "Correct the annotation.")
    return where, names[category], x, y, x + width, y + height


def _size(item: dict[str, Any]) -> tuple[int, int]:
    return int(item.get("width") or 0), int(item.get("height") or 0)


def _find(root: Path, file: Path, name: str, shown: str) -> Path | None:
    """The image file: beside the annotations, or in one of the folders where COCO sets keep them."""
    stem = re.sub(r"^(instances|annotations|person_keypoints)_", "", file.stem)
    bases = [file.parent, file.parent / "images", root, root / "images", root / stem, root / "images" / stem]
    for base in bases:
        path = inside(root, base / name, f"{shown}: file_name {name!r}") if base.is_dir() else base / name
        if path.is_file():
            return path
    return None


def _looks_like_coco(path: Path) -> bool:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and {"images", "annotations", "categories"} <= set(content)


def _load(file: Path, shown: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{shown} is not JSON ({error})", "Correct the file.") from error
    lists = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(name), list) for name in lists):
        raise InputError(f"{shown} lacks a list images, annotations or categories", "Give COCO instance annotations.")
    return content
