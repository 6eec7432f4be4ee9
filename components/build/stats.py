"""The statistics of a dataset: frames, boxes and groups per split and class, what was left out, and plain warnings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..shared.dataset import SPLITS, ManifestRow
from .config import BuildConfig
from .merge import Exclusions

__all__ = ["statistics_of"]

_LISTED = 100  # excluded frames named per reason; the counts are of all


def statistics_of(
    digest: str,
    rows: Sequence[ManifestRow],
    config: BuildConfig,
    excluded: Exclusions,
    dropped_boxes: Mapping[str, Any],
    retired: Mapping[str, Mapping[str, str]],
) -> dict[str, Any]:
    """The content of stats.json.

    Args:
        digest: the dataset's.
        rows: its manifest.
        config: what was asked for.
        excluded: frames left out.
        dropped_boxes: boxes left out of frames that stay, by reason.
        retired: frames that the next build must remember (see `split.retired_frames`).
    """
    parts = {split: [row for row in rows if row.split == split] for split in SPLITS}
    classes = {name: {split: _of_class(part, name) for split, part in parts.items()} for name in config.classes}
    frames = {split: len(part) for split, part in parts.items()}
    return {
        "format": 1,
        "name": config.name,
        "digest": digest,
        "previous_dataset": config.previous_dataset,
        "ratios": dict(config.ratios),
        "seed": config.seed,
        "grouping": asdict(config.grouping),
        "frames": frames,
        "groups": {split: len({row.group for row in part}) for split, part in parts.items()},
        "largest_group": {split: _largest_group(part) for split, part in parts.items()},
        "background_frames": {split: sum(not row.boxes for row in part) for split, part in parts.items()},
        "origins": {split: dict(sorted(Counter(row.origin for row in part).items())) for split, part in parts.items()},
        "classes": classes,
        "excluded": excluded.counts(),
        "excluded_frames": {
            reason: [{"sha256": sha256, "detail": detail} for sha256, detail in sorted(items)[:_LISTED]]
            for reason, items in sorted(excluded.frames.items())
        },
        "dropped_boxes": dict(dropped_boxes),
        "notes": _notes(frames, classes),
        "retired": {sha256: dict(entry) for sha256, entry in sorted(retired.items())},
    }


def _of_class(rows: Sequence[ManifestRow], name: str) -> dict[str, int]:
    """`covered` frames are those in which the class, where no box is, is known to be absent."""
    having = [row for row in rows if any(box.class_name == name for box in row.boxes)]
    return {
        "boxes": sum(box.class_name == name for row in having for box in row.boxes),
        "frames": len(having),
        "covered": sum(name in row.covers for row in rows),
        "groups": len({row.group for row in having}),
    }


def _largest_group(rows: Sequence[ManifestRow]) -> int:
    return max(Counter(row.group for row in rows).values(), default=0)


def _notes(frames: Mapping[str, int], classes: Mapping[str, Mapping[str, Mapping[str, int]]]) -> list[str]:
    """What a person should know before trusting figures that are measured on this dataset."""
    notes = [
        f"{split} is empty: too few groups that people labelled, or its ratio is 0"
        for split in ("val", "test")
        if not frames[split]
    ]
    for name, splits in classes.items():
        groups = sum(part["groups"] for part in splits.values())
        if not groups:
            notes.append(f"class {name!r} has no box at all")
            continue
        notes += [
            f"class {name!r} has no box in {split}; {groups} group{'s' if groups > 1 else ''} in all have it"
            for split in SPLITS
            if frames[split] and not splits[split]["boxes"]
        ]
    return notes
