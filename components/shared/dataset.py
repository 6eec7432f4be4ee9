"""The rows that flow through Haechi: frames, labels, dataset manifests; their files, object keys and digests.

Coordinates everywhere: pixels of the upright source image, x to the right, y down, corners (x1, y1, x2, y2).
Parquet is the only table format. `docs/artifacts.md` tells who writes and reads each table.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from .errors import IntegrityError
from .files import write_bytes
from .images import Signature
from .storage import ObjectMissing, Store

__all__ = [
    "FORMAT_VERSION",
    "SPLITS",
    "Box",
    "Frame",
    "LabelExport",
    "LabelledFrame",
    "ManifestRow",
    "dataset_digest",
    "exported_frames",
    "frame_key",
    "label_exports",
    "latest_dataset",
    "read_export",
    "read_rows",
    "table_bytes",
    "write_export",
    "write_rows",
]

FORMAT_VERSION = 1
SPLITS = ("train", "val", "test")

_Row = TypeVar("_Row", "Frame", "LabelledFrame", "ManifestRow")


@dataclass(frozen=True)
class Box:
    """One labelled object.

    Attributes:
        class_name: the class by name, never by index.
        x1, y1, x2, y2: corners in pixels of the upright image.
        score: the teacher's confidence; 1.0 for a person's or an imported box.
        origin: `import`, `machine` or `review`: who drew it.
        actor: the import's source URI, `model:<teacher's version>`, or the reviewer's name.
        parent: for a reviewed box that began as a proposal, the teacher's model version; else empty.
    """

    class_name: str
    x1: float
    y1: float
    x2: float
    y2: float
    score: float = 1.0
    origin: str = "import"
    actor: str = ""
    parent: str = ""


@dataclass(frozen=True)
class Frame:
    """One accepted frame, known by the SHA-256 of its bytes.

    Attributes:
        sha256, ext: name of the object `frames/<sha256[:2]>/<sha256>.<ext>`.
        width, height: pixels, upright.
        key: URI that it came from (`s3://bucket/raw/...`, `file:///...`).
        source: the source's short name, as in `state/ingest/<source>/`.
        camera: camera name, or empty.
        captured_at: capture time in UTC, or None.
        sequence: what ties frames that lie in no camera burst: a video's name, or empty.
        phash, thumb: the `images.Signature`.
    """

    sha256: str
    ext: str
    width: int
    height: int
    key: str
    source: str
    camera: str = ""
    captured_at: datetime | None = None
    sequence: str = ""
    phash: int = 0
    thumb: bytes = b""

    @property
    def signature(self) -> Signature:
        """How it looks, for near-duplicate search."""
        return Signature(self.phash, self.thumb)


@dataclass(frozen=True)
class LabelledFrame(Frame):
    """A frame with what one labels export says of it.

    Attributes:
        boxes: its objects; none means that no object of the covered classes is there.
        covers: the classes that this label speaks of; any other class is unknown here, not absent.
        origin: `import`, `machine` or `review`.
        decision: `imported`, `accepted`, `background` or `reviewed`.
        actor: as in Box, for the frame as a whole.
        split_hint: the split that an imported source had put it in; recorded, never obeyed.
        labelled_at: when, UTC; the newest review wins.
    """

    boxes: tuple[Box, ...] = ()
    covers: tuple[str, ...] = ()
    origin: str = "import"
    decision: str = "imported"
    actor: str = ""
    split_hint: str = ""
    labelled_at: datetime | None = None


@dataclass(frozen=True)
class ManifestRow(LabelledFrame):
    """A labelled frame in a dataset: its split, its group (which never straddles splits), and its export."""

    split: str = "train"
    group: str = ""
    export_id: str = ""


def frame_key(sha256: str, ext: str) -> str:
    """Object key of an accepted frame."""
    return f"frames/{sha256[:2]}/{sha256}.{ext}"


_UTC = pa.timestamp("ms", tz="UTC")
_BOX = pa.struct(
    [
        ("class_name", pa.string()),
        *[(name, pa.float64()) for name in ("x1", "y1", "x2", "y2", "score")],
        *[(name, pa.string()) for name in ("origin", "actor", "parent")],
    ]
)
_COLUMNS: dict[str, pa.DataType] = {
    "width": pa.int32(),
    "height": pa.int32(),
    "captured_at": _UTC,
    "phash": pa.uint64(),
    "thumb": pa.binary(),
    "boxes": pa.list_(_BOX),
    "covers": pa.list_(pa.string()),
    "labelled_at": _UTC,
}


def schema(kind: type[Frame]) -> pa.Schema:
    """The parquet schema of a row class: its fields in order, text unless listed otherwise."""
    return pa.schema([(item.name, _COLUMNS.get(item.name, pa.string())) for item in fields(kind)])


def table_bytes(kind: type[_Row], rows: Iterable[_Row]) -> bytes:
    """The rows as one parquet file; the same rows give the same bytes."""
    table = pa.Table.from_pylist([_plain(row) for row in rows], schema=schema(kind))
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def write_rows(path: Path, kind: type[_Row], rows: Iterable[_Row]) -> None:
    """Write rows to a parquet file, atomically."""
    write_bytes(path, table_bytes(kind, rows))


def read_rows(source: Path | bytes, kind: type[_Row]) -> list[_Row]:
    """Read the rows of a parquet file, or of its bytes.

    Raises:
        IntegrityError: not such a table.
    """
    try:
        table = _table(io.BytesIO(source) if isinstance(source, bytes) else source, schema(kind))
    except (pa.ArrowException, OSError, ValueError) as error:
        name = "the table" if isinstance(source, bytes) else str(source)
        raise IntegrityError(
            f"{name} is not a table of {kind.__name__} rows ({error})", "Run the step that wrote it again."
        ) from error
    return [_row(kind, entry) for entry in table.to_pylist()]


def _table(source: Path | io.BytesIO, wanted: pa.Schema) -> pa.Table:
    with pq.ParquetFile(source) as file:
        # Asked for a schema, pyarrow would fill a missing column with nulls: frames read as labels without boxes.
        missing = set(wanted.names) - set(file.schema_arrow.names)
        if missing:
            raise pa.ArrowInvalid(f"no column {', '.join(sorted(missing))}")
        return file.read(columns=wanted.names).select(wanted.names).cast(wanted)


def _plain(row: Frame) -> dict[str, Any]:
    return {item.name: getattr(row, item.name) for item in fields(row)} | (
        {"boxes": [asdict(box) for box in row.boxes], "covers": list(row.covers)}
        if isinstance(row, LabelledFrame)
        else {}
    )


def _row(kind: type[_Row], entry: dict[str, Any]) -> _Row:
    if "boxes" in entry:
        entry["boxes"] = tuple(Box(**box) for box in entry["boxes"] or ())
        entry["covers"] = tuple(entry["covers"] or ())
    return kind(**entry)


@dataclass(frozen=True)
class LabelExport:
    """One folder `labels/<export_id>/`: what was imported, machine-labelled or reviewed in one run.

    Attributes:
        export_id: `<kind>-<12 hex of the content's digest>`.
        kind: `import`, `machine` or `review`.
        created_at: ISO 8601 time in UTC of the first writing.
        info: what else its writer records (source, class map, teacher version, counts).
    """

    export_id: str
    kind: str
    created_at: str
    info: dict[str, Any] = field(default_factory=dict)


def write_export(
    store: Store, kind: str, rows: Sequence[LabelledFrame], info: dict[str, Any], now: datetime
) -> LabelExport:
    """Write a labels export, content-addressed: the same labels written again are the same export.

    `labels.parquet` goes first, `export.json` last, so that a reader never meets half an export.

    Args:
        store: the bucket.
        kind: `import`, `machine` or `review`.
        rows: the labelled frames; their `labelled_at` is left out of the digest.
        info: extra entries for export.json.
        now: time of writing, UTC; becomes `labelled_at` where a row has none.
    """
    ordered = sorted(rows, key=lambda row: row.sha256)
    # The sequence decides how frames are grouped: an import made again with another one is another export.
    leaves = [[*_label_leaf(row), row.sequence] for row in ordered]
    digest = _digest(["haechi-labels", FORMAT_VERSION, kind, *leaves])
    export_id = f"{kind}-{digest[:12]}"
    marker = f"labels/{export_id}/export.json"
    try:
        return LabelExport(**store.get_json(marker))
    except ObjectMissing:
        pass
    stamped = [row if row.labelled_at else replace(row, labelled_at=now) for row in ordered]
    export = LabelExport(export_id, kind, now.isoformat(timespec="milliseconds"), {"frames": len(ordered), **info})
    store.put(f"labels/{export_id}/labels.parquet", table_bytes(LabelledFrame, stamped))
    store.put_json(marker, asdict(export))
    return export


def label_exports(store: Store) -> list[LabelExport]:
    """All complete labels exports, oldest first (ties by id)."""
    markers = [item.key for item in store.list("labels/") if item.key.endswith("/export.json")]
    return sorted(
        (LabelExport(**store.get_json(key)) for key in markers), key=lambda item: (item.created_at, item.export_id)
    )


def read_export(store: Store, export: LabelExport) -> list[LabelledFrame]:
    """The labelled frames of one export."""
    return read_rows(store.get(f"labels/{export.export_id}/labels.parquet"), LabelledFrame)


def exported_frames(store: Store) -> Iterator[LabelledFrame]:
    """Every labelled frame of every export, oldest export first."""
    for export in label_exports(store):
        yield from read_export(store, export)


def latest_dataset(store: Store, name: str) -> str:
    """Digest of the newest complete dataset of this name (by its `stats.json`), or empty where there is none."""
    prefix, marker = f"datasets/{name}/", "/stats.json"
    complete = [item for item in store.list(prefix) if item.key.endswith(marker)]
    newest = max((item.modified for item in complete), default=0.0)
    tied = [item.key for item in complete if item.modified == newest]
    if len(tied) > 1:
        # Stores keep whole seconds: of two datasets of one second, the later one was built upon the other.
        older = {store.get_json(key).get("previous_dataset", "") for key in tied}
        tied = [key for key in tied if key[len(prefix) : -len(marker)] not in older] or tied
    return max(tied)[len(prefix) : -len(marker)] if tied else ""


def dataset_digest(classes: Sequence[str], rows: Iterable[ManifestRow]) -> str:
    """Digest of a dataset: a Merkle root over format version, ordered class names, and one leaf a frame.

    A leaf binds the frame's sha256, group, split, covered classes and boxes (class, corners to 1/1000 px, origin and
    actor), so that any change in what is learnt from, or in who said so, is another dataset. Leaves are ordered by
    sha256; odd nodes are promoted. Leaf and node hashes have different prefixes (RFC 6962, section 2.1).
    """
    leaves = [json.dumps([*_label_leaf(row), row.group, row.split], separators=(",", ":")).encode() for row in rows]
    # A leaf begins with its sha256, so that sorting leaves sorts by that.
    level = [hashlib.sha256(b"\x00" + leaf).digest() for leaf in sorted(leaves)]
    while len(level) > 1:
        paired = [hashlib.sha256(b"\x01" + a + b).digest() for a, b in zip(level[::2], level[1::2], strict=False)]
        level = paired + (level[-1:] if len(level) % 2 else [])
    root = level[0].hex() if level else ""
    return _digest(["haechi-dataset", FORMAT_VERSION, list(classes), root])


def _label_leaf(row: LabelledFrame) -> list[Any]:
    boxes = sorted(
        [
            box.class_name,
            # Adding zero makes the zero of -0.0 positive.
            *[f"{round(value, 3) + 0.0:.3f}" for value in (box.x1, box.y1, box.x2, box.y2)],
            box.origin,
            box.actor,
            box.parent,
        ]
        for box in row.boxes
    )
    return [row.sha256, sorted(row.covers), boxes, row.origin, row.decision, row.actor]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()).hexdigest()
