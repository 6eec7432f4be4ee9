"""What a step refuses at its turn, `haechi submit` and the first step of a run refuse before it, in the same words."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from haechi.components.build.step import build
from haechi.components.deploy.step import deploy
from haechi.components.evaluate.parameters import Gate
from haechi.components.evaluate.step import evaluate
from haechi.components.export.parameters import spread_thresholds
from haechi.components.export.step import export
from haechi.components.ingest.step import ingest
from haechi.components.label.step import label
from haechi.components.label.teacher import map_classes
from haechi.components.resolve.component import resolve
from haechi.components.shared.errors import InputError, SettingsError
from haechi.components.shared.model_folder import fetch_model
from haechi.components.shared.settings import Settings
from haechi.components.train.candidate import Candidate
from haechi.components.train.step import train
from haechi.pipelines.cli import main
from haechi.pipelines.parameters import run_parameters
from haechi.pipelines.submitting import Package

NOWHERE = Path("/nowhere")
CLASSES = ["smoke", "fire", "person_down"]  # of the preset
CANDIDATE = {"name": "a", "model": "yolo11n"}
# What a step gets beside parameters; it must refuse before it looks at any of it.
SURROUNDINGS = {
    **dict.fromkeys(("frames", "out", "work", "dataset", "onnx_model", "verdict", "report"), NOWHERE),
    **dict.fromkeys(("champion", "previous_dataset"), ""),
    "checkpoints": [],
    "candidate": CANDIDATE,
    "run_id": "run-1",
    "settings": Settings(),
}

Turn = Callable[[dict[str, Any]], Any]


def at(step: Callable[..., Any]) -> Turn:
    """The step itself, given the run's parameters."""
    wanted = inspect.signature(step).parameters.keys()
    return lambda values: step(**{name: value for name, value in {**values, **SURROUNDINGS}.items() if name in wanted})


# Parameter, a value that its step refuses, and how the step comes to it. Where only data leads there, its own parser.
WRONG: list[tuple[str, Any, Turn]] = [
    ("name", "My Model", at(build)),
    ("classes", ["fire", "fire"], at(ingest)),
    ("sources", [{"uri": "http://camera/frames"}], at(ingest)),
    ("sources", [{"uri": "s3://haechi/raw/", "pattern": "{camara}/{any}"}], at(ingest)),
    ("imports", [{"uri": "s3://haechi/set.zip", "covers": ["cat"]}], at(ingest)),
    ("quality", {"blurr": 0.1}, at(ingest)),
    ("teacher", "s3://haechi/best.pt", lambda values: fetch_model(None, values["teacher"], NOWHERE)),
    ("class_map", {"hound": "cat"}, lambda values: map_classes(["hound"], CLASSES, values["class_map"])),
    ("bands", {"default": [0.6, 0.2]}, at(label)),
    ("bands", {"default": [0.2, 0.6], "cat": [0.2, 0.6]}, at(label)),
    ("review_limit", -2, at(label)),
    ("ratios", {"val": 0.6, "test": 0.5}, at(build)),
    ("grouping", {"near_bit": 3}, at(build)),
    ("seed", -1, at(train)),
    ("device", "tpu", at(train)),
    ("candidates", [CANDIDATE | {"modle": "yolo11n"}], lambda values: Candidate.parse(values["candidates"][0])),
    ("candidates", [CANDIDATE | {"epochs": 0.5}], lambda values: Candidate.parse(values["candidates"][0])),
    ("thresholds", {"default": 2}, lambda values: spread_thresholds(values["thresholds"], CLASSES)),
    ("thresholds", {"default": 0.2, "cat": 0.3}, lambda values: spread_thresholds(values["thresholds"], CLASSES)),
    ("iou", 0.0, at(export)),
    ("golden_images", -1, at(export)),
    ("gate", {"min_box": 20}, at(evaluate)),
    ("gate", {"floors": {"cat": 0.3}}, lambda values: Gate.from_dict(values["gate"]).check_classes(CLASSES)),
    ("target", "kserv:models/gate", at(deploy)),
    ("rollout", {"steps": [50, 10]}, at(deploy)),
]


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """No store and no MLflow: who gets as far as asking them fails otherwise."""
    monkeypatch.delenv("HAECHI_S3_ENDPOINT", raising=False)


def first_step(values: dict[str, Any]) -> None:
    resolve.python_func(**{name: values[name] for name in resolve.component_spec.inputs})


@cache
def defaults() -> Mapping[str, Any]:
    return Package.read().parameters


def asked(**change: Any) -> dict[str, Any]:
    return {**defaults(), **run_parameters("safety"), **change}


@pytest.mark.parametrize(("name", "value", "turn"), WRONG, ids=[name for name, _, _ in WRONG])
def test_what_a_step_refuses_is_refused_before_the_run_and_by_its_first_step(
    name: str, value: Any, turn: Turn, unset: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError) as late:
        turn(asked(**{name: value}))
    with pytest.raises(InputError) as early:
        first_step(asked(**{name: value}))
    assert str(early.value) == str(late.value)
    # Nothing listens there: who sends anything ends with another code.
    words = ["submit", "--host", "http://127.0.0.1:9", "--preset", "safety", "--set", f"{name}={json.dumps(value)}"]
    assert main(words) == late.value.exit_code
    assert capsys.readouterr().err == f"haechi submit: {late.value}\n"


def test_every_parameter_that_the_first_step_gets_is_checked() -> None:
    assert {name for name, _, _ in WRONG} == set(resolve.component_spec.inputs)


@pytest.mark.parametrize("preset", ["safety", "entrance", ""])
def test_a_run_without_a_mistake_gets_as_far_as_the_settings(preset: str, unset: None) -> None:
    with pytest.raises(SettingsError):
        first_step({**defaults(), **run_parameters(preset)})


def test_classes_that_are_left_out_are_the_pipelines_own() -> None:
    run_parameters("", ["thresholds={default: 0.2, smoke: 0.3}"])
    with pytest.raises(InputError, match="model lacks: cat"):
        run_parameters("", ["thresholds={default: 0.2, cat: 0.3}"])


def test_the_check_needs_none_of_what_the_steps_need() -> None:
    code = (
        "import sys, haechi.components.resolve.parameters\nprint(sorted({name.split('.')[0] for name in sys.modules}))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert not set(json.loads(loaded.stdout.replace("'", '"'))) & {"numpy", "torch", "kfp", "minio", "pyarrow", "cv2"}
