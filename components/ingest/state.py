"""What has been seen: append-only state segments in the object store, and their union.

A segment is `state/ingest/<source>/<run>-<part>.parquet`, `<part>` being the first 12 hex digits of its own SHA-256:
two writers can never overwrite each other's rows, and the same rows written again are the same object. The state is the
union of all segments, so that no run has to lock out another.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..shared.dataset import Frame, schema
from ..shared.errors import IntegrityError
from ..shared.files import sha256_bytes
from ..shared.storage import Store, ordered_map

__all__ = ["ACCEPTED", "DUPLICATE", "PROMOTED_RUN", "QUARANTINED", "Entry", "Seen", "State", "frame_of"]

ACCEPTED, DUPLICATE, QUARANTINED = "accepted", "duplicate", "quarantined"
# The run in the names of segments that `settle` writes: such rows were first seen by another run.
PROMOTED_RUN = "promoted"
_PREFIX = "state/ingest/"


@dataclass(frozen=True)
class Seen(Frame):
    """One object that ingest has looked at.

    Attributes:
        etag: the store's ETag, or size and time of change of a file; with `key` it tells what was seen.
        size: bytes.
        status: `accepted` (its bytes are under `frames/`), `duplicate` or `quarantined`.
        reason: why it is quarantined, or empty.
        duplicate_of: the frame that it equals, or empty.
    """

    etag: str = ""
    size: int = 0
    status: str = ACCEPTED
    reason: str = ""
    duplicate_of: str = ""


@dataclass(frozen=True)
class Entry:
    """An object of the union: its columns, and the runs that have looked at it."""

    row: dict[str, Any]
    runs: frozenset[str]


_SCHEMA = pa.schema([*schema(Frame), *[(name, pa.string()) for name in ("etag", "status", "reason", "duplicate_of")]])
_SCHEMA = _SCHEMA.append(pa.field("size", pa.int64()))
# The best status first ("accepted" < "duplicate" < "quarantined"); the rest only makes the choice certain.
_ORDER = ("key", "etag", "status", "source", "camera", "sequence")


class State:
    """The union of all state segments, kept as columns.

    Args:
        store: the bucket.
        workers: concurrent reads.
    """

    def __init__(self, store: Store, workers: int) -> None:
        self._store = store
        self._workers = workers
        self._segments: dict[str, pa.Table] = {}
        self._known: set[tuple[str, str]] = set()

    def refresh(self) -> bool:
        """Read the segments that are new; tell whether there were any.

        Raises:
            IntegrityError: a segment that is no such table.
        """
        listed = [item.key for item in self._store.list(_PREFIX) if item.key.endswith(".parquet")]
        fresh = [key for key in listed if key not in self._segments]
        for key, data in zip(fresh, ordered_map(self._store.get, fresh, self._workers), strict=True):
            self._add(key, data)
        return bool(fresh)

    def has(self, key: str, etag: str) -> bool:
        """Whether this very object was looked at before."""
        return (key, etag) in self._known

    def append(self, source: str, run: str, rows: Sequence[Seen]) -> None:
        """Write a segment; what the rows speak of must be in the store already."""
        sink = io.BytesIO()
        plain = [{item.name: getattr(row, item.name) for item in fields(Seen)} for row in rows]
        pq.write_table(pa.Table.from_pylist(plain, schema=_SCHEMA), sink, compression="zstd")
        data = sink.getvalue()
        key = f"{_PREFIX}{source}/{run}-{sha256_bytes(data)[:12]}.parquet"
        self._store.put(key, data)
        self._add(key, data)

    def entries(self) -> Iterator[Entry]:
        """Every object of the union once, in key order; of several rows on one object the best status holds."""
        if not self._segments:
            return
        tables = [
            table.append_column("run", pa.array([key.rsplit("/", 1)[-1].rpartition("-")[0]] * len(table), pa.string()))
            for key, table in self._segments.items()
        ]
        table = pa.concat_tables(tables).sort_by([(name, "ascending") for name in _ORDER])
        rows = (row for batch in table.to_batches(max_chunksize=8192) for row in batch.to_pylist())
        for _, group in groupby(rows, key=lambda row: (row["key"], row["etag"])):
            same = list(group)
            yield Entry(same[0], frozenset(row["run"] for row in same))

    def _add(self, key: str, data: bytes) -> None:
        try:
            table = pq.read_table(io.BytesIO(data), schema=_SCHEMA)
        except (pa.ArrowInvalid, OSError) as error:
            raise IntegrityError(
                f"{self._store.uri(key)} is not a state segment ({error})", "Remove it; its frames are looked at again."
            ) from error
        self._segments[key] = table
        self._known.update(zip(table["key"].to_pylist(), table["etag"].to_pylist(), strict=True))


def frame_of(row: dict[str, Any]) -> Frame:
    """The frame in a row of the union."""
    return Frame(**{item.name: row[item.name] for item in fields(Frame)})
