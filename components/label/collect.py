"""Collecting review answers into one labels export, so that neither a kill nor a late answer loses anything.

The export is written first, the collected objects are deleted after it. A run that was killed in between finds its
answers in an export already and only deletes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from ..shared.dataset import LabelledFrame, label_exports, read_export, write_export
from ..shared.errors import IntegrityError
from ..shared.storage import ObjectMissing, Store, ordered_map
from .tasks import ANSWERS, ReviewAnswer, answer_key, open_frames, parse_answer, task_key

__all__ = ["Exported", "FoundAnswer", "clear", "close_finished", "collect", "find_answers", "read_exported"]


@dataclass(frozen=True)
class Exported:
    """Where a frame is labelled already.

    Attributes:
        export_id: the newest export that decides: a review before a machine's label, that before an import.
        kind: `review`, `machine` or `import`.
        decision: as in LabelledFrame.
    """

    export_id: str
    kind: str
    decision: str


_RANK = {"import": 0, "machine": 1, "review": 2}


@dataclass(frozen=True)
class FoundAnswer:
    """An answer with the very bytes that were read, by which a later change is seen."""

    data: bytes
    answer: ReviewAnswer

    @property
    def sha256(self) -> str:
        """The frame."""
        return self.answer.frame.sha256


def collect(store: Store, now: datetime) -> frozenset[str]:
    """Turn all answers into one export of kind `review`, then delete them and their tasks.

    Returns:
        The frames whose answers were collected.

    Raises:
        IntegrityError: an answer that cannot be read; nothing was collected.
    """
    found = find_answers(store)
    fresh = _not_exported(store, [item.answer.labelled() for item in found])
    if fresh:
        write_export(store, "review", fresh, {"reviewers": sorted({row.actor for row in fresh})}, now)
    clear(store, found)
    return frozenset(item.sha256 for item in found)


def find_answers(store: Store) -> list[FoundAnswer]:
    """Read every answer, in the order of the frames' hashes."""
    keys = (item.key for item in store.list(ANSWERS))
    return [item for item in ordered_map(lambda key: _read(store, key), keys, store.settings.workers) if item]


def _read(store: Store, key: str) -> FoundAnswer | None:
    try:
        data = store.get(key)
    except ObjectMissing:
        return None  # collected by a run beside this one
    found = FoundAnswer(data, parse_answer(store.uri(key), data))
    if answer_key(found.sha256) != key:
        raise IntegrityError(
            f"{store.uri(key)} speaks of frame {found.sha256}", "Rename or remove that object; its name is its frame."
        )
    return found


def _not_exported(store: Store, rows: Sequence[LabelledFrame]) -> list[LabelledFrame]:
    """The rows that no review export holds yet, word for word and of the same moment."""
    known = {
        _content(row)
        for export in (label_exports(store) if rows else [])
        if export.kind == "review"
        for row in read_export(store, export)
    }
    return [row for row in rows if _content(row) not in known]


def _content(row: LabelledFrame) -> tuple[object, ...]:
    return row.sha256, row.boxes, row.covers, row.actor, row.labelled_at


def clear(store: Store, found: Iterable[FoundAnswer]) -> None:
    """Delete collected answers and their tasks; an answer that changed since it was read stays for the next run.

    S3 has no conditional delete here, so an answer that arrives within the milliseconds between the last look and
    the delete is the one thing that this cannot see.
    """
    for _ in ordered_map(lambda item: _clear_one(store, item), found, store.settings.workers):
        pass


def _clear_one(store: Store, item: FoundAnswer) -> None:
    # The task goes first: an answer without a task is whole, a task without its answer would be asked again.
    if _unchanged(store, item):
        store.remove(task_key(item.sha256))
    if _unchanged(store, item):
        store.remove(answer_key(item.sha256))


def _unchanged(store: Store, item: FoundAnswer) -> bool:
    try:
        return store.get(answer_key(item.sha256)) == item.data
    except ObjectMissing:
        return False


def read_exported(store: Store) -> dict[str, Exported]:
    """For every frame in any labels export: which one decides."""
    found: dict[str, Exported] = {}
    for export in label_exports(store):
        for row in read_export(store, export):
            before = found.get(row.sha256)
            if before is None or _RANK[export.kind] >= _RANK[before.kind]:
                found[row.sha256] = Exported(export.export_id, export.kind, row.decision)
    return found


def close_finished(store: Store, exported: dict[str, Exported]) -> None:
    """Delete tasks whose frame a machine or a person has labelled meanwhile, and that have no answer.

    A killed run leaves such tasks, and so does a newer teacher that is sure where the older one was not.
    """
    for sha256 in sorted(open_frames(store)):
        if sha256 in exported and exported[sha256].kind != "import":
            store.remove(task_key(sha256))
