"""`haechi submit --wait`: follow a run on the cluster to its end, and tell how it ended."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from haechi.components.shared.progress import say

from .kubeflow import Kubeflow
from .kubeflow_errors import RunFailed, SubmitError

__all__ = ["NOT_PROMOTED", "Ended", "watch"]

NOT_PROMOTED = 30  # exit code of `--wait` where the run is well and the gate said no
_GOOD, _BAD = ("SUCCEEDED",), ("FAILED", "CANCELED", "CANCELLED")
_PATIENCE = 300.0  # seconds that the API may be away while we wait


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    Attributes:
        decision: `promote`, or `refuse` where the gate refused or had not enough data; its report tells which.
        seconds: from the start of the wait.
    """

    decision: str
    seconds: float

    @property
    def exit_code(self) -> int:
        """0 where the model was promoted, else NOT_PROMOTED."""
        return 0 if self.decision == "promote" else NOT_PROMOTED


def watch(
    api: Kubeflow,
    run_id: str,
    steps: Collection[str],
    *,
    timeout: float = 0.0,
    every: float = 10.0,
    tell: Callable[[str], None] = say,
) -> Ended:
    """Wait until a run ends, with a line whenever the state of a step changes.

    Args:
        api: the server; it may be away for minutes meanwhile.
        run_id: the run.
        steps: the pipeline's steps; other nodes (drivers, loops) are not told.
        timeout: seconds to wait at most; 0 for no limit. The run itself goes on.
        every: seconds between two looks.
        tell: takes the lines of progress.

    Raises:
        RunFailed: it failed or was stopped, naming the steps; or the time is over.
        SubmitError: the API refuses to tell, or is away for too long.
    """
    start = heard = time.monotonic()
    told: dict[str, str] = {}
    while True:
        try:
            run = api.run(run_id)
            heard = time.monotonic()
        except SubmitError as error:
            if (0 < error.status < 500 and error.status != 429) or time.monotonic() - heard > _PATIENCE:
                raise
            tell(f"no answer for {time.monotonic() - heard:.0f} s; the run goes on: {error.problem}")
            run = None
        if run is not None:
            states = _states(run, steps)
            for step, line in states.items():
                if told.get(step) != line:
                    tell(f"{step:10} {line}")
            told = states
            if run.state in _GOOD:
                return Ended(_decision(run), round(time.monotonic() - start, 1))
            if run.state in _BAD:
                raise RunFailed(*_failure(api, run, steps))
        left = timeout - (time.monotonic() - start) if timeout else every
        if left <= 0:
            raise RunFailed(
                f"the run {run_id} has not ended after {timeout:.0f} s",
                f"It goes on: {api.link(f'runs/details/{run_id}')}",
            )
        time.sleep(min(every, left))  # so that the last look is at the end of the time


def _tasks(run: Any) -> list[Any]:
    return (run.run_details and run.run_details.task_details) or []


def _states(run: Any, steps: Collection[str]) -> dict[str, str]:
    """Step → its states; a step in a loop has one for each turn."""
    counted: dict[str, Counter[str]] = {}
    for task in _tasks(run):
        if task.display_name in steps:
            counted.setdefault(task.display_name, Counter())[(task.state or "PENDING").lower()] += 1
    return {
        step: ", ".join(f"{count} {state}" if states.total() > 1 else state for state, count in sorted(states.items()))
        for step, states in counted.items()
    }


def _decision(run: Any) -> str:
    # The API tells no outputs; which branch ran tells the decision.
    done = {task.display_name for task in _tasks(run) if task.state in _GOOD}
    return "promote" if "deploy" in done else "refuse"


def _failure(api: Kubeflow, run: Any, steps: Collection[str]) -> tuple[str, str]:
    failed = sorted({task.display_name for task in _tasks(run) if task.state == "FAILED"} & set(steps))
    said = run.error.message if run.error and run.error.message else ""
    where = f" in {', '.join(failed)}" if failed else ""
    what = "failed" if run.state == "FAILED" else "was stopped"
    problem = f"the run {run.run_id} {what}{where}" + (f" ({said[:300]})" if said else "")
    return problem, f"Read the step's log: {api.link(f'runs/details/{run.run_id}')}"
