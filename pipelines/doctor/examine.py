"""Run all checks side by side, each bounded in time, and gather what they say."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

from haechi.components.shared.errors import HaechiError

from .checks import CHECKS, Check
from .findings import CannotLook, Finding, NotAsked
from .world import World

__all__ = ["Diagnosis", "Result", "examine"]


@dataclass(frozen=True)
class Result:
    """What one check said.

    Attributes:
        check: its name.
        findings: faults; none is healthy only where `unseen` and `skipped` are empty too.
        unseen: why it could not look (everywhere), or empty.
        remedy: what would let it look.
        skipped: why there was nothing to look at, or empty.
    """

    check: str
    findings: tuple[Finding, ...] = ()
    unseen: str = ""
    remedy: str = ""
    skipped: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """The results of all checks, in the table's order, and what was looked at."""

    results: tuple[Result, ...]
    cluster: str

    @property
    def exit_code(self) -> int:
        """0 healthy, 1 findings, 2 no finding but something could not be looked at."""
        if any(result.findings for result in self.results):
            return 1
        return 2 if any(result.unseen for result in self.results) else 0


def examine(world: World, seconds: float = 30.0, checks: Mapping[str, Check] = CHECKS) -> Diagnosis:
    """Look at the world.

    Args:
        world: what to look at.
        seconds: that all checks together may take; one that is not done then could not look.
        checks: the table.
    """
    done: dict[str, Result] = {}
    # Daemons: a check that hangs in a system call must not keep the process from ending.
    threads = {
        name: threading.Thread(target=_run, args=(name, check, world, done), name=f"doctor {name}", daemon=True)
        for name, check in checks.items()
    }
    for thread in threads.values():
        thread.start()
    deadline = time.monotonic() + seconds
    for thread in threads.values():
        thread.join(max(0.0, deadline - time.monotonic()))
    late = Result("", unseen=f"no answer within {seconds:.0f} s", remedy="Give it longer: --timeout 120.")
    results = [done.get(name) or Result(name, unseen=late.unseen, remedy=late.remedy) for name in checks]
    return Diagnosis(tuple(results), world.server)


def _run(name: str, check: Check, world: World, done: dict[str, Result]) -> None:
    try:
        done[name] = Result(name, tuple(check.look(world)))
    except NotAsked as reason:
        done[name] = Result(name, skipped=str(reason))
    except CannotLook as error:
        done[name] = Result(name, tuple(error.found), error.problem, error.remedy)
    except HaechiError as error:
        done[name] = Result(name, unseen=error.problem, remedy=error.remedy)
    # An object that looks as no object should must not hide what the other checks found.
    except Exception as error:
        problem = f"the check itself failed ({type(error).__name__}: {error})"
        done[name] = Result(name, unseen=problem, remedy="Please report it, with the output of --json.")
