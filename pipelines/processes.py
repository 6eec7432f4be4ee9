"""Child processes that never outlive their owner, and identities that never mistake a stranger for one of ours."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from haechi.components.shared.errors import HaechiError

__all__ = ["GuardedProcess", "ProcessId", "ServiceError", "stop_pair", "tail"]

_GUARD = Path(__file__).with_name("guard.py")
_LINUX: bool = sys.platform == "linux"


class ServiceError(HaechiError):
    """An embedded service or a child process did not come up, or went away."""

    exit_code = 14
    http_status = 503


@dataclass(frozen=True)
class ProcessId:
    """A process by pid and time of start, so that a reused pid is not taken for it.

    Attributes:
        pid: the operating system's number.
        started: on Linux boot id and start ticks, elsewhere the time of creation.
    """

    pid: int
    started: str

    @classmethod
    def of(cls, pid: int) -> ProcessId:
        """The identity of a living process; `started` is empty where there is none."""
        return cls(pid, _started(pid))

    def alive(self) -> bool:
        """Whether that very process still runs (a zombie does not)."""
        return bool(self.started) and _started(self.pid) == self.started

    def send(self, number: int, group: bool = False) -> None:
        """Send a signal to it, or to the process group that it leads, unless it is gone."""
        if self.alive():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                (os.killpg if group else os.kill)(self.pid, number)

    def wait_gone(self, seconds: float) -> bool:
        """Wait at most `seconds` for it to end; whether it did."""
        deadline = time.monotonic() + seconds
        while self.alive():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True


class GuardedProcess:
    """A running child with its guard (see guard.py): its whole process group ends with us.

    Args:
        command: program and arguments.
        log: file that its output is appended to; None for our own standard error.
        env: its whole environment.
        grace: seconds between SIGTERM and SIGKILL when it is stopped.
        detached: be no child of ours, so that `keep` can let it outlive us.
        remove: files to delete once it has ended.
        folder: where it starts; None for our own working directory.

    Raises:
        ServiceError: the guard could not start it.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path | None,
        env: Mapping[str, str],
        grace: float = 2.0,
        detached: bool = False,
        remove: Sequence[str] = (),
        folder: Path | None = None,
    ) -> None:
        order = {"command": list(command), "log": str(log or ""), "grace": grace, "detach": detached}
        order |= {"remove": list(remove), "folder": str(folder or "")}
        self._grace = grace
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_GUARD), json.dumps(order)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # No file of the folder that we happen to run in counts as a module, in the child or in its own children.
            env={**env, "PYTHONSAFEPATH": "1"},
            start_new_session=True,
        )
        assert self._guard.stdout is not None  # noqa: S101 - PIPE above
        with self._guard.stdout as hello:
            line = hello.readline()
        if detached:
            self._guard.wait()
        if not line:
            self._close()
            self._guard.wait()
            raise ServiceError(f"{command[0]} could not be started", "Look at the messages above.")
        pids = json.loads(line)
        self.guard = ProcessId.of(pids["guard"])
        self.child = ProcessId.of(pids["child"])

    def alive(self) -> bool:
        """Whether the child still runs."""
        return self.child.alive()

    def wait(self, seconds: float | None = None) -> int:
        """Wait for the child to end by itself; its exit status (143 where it was stopped).

        Raises:
            subprocess.TimeoutExpired: it still runs after `seconds`.
        """
        status = self._guard.wait(seconds)
        self._close()
        return status

    def keep(self) -> None:
        """Let the detached child outlive us; call it once `guard` and `child` are on record."""
        assert self._guard.stdin is not None  # noqa: S101 - PIPE above
        self._guard.stdin.write(b"stay")
        self._close()

    def stop(self) -> None:
        """End the child's process group: SIGTERM, the grace, SIGKILL."""
        self._close()
        stop_pair(self.guard, self.child, self._grace)
        if self._guard.poll() is None:
            self._guard.wait()

    def _close(self) -> None:
        if self._guard.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._guard.stdin.close()


def stop_pair(guard: ProcessId, child: ProcessId, grace: float) -> None:
    """End a guard and its child; processes that only reuse their pids are left alone."""
    guard.send(signal.SIGTERM)
    guard.wait_gone(grace + 12)
    guard.send(signal.SIGKILL)
    # A guard that was itself killed leaves the group to us.
    child.send(signal.SIGKILL, group=True)
    child.wait_gone(5)


def tail(path: Path, lines: int = 15) -> str:
    """The last lines of a log, for an error message."""
    try:
        return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
    except OSError:
        return "(no log)"


def _started(pid: int) -> str:
    """When a process started, as an opaque text; empty where there is none or it is a zombie."""
    if _LINUX:
        try:
            # Field 2 is the name in brackets and may hold anything, so count from its end: state is 3, start is 22.
            fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        except OSError:
            return ""
        return "" if fields[0] in "ZX" else f"{boot}:{fields[19]}"
    import psutil

    try:
        process = psutil.Process(pid)
        return "" if process.status() == psutil.STATUS_ZOMBIE else repr(process.create_time())
    except psutil.Error:
        return ""
