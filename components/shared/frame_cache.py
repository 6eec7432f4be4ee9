"""Frames kept between runs in a folder that processes and pods share; a cache that fails costs time and nothing else.

Content-addressed and never believed: what is taken is checked against its SHA-256. A frame comes in by a rename, so that
whoever is killed leaves a hidden file at most. The folder's disk is never filled: the frames that nobody used for longest
make room, and where that does not do, nothing more is kept.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import StorageError
from .files import sha256_bytes, sha256_file, write_bytes
from .progress import say

if TYPE_CHECKING:  # the serving image comes by here for models, and has no pyarrow
    from .dataset import Frame

__all__ = ["FrameCache", "usable_folder"]

_ABANDONED_S = 3600.0
_FREE_SHARE, _FREE_MOST = 10, 2 * 2**30  # a tenth of the disk stays free, 2 GiB at most


def usable_folder(folder: Path | None) -> Path | None:
    """The cache's folder, made where it is missing; None, and a line why, where nothing can be written there.

    A volume that the cluster mounts may belong to another user: a step then works without it.
    """
    if folder is None:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder.absolute()
    except OSError as error:
        say(f"going on without the cache: HAECHI_CACHE_DIR {folder} cannot be written ({error.strerror or error})")
        return None


class FrameCache:
    """A folder of frames, for one process with any number of threads, beside any number of other processes.

    Args:
        folder: writable; frames lie there as `<sha256[:2]>/<sha256>.<ext>`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._began = time.time()
        self._lock = threading.Lock()
        self._closed = False
        self._coming = 0  # bytes that threads are about to write
        self._sweep()

    @classmethod
    def open(cls, folder: Path | None) -> FrameCache | None:
        """The cache in `folder`, or None where none is wanted or it cannot be written."""
        usable = usable_folder(folder)
        return cls(usable) if usable else None

    def path(self, frame: Frame) -> Path:
        """Where a frame lies; the same place for every step."""
        return self.folder / frame.sha256[:2] / f"{frame.sha256}.{frame.ext}"

    def has(self, frame: Frame) -> bool:
        """Whether the frame is there; whether it is whole turns out when it is taken."""
        return self.path(frame).exists()

    def read(self, frame: Frame) -> bytes | None:
        """A frame's encoded bytes, or None where it is not there or damaged."""
        try:
            data = self.path(frame).read_bytes()
        except OSError:
            return None
        if sha256_bytes(data) != frame.sha256:
            return None
        self._used(frame)
        return data

    def link(self, frame: Frame, target: Path) -> bool:
        """Put a frame at `target`, which must not exist: a hard link, or a copy where the disk is another one.

        Returns:
            Whether it was there, whole.

        Raises:
            StorageError: `target` cannot be written.
        """
        try:
            os.link(self.path(frame), target)
        except FileNotFoundError:
            return False
        except OSError:
            data = self.read(frame)
            if data is not None:
                write_bytes(target, data)
            return data is not None
        # Checked at its new place, since another process may put the frame away at any moment. A trainer may have
        # "repaired" a linked picture in place, so not even our own entries are trusted.
        if sha256_file(target) != frame.sha256:
            target.unlink()
            return False
        self._used(frame)
        return True

    def keep(self, frame: Frame, data: bytes) -> bool:
        """Keep a frame where there is room for it.

        Returns:
            Whether it is there now.
        """
        with self._lock:
            self._coming += len(data)
        try:
            with self._lock:
                if self._closed or not self._make_room():
                    return False
            write_bytes(self.path(frame), data)
        except (StorageError, OSError) as error:
            self._close(str(error))
            return False
        finally:
            with self._lock:
                self._coming -= len(data)
        return True

    def _make_room(self) -> bool:
        disk = shutil.disk_usage(self.folder)
        floor = min(disk.total // _FREE_SHARE, _FREE_MOST)
        lacking = floor + self._coming - disk.free
        # Some more than is needed at this moment, or every frame would have to look through all of them.
        if lacking > 0 and self._evict(lacking + floor // 2) < lacking:
            self._close(f"the disk has {disk.free >> 20} MiB free, and {floor >> 20} MiB shall stay so")
            return False
        return True

    def _evict(self, wanted: int) -> int:
        """Remove the frames that were not used for longest, but none that was used since this process began; bytes freed."""
        known = []
        for path in self.folder.glob("??/[!.]*"):
            with suppress(OSError):
                told = path.stat()
                # One that is linked elsewhere too would free nothing.
                if told.st_nlink == 1 and told.st_mtime < self._began:
                    known.append((told.st_mtime, told.st_size, path))
        freed = 0
        for _, size, path in sorted(known):
            if freed >= wanted:
                break
            path.unlink(missing_ok=True)
            freed += size
        return freed

    def _close(self, reason: str) -> None:
        if not self._closed:
            self._closed = True
            say(f"the cache {self.folder} takes no more frames: {reason}")

    def _used(self, frame: Frame) -> None:
        with suppress(OSError):
            os.utime(self.path(frame))

    def _sweep(self) -> None:
        """Remove what a killed process left (never what a running one is writing)."""
        for partial in self.folder.glob("??/.*"):
            with suppress(OSError):
                if self._began - partial.stat().st_mtime > _ABANDONED_S:
                    partial.unlink()
