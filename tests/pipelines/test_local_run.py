"""`run_training`: the pipeline as kfp.local runs it, its errors and its artifacts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from haechi.components.shared.errors import HaechiError, NoDataError, StorageError
from haechi.components.shared.settings import Settings
from haechi.components.shared.storage import Store
from haechi.pipelines.demo.world import draw_labelled
from haechi.pipelines.local_run import RunResult, _Events, run_training
from haechi.pipelines.parameters import run_parameters

FAST = ["candidates=[{name: tiny, model: yolo11n, epochs: 1, imgsz: 64, batch: 4}]"]


@pytest.fixture
def full_settings(settings: Settings, mlflow_uri: str) -> Settings:
    """Store and MLflow, with one thread a training so that two can share two cores."""
    full = replace(settings, mlflow_tracking_uri=mlflow_uri, threads=1, workers=4)
    Store(full).ensure_bucket()
    return full


def test_a_run_without_any_labelled_data_fails_with_the_steps_own_error(
    tmp_path: Path, full_settings: Settings
) -> None:
    frames = tmp_path / "frames"
    frames.mkdir()
    (frames / "a.jpg").write_bytes(b"not an image")
    said: list[str] = []
    parameters = run_parameters("safety", [*FAST, "name=unlabelled", f'sources=[{{uri: "{frames.as_uri()}"}}]'])
    with pytest.raises(NoDataError, match=r"labels/"):
        run_training(parameters, tmp_path, full_settings, said.append)
    assert any(line.startswith("ingest done") for line in said)
    assert any(line.startswith("build FAILED") for line in said)


def test_a_store_with_wrong_credentials_fails_in_the_first_step(tmp_path: Path, full_settings: Settings) -> None:
    wrong = replace(full_settings, s3_secret_key="wrong")
    said: list[str] = []
    with pytest.raises(StorageError, match="HAECHI_S3_SECRET_KEY"):
        run_training(run_parameters("safety", FAST), tmp_path, wrong, said.append)
    assert not any(line.startswith("ingest") for line in said)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("haechi.components.shared.errors.NoDataError: labels/ is empty", "labels/ is empty"),
        ("FileNotFoundError: sh", "a step failed with FileNotFoundError: sh"),
        ("previous_dataset: digest of the newest dataset", "the run failed"),
    ],
)
def test_the_exception_of_a_failed_task_is_told_and_no_docstring(tmp_path: Path, line: str, told: str) -> None:
    (tmp_path / "log.txt").write_text("the end")
    events = _Events(lambda text: None)
    for entry in (line, "10:00:00.000 - ERROR - Task 'build' finished with status FAILURE"):
        events.take(entry)
    assert str(events.failure(tmp_path / "log.txt")).startswith(told)


def test_a_log_holds_no_secret(tmp_path: Path, full_settings: Settings) -> None:
    missing = replace(full_settings, bucket="haechi-none")
    with pytest.raises(HaechiError, match="haechi-none"):
        run_training(run_parameters("safety", FAST), tmp_path, missing, lambda line: None)
    [log] = tmp_path.glob("runs/*/log.txt")
    assert full_settings.s3_secret_key not in log.read_text()


def _copy_some(
    source: Path, target: Path, splits: dict[str, int], want: Callable[[Path], bool] = lambda path: True
) -> None:
    """A part of a YOLO folder: the first images of each split."""
    target.mkdir(parents=True)
    shutil.copy(source / "data.yaml", target)
    for split, count in splits.items():
        for image in [path for path in sorted((source / "images" / split).iterdir()) if want(path)][:count]:
            label = source / "labels" / split / f"{image.stem}.txt"
            for path, kind in ((image, "images"), (label, "labels")):
                (target / kind / split).mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target / kind / split)


@pytest.fixture
def real_parameters(realdata: Path, tmp_path: Path) -> dict[str, Any]:
    """A small version of a run on all the real data: two labelled sets, a camera's frames, COCO weights."""
    from haechi.components.export.step import export_checkpoint

    data = tmp_path / "data"
    _copy_some(realdata / "fire_smoke", data / "fire_smoke", {"train": 30, "val": 10, "test": 10})
    _copy_some(realdata / "person_down", data / "person_down", {"train": 30, "val": 10})
    (data / "cam_lobby").mkdir()
    for path in sorted((realdata / "cam_lobby").iterdir())[:40:2]:
        shutil.copy(path, data / "cam_lobby")
    weights = tmp_path / "weights.pt"
    shutil.copy(realdata / "weights" / "yolo11n.pt", weights)
    teacher = tmp_path / "teacher"
    export_checkpoint(weights, teacher, name="coco", images=[data / "cam_lobby"], imgsz=640)
    return run_parameters(
        "",
        [
            "name=plant",
            "classes=[smoke, fire, person_down, person]",
            f'imports=[{{uri: "{(data / "fire_smoke").as_uri()}", covers: [smoke, fire]}}, '
            f'{{uri: "{(data / "person_down").as_uri()}", covers: [person_down, person]}}]',
            f'sources=[{{uri: "{(data / "cam_lobby").as_uri()}", pattern: "{{camera}}_{{offset_ms}}ms.jpg"}}]',
            f"teacher={teacher}",
            "bands={default: [0.3, 0.6]}",
            f"candidates=[{{name: ft, model: yolo11n, weights: {weights}, epochs: 1, imgsz: 160, batch: 8}}]",
            "gate={min_boxes: 1, min_groups: 1, floors: {default: 0.0}}",
            f"target=dir:{tmp_path / 'deploy'}",
            "device=cpu",
        ],
    )


@pytest.mark.realdata
@pytest.mark.slow
def test_real_frames_go_from_folders_to_a_deployed_model(
    real_parameters: dict[str, Any], tmp_path: Path, full_settings: Settings
) -> None:
    result: RunResult = run_training(real_parameters, tmp_path, full_settings)
    ingest = json.loads((result.artifact("frames") / "ingest.json").read_text())
    assert ingest["seen"] >= 20
    assert 0 < ingest["accepted"] <= 20
    assert ingest["imported"] == 90
    label = json.loads((result.artifact("labels") / "label.json").read_text())
    assert label["accepted"] + label["review"] + label["background"] == ingest["accepted"]
    stats = json.loads((result.artifact("dataset") / "stats.json").read_text())
    certificate = json.loads((result.artifact("dataset") / "certificate.json").read_text())
    assert stats
    assert certificate
    parity = json.loads((result.artifact("onnx_model") / "parity.json").read_text())
    assert parity["ok"] is True
    assert parity["images"] > 0
    assert (result.folder / "report.html").read_text() == result.artifact("report").read_text()
    assert result.decision in ("promote", "refuse", "not_enough_data")
    verdict = json.loads((result.artifact("verdict") / "verdict.json").read_text())
    assert verdict["decision"] == result.decision
    assert (tmp_path / "deploy" / "current" / "model.json").exists() == (result.decision == "promote")


_RUN = """
import json, sys
from pathlib import Path
from haechi.components.shared.settings import Settings
from haechi.pipelines.local_run import run_training
parameters, workdir = json.loads(sys.argv[1]), Path(sys.argv[2])
run_training(parameters, workdir, Settings.from_env())
"""


def _kill_at(line: str, parameters: dict[str, Any], workdir: Path, settings: Settings) -> None:
    """Start a run in a process of its own and end it by SIGKILL as soon as its log holds `line`."""
    words = [sys.executable, "-c", _RUN, json.dumps(parameters), str(workdir)]
    process = subprocess.Popen(words, env={**os.environ, **settings.to_env()}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not any(line in log.read_text() for log in workdir.glob("runs/*/log.txt")):
        assert process.poll() is None, f"the run ended before {line!r}"
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.kill()
    process.wait()
    shutil.rmtree(workdir / "runs")


@pytest.mark.slow
def test_a_run_killed_in_several_steps_ends_as_one_that_was_never_killed(
    tmp_path: Path, full_settings: Settings
) -> None:
    draw_labelled(tmp_path / "labelled", 3, 40)

    def parameters(name: str) -> dict[str, Any]:
        wanted = [f"name={name}", f'imports=[{{uri: "{(tmp_path / "labelled").as_uri()}"}}]', "device=cpu"]
        candidate = "candidates=[{name: tiny, model: yolo11n, epochs: 3, imgsz: 64, batch: 8}]"
        return run_parameters("safety", [*wanted, candidate])

    ends = []
    for name, kills in (("undisturbed", []), ("killed", ["epoch 1/3", "candidate tiny: val", "\x1b[96m'evaluate'"])):
        settings = replace(full_settings, bucket=f"{full_settings.bucket}-{name}")
        Store(settings).ensure_bucket()
        for line in kills:
            _kill_at(line, parameters(name), tmp_path / name, settings)
        result = run_training(parameters(name), tmp_path / name, settings)
        verdict = json.loads((result.artifact("verdict") / "verdict.json").read_text())
        ends.append({key: verdict[key] for key in ("decision", "reasons", "challenger", "dataset_digest")})
    assert ends[0] == ends[1]
