"""Where raw frames come from: `s3://bucket/folder` and `file:///folder`, listed and read alike."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from ..shared.errors import InputError, StorageError
from ..shared.storage import ObjectMissing, Store, parse_s3_uri
from .pattern import EPOCH, PathPattern

__all__ = ["Listed", "Reader", "Source", "check_keys", "folder_of", "iso_time", "short_name"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Listed(NamedTuple):
    """One object of a source: its URI, its key below the source's prefix, size in bytes, and what changes with it."""

    uri: str
    relative: str
    size: int
    etag: str


@dataclass(frozen=True)
class Source:
    """One entry of the parameter `sources`.

    Attributes:
        uri: `s3://bucket/folder` or `file:///absolute/folder`; everything below it is taken.
        name: short name for state segments; by default made of the URI.
        pattern: path pattern, see `pattern.py`, or None.
        camera: camera of frames whose key and metadata name none.
        zone: time zone of times in keys, EXIF and metadata that name none themselves.
        object_metadata: also ask the store for `x-amz-meta-camera` and `x-amz-meta-captured-at`, one request a frame.
    """

    uri: str
    name: str
    pattern: PathPattern | None = None
    camera: str = ""
    zone: tzinfo = UTC
    object_metadata: bool = False

    @classmethod
    def parse(cls, item: Mapping[str, Any], position: int) -> Source:
        """Read an entry of `sources`.

        Raises:
            InputError: an unknown key or a value that cannot be used; names the entry.
        """
        where = f"sources[{position}]"
        check_keys(where, item, ("uri", "name", "pattern", "camera", "start", "timezone", "object_metadata"))
        uri = str(item.get("uri") or "")
        if not uri.startswith(("s3://", "file://")):
            raise InputError(f"{where}.uri is {uri!r}", "Write s3://bucket/folder or file:///absolute/folder.")
        zone = _zone(where, str(item.get("timezone") or "UTC"))
        start = iso_time(str(item["start"]), zone) if item.get("start") else EPOCH
        if start is None:
            raise InputError(f"{where}.start is {item['start']!r}", "Write a time such as 2026-03-01T08:00:00Z.")
        text = str(item.get("pattern") or "")
        return cls(
            uri,
            short_name(where, str(item.get("name") or ""), uri),
            PathPattern(text, start, zone) if text else None,
            str(item.get("camera") or ""),
            zone,
            str(item.get("object_metadata") or "false").lower() in ("true", "1", "1.0"),
        )


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


def short_name(where: str, name: str, uri: str) -> str:
    """The given short name, checked, or one made of the URI's last parts.

    Raises:
        InputError: a given name with other characters than letters, digits, dot, dash and underscore.
    """
    if name:
        if not _NAME.fullmatch(name):
            raise InputError(f"{where}.name is {name!r}", "Use up to 64 letters, digits, dots, dashes, underscores.")
        return name
    last = [part for part in unquote(uri).split("://", 1)[-1].split("/") if part][-2:]
    picked = last[-1:] if uri.startswith("file://") else last
    made = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(picked)).strip("-._")[-64:].lstrip("-._")
    return made or "source"


def check_keys(where: str, item: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise an InputError that names the keys of `item` that are not known."""
    if not isinstance(item, Mapping):
        raise InputError(f"{where} is {item!r}, not a mapping", 'Write it as {"uri": "…"}.')
    unknown = sorted(set(item) - set(known))
    if unknown:
        raise InputError(f"{where} has the unknown keys {', '.join(unknown)}", f"Known keys: {', '.join(known)}.")


def iso_time(text: str, zone: tzinfo = UTC) -> datetime | None:
    """An ISO 8601 time in UTC; None where it is none. A time without offset is in `zone`."""
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=zone)).astimezone(UTC)


def _zone(where: str, name: str) -> tzinfo:
    if name.upper() == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise InputError(f"{where}.timezone {name!r} is not known", "Write a name such as Asia/Seoul.") from error
