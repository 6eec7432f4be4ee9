"""Accepted frames by their digest: fetched from the store or a cache, and never believed without it."""

from __future__ import annotations

import re
from pathlib import Path

from .dataset import Frame, frame_key
from .errors import IntegrityError
from .files import sha256_bytes, write_bytes
from .images import MAX_BYTES
from .storage import Store

__all__ = ["cached_frame", "check_frame_name", "fetch_frame"]

_NAME = re.compile(r"[0-9a-f]{64}\.[a-z0-9]{1,5}")


def check_frame_name(frame: Frame) -> None:
    """Refuse a frame whose digest or extension could not be a file's name: manifests come from the store too.

    Raises:
        IntegrityError: they are not 64 hex digits and a short extension.
    """
    if not _NAME.fullmatch(f"{frame.sha256}.{frame.ext}"):
        raise IntegrityError(
            f"the manifest has a frame {frame.sha256!r}.{frame.ext!r}", "Run the step that wrote it again."
        )


def cached_frame(cache: Path, frame: Frame) -> Path:
    """Where a frame lies in a cache folder; the same place for every step, so that they share it."""
    return cache / frame.sha256[:2] / f"{frame.sha256}.{frame.ext}"


def fetch_frame(store: Store, frame: Frame, cache: Path | None = None) -> bytes:
    """A frame's encoded bytes, from the cache where they are whole there, else from the store (and into the cache).

    Raises:
        IntegrityError: the stored object is not what its name says.
        StorageError: it is missing, or the store cannot be reached.
    """
    check_frame_name(frame)
    kept = cached_frame(cache, frame) if cache else None
    if kept and kept.is_file():
        data = kept.read_bytes()
        if sha256_bytes(data) == frame.sha256:
            return data
    key = frame_key(frame.sha256, frame.ext)
    data = store.get(key, limit=MAX_BYTES)
    if sha256_bytes(data) != frame.sha256:
        raise IntegrityError(
            f"{store.uri(key)} does not hold the bytes that its name says ({len(data)} bytes)",
            "Restore the object from a backup, or remove it and ingest the frame again.",
        )
    if kept:
        write_bytes(kept, data)
    return data
