"""Label: collect what people reviewed, let the teacher propose, and decide accept, review or background.

The order makes a killed run harmless: answers are exported before they are deleted, machine labels before tasks are
queued, and a repeated run meets what it finds done. What it reports is read from that state and not counted on the
way, so that a run which was killed and repeated reports the same as one that was not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from ..shared.dataset import Frame, LabelledFrame, read_rows, write_export
from ..shared.files import check_classes, write_json
from ..shared.model_folder import model_cache
from ..shared.progress import Progress, say
from ..shared.settings import Settings
from ..shared.storage import Store, ordered_map
from .bands import Decision, decide
from .collect import Exported, close_finished, collect, read_exported
from .parameters import UNLIMITED, Band, check_review_limit, parse_bands
from .tasks import ReviewTask, answered, open_frames, put_task, read_tasks, to_millis
from .teacher import Teacher, load_teacher, propose

__all__ = ["LabelResult", "label"]

_NO_TEACHER = Decision("review", reason="no teacher", priority=1.0)


@dataclass(frozen=True)
class LabelResult:
    """What a run did to the frames that it was given, and how the queue stands.

    Attributes:
        exports: ids of the exports that it wrote.
        accepted: frames labelled with boxes by the machine.
        background: frames that the machine labelled as empty.
        review: doubtful frames whose task is open.
        waiting: doubtful frames for which the queue has no room; a later run takes them up.
        reviewed: answers collected.
        pending: open tasks of the whole queue.
        teacher: model version, or empty.
    """

    exports: tuple[str, ...]
    accepted: int
    review: int
    background: int
    reviewed: int
    pending: int
    waiting: int
    teacher: str

    def metadata(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self) | {"exports": list(self.exports)}


def label(
    frames: Path,
    name: str,
    champion: str,
    teacher: str,
    classes: Sequence[str],
    class_map: Mapping[str, str],
    bands: Mapping[str, Any],
    review_limit: int,
    out: Path,
    settings: Settings,
    now: datetime | None = None,
) -> LabelResult:
    """Label the frames of `frames/frames.parquet`.

    Args:
        frames: the artifact of ingest.
        name, champion: registered model and its version, the teacher where `teacher` is empty; may be empty.
        teacher: model folder as path, `file://` or `s3://`. With no champion either, people label everything.
        classes: our classes, ordered; reviewers are asked about all of them.
        class_map: teacher's class name → ours; classes of the same name need no entry.
        bands: `{"default": [low, high], "<class>": [low, high]}`, see `bands.py`.
        review_limit: open review tasks at most; -1 for no limit.
        out: folder that `label.json` is written to.
        settings: object store, cache, workers and threads.
        now: time of the labels, default the present.

    Raises:
        InputError: a parameter that cannot be used; nothing was changed.
        IntegrityError, ModelError, StorageError: frames, an answer, the teacher or the store are unusable.
    """
    moment = to_millis(now or datetime.now(UTC))
    check_classes(classes)
    check_review_limit(review_limit)
    limits = parse_bands(bands, classes)
    rows = list({row.sha256: row for row in read_rows(frames / "frames.parquet", Frame)}.values())
    store = Store(settings)
    store.check()
    with model_cache(settings) as cache:
        guide = load_teacher(store, name, champion, teacher, classes, class_map, cache)
        collected = collect(store, moment)
        exported = read_exported(store)
        close_finished(store, exported)
        work = _Work(store, guide, tuple(classes), limits, int(review_limit), moment)
        exported |= work.run([row for row in rows if row.sha256 not in exported])
    result = _result(store, {row.sha256 for row in rows}, collected, exported, guide)
    write_json(out / "label.json", result.metadata())
    say(
        f"labelled: {result.accepted} accepted, {result.background} background, {result.review} in review, "
        f"{result.waiting} waiting, {result.reviewed} reviewed"
    )
    return result


@dataclass(frozen=True)
class _Work:
    """One run's labelling, once its parameters are checked."""

    store: Store
    teacher: Teacher | None
    classes: tuple[str, ...]
    bands: dict[str, Band]
    review_limit: int
    now: datetime

    def run(self, rows: Sequence[Frame]) -> dict[str, Exported]:
        """Decide the frames, write the machine's labels, then queue what is doubtful; the frames that got labels."""
        tasks = {task.sha256: task for task in read_tasks(self.store)}
        settled = answered(self.store) | {sha256 for sha256, task in tasks.items() if self._stands(task)}
        machine: list[LabelledFrame] = []
        doubtful: list[ReviewTask] = []
        for frame, decision in self._decide([row for row in rows if row.sha256 not in settled]):
            if decision.kind == "review":
                doubtful.append(self._task(frame, decision))
            else:
                machine.append(self._labelled(frame, decision))
        exported = self._export(machine)
        self._queue(doubtful, tasks)
        return exported

    def _stands(self, task: ReviewTask) -> bool:
        """Whether an open task stays as it is: without a newer teacher or other classes, asking again is the same."""
        same_teacher = self.teacher is None or task.teacher == self.teacher.model.version
        return same_teacher and task.classes == self.classes

    def _decide(self, frames: Sequence[Frame]) -> Iterator[tuple[Frame, Decision]]:
        if self.teacher is None:
            yield from ((frame, _NO_TEACHER) for frame in frames)
            return
        progress = Progress("frames looked at by the teacher", len(frames))
        least = min(self.bands[name].low for name in self.teacher.covers)
        for frame, boxes in propose(self.store, self.teacher, frames, least, self.store.settings.threads):
            progress.step()
            yield frame, decide(boxes, self.bands, frame.width, frame.height)
        progress.close()

    def _task(self, frame: Frame, decision: Decision) -> ReviewTask:
        return ReviewTask(
            frame=frame,
            classes=self.classes,
            proposals=decision.boxes,
            covers=self.teacher.covers if self.teacher else (),
            teacher=self.teacher.model.version if self.teacher else "",
            reason=decision.reason,
            priority=decision.priority,
            queued_at=self.now,
        )

    def _labelled(self, frame: Frame, decision: Decision) -> LabelledFrame:
        assert self.teacher is not None  # noqa: S101 - without one every decision is `review`
        return LabelledFrame(
            **{field: getattr(frame, field) for field in Frame.__dataclass_fields__},
            boxes=decision.boxes,
            covers=self.teacher.covers,
            origin="machine",
            decision="accepted" if decision.kind == "accept" else "background",
            actor=self.teacher.actor,
        )

    def _export(self, rows: Sequence[LabelledFrame]) -> dict[str, Exported]:
        if not rows or self.teacher is None:
            return {}
        info = {
            "teacher": self.teacher.model.version,
            "teacher_uri": self.teacher.uri,
            "covers": list(self.teacher.covers),
            "bands": {name: [band.low, band.high] for name, band in self.bands.items()},
        }
        export = write_export(self.store, "machine", rows, info, self.now)
        labelled = {row.sha256: Exported(export.export_id, "machine", row.decision) for row in rows}
        close_finished(self.store, labelled)
        return labelled

    def _queue(self, doubtful: Sequence[ReviewTask], tasks: Mapping[str, ReviewTask]) -> None:
        """Write tasks: those that are open already keep their place, new ones fill the room that is left."""
        again = [task for task in doubtful if task.sha256 in tasks]
        fresh = sorted(
            (task for task in doubtful if task.sha256 not in tasks), key=lambda task: (-task.priority, task.sha256)
        )
        if self.review_limit != UNLIMITED:
            fresh = fresh[: max(0, self.review_limit - len(open_frames(self.store)))]
        for _ in ordered_map(partial(put_task, self.store), [*again, *fresh], self.store.settings.workers):
            pass


def _result(
    store: Store, given: set[str], collected: frozenset[str], exported: Mapping[str, Exported], teacher: Teacher | None
) -> LabelResult:
    """Read off the state what became of the given frames and of the collected answers."""
    labelled = {sha256: exported[sha256] for sha256 in given | collected if sha256 in exported}
    own = {sha256: item for sha256, item in labelled.items() if item.kind != "import"}
    decisions = Counter(item.decision for item in own.values())
    asked = open_frames(store)
    return LabelResult(
        exports=tuple(sorted({item.export_id for item in own.values()})),
        accepted=decisions["accepted"],
        review=len(given & asked - set(exported)),
        background=decisions["background"],
        reviewed=decisions["reviewed"],
        pending=len(asked),
        waiting=len(given - set(exported) - asked - answered(store)),
        teacher=teacher.model.version if teacher else "",
    )
