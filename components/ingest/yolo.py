"""Import of YOLO sets: data.yaml, images and label files, read by `shared/yolo_format.py`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ..shared.dataset import Box
from ..shared.errors import InputError
from ..shared.yolo_format import label_path, read_data_yaml, read_labels, split_images
from .examples import Example, Parsed, inside

__all__ = ["find_data_yaml", "parse_yolo"]


def find_data_yaml(root: Path) -> Path | None:
    """The set's data.yaml: by its usual names, else the only YAML file at the top that has class names."""
    for name in ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml"):
        if (root / name).is_file():
            return root / name
    others = [
        path
        for path in sorted(root.glob("*.y*ml"))
        if path.is_file() and "names:" in path.read_text("utf-8", "replace")
    ]
    return others[0] if len(others) == 1 else None


def parse_yolo(root: Path) -> Parsed:
    """Read a YOLO set.

    A picture without a label file is unlabelled here, although Ultralytics takes it for background: whether nothing is
    on it or nobody looked, only its owner knows.

    Raises:
        InputError: data.yaml is missing, malformed, or leads outside `root`; or no picture has a label file.
    """
    file = find_data_yaml(root)
    if file is None:
        raise InputError("there is no data.yaml", "Add one with `names`, and `train`, `val` or `test`.")
    inside(root, file, file.name)
    data = read_data_yaml(file)
    found: dict[Path, Example] = {}
    for split in data.splits:
        if split == "test" and not any(entry.exists() for entry in data.splits[split]):
            continue  # Roboflow always writes the line, also where the set has no test pictures.
        for path in split_images(data, split):
            found.setdefault(path, _example(root, path, data.names, split))
    if found and all(example.boxes is None for example in found.values()):
        first = next(iter(found.values()))
        raise InputError(
            f"none of {len(found)} images has a label file, the first was looked for at {first.label}",
            "Put labels beside the images: the folder images becomes labels, the extension .txt.",
        )
    return Parsed(data.names, list(found.values()))


def _example(root: Path, path: Path, names: tuple[str, ...], split: str) -> Example:
    home = root.resolve()
    # Relative to the set: a folder called images above it is none of our business.
    label = home / label_path(path.relative_to(home))
    relative = label.relative_to(home).as_posix()
    if not label.is_file():
        return Example(path, relative, None, split)
    return Example(path, relative, partial(_read, inside(root, label, relative), names), split)


def _read(label: Path, names: tuple[str, ...], width: int, height: int) -> list[Box]:
    return read_labels(label, names, width, height)
