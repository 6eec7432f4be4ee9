"""The split: sticky, deterministic, and without a leak.

Frames of the previous dataset keep split and group. New frames tied to frames of exactly one split join it; tied to
several, they are left out (`bridges_splits`), so that nothing moves and nothing leaks. Everything else forms new
groups, which `stratify` shares out. Ties run through new frames only: a known frame has its place already, so being
tied to it says where to go and does not bind its other neighbours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..shared.dataset import SPLITS, ManifestRow
from ..shared.progress import say
from .config import BuildConfig, Grouping
from .groups import Components, links
from .merge import Exclusions, MergedFrame
from .previous import Place, Previous
from .stratify import FRAMES, GroupSize, assign

__all__ = ["Split", "retired_frames", "split_frames"]

_GROUP_DIGITS = 12
# Order matters: where two splits turn out to be tied, the earlier one keeps its frames.
_GUARDED = ("test", "val", "train")
_BIT = {split: np.uint8(1 << index) for index, split in enumerate(_GUARDED)}


@dataclass(frozen=True)
class Split:
    """The outcome of `split_frames`.

    Attributes:
        rows: the dataset, ordered by sha256.
        dropped_boxes: reason → boxes that val and test may not hold though their frame stays.
    """

    rows: tuple[ManifestRow, ...]
    dropped_boxes: dict[str, int]


def split_frames(frames: Sequence[MergedFrame], previous: Previous, config: BuildConfig, excluded: Exclusions) -> Split:
    """Give every frame its split and group, or a reason why it is left out.

    Args:
        frames: sound frames, each sha256 once.
        previous: decisions to keep.
        config: ratios, seed and grouping.
        excluded: where frames that are left out are recorded.
    """
    frames = sorted(frames, key=lambda frame: frame.sha256)
    known: list[MergedFrame] = []
    new: list[MergedFrame] = []
    for frame in frames:
        if frame.sha256 in previous.leaked:
            excluded.add("leak", frame.sha256, "taken out of a split before")
        else:
            (known if frame.sha256 in previous.places else new).append(frame)
    places = {frame.sha256: previous.places[frame.sha256] for frame in known}
    known = _without_leaks(known, places, config.grouping, excluded)
    joined, fresh = _join(known, new, places, config.grouping, excluded)
    settled = {frame.sha256: places[frame.sha256] for frame in known} | joined
    taken = {place.group for place in (*previous.places.values(), *previous.leaked.values())}
    settled |= _place_fresh(fresh, settled, frames, config, taken)
    say(f"{len(known)} frames keep their split, {len(joined)} join one, {len(fresh)} groups are new")
    return _rows(frames, settled, excluded)


def retired_frames(previous: Previous, rows: Iterable[ManifestRow], excluded: Exclusions) -> dict[str, dict[str, str]]:
    """What the next build must remember of frames that are in no split now but were: sha256 → split, group, reason."""
    here = {row.sha256 for row in rows}
    leaked = {sha256 for sha256, _ in excluded.frames.get("leak", [])} | set(previous.leaked)
    gone = {**previous.places, **previous.leaked}
    return {
        sha256: {
            "split": gone[sha256].split,
            "group": gone[sha256].group,
            "reason": "leak" if sha256 in leaked else "absent",
        }
        for sha256 in sorted(set(gone) - here)
    }


def _without_leaks(
    known: Sequence[MergedFrame], places: Mapping[str, Place], grouping: Grouping, excluded: Exclusions
) -> list[MergedFrame]:
    """Known frames less those tied to a split that is guarded more; ordered by split, then sha256.

    Only changed parameters or a changed source can tie frames that an earlier build told apart, so one pass is usual.
    """

    def order(frame: MergedFrame) -> tuple[int, str]:
        return _GUARDED.index(places[frame.sha256].split), frame.sha256

    kept = sorted(known, key=order)
    while True:
        own = np.array([_BIT[places[frame.sha256].split] for frame in kept], dtype=np.uint8)
        tied = own.copy()
        for one, others in links(kept, grouping):
            tied[one] |= np.bitwise_or.reduce(own[others])
            tied[others] |= own[one]
        for split in _GUARDED[:2]:
            out = ((tied & _BIT[split]) > 0) & (own > _BIT[split])
            if out.any():
                break
        else:
            return kept
        for frame in (frame for frame, gone in zip(kept, out, strict=True) if gone):
            excluded.add("leak", frame.sha256, f"was in {places[frame.sha256].split}, is tied to {split}")
        kept = [frame for frame, gone in zip(kept, out, strict=True) if not gone]


def _join(
    known: Sequence[MergedFrame],
    new: Sequence[MergedFrame],
    places: Mapping[str, Place],
    grouping: Grouping,
    excluded: Exclusions,
) -> tuple[dict[str, Place], list[list[MergedFrame]]]:
    """Tie new frames to known ones; the places of those that join a split, and the groups that are all new."""
    frames, first = [*known, *new], len(known)
    parts = Components(len(frames))
    touched: dict[int, set[Place]] = {}
    for one, others in links(frames, grouping, since=first):
        beside, old = others[others >= first], others[others < first]
        if one < first:
            for index in beside:
                touched.setdefault(int(index), set()).add(places[frames[one].sha256])
        else:
            parts.join(one, beside)
            touched.setdefault(one, set()).update(places[frames[index].sha256] for index in old)
    joined: dict[str, Place] = {}
    fresh: list[list[MergedFrame]] = []
    for members in parts.sets():
        if members[0] < first:
            continue
        near = set().union(*(touched.get(index, set()) for index in members))
        splits = sorted({place.split for place in near})
        if not near:
            fresh.append([frames[index] for index in members])
        elif len(splits) == 1:
            place = min(near, key=lambda place: place.group)
            joined.update({frames[index].sha256: place for index in members})
        else:
            for index in members:
                excluded.add("bridges_splits", frames[index].sha256, f"its group is tied to {' and '.join(splits)}")
    return joined, fresh


def _place_fresh(
    fresh: Sequence[Sequence[MergedFrame]],
    settled: Mapping[str, Place],
    frames: Sequence[MergedFrame],
    config: BuildConfig,
    taken: set[str],
) -> dict[str, Place]:
    """Share out new groups; one that people labelled nothing of goes to train."""
    named = {_group_id(members, taken): members for members in fresh}
    sizes = [GroupSize(group, _size(members)) for group, members in named.items()]
    have = {split: Counter[str]() for split in SPLITS}
    for frame in frames:
        if frame.sha256 in settled:
            have[settled[frame.sha256].split].update(_size([frame]))
    chosen = assign([item for item in sizes if item.sizes[FRAMES]], have, config.ratios, config.seed)
    return {
        frame.sha256: Place(chosen.get(group, "train"), group) for group, members in named.items() for frame in members
    }


def _group_id(members: Sequence[MergedFrame], taken: set[str]) -> str:
    """First digits of the smallest sha256; of the next one where an older group has that name already."""
    names = (sha256[:_GROUP_DIGITS] for sha256 in sorted(frame.sha256 for frame in members))
    group = next((name for name in names if name not in taken), "") or min(frame.sha256 for frame in members)
    taken.add(group)
    return group


def _size(members: Iterable[MergedFrame]) -> Counter[str]:
    sizes = Counter[str]({FRAMES: 0})
    for frame in members:
        if frame.human:
            sizes[FRAMES] += 1
            sizes.update(box.class_name for box in frame.human.boxes)
    return sizes


def _rows(frames: Sequence[MergedFrame], settled: Mapping[str, Place], excluded: Exclusions) -> Split:
    """The manifest's rows: all of a frame in train, only what people labelled and cover in val and test."""
    rows, dropped = [], Counter[str]()
    for frame in frames:
        place = settled.get(frame.sha256)
        if place is None:
            continue
        row = frame.row if place.split == "train" else frame.human
        if row is None:
            by_person = frame.row.origin != "machine"
            excluded.add(f"uncovered_in_{place.split}" if by_person else f"machine_in_{place.split}", frame.sha256)
            continue
        dropped[f"machine_or_uncovered_in_{place.split}"] += len(frame.row.boxes) - len(row.boxes)
        rows.append(replace(row, split=place.split, group=place.group))
    ordered = sorted(rows, key=lambda row: row.sha256)
    return Split(tuple(ordered), {reason: count for reason, count in sorted(dropped.items()) if count})
