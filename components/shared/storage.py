"""The object store: one small door to MinIO, SeaweedFS or any S3, with timeouts, bounded reads and clear errors.

Everything under the bucket is immutable except `review/`, so writers use `put_if_absent`, and a folder of several
objects is made visible by writing its marker object last.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import urllib3
from minio import Minio
from minio.error import MinioException, S3Error

from .errors import InputError, SettingsError, StorageError
from .files import write_bytes
from .settings import Settings

__all__ = ["ObjectInfo", "ObjectMissing", "Store", "ordered_map", "parse_s3_uri"]

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

# 3 × 4 s until a host that does not answer is told, 2 × 30 s until one that hangs is.
_TIMEOUT = urllib3.Timeout(connect=4, read=30)
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_RETRIES = urllib3.Retry(
    total=3, connect=2, read=1, backoff_factor=0.2, status_forcelist=[500, 502, 503, 504], allowed_methods=None
)


class ObjectMissing(StorageError):
    """The key does not exist in the bucket."""


@dataclass(frozen=True)
class ObjectInfo:
    """One listed object: its key, size in bytes, ETag without quotes, and time of change in seconds since 1970."""

    key: str
    size: int
    etag: str
    modified: float


def parse_s3_uri(uri: str) -> tuple[str, str]:
    """Split `s3://bucket/some/prefix` into bucket and key or prefix.

    Raises:
        InputError: another scheme, or no bucket.
    """
    parts = urlsplit(uri)
    if parts.scheme != "s3" or not parts.netloc:
        raise InputError(f"{uri!r} is not an s3:// URI", "Write it as s3://<bucket>/<prefix>.")
    return parts.netloc, uri.split("://", 1)[1][len(parts.netloc) :].lstrip("/")


class Store:
    """One bucket of an S3 service. Safe to share between threads.

    Args:
        settings: endpoint, credentials and default bucket.
        bucket: another bucket than the settings name (a raw bucket, say).

    Raises:
        SettingsError: no endpoint is set.
        InputError: no name that a bucket can have.
    """

    def __init__(self, settings: Settings, bucket: str = "") -> None:
        if not settings.s3_endpoint:
            raise SettingsError(
                "HAECHI_S3_ENDPOINT is not set, so there is no object store",
                "Set it (and HAECHI_S3_ACCESS_KEY / HAECHI_S3_SECRET_KEY), or start the embedded one with `haechi up`.",
            )
        parts = urlsplit(settings.s3_endpoint)
        self.settings = settings
        self.endpoint = settings.s3_endpoint
        self.bucket = bucket or settings.bucket
        if not _BUCKET.fullmatch(self.bucket):
            raise InputError(
                f"{self.bucket!r} is no bucket name", "Use 3 to 63 lower-case letters, digits, dots and dashes."
            )
        # minio-py's default client retries for minutes; a camera team wants to know within seconds.
        pool = urllib3.PoolManager(timeout=_TIMEOUT, retries=_RETRIES, maxsize=max(16, 2 * settings.workers))
        self._client = Minio(
            parts.netloc,
            access_key=settings.s3_access_key or None,
            secret_key=settings.s3_secret_key or None,
            secure=parts.scheme == "https",
            region=settings.s3_region,
            http_client=pool,
        )

    def for_bucket(self, bucket: str) -> Store:
        """The same service with another bucket."""
        return self if bucket == self.bucket else Store(self.settings, bucket)

    def uri(self, key: str) -> str:
        """The s3:// URI of `key`."""
        return f"s3://{self.bucket}/{key}"

    def check(self) -> None:
        """Raise a StorageError that says what is wrong unless the bucket exists and may be listed."""
        if not self._call("", lambda: self._client.bucket_exists(self.bucket)):
            raise StorageError(
                f"bucket {self.bucket!r} does not exist at {self.endpoint}",
                "Create it, or set HAECHI_BUCKET to the bucket that exists.",
            )

    def ensure_bucket(self) -> None:
        """Create the bucket where it is missing (the embedded store only; on a cluster a person makes buckets)."""
        if not self._call("", lambda: self._client.bucket_exists(self.bucket)):
            self._call("", lambda: self._client.make_bucket(self.bucket))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """All objects under `prefix`, in the store's order: by key on S3 and MinIO, folder by folder on SeaweedFS.

        The same objects come in the same order; a reader that needs key order sorts.
        """
        listing = self._client.list_objects(self.bucket, prefix=prefix, recursive=True)
        while True:
            item = self._call(prefix, lambda: next(listing, None))
            if item is None:
                return
            if item.is_dir or item.object_name is None:
                continue
            modified = item.last_modified.timestamp() if item.last_modified else 0.0
            yield ObjectInfo(item.object_name, item.size or 0, (item.etag or "").strip('"'), modified)

    def exists(self, key: str) -> bool:
        """Whether the object is there."""
        try:
            self._call(key, lambda: self._client.stat_object(self.bucket, key))
        except ObjectMissing:
            return False
        return True

    def user_metadata(self, key: str) -> dict[str, str]:
        """The object's `x-amz-meta-*` entries, lower-case, without the prefix."""
        stat = self._call(key, lambda: self._client.stat_object(self.bucket, key))
        headers = {name.lower(): value for name, value in (stat.metadata or {}).items()}
        mark = "x-amz-meta-"
        return {name[len(mark) :]: value for name, value in headers.items() if name.startswith(mark)}

    def get(self, key: str, limit: int | None = None) -> bytes:
        """The object's bytes.

        Args:
            key: what to read.
            limit: refuse an object of more bytes than this before reading it.

        Raises:
            ObjectMissing: there is no such key.
            InputError: the object is larger than `limit`.
        """

        def read() -> bytes:
            response = self._client.get_object(self.bucket, key)
            try:
                size = int(response.headers.get("Content-Length", 0))
                data = (
                    b"" if limit is not None and size > limit else response.read(None if limit is None else limit + 1)
                )
                if limit is not None and max(size, len(data)) > limit:
                    raise InputError(
                        f"{self.uri(key)} has {max(size, len(data))} bytes, more than {limit}",
                        "Raise the limit or remove it.",
                    )
                return data
            finally:
                response.close()
                response.release_conn()

        return self._call(key, read)

    def get_json(self, key: str) -> Any:
        """The object parsed as JSON."""
        return json.loads(self.get(key))

    def get_file(self, key: str, path: Path) -> Path:
        """Write the object to `path`, atomically and without holding all of it in memory."""

        def read() -> None:
            response = self._client.get_object(self.bucket, key)
            try:
                write_bytes(path, response.stream(2**20))
            finally:
                response.close()
                response.release_conn()

        self._call(key, read)
        return path

    def put(
        self,
        key: str,
        data: bytes,
        content_type: str = "application/octet-stream",
        metadata: dict[str, str] | None = None,
    ) -> None:
        """Write one object, whole or not at all."""
        self._call(
            key,
            lambda: self._client.put_object(
                self.bucket, key, io.BytesIO(data), len(data), content_type=content_type, metadata=dict(metadata or {})
            ),
        )

    def put_if_absent(self, key: str, data: bytes, content_type: str = "application/octet-stream") -> bool:
        """Write a content-addressed object unless it is there; tell whether it was written.

        Two writers may both write: the bytes are the same, so the store ends the same.
        """
        if self.exists(key):
            return False
        self.put(key, data, content_type)
        return True

    def put_json(self, key: str, value: Any) -> None:
        """Write `value` as JSON."""
        self.put(key, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False).encode(), "application/json")

    def put_folder(self, prefix: str, folder: Path, marker: str) -> None:
        """Upload every file under `folder` to `prefix` (which ends in `/`), the file named `marker` last.

        Readers look for the marker, so that they never see half a folder.
        """
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        if marker not in names:
            raise InputError(f"{folder} has no {marker}", "Write it before the folder is uploaded.")
        names.remove(marker)
        for name in [*names, marker]:
            self.put(prefix + name, (folder / name).read_bytes())

    def get_folder(self, prefix: str, folder: Path) -> None:
        """Download all objects under `prefix` (which ends in `/`) into `folder`."""
        for item in self.list(prefix):
            self.get_file(item.key, folder / _safe_relative(item.key[len(prefix) :]))

    def remove(self, key: str) -> None:
        """Delete one object (only ever under `review/`, and states of finished trainings under `state/train/`)."""
        self._call(key, lambda: self._client.remove_object(self.bucket, key))

    def _call(self, key: str, work: Callable[[], _Result]) -> _Result:
        try:
            return work()
        except S3Error as error:
            raise self._explain(key, error) from error
        except (urllib3.exceptions.HTTPError, MinioException, OSError) as error:
            raise StorageError(
                f"cannot reach the object store at {self.endpoint}: {error}",
                "Check HAECHI_S3_ENDPOINT and that the service is up.",
            ) from error

    def _explain(self, key: str, error: S3Error) -> StorageError:
        if error.code in ("NoSuchKey", "NoSuchObject", "NoSuchVersion"):
            return ObjectMissing(f"{self.uri(key)} does not exist", "Check the key, or run the step that writes it.")
        if error.code == "NoSuchBucket":
            return StorageError(
                f"bucket {self.bucket!r} does not exist at {self.endpoint}",
                "Create it, or set HAECHI_BUCKET to the bucket that exists.",
            )
        if error.code in ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "AllAccessDisabled"):
            return StorageError(
                f"{self.endpoint} refuses our credentials for bucket {self.bucket!r} ({error.code})",
                "Check HAECHI_S3_ACCESS_KEY and HAECHI_S3_SECRET_KEY, and the rights of that key.",
            )
        return StorageError(
            f"{self.endpoint} answered {error.code} for {self.uri(key)}: {error.message}", "Look at the store's log."
        )


def ordered_map(work: Callable[[_Item], _Result], items: Iterable[_Item], workers: int) -> Iterator[_Result]:
    """Map `work` over `items` with `workers` threads; results in the items' order, at most 4 × `workers` held.

    The bound is what keeps memory flat while a million frames stream through.
    """
    source = iter(items)
    with ThreadPoolExecutor(max_workers=workers) as pool:
        waiting: list[Future[_Result]] = [pool.submit(work, item) for item in islice(source, 4 * workers)]
        try:
            while waiting:
                result = waiting.pop(0).result()
                waiting.extend(pool.submit(work, item) for item in islice(source, 1))
                yield result
        finally:
            for future in waiting:
                future.cancel()


def _safe_relative(name: str) -> str:
    if name.startswith("/") or ".." in name.split("/"):
        raise InputError(f"the object name {name!r} leaves its folder", "Remove that object from the store.")
    return name
