"""Where raw frames come from: `s3://bucket/folder` and `file:///folder`, listed and read alike."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from ..shared.errors import InputError, StorageError
from ..shared.storage import ObjectMissing, Store, parse_s3_uri

__all__ = ["Listed", "Reader", "folder_of"]


class Listed(NamedTuple):
    """One object of a source: its URI, its key below the source's prefix, size in bytes, and what changes with it."""

    uri: str
    relative: str
    size: int
    etag: str


class Reader:
    """Lists and reads URIs of any bucket of one object store, and of local folders. Safe to share between threads."""

    def __init__(self, store: Store) -> None:
        self._stores = {store.bucket: store}
        self._home = store

    def store(self, bucket: str) -> Store:
        """The store of `bucket`."""
        if bucket not in self._stores:
            self._stores[bucket] = self._home.for_bucket(bucket)
        return self._stores[bucket]

    def list(self, uri: str) -> Iterator[Listed]:
        """All objects below `uri`, but none whose name begins with a dot.

        Raises:
            InputError: a folder that does not exist.
            StorageError: the store or the bucket cannot be listed.
        """
        listing = self._list_s3(uri) if uri.startswith("s3://") else _list_folder(folder_of(uri))
        return (item for item in listing if not item.relative.rsplit("/", 1)[-1].startswith("."))

    def read(self, uri: str) -> bytes:
        """The bytes behind `uri`.

        Raises:
            ObjectMissing: it is gone.
            StorageError: it cannot be read.
        """
        if uri.startswith("s3://"):
            bucket, key = parse_s3_uri(uri)
            return self.store(bucket).get(key)
        path = folder_of(uri)
        try:
            return path.read_bytes()
        except FileNotFoundError as error:
            raise ObjectMissing(f"{path} does not exist", "Check the folder.") from error
        except OSError as error:
            raise StorageError(f"cannot read {path}: {error.strerror or error}", "Check its permissions.") from error

    def metadata(self, uri: str) -> dict[str, str]:
        """The user metadata of an object; files have none."""
        if not uri.startswith("s3://"):
            return {}
        bucket, key = parse_s3_uri(uri)
        return self.store(bucket).user_metadata(key)

    def _list_s3(self, uri: str) -> Iterator[Listed]:
        bucket, prefix = parse_s3_uri(uri)
        # A folder, never a bare string prefix: raw/cam1 must not take the frames of raw/cam10.
        prefix = prefix.rstrip("/") + "/" if prefix.strip("/") else ""
        store = self.store(bucket)
        for item in store.list(prefix):
            if not item.key.endswith("/"):
                yield Listed(store.uri(item.key), item.key[len(prefix) :], item.size, item.etag)


def folder_of(uri: str) -> Path:
    """The local path of a `file:///` URI.

    Raises:
        InputError: it names a host or no absolute path.
    """
    parts = urlsplit(uri)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise InputError(f"{uri!r} is not a local file:/// URI", "Write file:///absolute/path.")
    # urlsplit takes ? and # for query and fragment, which a path may well hold.
    return Path(unquote(uri.split("://", 1)[1].removeprefix("localhost")))


def _list_folder(folder: Path) -> Iterator[Listed]:
    if not folder.is_dir():
        raise InputError(f"the folder {folder} does not exist", "Check the file:// URI and that it is mounted here.")
    root = folder.resolve()
    for place, folders, names in os.walk(folder, onerror=_refuse):
        folders.sort()
        for name in sorted(names):
            path = Path(place, name)
            # A link may point to a neighbour, but not out of what the user named.
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                continue
            if path.is_file():
                stat = path.stat()
                relative = path.relative_to(folder).as_posix()
                yield Listed(path.absolute().as_uri(), relative, stat.st_size, f"{stat.st_size}-{stat.st_mtime_ns}")


def _refuse(error: OSError) -> None:
    raise StorageError(f"cannot list {error.filename}: {error.strerror or error}", "Check its permissions.") from error
