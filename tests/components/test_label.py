"""The label step: bands, teachers, the review queue, and what survives a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from subprocess import PIPE
from typing import Any

import numpy as np
import pytest
from label_world import CLASSES, NOW, World, painted, put_frame, snapshot

from haechi.components.label.bands import decide
from haechi.components.label.collect import clear, find_answers
from haechi.components.label.parameters import Band, parse_bands
from haechi.components.label.review import accept_proposals, answer, list_tasks
from haechi.components.label.step import LabelResult
from haechi.components.label.teacher import Teacher, map_classes, translate
from haechi.components.shared.dataset import (
    Box,
    LabelledFrame,
    exported_frames,
    frame_key,
    label_exports,
    read_export,
    write_export,
)
from haechi.components.shared.detections import Detections
from haechi.components.shared.errors import (
    HaechiError,
    InputError,
    IntegrityError,
    ModelError,
    SettingsError,
    StorageError,
)
from haechi.components.shared.files import read_json, sha256_bytes
from haechi.components.shared.model_folder import ModelFolder
from haechi.components.shared.settings import Settings
from haechi.components.shared.storage import ObjectMissing, Store


@pytest.fixture
def world(store: Store, tmp_path: Path) -> World:
    return World(store, tmp_path)


def box(name: str, score: float, x1: float = 0, y1: float = 0, x2: float = 10, y2: float = 10) -> Box:
    return Box(name, x1, y1, x2, y2, score)


# bands ------------------------------------------------------------------------------------------------------------

_LIMITS = {"person": Band(0.2, 0.6), "dog": Band(0.5, 0.9)}


@pytest.mark.parametrize(
    ("boxes", "kind", "kept", "priority"),
    [
        ([], "background", 0, 0.0),
        ([box("person", 0.19)], "background", 0, 0.0),
        ([box("person", 0.6)], "accept", 1, 0.0),
        ([box("person", 0.2)], "review", 1, 0.0),
        ([box("person", 0.4)], "review", 1, 1.0),
        ([box("person", 0.5)], "review", 1, 0.5),
        ([box("person", 0.9), box("person", 0.1, 50, 50, 60, 60)], "accept", 1, 0.0),
        ([box("person", 0.9), box("dog", 0.8, 50, 50, 60, 60)], "review", 2, 0.5),
        ([box("person", 0.7), box("dog", 0.95, 1, 0, 10, 10)], "review", 2, 1.0),  # two classes at one place, IoU 0.9
        ([box("person", 0.7), box("dog", 0.95, 5, 0, 15, 10)], "accept", 2, 0.0),  # IoU 1/3
        ([box("person", 0.7), box("person", 0.8, 1, 0, 10, 10)], "accept", 2, 0.0),
        ([box("person", 0.7), box("dog", 0.4, 1, 0, 10, 10)], "accept", 1, 0.0),  # the other is below its band
        ([box("person", 0.9, 0, 0, 100, 99)], "review", 1, 1.0),
        ([box("person", 0.9, 0, 0, 100, 98)], "accept", 1, 0.0),
    ],
)
def test_bands_decide_a_frame(boxes: list[Box], kind: str, kept: int, priority: float) -> None:
    decision = decide(boxes, _LIMITS, 100, 100)
    assert (decision.kind, len(decision.boxes)) == (kind, kept)
    assert decision.priority == pytest.approx(priority)
    assert bool(decision.reason) == (kind == "review")


def test_reasons_name_the_most_uncertain_box_first() -> None:
    decision = decide([box("person", 0.55), box("dog", 0.7, 50, 50, 60, 60)], _LIMITS, 100, 100)
    assert decision.reason == "dog 0.70 is in its band; person 0.55 is in its band"


@pytest.mark.parametrize(
    ("bands", "named"),
    [
        ({}, "'default'"),
        ({"person": [0.1, 0.2]}, "'dog'"),
        ({"default": [0.1, 0.2], "cat": [0.1, 0.2]}, "'cat'"),
        ({"default": [0.6, 0.2]}, "[0.6, 0.2]"),
        ({"default": [-0.1, 0.2]}, "'default'"),
        ({"default": [0.1, 1.2]}, "'default'"),
        ({"default": [0.1, float("nan")]}, "nan"),
        ({"default": [0.1]}, "[0.1]"),
        ({"default": 0.1}, "0.1"),
        ({"default": ["a", "b"]}, "['a', 'b']"),
        ({"default": [0.1, 0.2], "dog": [True, True]}, "'dog'"),
    ],
)
def test_bad_bands_are_named(bands: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_bands(bands, CLASSES)
    assert named in caught.value.problem
    assert caught.value.remedy


def test_a_class_without_a_band_of_its_own_takes_the_default() -> None:
    assert parse_bands({"default": [0, 1], "dog": [0.5, 0.5]}, CLASSES) == {"person": Band(0, 1), "dog": Band(0.5, 0.5)}


# class mapping ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("theirs", "class_map", "names"),
    [
        (["dog", "person"], {}, {0: "dog", 1: "person"}),
        (["cat", "person"], {}, {1: "person"}),
        (["human", "hound"], {"human": "person", "hound": "dog"}, {0: "person", 1: "dog"}),
        (["human", "person"], {"human": "person"}, {0: "person", 1: "person"}),
        (["dog", "person"], {"dog": ""}, {1: "person"}),
        (["dog", "person"], {"dog": "person", "person": "dog", "absent": "dog"}, {0: "person", 1: "dog"}),
    ],
)
def test_teacher_classes_map_by_name(theirs: list[str], class_map: dict[str, str], names: dict[int, str]) -> None:
    assert map_classes(theirs, CLASSES, class_map) == names


@pytest.mark.parametrize(
    ("class_map", "named"),
    [({}, ["cat, bird", "person, dog"]), ({"cat": "lion"}, ["'lion'"]), ({"cat": ""}, ["cat, bird"])],
)
def test_a_teacher_that_cannot_speak_of_our_classes_is_refused(class_map: dict[str, str], named: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        map_classes(["cat", "bird"], CLASSES, class_map)
    assert all(text in caught.value.problem for text in named)


def test_boxes_of_classes_that_became_one_are_merged_and_slivers_dropped(tmp_path: Path) -> None:
    model = ModelFolder("t", "abc", ("car", "truck", "cat"), 320, 32, {}, 0.7, "")
    teacher = Teacher(model, tmp_path, "", {0: "vehicle", 1: "vehicle"}, ("vehicle",))
    found = Detections(
        np.array([[0, 0, 50, 50], [1, 0, 50, 50], [80, 0, 99, 50], [0, 0, 50, 50], [5, 5, 5.4, 50]], np.float32),
        np.array([0.9, 0.8, 0.7, 0.6, 0.5], np.float32),
        np.array([0, 1, 1, 2, 0]),
    )
    proposed = translate(found, teacher)
    assert [(item.class_name, item.x1, item.score, item.actor) for item in proposed] == [
        ("vehicle", 0.0, 0.9, "model:abc"),
        ("vehicle", 80.0, 0.7, "model:abc"),
    ]


# a run ------------------------------------------------------------------------------------------------------------


def test_a_run_accepts_passes_and_asks(world: World) -> None:
    model, teacher = world.teacher()
    rows = world.frames(
        {
            "sure": painted((0, 0.9), (1, 0.8)),
            "empty": painted(),
            "unsure": painted((0, 0.9), (1, 0.5)),
            "most unsure": painted((0, 0.4)),
        }
    )
    result = world.label(teacher=teacher)

    (export,) = label_exports(world.store)
    assert result == LabelResult((export.export_id,), 1, 2, 1, 0, 2, 0, model.version)
    assert read_json(world.folder / "labels" / "label.json") == result.metadata()
    assert json.loads(json.dumps(result.metadata())) == result.metadata()

    labelled = {row.sha256: row for row in read_export(world.store, export)}
    assert set(labelled) == {rows["sure"].sha256, rows["empty"].sha256}
    sure, empty = labelled[rows["sure"].sha256], labelled[rows["empty"].sha256]
    assert (sure.origin, sure.decision, sure.actor) == ("machine", "accepted", f"model:{model.version}")
    assert (sure.covers, sure.labelled_at, sure.captured_at) == (tuple(CLASSES), NOW, rows["sure"].captured_at)
    assert [(b.class_name, b.x1, b.y1, b.x2, b.y2) for b in sure.boxes] == [
        ("person", 0, 0, 32, 32),
        ("dog", 32, 32, 64, 64),
    ]
    assert [b.score for b in sure.boxes] == pytest.approx([0.9, 0.8], abs=0.006)
    assert {(b.origin, b.actor) for b in sure.boxes} == {("machine", f"model:{model.version}")}
    assert (empty.decision, empty.boxes) == ("background", ())
    assert (export.kind, export.info["teacher"], export.info["covers"]) == ("machine", model.version, CLASSES)

    first, second = list_tasks(world.store)
    assert (first.sha256, second.sha256) == (rows["most unsure"].sha256, rows["unsure"].sha256)
    assert first.frame == rows["most unsure"]
    assert (first.classes, first.teacher, first.queued_at) == (tuple(CLASSES), model.version, NOW)
    assert first.reason == "person 0.40 is in its band"
    assert first.priority > 0.97 > 0.55 > second.priority > 0.45
    assert [item.class_name for item in second.proposals] == ["person", "dog"]


def test_a_teacher_covers_only_what_it_can_speak_of(world: World) -> None:
    _, teacher = world.teacher(classes=["cat", "hound"])
    world.frames({"hound": painted((1, 0.9)), "cat": painted((0, 0.9))})
    result = world.label(teacher=teacher, class_map={"hound": "dog"})
    assert (result.accepted, result.background) == (1, 1)
    assert {row.covers for row in exported_frames(world.store)} == {("dog",)}


def test_the_champion_is_the_teacher_where_none_is_given_and_is_fetched_once(world: World) -> None:
    model, folder = world.teacher()
    world.store.put_folder(f"models/gate/{model.version}/", Path(folder), "model.json")
    world.frames({"sure": painted((0, 0.9))})
    settings = replace(world.settings, cache_dir=str(world.folder / "cache"))
    result = world.label(champion=model.version, settings=settings)
    assert (result.accepted, result.teacher) == (1, model.version)
    cached = world.folder / "cache" / "models" / world.store.bucket / "models" / "gate" / model.version
    assert ModelFolder.load(cached) == model


def test_without_a_teacher_people_are_asked_up_to_the_limit(world: World) -> None:
    rows = world.frames({str(i): painted(ground=i) for i in range(5)})
    result = world.label(review_limit=3)
    assert (result.exports, result.review, result.waiting, result.pending, result.teacher) == ((), 3, 2, 3, "")
    tasks = list_tasks(world.store)
    assert [task.sha256 for task in tasks] == sorted(row.sha256 for row in rows.values())[:3]
    assert {(task.reason, task.proposals, task.teacher) for task in tasks} == {("no teacher", (), "")}


def test_the_most_uncertain_take_the_room_and_the_rest_wait_for_an_answer(world: World) -> None:
    _, teacher = world.teacher()
    scores = {"a": 0.40, "b": 0.45, "c": 0.50, "d": 0.25}
    rows = world.frames({name: painted((0, score)) for name, score in scores.items()})
    result = world.label(teacher=teacher, review_limit=2)
    assert (result.review, result.waiting, result.pending) == (2, 2, 2)
    assert [task.sha256 for task in list_tasks(world.store)] == [rows["a"].sha256, rows["b"].sha256]

    accept_proposals(world.store, rows["a"].sha256, "minji", NOW)
    result = world.label(teacher=teacher, review_limit=2)
    assert (result.reviewed, result.review, result.waiting, result.pending) == (1, 2, 1, 2)
    assert [task.sha256 for task in list_tasks(world.store)] == [rows["b"].sha256, rows["c"].sha256]
    assert world.label(teacher=teacher, review_limit=0).pending == 2, "an open task is not taken back"


def test_running_again_changes_nothing_and_reports_the_same(world: World) -> None:
    _, teacher = world.teacher()
    rows = world.frames({"sure": painted((0, 0.9)), "unsure": painted((0, 0.4)), "asked": painted((0, 0.35))})
    world.label(teacher=teacher)
    answer(world.store, rows["asked"].sha256, [], "minji", now=NOW)
    first = world.label(teacher=teacher)
    before = snapshot(world.store)
    assert world.label(teacher=teacher, now=NOW + timedelta(hours=1)) == first
    assert snapshot(world.store) == before
    assert (first.accepted, first.review, first.reviewed, len(first.exports)) == (1, 1, 1, 2)


def test_an_open_task_stands_until_a_newer_teacher_or_other_classes_come(world: World) -> None:
    old, old_path = world.teacher(0.5)
    new, new_path = world.teacher(0.6)
    rows = world.frames({"stays unsure": painted((0, 0.45)), "gets sure": painted((0, 0.55))})
    world.label(teacher=old_path)
    assert {task.teacher for task in list_tasks(world.store)} == {old.version}

    later = NOW + timedelta(days=1)
    assert world.label(now=later).review == 2, "without a teacher nothing is proposed anew"
    assert {(task.teacher, task.queued_at) for task in list_tasks(world.store)} == {(old.version, NOW)}

    result = world.label(teacher=new_path, now=later)
    assert (result.accepted, result.review, result.pending) == (1, 1, 1)
    (task,) = list_tasks(world.store)
    assert (task.sha256, task.teacher, task.queued_at) == (rows["stays unsure"].sha256, new.version, later)

    wider = [*CLASSES, "package"]
    world.label(teacher=new_path, classes=wider, now=later)
    assert list_tasks(world.store)[0].classes == tuple(wider)


def test_a_frame_labelled_elsewhere_meanwhile_is_left_out(world: World) -> None:
    _, teacher = world.teacher()
    rows = world.frames({"imported": painted((0, 0.9)), "new": painted((1, 0.9))})
    theirs = LabelledFrame(**vars(rows["imported"]), covers=("person",))
    write_export(world.store, "import", [theirs], {}, NOW)
    result = world.label(teacher=teacher)
    assert (result.accepted, len(result.exports)) == (1, 1)
    assert [row.sha256 for row in exported_frames(world.store) if row.origin == "machine"] == [rows["new"].sha256]


def test_no_frames_at_all_is_a_run_of_zeros(world: World) -> None:
    world.write([])
    assert world.label() == LabelResult((), 0, 0, 0, 0, 0, 0, "")
    assert snapshot(world.store) == {}


# answers ----------------------------------------------------------------------------------------------------------


def test_answers_become_one_review_export_and_leave_the_queue(world: World) -> None:
    model, teacher = world.teacher()
    rows = world.frames({"a": painted((0, 0.4)), "b": painted((0, 0.35)), "c": painted((0, 0.3))})
    world.label(teacher=teacher)
    accept_proposals(world.store, rows["a"].sha256, "minji", NOW)
    answer(world.store, rows["b"].sha256, [Box("dog", 5, 5, 50, 60)], "junho", now=NOW + timedelta(minutes=1))

    result = world.label(teacher=teacher, now=NOW + timedelta(hours=1))
    assert (result.reviewed, result.pending, len(result.exports)) == (2, 1, 1)
    (export,) = label_exports(world.store)
    assert (export.kind, export.info["reviewers"]) == ("review", ["junho", "minji"])
    labelled = {row.sha256: row for row in read_export(world.store, export)}
    accepted, drawn = labelled[rows["a"].sha256], labelled[rows["b"].sha256]
    assert (accepted.origin, accepted.decision, accepted.actor) == ("review", "reviewed", "minji")
    assert (accepted.covers, accepted.labelled_at) == (tuple(CLASSES), NOW)
    assert (accepted.boxes[0].parent, drawn.boxes[0].parent) == (model.version, "")
    assert (drawn.labelled_at, drawn.boxes) == (
        NOW + timedelta(minutes=1),
        (Box("dog", 5, 5, 50, 60, 1.0, "review", "junho"),),
    )
    assert drawn.signature == rows["b"].signature
    assert [item.key for item in world.store.list("review/")] == [f"review/queue/{rows['c'].sha256}.json"]


def test_an_answer_that_changes_while_it_is_collected_is_kept_for_the_next_run(world: World) -> None:
    rows = world.frames({"a": painted(), "b": painted((0, 1))})
    world.label()
    for row in rows.values():
        answer(world.store, row.sha256, [], "minji", now=NOW)
    found = find_answers(world.store)
    late = [Box("person", 0, 0, 32, 32)]
    answer(world.store, rows["b"].sha256, late, "minji", now=NOW + timedelta(seconds=9))
    clear(world.store, found)
    assert [item.sha256 for item in find_answers(world.store)] == [rows["b"].sha256]
    world.label()
    (row,) = list(exported_frames(world.store))
    assert (row.sha256, len(row.boxes)) == (rows["b"].sha256, 1)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b'{"format_version": 9}', b'{"format_version": 1, "frame": {}}'],
)
def test_an_answer_that_cannot_be_read_is_named_and_nothing_is_lost(world: World, content: bytes) -> None:
    rows = world.frames({"a": painted(), "b": painted((0, 1))})
    world.label()
    answer(world.store, rows["a"].sha256, [], "minji", now=NOW)
    key = f"review/answers/{rows['b'].sha256}.json"
    world.store.put(key, content)
    before = snapshot(world.store)
    with pytest.raises(IntegrityError, match=key):
        world.label()
    assert snapshot(world.store) == before


# bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"classes": []}, InputError, "classes"),
        ({"classes": ["person", "person"]}, InputError, "classes"),
        ({"review_limit": -2}, InputError, "review_limit"),
        ({"bands": {}}, InputError, "bands"),
        ({"teacher": "weights/yolo11n.pt"}, InputError, "haechi export"),
        ({"teacher": "ftp://models/x"}, InputError, "ftp://models/x"),
        ({"teacher": "/nowhere/at/all"}, ModelError, "/nowhere/at/all"),
        ({"champion": "0123456789ab"}, ModelError, "models/gate/0123456789ab"),
        ({"class_map": {"person": "lion"}, "teacher": "TEACHER"}, InputError, "lion"),
        ({"classes": ["fire"], "teacher": "TEACHER"}, InputError, "person, dog"),
    ],
)
def test_bad_parameters_are_named_and_change_nothing(
    world: World, changes: dict[str, Any], error: type[HaechiError], named: str
) -> None:
    rows = world.frames({"a": painted((0, 0.4))})
    world.label()
    answer(world.store, rows["a"].sha256, [], "minji", now=NOW)
    before = snapshot(world.store)
    _, teacher = world.teacher()
    changes = {key: teacher if value == "TEACHER" else value for key, value in changes.items()}
    with pytest.raises(error) as caught:
        world.label(**changes)
    assert named in str(caught.value)
    assert caught.value.remedy
    assert snapshot(world.store) == before


def test_damaged_or_missing_frames_are_named(world: World) -> None:
    _, teacher = world.teacher()
    row = world.frames({"a": painted((0, 0.9))})["a"]
    key = frame_key(row.sha256, row.ext)
    world.store.put(key, painted((1, 0.9)))
    with pytest.raises(IntegrityError, match=key):
        world.label(teacher=teacher)
    world.store.remove(key)
    with pytest.raises(ObjectMissing, match=key):
        world.label(teacher=teacher)


def test_a_frame_that_cannot_be_decoded_is_named(world: World) -> None:
    _, teacher = world.teacher()
    row = put_frame(world.store, painted((0, 0.9)))
    torn = painted((0, 0.9))[:100]
    row = replace(row, sha256=sha256_bytes(torn))
    world.store.put(frame_key(row.sha256, row.ext), torn)
    world.write([row])
    with pytest.raises(InputError, match=row.sha256):
        world.label(teacher=teacher)


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"s3_endpoint": "http://127.0.0.1:9"}, StorageError, "HAECHI_S3_ENDPOINT"),
        ({"s3_endpoint": ""}, SettingsError, "HAECHI_S3_ENDPOINT"),
        ({"s3_secret_key": "wrong"}, StorageError, "HAECHI_S3_SECRET_KEY"),
        ({"bucket": "no-such-bucket"}, StorageError, "no-such-bucket"),
    ],
)
def test_an_unusable_store_is_named(
    world: World, changes: dict[str, str], error: type[HaechiError], named: str
) -> None:
    world.write([])
    with pytest.raises(error, match=named):
        world.label(settings=replace(world.settings, **changes))


def test_frames_without_a_table_are_named(world: World) -> None:
    with pytest.raises(IntegrityError, match=r"frames\.parquet"):
        world.label(frames=world.folder / "nothing")


# kill -9 ----------------------------------------------------------------------------------------------------------

# One interpreter that forks a child for every run, so that only the first pays for the imports.
_MORTAL_RUNS = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
from label_world import World
from haechi.components.shared.settings import Settings
from haechi.components.shared.storage import Store

def mortal(method):
    def call(self, *values, **named):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return method(self, *values, **named)
    return call

Store.put, Store.remove = mortal(Store.put), mortal(Store.remove)
for line in sys.stdin:
    bucket, writes, folder, teacher = line.split()
    left = int(writes)
    child = os.fork()
    if child == 0:
        store = Store(replace(Settings.from_env(), bucket=bucket))
        World(store, Path(folder)).label(teacher=teacher, review_limit=3)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def _prepared(store: Store, folder: Path) -> tuple[World, str]:
    """A queue of an older teacher with two answers, and new frames of every kind."""
    world = World(store, folder)
    _, old = world.teacher(0.5)
    _, new = world.teacher(0.6)
    rows = world.frames({str(score): painted((0, score)) for score in (0.55, 0.45, 0.5, 0.4, 0.42)})
    world.label(teacher=old)
    accept_proposals(store, rows["0.4"].sha256, "minji", NOW)
    answer(store, rows["0.42"].sha256, [], "junho", now=NOW)
    fresh = [painted((0, 0.95)), painted(), painted((0, 0.48)), painted((0, 0.3))]
    world.write([*rows.values(), *(put_frame(store, data) for data in fresh)])
    return world, new


@pytest.fixture
def run_mortal(settings: Settings) -> Iterator[Callable[[str, int, Path, str], int]]:
    """Run the step in a process that kills itself before its n-th write; its exit status."""
    environment = {**os.environ, **settings.to_env(), "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", _MORTAL_RUNS]
    with subprocess.Popen(command, env=environment, stdin=PIPE, stdout=PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def run(bucket: str, writes: int, folder: Path, teacher: str) -> int:
            stdin.write(f"{bucket} {writes} {folder} {teacher}\n")
            stdin.flush()
            return int(stdout.readline())

        yield run


def test_a_run_killed_before_any_write_and_repeated_ends_like_one_that_was_not(
    settings: Settings, tmp_path: Path, run_mortal: Callable[[str, int, Path, str], int]
) -> None:
    def bucket(suffix: str) -> Store:
        store = Store(replace(settings, bucket=f"{settings.bucket}-{suffix}"))
        store.ensure_bucket()
        return store

    world, teacher = _prepared(bucket("whole"), tmp_path)
    expected = world.label(teacher=teacher, review_limit=3)
    whole = snapshot(world.store)
    assert (expected.accepted, expected.background, expected.review, expected.waiting) == (2, 1, 3, 1)
    assert (expected.reviewed, expected.pending, len(expected.exports)) == (2, 3, 2)

    killed = 0
    while True:
        world, teacher = _prepared(bucket(str(killed)), tmp_path)
        (tmp_path / "labels" / "label.json").unlink(missing_ok=True)
        status = run_mortal(world.store.bucket, killed, tmp_path, teacher)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        assert not (tmp_path / "labels" / "label.json").exists()
        assert world.label(teacher=teacher, review_limit=3) == expected, f"killed before write {killed}"
        assert snapshot(world.store) == whole, f"killed before write {killed}"
        killed += 1
    assert killed == 12, "2 review objects, 4 deletes, 2 machine objects, 1 closed task, 3 tasks"


# the contract -----------------------------------------------------------------------------------------------------


def test_the_component_runs_the_step_and_sets_plain_metadata(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from kfp import dsl

    from haechi.components.label.component import label as component

    model, teacher = world.teacher()
    world.frames({"sure": painted((0, 0.9)), "unsure": painted((0, 0.4))})
    for name, value in world.settings.to_env().items():
        monkeypatch.setenv(name, value)
    out = dsl.Artifact(uri=str(world.folder / "labels"))
    component.python_func(
        frames=dsl.Artifact(uri=str(world.folder / "frames")),
        name="gate",
        champion="",
        teacher=teacher,
        classes=CLASSES,
        class_map={},
        bands={"default": [0.2, 0.6]},
        review_limit=5,
        labels=out,
    )
    assert read_json(world.folder / "labels" / "label.json") == out.metadata
    assert (out.metadata["accepted"], out.metadata["review"], out.metadata["teacher"]) == (1, 1, model.version)


# real frames ------------------------------------------------------------------------------------------------------


@pytest.mark.realdata
@pytest.mark.filterwarnings("ignore")
def test_a_coco_model_labels_the_people_of_a_real_lobby(world: World, realdata: Path) -> None:
    """A fixed-vocabulary checkpoint, exported first, as the teacher of an unlabelled camera."""
    from haechi.components.export.step import export_checkpoint

    folder = world.folder / "yolo11n"
    export_checkpoint(realdata / "weights" / "yolo11n.pt", folder, name="coco", imgsz=640)
    pictures = sorted((realdata / "cam_lobby").glob("*.jpg"))[::12]
    rows = [put_frame(world.store, path.read_bytes(), path.stem, "jpg") for path in pictures]
    world.write(rows)
    result = world.label(
        teacher=str(folder), classes=["visitor", "dog"], class_map={"person": "visitor"}, bands={"default": [0.25, 0.6]}
    )
    assert result.accepted + result.background + result.review == len(rows)
    assert result.accepted > 0 and result.accepted + result.review > len(rows) // 4
    labelled = list(exported_frames(world.store))
    boxes = [item for row in labelled for item in row.boxes]
    assert {item.class_name for item in boxes} == {"visitor"}
    assert min(item.score for item in boxes) >= 0.6
    sizes = {row.sha256: (row.width, row.height) for row in rows}
    for row in labelled:
        width, height = sizes[row.sha256]
        assert all(0 <= item.x1 < item.x2 <= width and 0 <= item.y1 < item.y2 <= height for item in row.boxes)
        assert row.covers == ("visitor", "dog")
