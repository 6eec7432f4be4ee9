"""Run the training pipeline on this machine by kfp.local, in a guarded child process.

The child (`python -m haechi.pipelines.local_run RUN_DIR`) holds kfp's global state and the steps; the parent reads its
log, tells the progress, and turns a failed step into the error that the step gave.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from haechi.components.shared import errors
from haechi.components.shared.errors import HaechiError
from haechi.components.shared.files import read_json, write_bytes, write_json
from haechi.components.shared.progress import say
from haechi.components.shared.settings import Settings

from .processes import GuardedProcess, tail

__all__ = ["RunResult", "run_training"]

_COLOUR = re.compile(r"\x1b\[\d+m")
_EVENT = re.compile(
    r"^(\d\d:\d\d:\d\d\.\d+) - (?:INFO|ERROR) - (?:Executing task '([^']+)'|Task '([^']+)' finished with status (\w+))"
)
# A class name last: kfp also logs the sources of components, whose docstrings have lines such as `name: of the model`.
_RAISED = re.compile(r"^((?:\w+\.)*[A-Z]\w*): (.+)$")
_STEP_LINE = re.compile(r"^\s*\d\d:\d\d:\d\d (?!- )(.+)$")


@dataclass(frozen=True)
class RunResult:
    """What a finished run left behind.

    Attributes:
        decision: `promote`, `refuse` or `not_enough_data`.
        folder: the run's folder, with `log.txt`, `report.html` and `artifacts/`.
        artifacts: artifact name → paths, in the order of the tasks (several `checkpoint`s, one of the others).
        seconds: task name → seconds.
    """

    decision: str
    folder: Path
    artifacts: dict[str, list[Path]]
    seconds: dict[str, float]

    def artifact(self, name: str) -> Path:
        """The one artifact of that name."""
        return self.artifacts[name][-1]


class StepFailed(HaechiError):
    """A step of a local run failed without an error of ours; its log tells."""

    exit_code = 12


def run_training(
    parameters: Mapping[str, Any], workdir: Path, settings: Settings, tell: Callable[[str], None] = say
) -> RunResult:
    """Run the pipeline once, as a child that ends with this process.

    Args:
        parameters: pipeline parameters, already checked.
        workdir: the run's folder is made under its `runs/`.
        settings: handed to the steps as environment.
        tell: receives progress lines.

    Raises:
        HaechiError: the error of the step that failed, with its own exit code.
    """
    folder = workdir.resolve() / "runs" / f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"
    for left in folder.parent.glob("*/tmp"):
        # Scratch of a run that was killed: a workdir holds one run at a time.
        shutil.rmtree(left, ignore_errors=True)
    write_json(folder / "parameters.json", dict(parameters))
    scratch = folder / "tmp"
    scratch.mkdir()
    log = folder / "log.txt"
    log.touch()
    env = {**os.environ, **settings.to_env(), "PYTHONUNBUFFERED": "1", "TMPDIR": str(scratch)}
    process = GuardedProcess([sys.executable, "-m", "haechi.pipelines.local_run", str(folder)], log, env)
    events = _Events(tell)
    try:
        for line in _follow(log, process):
            events.take(line)
        status = process.wait()
    finally:
        process.stop()
        shutil.rmtree(scratch, ignore_errors=True)
    if status != 0 or not (folder / "result.json").is_file():
        raise events.failure(log)
    result = RunResult(read_json(folder / "result.json")["decision"], folder, _artifacts(folder), events.seconds)
    # The artifact has no suffix, and a browser shows such a file as text.
    write_bytes(folder / "report.html", result.artifact("report").read_bytes())
    return result


class _Events:
    """Reads kfp.local's log: when each task began and ended, what the steps said, and the last error of ours."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.seconds: dict[str, float] = {}
        self._tell = tell
        self._began: dict[str, float] = {}
        # A traceback ends with its exception, so the last such line before a task fails is that task's error.
        self._last = self._error = ("", "")

    def take(self, line: str) -> None:
        line = _COLOUR.sub("", line)
        event = _EVENT.match(line)
        if event:
            self._event(event[2] or event[3], event[4])
        elif said := _STEP_LINE.match(line):
            self._tell(f"  {said[1]}")
        elif found := _RAISED.match(line.strip()):
            self._last = (found[1], found[2])

    def _event(self, task: str, status: str | None) -> None:
        if status is None:
            # Candidates run side by side under one name: their time is from the first start to the last end.
            self._began.setdefault(task, time.monotonic())
            self._tell(f"{task} …")
            return
        if status != "SUCCESS" and not self._error[0]:
            self._error = self._last
        self.seconds[task] = round(time.monotonic() - self._began.get(task, time.monotonic()), 1)
        self._tell(f"{task} {'done' if status == 'SUCCESS' else 'FAILED'} in {self.seconds[task]} s")

    def failure(self, log: Path) -> HaechiError:
        """The failed step's own error, or one that shows the end of the log."""
        name, message = self._error
        kind = getattr(errors, name.rpartition(".")[2], None)
        if isinstance(kind, type) and issubclass(kind, HaechiError):
            return kind(message)
        if not name:
            return StepFailed(f"the run failed; the end of {log} says:\n{tail(log)}")
        return StepFailed(f"a step failed with {name}: {message}", f"Look into {log}.")


def _follow(log: Path, process: GuardedProcess) -> Iterator[str]:
    """Lines of a growing log until its writer has ended."""
    with log.open(encoding="utf-8", errors="replace") as file:
        rest = ""
        while True:
            ended = not process.alive()
            rest += file.read()
            *lines, rest = rest.split("\n")
            yield from lines
            if ended:
                break
            time.sleep(0.2)
    if rest:
        yield rest


def _artifacts(folder: Path) -> dict[str, list[Path]]:
    """Outputs by name: kfp.local writes them to artifacts/<run>/[<loop iteration>/]<task>/<output>."""
    found: dict[str, list[Path]] = {}
    tasks = [path.parent for path in folder.glob("artifacts/**/executor_output.json")]
    for task in sorted(tasks, key=lambda path: (path.stat().st_mtime, path.name)):
        for output in sorted(task.iterdir()):
            if output.name != "executor_output.json":
                found.setdefault(output.name, []).append(output)
    return found


def _child(folder: Path) -> None:
    """The child's whole work: run the pipeline and write result.json."""
    import warnings

    from kfp import local

    from .training import training

    # Cluster settings have no effect here, and no image is pulled: kfp's warnings of both say nothing new.
    warnings.filterwarnings("ignore", message=".*(no effect in the current local runner|non-Python base image).*")
    for component in (training.pipeline_spec.root, *training.pipeline_spec.components.values()):
        for task in component.dag.tasks.values():
            # Retries are for spot nodes; here they would only delay the error by minutes.
            task.ClearField("retry_policy")
    mend_loops()
    local.init(
        runner=local.SubprocessRunner(use_venv=False),
        pipeline_root=str(folder / "artifacts"),
        workspace_root=str(folder / "workspace"),
        raise_on_error=True,
    )
    done = training(**read_json(folder / "parameters.json"))
    write_json(folder / "result.json", {"decision": done.output})


def mend_loops() -> None:
    """Give the body of a loop the task outputs that it asks for.

    kfp.local 2.17 replaces every task output that goes into a ParallelFor by the loop's item, so that a candidate would
    take its own settings for the champion's version.
    """
    from kfp.local.orchestrator import task_spec_utils

    original = task_spec_utils.create_parameter_loop_iteration_task_spec

    def mended(original_task_spec: Any, loop_item: Any, loop_task_name: str) -> Any:
        made = original(original_task_spec, loop_item, loop_task_name)
        for name, given in original_task_spec.inputs.parameters.items():
            if given.HasField("task_output_parameter"):
                made.inputs.parameters[name].CopyFrom(given)
        return made

    task_spec_utils.create_parameter_loop_iteration_task_spec = mended


if __name__ == "__main__":
    _child(Path(sys.argv[1]))
