"""Accepted frames by their digest: fetched from the store or a cache, and never believed without it."""

from __future__ import annotations

import re

from .dataset import Frame, frame_key
from .errors import IntegrityError
from .files import sha256_bytes
from .frame_cache import FrameCache
from .images import MAX_BYTES
from .storage import Store

__all__ = ["check_frame_name", "fetch_frame"]

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


def fetch_frame(store: Store, frame: Frame, cache: FrameCache | None = None) -> bytes:
    """A frame's encoded bytes, from the cache where they are whole there, else from the store (and into the cache).

    Raises:
        IntegrityError: the stored object is not what its name says.
        StorageError: it is missing, or the store cannot be reached.
    """
    check_frame_name(frame)
    kept = cache.read(frame) if cache else None
    if kept is not None:
        return kept
    key = frame_key(frame.sha256, frame.ext)
    data = store.get(key, limit=MAX_BYTES)
    if sha256_bytes(data) != frame.sha256:
        raise IntegrityError(
            f"{store.uri(key)} does not hold the bytes that its name says ({len(data)} bytes)",
            "Restore the object from a backup, or remove it and ingest the frame again.",
        )
    if cache:
        cache.keep(frame, data)
    return data
