"""Materialise a dataset: from manifest rows to a folder of images and YOLO labels that a trainer reads.

Frames are fetched concurrently, each is checked against its SHA-256, and a cache of frames is shared between datasets
by hard links. Files that are right already stay. `data.yaml` is written last and removed first, so that a folder with a
`data.yaml` is whole.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from .dataset import SPLITS, ManifestRow, frame_key, read_rows
from .errors import InputError, IntegrityError, StorageError
from .files import sha256_file, write_bytes, write_json
from .frame_cache import FrameCache
from .frames import check_frame_name, fetch_frame
from .progress import Progress
from .storage import ObjectMissing, Store, ordered_map

__all__ = ["Materialized", "label_lines", "materialize"]

_OURS = ".haechi-dataset"  # marks a folder whose content may be replaced
_SMALL_FILE = 4096  # disk space that a label file takes
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Materialized:
    """A materialised dataset.

    Attributes:
        root: its folder, absolute.
        data_yaml: what Ultralytics reads; its `path` is `root`.
        covers: `covers.json`, image path under root → classes labelled exhaustively there.
        frames: split → images.
        fetched: images read from the store.
        cached: images taken from the cache.
        kept: images that lay there already, whole.
    """

    root: Path
    data_yaml: Path
    covers: Path
    frames: Mapping[str, int]
    fetched: int
    cached: int
    kept: int


def materialize(
    manifest: Path | Sequence[ManifestRow],
    classes: Sequence[str],
    dest: Path,
    store: Store,
    cache: Path | None = None,
    splits: Sequence[str] = SPLITS,
) -> Materialized:
    """Write images, labels, `covers.json` and `data.yaml` of a dataset to `dest`.

    Layout: `images/<split>/<sha256>.<ext>`, `labels/<split>/<sha256>.txt` (lines `class cx cy w h`, fractions of the
    upright image). A split that is asked for but has no frame gets empty folders. Whatever else lies under `images`
    and `labels` of an earlier call, a trainer's caches included, is removed.

    Args:
        manifest: manifest.parquet, or its rows.
        classes: ordered class names; their order gives the label files' class numbers. Boxes of others are left out.
        dest: an empty or new folder, or one of an earlier call.
        store: where the frames are.
        cache: folder of frames kept between calls; None for none. One that cannot be written is done without.
        splits: which splits to write.

    Raises:
        InputError: `dest` holds other things, or the manifest has a class or split that cannot be.
        IntegrityError: a frame's bytes are not what its name says, or the manifest is no manifest.
        StorageError: a frame is missing, or the disk is too small or full; what is there already stays for a next call.
    """
    rows = read_rows(manifest, ManifestRow) if isinstance(manifest, Path) else list(manifest)
    rows = [row for row in rows if row.split in splits]
    _check(rows, splits)
    root = dest.absolute()
    _prepare(root, rows, splits)
    job = _Job(root, store, FrameCache.open(cache))
    sizes = _sizes(store, rows)
    needed = job.needed(rows, sizes)
    try:
        _require_space(root, needed)
        counts = job.run(rows)
        for row in rows:
            _write_if_new(root / _label_path(row), label_lines(row, classes))
        covers = {_image_path(row): [name for name in classes if name in row.covers] for row in rows}
        write_json(root / "covers.json", covers)
        write_bytes(root / "data.yaml", _data_yaml(root, classes, splits))
    except StorageError as error:
        if _is_full(error):
            raise StorageError(
                f"the disk is full while writing the dataset to {root}, which needs {_mib(needed)} in all ({error.problem})",
                "Free space or choose another folder, then run again: what was written is kept.",
            ) from error
        raise
    frames = {split: sum(row.split == split for row in rows) for split in splits}
    return Materialized(root, root / "data.yaml", root / "covers.json", frames, **counts)


def label_lines(row: ManifestRow, classes: Sequence[str]) -> bytes:
    """The frame's YOLO label file: per box `class cx cy w h`, fractions of the image's width and height."""
    lines = []
    for box in row.boxes:
        if box.class_name in classes:
            centre_x, centre_y = (box.x1 + box.x2) / 2 / row.width, (box.y1 + box.y2) / 2 / row.height
            width, height = (box.x2 - box.x1) / row.width, (box.y2 - box.y1) / row.height
            number = list(classes).index(box.class_name)
            lines.append(f"{number} {centre_x:.6f} {centre_y:.6f} {width:.6f} {height:.6f}\n")
    return "".join(lines).encode()


class _Job:
    """Brings frames to their place: kept, linked from the cache, or fetched."""

    def __init__(self, root: Path, store: Store, cache: FrameCache | None) -> None:
        self.root, self.store, self.cache = root, store, cache

    def needed(self, rows: Sequence[ManifestRow], sizes: Mapping[str, int]) -> int:
        """Bytes still to write that must find room, at the root; a cache on another disk keeps what it has room for."""
        absent = [row for row in rows if not (self.root / _image_path(row)).exists()]
        if self.cache and self.cache.folder.stat().st_dev == self.root.stat().st_dev:
            # What is linked takes no room of its own.
            absent = [row for row in absent if not self.cache.has(row)]
        return sum(sizes[row.sha256] for row in absent) + _SMALL_FILE * len(rows)

    def run(self, rows: Sequence[ManifestRow]) -> dict[str, int]:
        counts = {"fetched": 0, "cached": 0, "kept": 0}
        progress = Progress("frames materialised", len(rows))
        for outcome in ordered_map(self.bring, rows, self.store.settings.workers):
            counts[outcome] += 1
            progress.step()
        progress.close()
        return counts

    def bring(self, row: ManifestRow) -> str:
        """Bring one frame; `kept`, `cached` or `fetched`."""
        target = self.root / _image_path(row)
        if _is_whole(target, row.sha256):
            return "kept"
        target.unlink(missing_ok=True)
        if self.cache and self.cache.link(row, target):
            return "cached"
        data = fetch_frame(self.store, row)
        if not (self.cache and self.cache.keep(row, data) and self.cache.link(row, target)):
            write_bytes(target, data)
        return "fetched"


def _check(rows: Sequence[ManifestRow], splits: Sequence[str]) -> None:
    for split in splits:
        if split not in SPLITS:
            raise InputError(f"splits names {split!r}", f"Use some of {', '.join(SPLITS)}.")
    seen: set[str] = set()
    for row in rows:
        check_frame_name(row)
        if row.width < 1 or row.height < 1:
            raise IntegrityError(f"the manifest has frame {row.sha256} without a size", "Build the dataset again.")
        if row.sha256 in seen:
            raise IntegrityError(f"the manifest has frame {row.sha256} twice", "Build the dataset again.")
        seen.add(row.sha256)


def _prepare(root: Path, rows: Iterable[ManifestRow], splits: Sequence[str]) -> None:
    """Make the folders, take the sign of wholeness away, and remove what this dataset does not have."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        ours = root / _OURS
        if not ours.exists() and any(root.iterdir()):
            raise InputError(f"{root} holds files that are not a materialised dataset", "Choose a new or empty folder.")
        ours.touch()
        (root / "data.yaml").unlink(missing_ok=True)
        wanted = {path for row in rows for path in (_image_path(row), _label_path(row))}
        for kind in ("images", "labels"):
            for path in sorted((root / kind).rglob("*"), reverse=True):
                if path.is_dir() and not path.is_symlink():
                    if not any(path.iterdir()):
                        path.rmdir()
                elif path.relative_to(root).as_posix() not in wanted:
                    path.unlink()
            for split in splits:
                (root / kind / split).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"cannot write to {root}: {error.strerror or error}", "Check the path and its rights."
        ) from error


def _sizes(store: Store, rows: Sequence[ManifestRow]) -> dict[str, int]:
    """Bytes of every frame, from one listing."""
    listed = {item.key: item.size for item in store.list("frames/")} if rows else {}
    sizes = {row.sha256: listed.get(frame_key(row.sha256, row.ext)) for row in rows}
    missing = [row for row in rows if sizes[row.sha256] is None]
    if missing:
        key = frame_key(missing[0].sha256, missing[0].ext)
        raise ObjectMissing(
            f"{len(missing)} frames of the dataset are not in the store, the first is {store.uri(key)}",
            "Restore them from a backup, or build the dataset again without them.",
        )
    return {sha256: size or 0 for sha256, size in sizes.items()}


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise StorageError(
            f"{folder} needs {_mib(needed)} and its disk has {_mib(free)} free",
            "Free space, or choose a folder on a larger disk.",
        )


def _is_whole(path: Path, sha256: str) -> bool:
    return path.is_file() and not path.is_symlink() and sha256_file(path) == sha256


def _write_if_new(path: Path, data: bytes) -> None:
    if not path.is_file() or path.read_bytes() != data:
        write_bytes(path, data)


def _image_path(row: ManifestRow) -> str:
    return f"images/{row.split}/{row.sha256}.{row.ext}"


def _label_path(row: ManifestRow) -> str:
    return f"labels/{row.split}/{row.sha256}.txt"


def _data_yaml(root: Path, classes: Sequence[str], splits: Sequence[str]) -> bytes:
    # Ultralytics wants train and val; a split that was not asked for is left out.
    content = {"path": str(root), **{split: f"images/{split}" for split in splits}, "names": dict(enumerate(classes))}
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode()


def _is_full(error: StorageError) -> bool:
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno in _FULL


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
