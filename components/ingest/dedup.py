"""Which of the frames seen are kept: a pure function of what was seen, never of when.

Labelled frames come first, then all others in key order; a frame is kept unless it equals one before it: the same bytes
anywhere, or nearly the same look from the same camera. Across cameras nearly equal frames stay: two dark corridors look
the same and are not the same place, and `build` keeps such pairs within one split anyway. Frames without a camera name
count as one camera, so naming cameras keeps more.

Runs that overlap judge with what each of them knows; `choose` judges again with all that is known, so that it does not
matter who came first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from ..shared.images import NearDuplicates, Signature
from .state import QUARANTINED, Entry

__all__ = ["Choice", "Kept", "Known", "choose"]


@dataclass(frozen=True)
class Known:
    """A frame as far as duplicates need it."""

    sha256: str
    camera: str
    signature: Signature


class Kept:
    """The frames kept so far, and the question whether another equals one of them."""

    def __init__(self, known: Iterable[Known] = ()) -> None:
        self._shas: set[str] = set()
        self._near: dict[str, tuple[NearDuplicates, list[str]]] = {}
        for frame in known:
            self.add(frame)

    def add(self, frame: Known) -> None:
        """Keep a frame."""
        if frame.sha256 in self._shas:
            return
        self._shas.add(frame.sha256)
        index, names = self._near.setdefault(frame.camera, (NearDuplicates(), []))
        index.add(frame.signature)
        names.append(frame.sha256)

    def equal_of(self, frame: Known) -> str:
        """SHA-256 of the kept frame that this one equals (its own for the same bytes), or empty."""
        if frame.sha256 in self._shas:
            return frame.sha256
        if frame.camera not in self._near:
            return ""
        index, names = self._near[frame.camera]
        found = index.find(frame.signature)
        return names[found[0]] if len(found) else ""


@dataclass
class Choice:
    """What `choose` found: the kept rows in key order, and what became of the objects of one run."""

    kept: list[dict[str, Any]] = field(default_factory=list)
    accepted: int = 0
    duplicates: int = 0
    quarantined: int = 0
    reasons: Counter[str] = field(default_factory=Counter)


def choose(
    entries: Iterable[Entry], labelled: Iterable[Known], run: str, lost: Collection[str] = frozenset()
) -> tuple[Choice, Kept]:
    """Judge all that was seen.

    Args:
        entries: the union of the state, in key order.
        labelled: frames that are in a labels export.
        run: the run whose objects are counted.
        lost: SHA-256 of frames whose bytes exist nowhere any more.

    Returns:
        The choice, and the index of all kept frames (labelled ones included).
    """
    choice, index = Choice(), Kept(labelled)
    for entry in entries:
        row, mine = entry.row, run in entry.runs
        if row["status"] == QUARANTINED:
            choice.quarantined += mine
            choice.reasons.update([row["reason"]] * mine)
            continue
        frame = Known(row["sha256"], row["camera"], Signature(row["phash"], row["thumb"]))
        if row["sha256"] in lost or index.equal_of(frame):
            choice.duplicates += mine
            continue
        index.add(frame)
        choice.kept.append(row)
        choice.accepted += mine
    return choice, index
