"""Import of Pascal VOC sets: one XML file an image, with corners counted from pixel 1."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

from ..shared.dataset import Box
from ..shared.errors import InputError
from ..shared.images import IMAGE_SUFFIXES
from .examples import Example, Parsed, faulty, images_below, inside, pixel_boxes, split_hint

__all__ = ["find_voc", "parse_voc"]

_MAX_BYTES = 8 * 2**20


def find_voc(root: Path) -> list[Path]:
    """All XML files below `root`."""
    return sorted(path for path in root.rglob("*.xml") if path.is_file() and not path.name.startswith("."))


def parse_voc(root: Path) -> Parsed:
    """Read a VOC set.

    Raises:
        InputError: no XML file, one that is malformed or has a DTD, or a file name that leads outside `root`.
    """
    files = find_voc(root)
    if not files:
        raise InputError("there is no VOC annotation (.xml)", "Add one XML file an image.")
    splits = _splits(root)
    whole = Parsed((), [])
    names: dict[str, None] = {}
    for file in files:
        shown = inside(root, file, file.name).relative_to(root.resolve()).as_posix()
        told, read, classes = _annotation(_text(file, shown), shown)
        names |= dict.fromkeys(classes)
        path = _image(root, file, told, shown)
        if path is None:
            whole.missing.append(f"{shown}: its image")
            continue
        whole.examples.append(Example(path, shown, read, splits.get(file.stem) or split_hint(shown)))
    whole.names = tuple(names)
    labelled = {example.path for example in whole.examples}
    whole.examples += [Example(path, path.name, None) for path in images_below(root) if path not in labelled]
    return whole


def _text(file: Path, shown: str) -> str:
    if file.stat().st_size > _MAX_BYTES:
        raise InputError(f"{shown} has more than {_MAX_BYTES} bytes", "Give VOC annotations.")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{shown} is not UTF-8 text ({error})", "Save it as UTF-8.") from error
    # Entities come only by a DTD, and VOC needs none: no expansion, and nothing external is ever opened.
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise InputError(f"{shown} has a DTD or an entity", "Remove it; VOC annotations need none.")
    return text


def _annotation(text: str, shown: str) -> tuple[str, Callable[[int, int], list[Box]], list[str]]:
    """The image's name as told, a reader of the boxes, and the class names; a fault is the reader's to raise."""
    try:
        tree = ElementTree.fromstring(text)  # noqa: S314
        if tree.tag != "annotation":
            raise InputError(f"{shown} begins with <{tree.tag}>, not <annotation>", "Give VOC annotations.")
        boxes = [_object(f"{shown} object {index}", item) for index, item in enumerate(tree.iter("object"), start=1)]
    except ElementTree.ParseError as error:
        return "", faulty(InputError(f"{shown} is not XML ({error})", "Correct the file.")), []
    except InputError as error:
        return "", faulty(error), []
    size = (_whole(tree, "size/width"), _whole(tree, "size/height"))
    told = (tree.findtext("filename") or "").strip().replace("\\", "/")
    return told, pixel_boxes(boxes, size, shown), [name for _, name, *_ in boxes]


def _object(where: str, item: ElementTree.Element) -> tuple[str, str, float, float, float, float]:
    name = (item.findtext("name") or "").strip()
    if not name:
        raise InputError(f"{where} has no name", "Name its class.")
    try:
        x1, y1, x2, y2 = (float(item.findtext(f"bndbox/{side}") or "") for side in ("xmin", "ymin", "xmax", "ymax"))
    except ValueError as error:
        raise InputError(f"{where}: bndbox is not four numbers", "Write xmin, ymin, xmax and ymax.") from error
    # VOC names the first and the last pixel, counted from 1; ours are edges, counted from 0.
    return where, name, x1 - 1, y1 - 1, x2, y2


def _image(root: Path, file: Path, told: str, shown: str) -> Path | None:
    """The image: by the name that the annotation gives, else by the annotation's own name; beside it or in JPEGImages."""
    names = [told] if told else []
    names += [file.stem + suffix for suffix in IMAGE_SUFFIXES]
    bases = [file.parent, file.parent.parent / "JPEGImages", file.parent.parent / "images", root / "images", root]
    for name in names:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise InputError(f"{shown}: filename {name!r} leads outside the imported folder", "Write a plain name.")
        for base in bases:
            # The parent of the set's own folder is not ours to look into.
            if base.resolve().is_relative_to(root.resolve()):
                path = inside(root, base / name, f"{shown}: filename {name!r}")
                if path.is_file():
                    return path
    return None


def _splits(root: Path) -> dict[str, str]:
    """Image stem to split, by ImageSets/Main/{train,val,test}.txt."""
    found: dict[str, str] = {}
    for split in ("train", "val", "test"):
        for file in sorted(root.rglob(f"ImageSets/Main/{split}.txt")):
            for line in inside(root, file, file.name).read_text("utf-8", "replace").splitlines():
                if line.strip():
                    found.setdefault(line.split()[0], split)
    return found


def _whole(tree: ElementTree.Element, path: str) -> int:
    text = (tree.findtext(path) or "").strip()
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else 0
