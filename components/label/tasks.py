"""Review tasks and answers as objects: `review/queue/<sha256>.json` and `review/answers/<sha256>.json`.

Both hold the whole frame row, so that either of them alone is enough to write the reviewed label. Their fields are
described in this folder's README.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from ..shared.dataset import Box, Frame, LabelledFrame
from ..shared.errors import IntegrityError
from ..shared.storage import ObjectMissing, Store, ordered_map

__all__ = [
    "ANSWERS",
    "QUEUE",
    "ReviewAnswer",
    "ReviewTask",
    "answer_key",
    "answered",
    "open_frames",
    "parse_answer",
    "put_answer",
    "put_task",
    "read_task",
    "read_tasks",
    "task_key",
    "to_millis",
]

QUEUE = "review/queue/"
ANSWERS = "review/answers/"
FORMAT_VERSION = 1
_MAX_TEXT = 4096
_NUMBERS = ("x1", "y1", "x2", "y2", "score")

_Object = TypeVar("_Object")


@dataclass(frozen=True)
class ReviewTask:
    """A frame on which a person is asked.

    Attributes:
        frame: the frame.
        classes: all classes that the reviewer is asked about, ordered; the answer covers them.
        proposals: the teacher's boxes; none where there was no teacher.
        covers: the classes that the teacher could speak of.
        teacher: its model version, or empty.
        reason: why a person is asked.
        priority: 0 to 1, the most uncertain first.
        queued_at: when, UTC.
    """

    frame: Frame
    classes: tuple[str, ...]
    proposals: tuple[Box, ...]
    covers: tuple[str, ...]
    teacher: str
    reason: str
    priority: float
    queued_at: datetime

    @property
    def sha256(self) -> str:
        """The frame's identity."""
        return self.frame.sha256


@dataclass(frozen=True)
class ReviewAnswer:
    """What a person says of a frame.

    Attributes:
        frame: the frame.
        boxes: its objects; none means that no covered class is there.
        covers: the classes that the answer speaks of.
        reviewer: who answered.
        answered_at: when, UTC; becomes `labelled_at`.
        teacher: version of the model whose proposals were shown, or empty.
    """

    frame: Frame
    boxes: tuple[Box, ...]
    covers: tuple[str, ...]
    reviewer: str
    answered_at: datetime
    teacher: str = ""

    def labelled(self) -> LabelledFrame:
        """The row for a labels export."""
        return LabelledFrame(
            **{name: getattr(self.frame, name) for name in Frame.__dataclass_fields__},
            boxes=self.boxes,
            covers=self.covers,
            origin="review",
            decision="reviewed",
            actor=self.reviewer,
            labelled_at=self.answered_at,
        )


def task_key(sha256: str) -> str:
    """Object key of a task."""
    return f"{QUEUE}{sha256}.json"


def answer_key(sha256: str) -> str:
    """Object key of an answer."""
    return f"{ANSWERS}{sha256}.json"


def to_millis(moment: datetime) -> datetime:
    """The moment in UTC, cut to milliseconds as the tables keep it."""
    moment = moment.astimezone(UTC)
    return moment.replace(microsecond=moment.microsecond // 1000 * 1000)


def answered(store: Store) -> set[str]:
    """The frames that have an answer which no run has collected yet."""
    return {_sha256(item.key) for item in store.list(ANSWERS)}


def open_frames(store: Store) -> set[str]:
    """The frames whose task has no answer."""
    return {_sha256(item.key) for item in store.list(QUEUE)} - answered(store)


def put_task(store: Store, task: ReviewTask) -> None:
    """Write (or replace) a task."""
    store.put_json(task_key(task.sha256), _plain(task, "queued_at", task.queued_at))


def put_answer(store: Store, answer: ReviewAnswer) -> None:
    """Write (or replace) an answer."""
    store.put_json(answer_key(answer.frame.sha256), _plain(answer, "answered_at", answer.answered_at))


def read_task(store: Store, sha256: str) -> ReviewTask | None:
    """One task, or None where the frame is not queued."""
    key = task_key(sha256)
    try:
        data = store.get(key)
    except ObjectMissing:
        return None
    return _parsed(store.uri(key), data, _task)


def read_tasks(store: Store) -> list[ReviewTask]:
    """All tasks of the queue, answered or not, in the order of their hashes."""
    names = (_sha256(item.key) for item in store.list(QUEUE))
    found = ordered_map(lambda sha256: read_task(store, sha256), names, store.settings.workers)
    return [task for task in found if task is not None]


def parse_answer(where: str, data: bytes) -> ReviewAnswer:
    """Read an answer's bytes.

    Raises:
        IntegrityError: not such an object; the message names `where`.
    """
    return _parsed(where, data, _answer)


def _sha256(key: str) -> str:
    return key.rsplit("/", 1)[-1].removesuffix(".json")


def _plain(item: ReviewTask | ReviewAnswer, moment: str, when: datetime) -> dict[str, Any]:
    frame = asdict(item.frame) | {
        # 64 bits do not survive a reader whose numbers are doubles (a browser).
        "phash": f"{item.frame.phash:016x}",
        "thumb": base64.b64encode(item.frame.thumb).decode(),
        "captured_at": item.frame.captured_at.isoformat() if item.frame.captured_at else None,
    }
    return {
        "format_version": FORMAT_VERSION,
        **asdict(item),
        "frame": frame,
        moment: when.isoformat(timespec="milliseconds"),
    }


def _parsed(where: str, data: bytes, parse: Callable[[dict[str, Any]], _Object]) -> _Object:
    try:
        entry = json.loads(data)
        if entry["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format_version is {entry['format_version']!r}, not {FORMAT_VERSION}")
        return parse(entry)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise IntegrityError(
            f"{where} is not a review object ({type(error).__name__}: {error})",
            "Answer that frame again with `haechi review answer`, or remove the object.",
        ) from error


def _task(entry: dict[str, Any]) -> ReviewTask:
    return ReviewTask(
        frame=_frame(entry["frame"]),
        classes=_names(entry["classes"]),
        proposals=tuple(_box(box) for box in entry["proposals"]),
        covers=_names(entry["covers"]),
        teacher=_text(entry["teacher"]),
        reason=_text(entry["reason"]),
        priority=float(entry["priority"]),
        queued_at=datetime.fromisoformat(entry["queued_at"]),
    )


def _answer(entry: dict[str, Any]) -> ReviewAnswer:
    return ReviewAnswer(
        frame=_frame(entry["frame"]),
        boxes=tuple(_box(box) for box in entry["boxes"]),
        covers=_names(entry["covers"]),
        reviewer=_text(entry["reviewer"]),
        answered_at=to_millis(datetime.fromisoformat(entry["answered_at"])),
        teacher=_text(entry["teacher"]),
    )


def _text(value: Any) -> str:
    # Anyone who may answer writes these objects: what is no text or number would only break the table of the export.
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        raise ValueError(f"{str(value)[:40]!r} is not a text of at most {_MAX_TEXT} characters")
    return value


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{str(value)[:40]!r} is not a list of names")
    return tuple(_text(name) for name in value)


def _box(entry: dict[str, Any]) -> Box:
    texts = {name: _text(value) for name, value in entry.items() if name not in _NUMBERS}
    numbers = {name: float(entry[name]) for name in _NUMBERS if name in entry}
    if not all(math.isfinite(value) for value in numbers.values()):
        raise ValueError(f"the box {numbers} has a number that is not finite")
    return Box(**texts, **numbers)  # type: ignore[arg-type]


def _frame(entry: dict[str, Any]) -> Frame:
    taken = entry["captured_at"]
    plain = entry | {
        "phash": int(entry["phash"], 16),
        "thumb": base64.b64decode(entry["thumb"], validate=True),
        "captured_at": datetime.fromisoformat(taken) if taken else None,
    }
    frame = Frame(**plain)
    for name in ("sha256", "ext", "key", "source", "camera", "sequence"):
        _text(getattr(frame, name))
    if not (isinstance(frame.width, int) and isinstance(frame.height, int) and min(frame.width, frame.height) > 0):
        raise ValueError(f"the frame is {frame.width!r} by {frame.height!r} pixels")
    if not 0 <= frame.phash < 2**64:
        raise ValueError("phash has more than 64 bits")
    return frame
