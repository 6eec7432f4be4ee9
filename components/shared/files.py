"""Files that are whole or absent: atomic writes of files and folders, hashes, and names that are safe to join."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import InputError, StorageError

__all__ = [
    "atomic_folder",
    "check_classes",
    "check_name",
    "read_json",
    "sha256_bytes",
    "sha256_file",
    "write_bytes",
    "write_json",
]

_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


def check_name(name: str) -> None:
    """Refuse a model's or dataset's name that is not kebab-case; it becomes part of object keys and Kubernetes names.

    Raises:
        InputError: it holds anything but lower-case letters, digits and single inner hyphens.
    """
    if not _NAME.fullmatch(name):
        raise InputError(f"name is {name!r}", "Give kebab-case, such as safety or door-camera.")


def check_classes(classes: Sequence[str]) -> tuple[str, ...]:
    """The ordered class names, once they are known to be usable by every step.

    Raises:
        InputError: none at all, one twice, or one that is empty or holds a character that cannot be printed.
    """
    if isinstance(classes, str) or not classes:
        raise InputError(f"classes is {classes!r}", "List at least one class name.")
    for name in classes:
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise InputError(f"classes holds {name!r}", "Give every class a printable name.")
        if list(classes).count(name) > 1:
            raise InputError(f"classes names {name!r} twice", "List each class once.")
    return tuple(classes)


def sha256_bytes(data: bytes | memoryview) -> str:
    """Hex SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_bytes(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Write `data`, whole or in pieces, to `path` through a temporary neighbour and a rename.

    Raises:
        StorageError: the disk is full or not writable; nothing is left behind.
    """
    name = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
        # mkstemp makes private files; others (the next pod's user) must be able to read an artifact.
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException as error:
        if name:
            Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _not_written(str(path), error) from error
        raise


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON, atomically; NaN is refused since JSON has none."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Parse the JSON file at `path`."""
    return json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield an empty sibling folder that takes `target`'s place when the block ends well.

    On an error the sibling is removed and `target` is as it was. A killed process can leave a
    `.<name>.partial-*` sibling, which the next call removes, or (killed between two renames) the former folder as
    `.<name>.former`, which the next call puts back. One writer a target at a time.

    Raises:
        StorageError: an OSError inside the block (a full disk, say), told with the folder's name.
    """
    former = target.parent / f".{target.name}.former"
    partial = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _recover(target, former)
        partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.partial-"))
        yield partial
        partial.chmod(0o755)
        # A folder cannot be renamed onto a filled one: set the old one aside, and keep it until the new one is there.
        if _present(target):
            target.replace(former)
        partial.replace(target)
        _discard(former)
    except OSError as error:
        if _present(former) and not _present(target):
            former.replace(target)
        raise _not_written(f"folder {target}", error) from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _recover(target: Path, former: Path) -> None:
    """Undo what a killed writer left."""
    if _present(former):
        if _present(target):
            _discard(former)
        else:
            former.replace(target)
    for stale in target.parent.glob(f".{glob.escape(target.name)}.partial-*"):
        shutil.rmtree(stale, ignore_errors=True)


def _present(path: Path) -> bool:
    return path.is_symlink() or path.exists()


def _discard(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _not_written(what: str, error: OSError) -> StorageError:
    detail = f"{error.strerror} ({error.filename})" if error.strerror and error.filename else str(error)
    return StorageError(f"cannot write {what}: {detail}", "Free disk space or check the mount.")
