"""Zip archives: everything is checked before anything is written, and nothing is written outside the folder."""

from __future__ import annotations

import lzma
import shutil
import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from ..shared.errors import InputError, StorageError

__all__ = ["MAX_ENTRIES", "MAX_RATIO", "MAX_TOTAL", "extract"]

MAX_ENTRIES = 1_000_000
MAX_TOTAL = 64 * 2**30
# Pictures hardly shrink and label files at most some twenty-fold; a bomb shrinks a thousand-fold.
MAX_RATIO = 100
_RATIO_FROM = 64 * 2**20
_MAX_NAME = 1024  # bytes; what systems take at the least, and it bounds how deep folders nest


def extract(file: Path, folder: Path, shown: str) -> None:
    """Unpack a zip into an empty folder.

    Args:
        file: the archive.
        folder: where to.
        shown: how messages call it.

    Raises:
        InputError: not a zip, or a damaged one; an entry that is absolute, has `..`, is a link, encrypted, there twice
            or both a file and a folder; too many entries, too many bytes, or a bomb's ratio.
        StorageError: the disk has less room than the archive needs.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = [entry for entry in archive.infolist() if not entry.filename.startswith("__MACOSX/")]
            _check(entries, shown)
            total = sum(entry.file_size for entry in entries)
            free = shutil.disk_usage(folder).free
            if total > free:
                raise StorageError(f"{shown} needs {total} bytes, {folder} has {free}", "Free disk space.")
            for entry in entries:
                _unpack(archive, entry, folder)
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise InputError(f"{shown} is not a sound zip archive ({error})", "Make the archive again.") from error


def _check(entries: list[zipfile.ZipInfo], shown: str) -> None:
    if len(entries) > MAX_ENTRIES:
        raise InputError(f"{shown} has {len(entries)} entries, more than {MAX_ENTRIES}", "Split the archive.")
    files: set[str] = set()
    folders: set[str] = set()
    for entry in entries:
        problem = _problem(entry)
        path = PurePosixPath(entry.filename.casefold())
        if not problem and str(path) in files:
            problem = "is there twice"
        (folders if entry.is_dir() else files).add(str(path))
        folders.update(str(parent) for parent in path.parents if str(parent) not in folders)
        if problem:
            raise InputError(
                f"{shown}: the entry {entry.filename[:200]!r} {problem}", "Make the archive again without it."
            )
    if both := sorted(files & folders):
        raise InputError(f"{shown}: {both[0][:200]!r} is both a file and a folder", "Make the archive again.")
    total = sum(entry.file_size for entry in entries)
    packed = sum(entry.compress_size for entry in entries)
    if total > MAX_TOTAL or (total > _RATIO_FROM and total > MAX_RATIO * max(1, packed)):
        raise InputError(
            f"{shown} would unpack from {packed} to {total} bytes, which is a bomb or too much at once",
            f"Give at most {MAX_TOTAL} bytes, and no more than {MAX_RATIO} times the packed size.",
        )


def _problem(entry: zipfile.ZipInfo) -> str:
    # zipfile cuts names at a NUL and mends them when it extracts; what the archive says counts.
    name = entry.orig_filename
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not parts or name.startswith(("/", "\\")) or ":" in parts[0] or "\0" in name:
        return "is not a relative path"
    if ".." in parts:
        return "leads outside the archive"
    if "\\" in name:
        return "has backslashes"
    if len(name.encode()) > _MAX_NAME or any(len(part.encode()) > 255 for part in parts):
        return "has too long a name"
    if entry.flag_bits & 1:
        return "is encrypted"
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a device"
    return ""


def _unpack(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, folder: Path) -> None:
    target = folder / entry.filename
    try:
        if entry.is_dir():
            target.mkdir(parents=True, exist_ok=True)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        # zipfile reads no more than the size that the entry declares, which is what was counted.
        with archive.open(entry) as source, target.open("xb") as sink:
            shutil.copyfileobj(source, sink, 2**20)
    except OSError as error:
        if error.errno is None:  # bzip2's word for damaged data
            raise zipfile.BadZipFile(f"{entry.filename}: {error}") from error
        raise StorageError(
            f"cannot unpack {entry.filename} to {folder}: {error.strerror or error}",
            "Free disk space or check the mount.",
        ) from error
