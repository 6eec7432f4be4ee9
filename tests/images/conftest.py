"""The small model that most rooms of the runtime are tried with, and a process that serves it as `door`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving_process import Running, running
from tests.tiny_models import tiny_model_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served")
    tiny_model_folder(path, ["person", "dog"])
    return path


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    with running(folder, "--name", "door") as process:
        yield process
