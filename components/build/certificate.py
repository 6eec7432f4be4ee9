"""The certificate of a dataset: that nothing leaks between its splits, and what would have leaked otherwise.

The check starts from the finished manifest and shares no code with the split: plain sets for groups and sequences,
sorted times for bursts, and every pair of frames from two splits for near-duplicates.
"""

from __future__ import annotations

import random
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..shared.dataset import SPLITS, ManifestRow
from ..shared.errors import IntegrityError
from ..shared.images import NearDuplicates
from .config import BuildConfig, Grouping

__all__ = ["DRAWS", "certify", "random_split_leak"]

DRAWS = 20
_BLOCK = 256  # frames of one split compared with all of another at a time: 40 MB for 20,000 frames
_PAIRS = 65_536  # pairs whose 16×16 means are compared at a time


def certify(rows: Sequence[ManifestRow], config: BuildConfig) -> dict[str, Any]:
    """Check a manifest and measure what its grouping prevents.

    Args:
        rows: the manifest as read back from its file.
        config: ratios, seed and limits that it was built with.

    Returns:
        The content of certificate.json.

    Raises:
        IntegrityError: a frame twice, or a group, sequence, burst or near-duplicate pair in two splits.
    """
    pairs, across = _near_pairs_across(rows, config.grouping)
    found = {
        "frames_twice": len(rows) - len({row.sha256 for row in rows}),
        "groups_straddling": _straddling((row.group, row.split) for row in rows),
        "sequences_straddling": _straddling((row.sequence, row.split) for row in rows if row.sequence),
        "bursts_straddling": _bursts_straddling(rows, config.grouping.burst_gap_s),
        "near_duplicates_across": across,
    }
    broken = {name: count for name, count in found.items() if count}
    if broken:
        raise IntegrityError(
            f"the dataset would leak between its splits: {broken}",
            "Nothing was written. Report this with the previous dataset's digest; it is a defect of the split.",
        )
    groups = {split: len({row.group for row in rows if row.split == split}) for split in SPLITS}
    neighbours = _Neighbours(rows, config.grouping)
    return {
        "format": 1,
        "checked": {"frames": len(rows), "pairs_across_splits": pairs, "groups": groups, **found},
        "limits": {
            "burst_gap_s": config.grouping.burst_gap_s,
            "near_bits": config.grouping.near_bits,
            "near_levels": config.grouping.near_levels,
        },
        "random_split": random_split_leak(rows, neighbours, config),
        "imported_splits": _imported_splits(rows, neighbours),
    }


def _straddling(members: Iterable[tuple[str, str]]) -> int:
    """How many names stand with more than one split."""
    splits: dict[str, set[str]] = defaultdict(set)
    for name, split in members:
        splits[name].add(split)
    return sum(len(found) > 1 for found in splits.values())


def _bursts_straddling(rows: Sequence[ManifestRow], gap_s: float) -> int:
    cameras: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for row in rows:
        if row.camera and row.captured_at:
            cameras[row.camera].append((row.captured_at.timestamp(), row.split))
    return sum(
        later[0] - earlier[0] <= gap_s and later[1] != earlier[1]
        for moments in cameras.values()
        for earlier, later in pairwise(sorted(moments))
    )


def _near_pairs_across(rows: Sequence[ManifestRow], grouping: Grouping) -> tuple[int, int]:
    """Pairs of frames from two splits: how many there are, and how many are near-duplicates."""
    hashes = {split: np.array([row.phash for row in rows if row.split == split], dtype=np.uint64) for split in SPLITS}
    thumbs = {split: _thumbs(row for row in rows if row.split == split) for split in SPLITS}
    checked = near = 0
    for one, other in combinations(SPLITS, 2):
        checked += len(hashes[one]) * len(hashes[other])
        for start in range(0, len(hashes[other]), _BLOCK):
            block = hashes[other][start : start + _BLOCK]
            distance = np.bitwise_count(block[:, None] ^ hashes[one][None, :])
            left, right = np.nonzero(distance <= grouping.near_bits)
            for first in range(0, len(left), _PAIRS):
                part = slice(first, first + _PAIRS)
                apart = np.abs(thumbs[other][start + left[part]] - thumbs[one][right[part]]).max(axis=1, initial=0)
                near += int((apart <= grouping.near_levels).sum())
    return checked, near


def _thumbs(rows: Iterable[ManifestRow]) -> NDArray[np.int16]:
    data = b"".join(row.thumb for row in rows)
    return np.frombuffer(data, dtype=np.uint8).reshape(-1, 256).astype(np.int16)


class _Neighbours:
    """For each frame, which frames have its group, and which look like it."""

    def __init__(self, rows: Sequence[ManifestRow], grouping: Grouping) -> None:
        numbers = {name: index for index, name in enumerate(dict.fromkeys(row.group for row in rows))}
        self.group = np.array([numbers[row.group] for row in rows], dtype=np.intp)
        self._rows = rows
        self._index = NearDuplicates(grouping.near_bits, grouping.near_levels)
        for row in rows:
            self._index.add(row.signature)

    def mates(self, train: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Per frame, whether a frame of its group is in `train` (of shape (draws, frames))."""
        counts = np.zeros((len(train), len(self.group) + 1), dtype=np.intp)
        for draw, members in enumerate(train):
            np.add.at(counts[draw], self.group[members], 1)
        return counts[:, self.group] > 0

    def alike(self, train: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Per frame, whether a near-duplicate of it, not itself, is in `train` (of shape (draws, frames))."""
        found = np.zeros_like(train)
        for number, row in enumerate(self._rows):
            near = self._index.find(row.signature)
            near = near[near != number]
            if len(near):
                found[:, number] = train[:, near].any(axis=1)
        return found


def random_split_leak(rows: Sequence[ManifestRow], neighbours: _Neighbours, config: BuildConfig) -> dict[str, Any]:
    """What a split frame by frame with the same shares would have leaked, over DRAWS seeded draws.

    Frames that people labelled are drawn into train, val and test; machine-labelled ones stay in train.

    Returns:
        Mean and standard deviation of the share of test frames with a group mate, a near-duplicate, or either, in
        train; nulls where the share of test is no whole frame.
    """
    drawn = [index for index, row in enumerate(rows) if row.origin != "machine"]
    tests, vals = round(config.ratios["test"] * len(drawn)), round(config.ratios["val"] * len(drawn))
    result: dict[str, Any] = {"draws": DRAWS, "test_frames": tests}
    if not tests:
        return result | {"group_mate": None, "near_duplicate": None, "either": None}
    test = np.zeros((DRAWS, len(rows)), dtype=np.bool_)
    train = np.ones((DRAWS, len(rows)), dtype=np.bool_)
    for draw in range(DRAWS):
        order = drawn.copy()
        random.Random(f"{config.seed}:{draw}").shuffle(order)
        test[draw, order[:tests]] = True
        train[draw, order[: tests + vals]] = False
    mates, alike = neighbours.mates(train), neighbours.alike(train)
    for name, leaks in (("group_mate", mates), ("near_duplicate", alike), ("either", mates | alike)):
        shares = ((leaks & test).sum(axis=1) / tests).tolist()
        result[name] = {"mean": round(statistics.fmean(shares), 4), "sd": round(statistics.stdev(shares), 4)}
    return result


def _imported_splits(rows: Sequence[ManifestRow], neighbours: _Neighbours) -> dict[str, dict[str, dict[str, int]]]:
    """Per source and its own val and test: frames, and how many of them have a group mate or look-alike in its train."""
    result: dict[str, dict[str, dict[str, int]]] = {}
    hints = [(row.source, _usual_name(row.split_hint)) for row in rows]
    for source in sorted({source for source, hint in hints if hint == "train"}):
        train = np.array([[hint == (source, "train") for hint in hints]])
        mates, alike = neighbours.mates(train)[0], neighbours.alike(train)[0]
        for split in ("val", "test"):
            members = np.array([hint == (source, split) for hint in hints])
            if members.any():
                result.setdefault(source, {})[split] = {
                    "frames": int(members.sum()),
                    "group_mate_in_train": int((members & mates).sum()),
                    "near_duplicate_in_train": int((members & alike).sum()),
                }
    return result


def _usual_name(hint: str) -> str:
    """`valid`, `val2017` and the like by our name of the split; empty for anything else."""
    word = hint.strip().lower()
    names: Mapping[str, str] = {"train": "train", "val": "val", "test": "test"}
    return next((split for prefix, split in names.items() if word.startswith(prefix)), "")
