"""Golden images: a few pictures whose boxes prove a model folder wherever it is opened."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..shared.dataset import ManifestRow
from ..shared.errors import InputError
from ..shared.files import sha256_bytes
from ..shared.frames import fetch_frame
from ..shared.images import IMAGE_SUFFIXES, decode
from ..shared.storage import Store
from ..shared.yolo_format import read_data_yaml, split_images

__all__ = ["Picture", "choose_rows", "from_data", "from_files", "from_store"]


@dataclass(frozen=True)
class Picture:
    """An encoded image that is known to decode, and its file name in `golden/`."""

    name: str
    data: bytes


def choose_rows(rows: Iterable[ManifestRow], count: int) -> list[ManifestRow]:
    """Pick up to `count` val frames, each time the one that shows most of what was picked least.

    A class or camera that was picked n times counts 1 / (1 + n); ties go by digest, so that the same dataset gives
    the same pictures.
    """
    left = sorted((row for row in rows if row.split == "val"), key=lambda row: row.sha256)
    seen: Counter[tuple[str, str]] = Counter()
    chosen: list[ManifestRow] = []
    while left and len(chosen) < count:
        best = max(left, key=lambda row: sum(1 / (1 + seen[trait]) for trait in _traits(row)))
        left.remove(best)
        seen.update(_traits(best))
        chosen.append(best)
    return chosen


def _traits(row: ManifestRow) -> set[tuple[str, str]]:
    return {("camera", row.camera), *(("class", box.class_name) for box in row.boxes)}


def from_store(store: Store, rows: Iterable[ManifestRow]) -> list[Picture]:
    """Fetch frames.

    Raises:
        IntegrityError: a frame is not what its name says.
        StorageError: a frame is not there.
    """
    pictures = []
    for row in rows:
        pictures.append(Picture(f"{row.sha256[:16]}.{row.ext}", fetch_frame(store, row)))
    return pictures


def from_files(paths: Sequence[Path], count: int) -> list[Picture]:
    """Read up to `count` images, spread evenly over the files given; a folder means the images under it.

    Raises:
        InputError: a path that is not there, a folder without images, or a file that is no image.
    """
    files: list[Path] = []
    for path in paths:
        found = [path]
        if path.is_dir():
            found = sorted(item for item in path.rglob("*") if item.suffix.lower() in IMAGE_SUFFIXES)
        if not found or not found[0].is_file():
            raise InputError(f"{path} is neither an image nor a folder of images", "Give --images a folder of images.")
        files += found
    step = max(1.0, len(files) / max(1, count))
    spread = [files[int(index * step)] for index in range(min(count, len(files)))]
    return list({picture.name: picture for picture in map(_read, spread)}.values())


def _read(path: Path) -> Picture:
    data = path.read_bytes()
    try:
        decode(data)
    except InputError as error:
        raise InputError(f"{path}: {error.problem}", error.remedy) from error
    return Picture(f"{sha256_bytes(data)[:16]}{path.suffix.lower()}", data)


def from_data(path: Path, count: int) -> list[Picture]:
    """Images of a data.yaml's val split, or of test where it has no val.

    Raises:
        InputError: not a data.yaml, or neither split is there.
    """
    data = read_data_yaml(path)
    for split in ("val", "test"):
        if split in data.splits:
            return from_files(split_images(data, split), count)
    raise InputError(f"{path} has neither val nor test", "Give --images a folder instead.")
