"""Raw frames: list, fetch what is new, judge, store, and record; then settle what all runs together keep.

The order of writes makes a kill harmless at any point: first the bytes (content-addressed), then the state segment
that says they are there. What no segment names is simply looked at again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from ..shared.dataset import Frame, exported_frames, frame_key, label_exports
from ..shared.errors import InputError, NoDataError
from ..shared.files import sha256_bytes
from ..shared.images import MAX_BYTES
from ..shared.progress import Progress, say
from ..shared.storage import ObjectMissing, Store, ordered_map
from .dedup import Choice, Kept, Known, choose
from .parameters import Quality, Source, in_utc, iso_time
from .pattern import Place
from .quality import Examined, examine
from .sources import Listed, Reader
from .state import ACCEPTED, DUPLICATE, PROMOTED_RUN, QUARANTINED, Seen, State, frame_of

__all__ = ["PART", "Labelled", "collect", "no_data", "quarantine", "settle"]

# Rows in a state segment: what a killed run looks at again, at most.
PART = 2000


class Labelled:
    """The frames in labels exports, read again only when an export was added."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._exports: list[str] | None = None
        self._known: list[Known] = []

    def read(self) -> list[Known]:
        """All labelled frames, now."""
        exports = [export.export_id for export in label_exports(self._store)]
        if exports != self._exports:
            frames = exported_frames(self._store)
            self._known = [Known(frame.sha256, frame.camera, frame.signature) for frame in frames]
            self._exports = exports
        return self._known


@dataclass(frozen=True)
class _Fetched:
    item: Listed
    data: bytes
    found: Examined
    place: Place


def collect(
    store: Store,
    sources: Sequence[Source],
    quality: Quality,
    state: State,
    kept: Kept,
    run: str,
    workers: int,
    part: int = PART,
) -> int:
    """Look at every new object of the sources, store what is new and good, and record all of it.

    Args:
        store: Haechi's bucket.
        sources: where frames come from.
        quality: limits that they must keep.
        state: what was seen before; grows.
        kept: what is kept already, for duplicates; grows.
        run: this run's id, for segment names.
        workers: concurrent transfers and decodes.
        part: rows in a segment.

    Returns:
        How many objects the sources hold, new or not.

    Raises:
        InputError: a source's pattern matches none of its keys.
    """
    reader = Reader(store)
    total = 0
    for source in sources:
        new, listed = _list_new(reader, source, state)
        total += listed
        say(f"{source.name}: {listed} objects at {source.uri}, {len(new)} new")
        progress = Progress("frames checked", len(new))
        fetched = ordered_map(lambda item, source=source: _fetch(reader, source, quality, item), new, workers)  # type: ignore[misc]
        stored = ordered_map(lambda job: _keep(store, *job), _judge(fetched, source, kept), workers)
        rows: list[Seen] = []
        for row in stored:
            rows.append(row)
            progress.step()
            if len(rows) == part:
                state.append(source.name, run, rows)
                rows = []
        if rows:
            state.append(source.name, run, rows)
        if new:
            progress.close()
    return total


def _list_new(reader: Reader, source: Source, state: State) -> tuple[list[Listed], int]:
    """The objects that the state does not know, in key order, and how many there are at all."""
    new, listed, matched, example = [], 0, source.pattern is None, ""
    for item in reader.list(source.uri):
        if item.relative.endswith(".json"):  # what a camera or our runtime says of the frame beside it
            continue
        listed += 1
        example = example or item.relative
        matched = matched or (source.pattern is not None and source.pattern.read(item.relative) is not None)
        if not state.has(item.uri, item.etag):
            new.append(item)
    if listed and not matched and source.pattern:
        raise InputError(
            f"pattern {source.pattern.text!r} of {source.uri} matches none of its {listed} keys, the first is {example!r}",
            "Write the pattern for the whole key below the prefix; components/ingest/README.md lists the fields.",
        )
    # Some stores list folder by folder instead of in byte order.
    return sorted(new), listed


def _fetch(reader: Reader, source: Source, quality: Quality, item: Listed) -> _Fetched | None:
    """Read, decode and judge one object; None where it is gone since it was listed."""
    if item.size > MAX_BYTES:
        name = sha256_bytes(f"{item.uri}\n{item.etag}".encode())
        detail = f"{item.size} bytes, more than {MAX_BYTES}; not downloaded"
        return _Fetched(item, b"", Examined(name, "", reason="too_large", detail=detail), Place())
    try:
        data = reader.read(item.uri)
        found = examine(data, item.relative, quality)
        return _Fetched(item, data, found, _place(reader, source, item, found))
    except ObjectMissing:
        say(f"{item.uri} has gone since it was listed")
        return None


def _place(reader: Reader, source: Source, item: Listed, found: Examined) -> Place:
    """Camera, time and sequence: from the key, else from object metadata, else from EXIF and the source."""
    place = (source.pattern.read(item.relative) if source.pattern else None) or Place()
    camera, moment = place.camera, place.captured_at
    if source.object_metadata and not (camera and moment):
        told = reader.metadata(item.uri)
        camera = camera or told.get("camera", "")
        moment = moment or iso_time(told.get("captured-at", ""), source.zone)
    if moment is None and found.captured_at:
        moment = in_utc(found.captured_at.replace(tzinfo=source.zone))
    return Place(camera or source.camera, _milliseconds(moment), place.sequence)


def _milliseconds(moment: datetime | None) -> datetime | None:
    return moment.replace(microsecond=moment.microsecond // 1000 * 1000) if moment else None


def _judge(fetched: Iterable[_Fetched | None], source: Source, kept: Kept) -> Iterator[tuple[Seen, bytes, str]]:
    """One row an object, in key order: the only place where the order decides, so it runs in one thread."""
    for one in fetched:
        if one is None:
            continue
        item, found, place = one.item, one.found, one.place
        status, equal = ACCEPTED, ""
        if found.signature is None:
            status = QUARANTINED
        else:
            known = Known(found.sha256, place.camera, found.signature)
            equal = kept.equal_of(known)
            status = DUPLICATE if equal else ACCEPTED
            if not equal:
                kept.add(known)
        row = Seen(
            found.sha256,
            found.ext,
            found.width,
            found.height,
            item.uri,
            source.name,
            place.camera,
            place.captured_at,
            place.sequence,
            found.signature.phash if found.signature else 0,
            found.signature.thumb if found.signature else b"",
            item.etag,
            item.size,
            status,
            found.reason,
            equal,
        )
        yield row, b"" if status == DUPLICATE else one.data, found.detail


def _keep(store: Store, row: Seen, data: bytes, detail: str) -> Seen:
    """Put the bytes where the row says they are."""
    if row.status == ACCEPTED:
        store.put_if_absent(frame_key(row.sha256, row.ext), data)
    elif row.status == QUARANTINED:
        quarantine(store, row.sha256, row.ext, data, row.reason, detail, row.key, row.size)
    return row


def quarantine(store: Store, sha256: str, ext: str, data: bytes, reason: str, detail: str, key: str, size: int) -> None:
    """Keep refused bytes and why; without `ext` (bytes never downloaded) only why."""
    if ext:
        store.put_if_absent(f"quarantine/{sha256}.{ext}", data)
    record = f"quarantine/{sha256}.json"
    if not store.exists(record):
        store.put_json(record, {"reason": reason, "detail": detail, "key": key, "size": size})


def settle(store: Store, state: State, labelled: Labelled, run: str, workers: int) -> tuple[Choice, list[Frame]]:
    """Judge the union of all runs, and make sure that every frame kept is stored.

    A frame that every run so far took for a duplicate can be kept by the union, when what it equalled is itself
    dropped: its bytes are fetched again and a segment says so.

    Returns:
        What became of this run's objects, and all kept frames, by key.
    """
    state.refresh()
    known = labelled.read()
    lost: set[str] = set()
    while True:
        choice, _ = choose(state.entries(), known, run, lost)
        waiting = [row for row in choice.kept if row["status"] != ACCEPTED]
        results = list(ordered_map(lambda row: _promote(store, row), waiting, workers))
        promoted = [row for row, done in zip(waiting, results, strict=True) if done]
        for source in sorted({row["source"] for row in promoted}):
            rows = [Seen(**_accepted(row)) for row in promoted if row["source"] == source]
            state.append(source, PROMOTED_RUN, rows)
        gone = {row["sha256"] for row, done in zip(waiting, results, strict=True) if not done}
        if not gone:
            return choice, [frame_of(row) for row in choice.kept]
        say(f"{len(gone)} frames are no longer where they came from and are left out")
        lost |= gone


def _accepted(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "run"} | {"status": ACCEPTED, "duplicate_of": ""}


def _promote(store: Store, row: dict[str, str]) -> bool:
    """Store a frame that was passed over before; False where its bytes are gone or others now."""
    key = frame_key(row["sha256"], row["ext"])
    if store.exists(key):
        return True
    try:
        data = Reader(store).read(row["key"])
    except ObjectMissing:
        return False
    if sha256_bytes(data) != row["sha256"]:
        return False
    store.put(key, data)
    return True


def no_data(sources: Sequence[Source]) -> NoDataError:
    """The error for sources that hold nothing at all."""
    names = ", ".join(source.uri for source in sources)
    return NoDataError(f"there is no object under {names}", "Check the prefix, or upload frames to it.")
