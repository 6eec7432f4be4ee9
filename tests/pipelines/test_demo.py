"""The demo: its parts on real services, a small run of the whole, and what is left when it is interrupted or killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from label_world import put_frame
from tiny_models import paint, shade, tiny_model_folder

from haechi.components.label.review import list_tasks
from haechi.components.label.step import label
from haechi.components.shared.dataset import Box, Frame, exported_frames, write_export, write_rows
from haechi.components.shared.errors import InputError, IntegrityError
from haechi.components.shared.files import sha256_bytes
from haechi.components.shared.settings import Settings
from haechi.components.shared.storage import Store
from haechi.pipelines.demo.demo import demo
from haechi.pipelines.demo.plan import NAME, Plan
from haechi.pipelines.demo.prediction import ask, serving
from haechi.pipelines.demo.reviewer import REVIEWER, answer_queue, audit_machine
from haechi.pipelines.demo.summary import table
from haechi.pipelines.demo.world import CLASSES, RawFrame, draw_raw
from haechi.pipelines.parameters import check
from haechi.pipelines.processes import ServiceError

# Too small to learn anything: only a gate that asks for nothing lets round 1's model become the champion of round 2.
LENIENT = {"min_boxes": 1, "min_groups": 1}
SMALL = Plan(labelled=60, bursts=2, frames=2, epochs=2, warm_epochs=1, imgsz=96, batch=8, gate=LENIENT)


def alive(workdir: Path) -> list[str]:
    """Living processes whose command line or environment names the folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        if int(entry.name) == os.getpid():
            continue
        try:
            told = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
        except OSError:
            continue
        if str(workdir).encode() in told:
            found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return found


def none_left(workdir: Path, seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while alive(workdir) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not alive(workdir)


# ---- the whole, small


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_rounds_end_in_a_summary_a_report_and_no_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir = tmp_path / "demo"
    summary = demo(workdir, SMALL)
    assert none_left(workdir)
    assert json.loads((workdir / "summary.json").read_text()) == summary
    assert len(summary["rounds"]) == 2
    for item in summary["rounds"]:
        _check_round(item)
    first, second = summary["rounds"]
    assert first["ingest"]["imported"] == 60
    assert first["ingest"]["seen"] == 0
    # Five cameras, two bursts of two frames, and four broken files each.
    assert second["ingest"]["seen"] == 5 * (2 * 2 + 4)
    assert second["ingest"]["duplicates"] >= 5
    assert second["ingest"]["quarantined"] >= 5 * 2
    assert second["ingest"]["accepted"] >= 10
    assert (
        second["label"]["accepted"] + second["label"]["review"] + second["label"]["background"]
        == second["ingest"]["accepted"]
    )
    assert second["label"]["reviewed"] == second["label"]["review"]
    assert first["verdict"]["decision"] == "promote"
    assert second["label"]["teacher"] == first["deployed"]["version"]
    assert [item["status"] for item in second["candidates"]] == ["ok", "ok"], "both went on from the champion"
    assert second["verdict"]["champion"] is not None
    _check_prediction(summary)
    told = capsys.readouterr().out
    assert "round 1" in told and "verdict" in told and str(workdir / "report.html") in told
    _check_page((workdir / "report.html").read_text())


def _check_round(item: dict[str, Any]) -> None:
    assert {"ingest", "label", "dataset", "candidates", "parity", "verdict", "deployed", "seconds"} <= set(item)
    assert re.fullmatch("[0-9a-f]{64}", item["dataset"]["digest"])
    assert all(item["dataset"][split] > 0 for split in ("train", "val", "test"))
    assert len(item["candidates"]) == 2
    assert all(0 <= candidate["map50_95"] <= candidate["map50"] <= 1 for candidate in item["candidates"])
    assert item["parity"]["ok"] is True
    assert item["verdict"]["decision"] in ("promote", "refuse", "not_enough_data")
    assert item["verdict"]["reasons"]
    assert item["seconds"]["total"] > 0
    if item["verdict"]["decision"] == "promote":
        assert item["deployed"]["changed"] and item["deployed"]["uri"].startswith(f"s3://haechi/models/{NAME}/")


def _check_prediction(summary: dict[str, Any]) -> None:
    assert summary["prediction"]["version"] == summary["rounds"][-1]["deployed"]["version"]
    assert summary["prediction"]["url"].endswith(f"/v1/models/{NAME}:predict")
    assert summary["prediction"]["truth"]


def _check_page(page: str) -> None:
    assert page.count("data:image/jpeg;base64,") >= 8
    assert page.count("<iframe") == 2
    assert "mAP50 on the frozen test" in page
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)[^"']+""", page), "nothing is fetched"
    assert "<script" not in page


# ---- interrupted, killed, started again


@pytest.mark.e2e
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_demo_that_is_stopped_in_a_step_leaves_no_process(tmp_path: Path, number: int, status: int) -> None:
    workdir = tmp_path / "demo"
    command = [sys.executable, "-m", "haechi.pipelines.cli", "demo", "--workdir", str(workdir)]
    with (
        (tmp_path / "err").open("w") as errors,
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors) as process,
    ):
        _wait_for_step(workdir, process)
        assert len(alive(workdir)) >= 5
        process.send_signal(number)
        assert process.wait(40) == status
    assert none_left(workdir)
    assert not (workdir / "summary.json").exists()


def _wait_for_step(workdir: Path, process: subprocess.Popen[bytes]) -> None:
    """Until a step's own process runs: kfp.local starts it with the executor's module."""
    deadline = time.monotonic() + 120
    while not any("executor_main" in line for line in alive(workdir)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)


def test_a_foreign_folder_is_not_emptied(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"not empty and no earlier demo's folder.*thesis\.tex"):
        demo(tmp_path, SMALL)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_second_demo_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    from haechi.pipelines.services import FolderLock

    with FolderLock(tmp_path / ".demo.lock"), pytest.raises(ServiceError, match="another process is using"):
        demo(tmp_path, SMALL)


def test_what_an_earlier_start_left_is_removed_first(tmp_path: Path) -> None:
    from haechi.pipelines.demo.demo import _claimed

    (tmp_path / ".haechi-demo").touch()
    (tmp_path / "summary.json").write_text("{}")
    (tmp_path / "seaweedfs" / "deep").mkdir(parents=True)
    (tmp_path / "current").symlink_to("seaweedfs")
    with _claimed(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".demo.lock", ".haechi-demo"]


# ---- the simulated reviewer


@pytest.fixture
def queued(store: Store, settings: Settings, tmp_path: Path) -> tuple[dict[str, tuple[Box, ...]], list[Frame]]:
    """Raw frames of one day in the review queue, and their truth."""
    raw = [frame for frame in draw_raw(3, bursts=2, frames=1) if frame.boxes is not None][:4]
    frames = [put_frame(store, frame.data, frame.key, "jpg") for frame in raw]
    _label(settings, frames, tmp_path)
    return {sha256_bytes(frame.data): frame.boxes or () for frame in raw}, frames


def _label(settings: Settings, frames: list[Frame], folder: Path) -> None:
    write_rows(folder / "frames.parquet", Frame, frames)
    label(
        folder, name=NAME, champion="", teacher="", classes=CLASSES, class_map={}, bands={"default": [0.2, 0.6]},
        review_limit=-1, out=folder / "out", settings=settings,
    )  # fmt: skip


def test_the_reviewer_answers_the_whole_queue_with_the_truth(
    store: Store, settings: Settings, tmp_path: Path, queued: tuple[dict[str, tuple[Box, ...]], list[Frame]]
) -> None:
    truth, frames = queued
    done = answer_queue(store, truth)
    assert {item.task.sha256 for item in done} == set(truth)
    assert list_tasks(store) == []
    _label(settings, frames, tmp_path)
    rows = {row.sha256: row for row in exported_frames(store)}
    assert set(rows) == set(truth)
    for sha256, row in rows.items():
        assert (row.origin, row.actor, row.covers) == ("review", REVIEWER, CLASSES)
        assert [(box.class_name, box.x1, box.y2) for box in row.boxes] == [
            (box.class_name, box.x1, box.y2) for box in truth[sha256]
        ]


def test_a_task_that_the_world_never_drew_stops_the_reviewer(
    store: Store, queued: tuple[dict[str, tuple[Box, ...]], list[Frame]]
) -> None:
    truth, _ = queued
    truth.pop(next(iter(truth)))
    with pytest.raises(IntegrityError, match="is not ours"):
        answer_queue(store, truth)
    assert len(list_tasks(store)) == 4, "no task was answered"


def test_the_audit_counts_right_boxes_one_to_one(store: Store) -> None:
    from datetime import UTC, datetime

    from haechi.components.shared.dataset import LabelledFrame

    frame = put_frame(store, paint({}), "a")
    other = put_frame(store, paint({}, ground=(9, 9, 9)), "b")
    drawn = (
        Box("fire", 0, 0, 10, 10, 0.9, "machine"),
        Box("fire", 1, 0, 10, 10, 0.8, "machine"),  # the same fire again
        Box("smoke", 50, 50, 80, 80, 0.7, "machine"),  # truly a fire
    )
    rows = [_machine(frame, drawn), _machine(other, ())]
    write_export(store, "machine", rows, {}, datetime.now(UTC))
    truth = {frame.sha256: (Box("fire", 0, 0, 10, 11), Box("fire", 50, 50, 80, 80)), other.sha256: ()}
    audit = audit_machine(store, truth)
    assert (audit.frames, audit.boxes, audit.right, audit.true) == (2, 3, 1, 2)
    assert (audit.precision, audit.recall) == (pytest.approx(1 / 3), 0.5)
    assert isinstance(rows[0], LabelledFrame)


def _machine(frame: Frame, boxes: tuple[Box, ...]) -> Any:
    from haechi.components.shared.dataset import LabelledFrame

    return LabelledFrame(**vars(frame), boxes=boxes, covers=CLASSES, origin="machine", decision="accepted")


# ---- serving, plan, table


def test_a_served_model_answers_with_boxes_in_pixels(tmp_path: Path) -> None:
    model = tiny_model_folder(tmp_path / "model", CLASSES, name=NAME)
    frame = RawFrame("raw/x.png", paint({(2, 3): shade(1, 0.9)}), (Box("fire", 64, 96, 96, 128),), 0)
    with serving(tmp_path / "model", tmp_path / "logs" / "serve.log", Settings(threads=1)) as base:
        answer = ask(base, NAME, frame)
        with pytest.raises(ServiceError, match="there is no model 'other'"):
            ask(base, "other", frame)
    assert none_left(tmp_path)
    assert (answer.model, answer.version) == (NAME, model.version)
    assert [(row["class"], row["box"]) for row in answer.boxes] == [("fire", [64, 96, 96, 128])]
    assert answer.to_json()["truth"] == [{"class": "fire", "box": [64, 96, 96, 128]}]


def test_a_model_that_cannot_be_served_shows_the_log(tmp_path: Path) -> None:
    with (
        pytest.raises(ServiceError, match=r"(?s)did not become ready.*is not a model folder"),
        serving(tmp_path / "none", tmp_path / "serve.log", Settings(threads=1)),
    ):
        pass


def test_the_plan_gives_parameters_that_the_pipeline_knows(tmp_path: Path) -> None:
    plan = Plan()
    first = check(plan.first_round(tmp_path, "none"), "plan")
    warm = check(plan.second_round("haechi", "none", "0123456789ab"), "plan")
    without = check(plan.second_round("haechi", "none", ""), "plan")
    assert [item["model"] for item in first["candidates"]] == ["yolo11n", "yolov8n"]
    assert {item["model"] for item in warm["candidates"]} == {"champion"}
    assert without["candidates"] == first["candidates"], "without a champion there is nothing to go on from"
    with pytest.raises(InputError, match="epochs of the demo is 0"):
        replace(plan, epochs=0)


def test_the_table_has_a_column_for_each_round() -> None:
    score = {"map50": 0.5, "map50_95": 0.25}
    item = {
        "ingest": {"seen": 3, "accepted": 1, "duplicates": 1, "quarantined": 1, "imported": 0},
        "label": {"accepted": 1, "review": 2, "background": 4, "reviewed": 2},
        "dataset": {"train": 7, "val": 2, "test": 1},
        "candidates": [{"name": "a", "status": "ok", "map50": 0.75}, {"name": "b", "status": "failed", "map50": None}],
        "parity": {"ok": True},
        "verdict": {"decision": "refuse", "challenger": score, "champion": None},
        "deployed": None,
        "seconds": {"total": 12.4},
    }
    later = {**item, "verdict": {"decision": "promote", "challenger": score, "champion": {"map50": 0.4}}}
    rows = {line[:24].strip(): line[24:].split() for line in table({"rounds": [item, later]})}
    assert rows["labelled by the machine"] == ["5", "5"]
    assert rows["candidate 1, val mAP50"] == ["a", "0.750", "a", "0.750"]
    assert rows["candidate 2, val mAP50"] == ["b", "failed", "b", "failed"]
    assert rows["test mAP50, champion"] == ["–", "0.400"]
    assert rows["verdict"] == ["refuse", "promote"]
    assert rows["deployed"] == ["–", "–"]
