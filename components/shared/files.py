"""Files that are whole or absent: atomic writes of files and folders, hashes, and names that are safe to join."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import StorageError

__all__ = ["atomic_folder", "read_json", "sha256_bytes", "sha256_file", "write_bytes", "write_json"]


def sha256_bytes(data: bytes | memoryview) -> str:
    """Hex SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` through a temporary neighbour and a rename.

    Raises:
        StorageError: the disk is full or not writable; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        # mkstemp makes private files; others (the next pod's user) must be able to read an artifact.
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except OSError as error:
        Path(name).unlink(missing_ok=True)
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}", "Free disk space or check the mount."
        ) from error


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
    `.<name>.partial-*` sibling, which the next call removes.

    Raises:
        StorageError: an OSError inside the block (a full disk, say), told with the folder's name.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for stale in target.parent.glob(f".{target.name}.partial-*"):
        shutil.rmtree(stale, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.partial-"))
    try:
        yield partial
        partial.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        partial.replace(target)
    except OSError as error:
        raise StorageError(
            f"cannot write folder {target}: {error.strerror or error}", "Free disk space or check the mount."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
