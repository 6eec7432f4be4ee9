"""Merge all labels exports into one row a frame, and refuse rows that are broken.

For every class the best source is taken: a person before a machine, then who covers the class (looked for all of it),
then a review before an import, then the newest. So several imports of one frame that speak of different classes add
up, and a review replaces only what it speaks of. Each frame gets two forms: all of it, for train; and the part that
people labelled and cover, which is all that val and test may hold.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import NamedTuple

from ..shared.dataset import Box, LabelExport, LabelledFrame, ManifestRow, frame_key, label_exports, read_export
from ..shared.progress import say
from ..shared.storage import Store, ordered_map

__all__ = ["Exclusions", "Merged", "MergedFrame", "Sighting", "merge", "merge_frame"]

SLACK = 1.0  # pixels that a box may overstep its image by; labelling tools round

_RANK = {"machine": 0, "import": 1, "review": 2}
_SHA256 = re.compile(r"[0-9a-f]{64}")
_THUMB_BYTES = 256
_LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)


class Sighting(NamedTuple):
    """Where one source says that a frame comes from; a frame may have several."""

    sequence: str
    camera: str
    captured_at: datetime | None


@dataclass(frozen=True)
class MergedFrame:
    """One frame with what all exports together say of it.

    Attributes:
        row: everything known, as train may have it; `export_id` lists the exports that gave it, best first.
        human: the part that people labelled, covered classes only; None where there is none.
        sightings: every sequence, camera and time that any source gives.
    """

    row: ManifestRow
    human: ManifestRow | None
    sightings: tuple[Sighting, ...]

    @property
    def sha256(self) -> str:
        """The frame's identity."""
        return self.row.sha256


@dataclass
class Exclusions:
    """Frames left out: reason → (sha256, detail) of each; nothing leaves silently."""

    frames: dict[str, list[tuple[str, str]]] = field(default_factory=lambda: defaultdict(list))

    def add(self, reason: str, sha256: str, detail: str = "") -> None:
        """Record one."""
        self.frames[reason].append((sha256, detail))

    def counts(self) -> dict[str, int]:
        """Reason → how many, reasons in alphabetical order."""
        return {reason: len(self.frames[reason]) for reason in sorted(self.frames)}


@dataclass(frozen=True)
class Merged:
    """The outcome of `merge`.

    Attributes:
        frames: sound frames, ordered by sha256.
        excluded: broken ones.
        dropped_boxes: class that is not asked for → boxes of it that were left out.
        exports: how many labels exports were read.
    """

    frames: tuple[MergedFrame, ...]
    excluded: Exclusions
    dropped_boxes: dict[str, int]
    exports: int


class _Label(NamedTuple):
    row: LabelledFrame
    export: LabelExport


def merge(store: Store, classes: Sequence[str]) -> Merged:
    """Read every labels export and merge them frame by frame.

    Args:
        store: the bucket.
        classes: class names of the dataset; boxes of others are dropped and counted.
    """
    exports = label_exports(store)
    labels: dict[str, list[_Label]] = defaultdict(list)
    pages = ordered_map(lambda export: read_export(store, export), exports, store.settings.workers)
    for export, rows in zip(exports, pages, strict=True):
        for row in rows:
            labels[row.sha256].append(_Label(row, export))
    say(f"{len(exports)} labels exports speak of {len(labels)} frames")
    present = {item.key for item in store.list("frames/")} if labels else set()
    excluded, dropped, frames = Exclusions(), Counter[str](), []
    for sha256 in sorted(labels):
        frame = merge_frame([(item.row, item.export) for item in labels[sha256]], classes)
        reason, detail = _problem(frame, present)
        if reason:
            excluded.add(reason, sha256, detail)
            continue
        dropped += _foreign_boxes([item.row for item in labels[sha256]], classes)
        frames.append(_clipped(frame))
    return Merged(tuple(frames), excluded, dict(sorted(dropped.items())), len(exports))


def merge_frame(labels: Sequence[tuple[LabelledFrame, LabelExport]], classes: Sequence[str]) -> MergedFrame:
    """Merge all labels of one frame.

    Args:
        labels: the frame's rows with the exports that hold them, in any order.
        classes: class names to keep.
    """
    ordered = sorted((_Label(*item) for item in labels), key=_precedence, reverse=True)
    human = [item for item in ordered if _is_human(item.row)]
    sightings = {Sighting(item.row.sequence, item.row.camera, item.row.captured_at) for item in ordered}
    return MergedFrame(
        row=_compose(ordered, classes, covered_only=False),
        human=_compose(human, classes, covered_only=True) if human else None,
        sightings=tuple(
            sorted(sightings, key=lambda item: (item.sequence, item.camera, item.captured_at or _LONG_AGO))
        ),
    )


def _precedence(label: _Label) -> tuple[int, datetime, str, str]:
    row, export = label
    return _RANK.get(row.origin, -1), row.labelled_at or _LONG_AGO, export.created_at, export.export_id


def _is_human(row: LabelledFrame) -> bool:
    return _RANK.get(row.origin, -1) > 0


def _names(row: LabelledFrame) -> set[str]:
    return {box.class_name for box in row.boxes}


def _foreign_boxes(rows: Iterable[LabelledFrame], classes: Sequence[str]) -> Counter[str]:
    """Boxes of classes not asked for; where several labels show the same object, it counts once."""
    counts = Counter[str]()
    for row in rows:
        counts |= Counter(box.class_name for box in row.boxes if box.class_name not in classes)
    return counts


def _compose(ordered: Sequence[_Label], classes: Sequence[str], covered_only: bool) -> ManifestRow:
    """One row from labels ordered best first: each class from the best label that speaks of it."""
    boxes: list[Box] = []
    covers: list[str] = []
    used: set[int] = set()
    for name in classes:
        index = _best(ordered, name)
        if index is None:
            continue
        row = ordered[index].row
        if name in row.covers:
            covers.append(name)
        elif covered_only:
            continue
        boxes.extend(box for box in row.boxes if box.class_name == name)
        used.add(index)
    lead = [ordered[index] for index in sorted(used)] or ordered[:1]
    first = lead[0].row
    # Camera and time from one row: mixed, they would place the frame where nobody saw it.
    placed = max((item.row for item in ordered), key=lambda row: 2 * bool(row.camera) + bool(row.captured_at))
    return ManifestRow(
        **{name: getattr(first, name) for name in ("sha256", "ext", "width", "height", "key", "source")},
        camera=placed.camera,
        captured_at=placed.captured_at,
        sequence=_first(item.row.sequence for item in ordered),
        phash=first.phash,
        thumb=first.thumb,
        boxes=tuple(boxes),
        covers=tuple(covers),
        origin=first.origin,
        decision=first.decision,
        actor=first.actor,
        split_hint=_first(item.row.split_hint for item in ordered),
        labelled_at=first.labelled_at,
        split="",
        export_id=" ".join(dict.fromkeys(item.export.export_id for item in lead)),
    )


def _best(ordered: Sequence[_Label], name: str) -> int | None:
    """Index of the label to take the class from: people first, then who covers it, then the order given."""
    speakers = [
        (not _is_human(item.row), name not in item.row.covers, index)
        for index, item in enumerate(ordered)
        if name in item.row.covers or name in _names(item.row)
    ]
    return min(speakers)[2] if speakers else None


def _first(values: Iterable[str]) -> str:
    return next((value for value in values if value), "")


def _problem(frame: MergedFrame, present: set[str]) -> tuple[str, str]:
    """Reason and detail why a frame cannot be used; two empty strings where it can."""
    row = frame.row
    if not _SHA256.fullmatch(row.sha256):
        return "bad_sha256", repr(row.sha256)
    if frame_key(row.sha256, row.ext) not in present:
        return "frame_missing", frame_key(row.sha256, row.ext)
    if row.width < 1 or row.height < 1:
        return "bad_size", f"{row.width}x{row.height}"
    if len(row.thumb) != _THUMB_BYTES:
        return "no_signature", f"thumb has {len(row.thumb)} bytes"
    if row.origin not in _RANK:
        return "unknown_origin", repr(row.origin)
    # One box that cannot be trusted spoils the frame: leaving only the box out would teach that nothing is there.
    for box in (*row.boxes, *(frame.human.boxes if frame.human else ())):
        reason = _box_problem(box, row.width, row.height)
        if reason:
            return reason, f"{box.class_name} {box.x1:g},{box.y1:g},{box.x2:g},{box.y2:g}"
    if not row.covers and not row.boxes:
        return "no_class", "no label speaks of any class asked for"
    return "", ""


def _box_problem(box: Box, width: int, height: int) -> str:
    corners = (box.x1, box.y1, box.x2, box.y2)
    if not all(math.isfinite(value) for value in (*corners, box.score)):
        return "box_not_finite"
    if min(corners) < -SLACK or max(box.x1, box.x2) > width + SLACK or max(box.y1, box.y2) > height + SLACK:
        return "box_outside"
    inside = _clip(box, width, height)
    return "" if inside.x2 > inside.x1 and inside.y2 > inside.y1 else "box_empty"


def _clip(box: Box, width: int, height: int) -> Box:
    def within(value: float, upper: int) -> float:
        return min(max(value, 0.0), float(upper))

    return replace(
        box,
        x1=within(box.x1, width),
        y1=within(box.y1, height),
        x2=within(box.x2, width),
        y2=within(box.y2, height),
    )


def _clipped(frame: MergedFrame) -> MergedFrame:
    def clip(row: ManifestRow) -> ManifestRow:
        return replace(row, boxes=tuple(_clip(box, row.width, row.height) for box in row.boxes))

    human = clip(frame.human) if frame.human and frame.human.covers else None
    return replace(frame, row=clip(frame.row), human=human)
