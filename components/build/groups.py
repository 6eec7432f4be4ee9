"""What ties frames together: one sequence, one camera's burst, or looks; as a stream of links, and their components.

A link ties a frame to some others. Not all pairs are listed, only enough that connected components come out right.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ..shared.images import NearDuplicates
from ..shared.progress import Progress
from .config import Grouping
from .merge import MergedFrame

__all__ = ["Components", "links"]

Indices = NDArray[np.intp]


def links(frames: Sequence[MergedFrame], grouping: Grouping, since: int = 0) -> Iterator[tuple[int, Indices]]:
    """All ties between frames.

    Args:
        frames: the frames; a tie of a sequence runs to its first frame here.
        grouping: what counts as a tie.
        since: leave out near-duplicate pairs whose both frames stand before this index.

    Yields:
        Index of a frame, and indices of frames that it is tied to.
    """
    yield from _sequences(frames)
    yield from _bursts(frames, grouping.burst_gap_s)
    yield from _near_duplicates(frames, grouping, since)


def _sequences(frames: Sequence[MergedFrame]) -> Iterator[tuple[int, Indices]]:
    members: dict[str, list[int]] = defaultdict(list)
    for index, frame in enumerate(frames):
        for name in {sighting.sequence for sighting in frame.sightings if sighting.sequence}:
            members[name].append(index)
    for first, *rest in members.values():
        if rest:
            yield first, np.array(rest, dtype=np.intp)


def _bursts(frames: Sequence[MergedFrame], gap_s: float) -> Iterator[tuple[int, Indices]]:
    """Neighbours in one camera's time order; a burst is a chain of them."""
    moments: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for index, frame in enumerate(frames):
        for sighting in frame.sightings:
            if sighting.camera and sighting.captured_at:
                moments[sighting.camera].append((sighting.captured_at.timestamp(), index))
    for chain in moments.values():
        chain.sort()
        for (before, one), (after, other) in pairwise(chain):
            if after - before <= gap_s and one != other:
                yield one, np.array([other], dtype=np.intp)


def _near_duplicates(frames: Sequence[MergedFrame], grouping: Grouping, since: int) -> Iterator[tuple[int, Indices]]:
    index = NearDuplicates(grouping.near_bits, grouping.near_levels)
    progress = Progress("frames compared", len(frames))
    for number, frame in enumerate(frames):
        look = frame.row.signature
        if number >= since:
            near = index.find(look)
            if len(near):
                yield number, near
        index.add(look)
        progress.step()


class Components:
    """Connected components of `size` frames (union-find that keeps every frame's root, merging small into large).

    Keeping roots exact lets thousands of links of one frame be joined by a single array operation.
    """

    def __init__(self, size: int) -> None:
        self._root: Indices = np.arange(size, dtype=np.intp)
        self._members = [[index] for index in range(size)]

    def join(self, one: int, others: Indices) -> None:
        """Put `one` and all `others` into one component."""
        for root in np.unique(self._root[others]):
            self._merge(int(self._root[one]), int(root))

    def sets(self) -> list[list[int]]:
        """The components, each sorted, ordered by their first member."""
        alive = [sorted(self._members[root]) for root in np.unique(self._root)]
        return sorted(alive)

    def _merge(self, one: int, other: int) -> None:
        if one == other:
            return
        if len(self._members[one]) < len(self._members[other]):
            one, other = other, one
        self._root[self._members[other]] = one
        self._members[one].extend(self._members[other])
        self._members[other] = []
