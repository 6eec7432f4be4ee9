"""What `haechi review` does: open a workdir's store (or the one that the environment names), list the queue, answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from haechi.components.label.review import ReviewTask, accept_proposals, answer, frame_bytes, list_tasks
from haechi.components.shared.drawing import draw_boxes
from haechi.components.shared.errors import InputError
from haechi.components.shared.files import write_bytes
from haechi.components.shared.images import decode, encode_jpeg
from haechi.components.shared.settings import Settings
from haechi.components.shared.storage import Store

from .services import running, services

__all__ = ["answer_task", "list_open"]


@contextmanager
def _store(workdir: Path) -> Iterator[Store]:
    settings = Settings.from_env()
    if settings.s3_endpoint and not running(workdir):
        yield Store(settings)
        return
    with services(workdir) as started:
        yield Store(started.settings())


def list_open(workdir: Path, images: Path | None) -> list[dict[str, Any]]:
    """The open tasks as plain rows, most uncertain first; with `images`, each frame drawn into that folder."""
    with _store(workdir) as store:
        tasks = list_tasks(store)
        for task in tasks if images else ():
            assert images is not None  # noqa: S101 - for the type checker
            _draw(store, task, images)
    return [_row(task) for task in tasks]


def answer_task(workdir: Path, sha256: str, reviewer: str, boxes: str, accept: bool = False) -> dict[str, Any]:
    """Answer one task.

    Args:
        workdir: whose services to use.
        sha256: the frame's hash or the beginning of it, unique among the open tasks.
        reviewer: name that stays with the labels.
        boxes: JSON list of `{"class", "box"}`; ignored with `accept`.
        accept: take the proposals as they are.

    Raises:
        InputError: no such task, an ambiguous beginning, or boxes that cannot be.
    """
    with _store(workdir) as store:
        full = _full_hash(list_tasks(store, include_answered=True), sha256)
        done = accept_proposals(store, full, reviewer) if accept else answer(store, full, _boxes(boxes), reviewer)
    return {"sha256": full, "reviewer": done.reviewer, "boxes": len(done.boxes), "covers": list(done.covers)}


def _boxes(text: str) -> list[dict[str, Any]]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputError(
            f"--boxes is not JSON ({error})", 'Write [{"class": "fire", "box": [x1, y1, x2, y2]}].'
        ) from error
    if not isinstance(value, list):
        raise InputError("--boxes is not a list", 'Write [{"class": "fire", "box": [x1, y1, x2, y2]}].')
    return value


def _full_hash(tasks: list[ReviewTask], beginning: str) -> str:
    found = [task.sha256 for task in tasks if task.sha256.startswith(beginning)]
    if len(found) != 1:
        what = "no task" if not found else f"{len(found)} tasks"
        raise InputError(f"{what} in the review queue begins with {beginning!r}", "See `haechi review list`.")
    return found[0]


def _row(task: ReviewTask) -> dict[str, Any]:
    return {
        "sha256": task.sha256,
        "priority": round(task.priority, 3),
        "reason": task.reason,
        "camera": task.frame.camera,
        "captured_at": task.frame.captured_at.isoformat() if task.frame.captured_at else "",
        "key": task.frame.key,
        "teacher": task.teacher,
        "classes": list(task.classes),
        "proposals": [
            {"class": box.class_name, "score": round(box.score, 4), "box": [box.x1, box.y1, box.x2, box.y2]}
            for box in task.proposals
        ],
    }


def _draw(store: Store, task: ReviewTask, folder: Path) -> None:
    labels = [(f"{box.class_name} {box.score:.2f}", (box.x1, box.y1, box.x2, box.y2)) for box in task.proposals]
    picture = draw_boxes(decode(frame_bytes(store, task)), labels)
    write_bytes(folder / f"{task.sha256[:12]}.jpg", encode_jpeg(picture))
