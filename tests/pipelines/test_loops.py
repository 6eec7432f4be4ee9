"""kfp.local's loops: a task's output that goes into a ParallelFor arrives there as it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PIPELINE = """
import json, sys
from typing import Dict, List, NamedTuple
from kfp import dsl, local

@dsl.component(base_image="python:3.11", install_kfp_package=False)
def resolve() -> NamedTuple("World", champion=str, dataset=str):
    return ("0123456789ab", "digest")

@dsl.component(base_image="python:3.11", install_kfp_package=False)
def train(candidate: dict, champion: str, seed: int) -> str:
    return f"{candidate['name']} {champion} {seed}"

@dsl.component(base_image="python:3.11", install_kfp_package=False)
def best(results: List[str]) -> str:
    return "; ".join(results)

@dsl.pipeline(name="loops")
def loops(candidates: List[Dict] = [{"name": "a"}, {"name": "b"}], seed: int = 3) -> str:
    world = resolve()
    with dsl.ParallelFor(candidates) as candidate:
        fitted = train(candidate=candidate, champion=world.outputs["champion"], seed=seed)
    return best(results=dsl.Collected(fitted.output)).output

from haechi.pipelines.local_run import mend_loops
mend_loops()
local.init(local.SubprocessRunner(use_venv=False), pipeline_root=sys.argv[1], workspace_root=sys.argv[1] + "/w")
print("RESULT " + loops().output)
"""


@pytest.mark.timeout(120)
def test_a_task_output_reaches_every_iteration_of_a_loop(tmp_path: Path) -> None:
    script = tmp_path / "loops.py"
    script.write_text(PIPELINE)
    done = subprocess.run([sys.executable, str(script), str(tmp_path / "root")], capture_output=True, text=True)
    assert "RESULT a 0123456789ab 3; b 0123456789ab 3\n" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
