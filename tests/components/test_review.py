"""Reviewing: the queue's order, what an answer may hold, and the objects that carry both."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from label_world import CLASSES, NOW, World, painted

from haechi.components.label.review import ReviewAnswer, accept_proposals, answer, frame_bytes, list_tasks
from haechi.components.label.tasks import ReviewTask, parse_answer, put_answer, put_task, read_task, to_millis
from haechi.components.shared.dataset import Box, Frame, frame_key
from haechi.components.shared.errors import InputError, IntegrityError
from haechi.components.shared.storage import Store

SHA = "ab" * 32
FRAME = Frame(
    SHA, "jpg", 200, 100, "s3://raw/gate/a.jpg", "gate", "문", NOW, "walk.mp4", phash=2**64 - 3, thumb=bytes(range(256))
)
PROPOSALS = (
    Box("person", 10, 10, 50, 90, 0.5, "machine", "model:abc"),
    Box("dog", 100, 50, 150, 100, 0.4, "machine", "model:abc"),
)
TASK = ReviewTask(FRAME, tuple(CLASSES), PROPOSALS, ("person",), "abc", "person 0.50 is in its band", 0.75, NOW)


@pytest.fixture
def queued(store: Store) -> Store:
    """A bucket with TASK in its queue."""
    put_task(store, TASK)
    return store


def stored_answer(store: Store) -> ReviewAnswer:
    return parse_answer("the answer", store.get(f"review/answers/{SHA}.json"))


# the objects ------------------------------------------------------------------------------------------------------


def test_a_task_comes_back_as_it_was_written(queued: Store) -> None:
    assert read_task(queued, SHA) == TASK
    assert read_task(queued, "cd" * 32) is None
    nothing_known = replace(TASK, frame=replace(FRAME, captured_at=None, thumb=b"", phash=0), proposals=(), teacher="")
    put_task(queued, nothing_known)
    assert read_task(queued, SHA) == nothing_known


def test_a_task_is_json_that_a_browser_reads_without_loss(queued: Store) -> None:
    entry = queued.get_json(f"review/queue/{SHA}.json")
    assert list(entry) == ["format_version", *TASK.__dataclass_fields__]
    assert (entry["frame"]["phash"], entry["frame"]["captured_at"]) == (
        "fffffffffffffffd",
        "2026-03-01T12:00:00.250000+00:00",
    )
    assert entry["proposals"][0] == asdict(PROPOSALS[0])
    assert entry["queued_at"] == "2026-03-01T12:00:00.250+00:00"


def test_an_answer_comes_back_as_it_was_written(store: Store) -> None:
    given = ReviewAnswer(
        FRAME, (Box("dog", 1.25, 2.5, 3.125, 4.0, 1.0, "review", "minji"),), ("dog",), "minji", NOW, "abc"
    )
    put_answer(store, given)
    assert stored_answer(store) == given


def test_moments_are_utc_milliseconds() -> None:
    moment = datetime(2026, 1, 1, 9, 0, 0, 123_999, tzinfo=timezone(timedelta(hours=9)))
    assert to_millis(moment) == datetime(2026, 1, 1, 0, 0, 0, 123_000, tzinfo=UTC)


@pytest.mark.parametrize("content", [b"", b"null", b"7", b'{"format_version": 1}', b"\xff\xfe"])
def test_a_task_that_cannot_be_read_is_named(store: Store, content: bytes) -> None:
    store.put(f"review/queue/{SHA}.json", content)
    with pytest.raises(IntegrityError, match=f"review/queue/{SHA}"):
        list_tasks(store)


# the list ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("boxes.0.x1", "left"),
        ("boxes.0.x1", float("nan")),
        ("boxes.0.score", float("inf")),
        ("boxes.0.class_name", 3),
        ("boxes.0.class_name", "x" * 5000),
        ("boxes.0.origin", {"a": 1}),
        ("covers", "abc"),
        ("covers", [1]),
        ("reviewer", {"a": 1}),
        ("reviewer", "x" * 5000),
        ("frame.width", 0),
        ("frame.height", "tall"),
        ("frame.ext", 3),
        ("frame.phash", "f" * 40),
        ("answered_at", "soon"),
    ],
)
def test_an_answer_with_a_value_that_no_table_takes_is_named(queued: Store, path: str, value: object) -> None:
    answer(queued, SHA, [{"class": "person", "box": [1, 2, 30, 40]}], "minji")
    entry = queued.get_json(f"review/answers/{SHA}.json")
    *way, last = path.split(".")
    place = entry
    for step in way:
        place = place[int(step) if step.isdigit() else step]
    place[last] = value
    with pytest.raises(IntegrityError, match=r"the answer is not a review object"):
        parse_answer("the answer", json.dumps(entry).encode())


def test_an_answer_nested_without_end_is_named() -> None:
    with pytest.raises(IntegrityError, match=r"the answer is not a review object"):
        parse_answer("the answer", b"[" * 100_000)


def test_tasks_are_listed_most_uncertain_first_without_the_answered(store: Store) -> None:
    for digit, priority in (("1", 0.2), ("2", 0.9), ("3", 0.2), ("4", 1.0)):
        put_task(store, replace(TASK, frame=replace(FRAME, sha256=digit * 64), priority=priority))
    assert [task.sha256[0] for task in list_tasks(store)] == ["4", "2", "1", "3"]
    answer(store, "4" * 64, [], "minji")
    assert [task.sha256[0] for task in list_tasks(store)] == ["2", "1", "3"]
    assert [task.sha256[0] for task in list_tasks(store, include_answered=True)] == ["4", "2", "1", "3"]


def test_an_empty_queue_lists_nothing(store: Store) -> None:
    assert list_tasks(store) == []


def test_the_picture_of_a_task_is_checked(store: Store, tmp_path: Path) -> None:
    world, data = World(store, tmp_path), painted((0, 0.5))
    row = world.frames({"a": data})["a"]
    world.label()
    (task,) = list_tasks(store)
    assert frame_bytes(store, task) == data
    store.put(frame_key(row.sha256, row.ext), b"other bytes")
    with pytest.raises(IntegrityError, match=row.sha256):
        frame_bytes(store, task)


# answers ----------------------------------------------------------------------------------------------------------


def test_boxes_are_signed_and_unmoved_proposals_keep_their_parent(queued: Store) -> None:
    boxes = [
        Box("person", 10.5, 10, 50, 90, 0.5, "machine", "someone"),  # IoU 0.9875 with the proposal
        Box("person", 14, 10, 50, 90),  # IoU 0.9
        Box("dog", 10, 10, 50, 90),  # the person's place, another class
        {"class": "dog", "box": [100, 50, 150, 100]},
    ]
    given = answer(queued, SHA, boxes, " minji ", now=NOW)
    assert [(box.score, box.origin, box.actor, box.parent) for box in given.boxes] == [
        (1.0, "review", "minji", "abc"),
        (1.0, "review", "minji", ""),
        (1.0, "review", "minji", ""),
        (1.0, "review", "minji", "abc"),
    ]
    assert (given.covers, given.reviewer, given.answered_at, given.teacher) == (tuple(CLASSES), "minji", NOW, "abc")
    assert stored_answer(queued) == given


def test_accepting_takes_all_proposals_for_all_classes(queued: Store) -> None:
    given = accept_proposals(queued, SHA, "minji", NOW)
    assert [(box.class_name, box.parent) for box in given.boxes] == [("person", "abc"), ("dog", "abc")]
    assert given.covers == tuple(CLASSES)


def test_proposals_of_nobody_cannot_be_accepted(store: Store) -> None:
    put_task(store, replace(TASK, proposals=(), teacher=""))
    with pytest.raises(InputError, match="no teacher"):
        accept_proposals(store, SHA, "minji")
    assert answer(store, SHA, [], "minji").boxes == ()


def test_the_newest_answer_wins(queued: Store) -> None:
    answer(queued, SHA, [], "minji", now=NOW)
    second = answer(queued, SHA, [Box("dog", 0, 0, 10, 10)], "junho", now=NOW + timedelta(seconds=1))
    assert stored_answer(queued) == second


def test_an_answer_may_speak_of_some_classes_only(queued: Store) -> None:
    assert answer(queued, SHA, [Box("dog", 0, 0, 10, 10)], "minji", covers=["dog"]).covers == ("dog",)
    with pytest.raises(InputError, match="person"):
        answer(queued, SHA, [Box("person", 0, 0, 10, 10)], "minji", covers=["dog"])


def test_boxes_that_round_over_the_edge_are_clipped(queued: Store) -> None:
    (box,) = answer(queued, SHA, [Box("dog", -0.4, 0, 200.4, 100.5)], "minji").boxes
    assert (box.x1, box.y1, box.x2, box.y2) == (0, 0, 200, 100)


@pytest.mark.parametrize(
    ("box", "named"),
    [
        (Box("cat", 0, 0, 10, 10), "'cat'"),
        (Box("dog", 0, 0, 0, 10), "no area"),
        (Box("dog", 10, 0, 5, 10), "no area"),
        (Box("dog", 200.2, 0, 200.4, 10), "no area"),
        (Box("dog", 0, 0, 201, 10), "200x100"),
        (Box("dog", -1, 0, 20, 10), "200x100"),
        (Box("dog", float("nan"), 0, 20, 10), "finite"),
        (Box("dog", 0, 0, float("inf"), 10), "finite"),
        ({"class": "dog"}, "box 1"),
        ({"class": "dog", "box": [1, 2, 3]}, "box 1"),
        ({"class": "dog", "box": "abcd"}, "box 1"),
        ({"box": [1, 2, 3, 4]}, "box 1"),
        ("dog", "box 1"),
    ],
)
def test_impossible_boxes_are_named_and_nothing_is_written(queued: Store, box: Any, named: str) -> None:
    with pytest.raises(InputError) as caught:
        answer(queued, SHA, [Box("person", 0, 0, 10, 10), box], "minji")
    assert named in caught.value.problem
    assert "box 1" in caught.value.problem
    assert not queued.exists(f"review/answers/{SHA}.json")


@pytest.mark.parametrize(
    ("sha256", "reviewer", "covers", "named"),
    [("cd" * 32, "minji", None, "cd" * 32), (SHA, "  ", None, "reviewer"), (SHA, "minji", ["cat"], "'cat'")],
)
def test_an_answer_to_nothing_or_by_nobody_is_refused(
    queued: Store, sha256: str, reviewer: str, covers: list[str] | None, named: str
) -> None:
    with pytest.raises(InputError, match=named):
        answer(queued, sha256, [], reviewer, covers)
    assert list(queued.list("review/answers/")) == []


def test_an_answer_is_plain_json(queued: Store) -> None:
    answer(queued, SHA, [Box("dog", 0, 0, 10, 10)], "민지", now=NOW)
    entry = json.loads(queued.get(f"review/answers/{SHA}.json"))
    assert (entry["reviewer"], entry["answered_at"]) == ("민지", "2026-03-01T12:00:00.250+00:00")
