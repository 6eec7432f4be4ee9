"""Each image's code imports and starts without the packages that its image does not hold.

No image is built here: what an extra does not bring in, walked through the installed packages' own requirements, is hidden
from a Python process as if it were not installed.
"""

from __future__ import annotations

import base64
import importlib.metadata as metadata
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import httpx
import pytest
from packaging.requirements import Requirement

from tests.serving_process import running
from tests.tiny_models import paint, shade, tiny_model_folder

ROOT = Path(__file__).resolve().parents[1]
# Python runs a module of this name before anything else.
HIDING = """
import sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {absent} else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
"""
FOLDERS = {"haechi.components": "components", "haechi.pipelines": "pipelines", "haechi.serving": "images/serving"}
TRAINING = ("haechi.components.train", "haechi.components.export")
# What a pod of the steps image runs beside steps: the launcher's executor, the reconciler, and the verbs of a person in it.
COMMANDS = ["kfp.dsl.executor_main", *(f"haechi.pipelines.{name}" for name in ("cli", "operations", "submitting"))]


def modules(package: str) -> list[str]:
    folder = ROOT / FOLDERS[package]
    parts = [path.relative_to(folder).with_suffix("").parts for path in sorted(folder.rglob("*.py"))]
    return [".".join([package, *inner]).removesuffix(".__init__") for inner in parts if inner[-1] != "__main__"]


STEPS = modules("haechi.components")
IMAGES = {
    "serving": modules("haechi.serving"),
    "steps": [*COMMANDS, *(name for name in STEPS if not name.startswith(TRAINING))],
    "train": [*COMMANDS[:1], *STEPS],
}


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def held(extra: str) -> set[str]:
    """The distributions that an image of this extra holds."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    # kfp is no part of the serving image: its Dockerfile leaves it out.
    always = [] if extra == "serving" else project["dependencies"]
    todo = [(Requirement(line), "") for line in [*always, f"haechi[{extra}]"]]
    found: set[tuple[str, str]] = set()
    while todo:
        wanted, above = todo.pop()
        if wanted.marker and not wanted.marker.evaluate({"extra": above}):
            continue
        name = plain(wanted.name)
        for chosen in ("", *wanted.extras):
            if (name, chosen) not in found:
                found.add((name, chosen))
                todo += [(Requirement(line), chosen) for line in requires(name, chosen, project)]
    return {name for name, _ in found}


def requires(name: str, extra: str, project: dict[str, dict[str, list[str]]]) -> Iterable[str]:
    if name == "haechi":
        return project["optional-dependencies"][extra] if extra else ()
    try:
        return metadata.requires(name) or ()
    except metadata.PackageNotFoundError:  # for another platform, or optional here
        return ()


def absent(extra: str) -> set[str]:
    """Top-level modules that are installed here and that the image has not got."""
    kept = held(extra) | {"haechi"}
    return {top for top, owners in metadata.packages_distributions().items() if not {*map(plain, owners)} & kept}


@pytest.fixture
def inside(tmp_path: Path, request: pytest.FixtureRequest) -> dict[str, str]:
    """The environment of a Python process that finds only what the image holds."""
    folder = tmp_path / "hiding"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(HIDING.format(absent=sorted(absent(request.param))))
    return {**os.environ, "PYTHONPATH": str(folder)}


def python(code: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("extra", "there", "hidden"),
    [
        (
            "serving",
            {"numpy", "onnxruntime", "cv2", "grpc", "httptools"},
            {"kfp", "pyarrow", "mlflow", "torch", "openvino"},
        ),
        (
            "steps",
            {"numpy", "kfp", "kubernetes", "pyarrow", "mlflow"},
            {"torch", "ultralytics", "onnx", "tritonclient"},
        ),
        ("train", {"kfp", "pyarrow", "torch", "onnx"}, {"tritonclient", "pytest", "playwright"}),
    ],
)
def test_what_an_extra_brings_in_is_seen_and_the_rest_is_not(extra: str, there: set[str], hidden: set[str]) -> None:
    assert absent(extra) & (there | hidden) == hidden


@pytest.mark.parametrize(("inside", "names"), IMAGES.items(), ids=list(IMAGES), indirect=["inside"])
def test_an_images_code_imports_without_what_it_does_not_hold(inside: dict[str, str], names: list[str]) -> None:
    code = f"import importlib\nfor name in {names}:\n    importlib.import_module(name)\nprint('all')"
    done = python(code, inside)
    assert (done.stdout, done.returncode) == ("all\n", 0), done.stderr[-2000:]


@pytest.mark.parametrize("inside", ["serving"], indirect=True)
def test_a_hidden_package_is_as_if_it_were_not_installed(inside: dict[str, str]) -> None:
    look = "from importlib.util import find_spec as find; print(find('pyarrow'), find('cv2').name)"
    assert python(look, inside).stdout == "None cv2\n"
    assert "No module named 'pyarrow'" in python("import pyarrow.parquet", inside).stderr


@pytest.mark.parametrize("inside", ["serving"], indirect=True)
def test_the_runtime_loads_proves_and_serves_a_model_with_what_its_image_holds(
    inside: dict[str, str], tmp_path: Path
) -> None:
    tiny_model_folder(tmp_path / "model", ["person", "dog"])
    picture = base64.b64encode(paint({(2, 3): shade(0, 0.9)})).decode()
    with running(tmp_path / "model", env=inside) as server:
        url = f"{server.url}/v1/models/tiny:predict"
        answer = httpx.post(url, json={"instances": [{"image": {"b64": picture}}]}).json()
        [found] = answer["predictions"][0]["detections"]
    assert found["class"] == "person"
