"""The guard of one child process: started beside a service, it takes the whole family down when its owner is gone.

Run as a script with one JSON argument; standard library only, so that it is up in milliseconds. The owner holds the
write end of the guard's standard input: when the owner ends, however it ends (SIGKILL included), the guard reads
end-of-file and kills the child's process group. That works on every POSIX system; Linux adds two nets below it:
orphans of the family fall to the guard (PR_SET_CHILD_SUBREAPER), and the child gets SIGTERM when the guard itself is
killed (PR_SET_PDEATHSIG).

The argument: `command` (list), `log` (file to append to, or "" to inherit), `grace` (seconds from SIGTERM to SIGKILL),
`detach` (true: be no child of the owner, and let it say `stay`), `remove` (files to delete at the end), `folder` (where
the child starts; "" for where the owner is).
The guard writes one JSON line `{"guard": pid, "child": pid}` to its standard output once the child runs. An owner that has
noted these may write `stay` to the guard's standard input: from then on the child outlives its owner.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["main"]

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def main(order: dict[str, Any]) -> NoReturn:
    """Start the child, watch it and the owner, and end with the child's exit status (128 + n for signal n)."""
    if order["detach"] and os.fork():
        os._exit(0)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    wake, bell = os.pipe()
    os.set_blocking(bell, False)
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(bell, warn_on_full_buffer=False)
    for number in (*_STOPPING, signal.SIGCHLD):
        signal.signal(number, _ring)
    spare = _open_streams(order["log"])
    child = _start(order["command"], spare, order["folder"])
    os.write(1, json.dumps({"guard": os.getpid(), "child": child}).encode() + b"\n")
    _release_streams(1)
    status = _watch(child, wake)
    _end_family(child, order["grace"])
    for name in order["remove"]:
        Path(name).unlink(missing_ok=True)
    os._exit(os.waitstatus_to_exitcode(status) % 256 if status is not None and os.WIFEXITED(status) else 128 + 15)


def _ring(number: int, frame: object) -> None:
    """Do nothing: the wake-up pipe carries the signal's number to the loop."""


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _open_streams(log: str) -> int:
    """The descriptor that the child writes to: the log, or our own standard error."""
    if not log:
        return 2
    return os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def _start(command: list[str], output: int, folder: str) -> int:
    child = os.fork()
    if child:
        with contextlib.suppress(OSError):  # both sides set it: whichever runs first
            os.setpgid(child, child)
        return child
    try:
        os.setpgid(0, 0)
        _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        signal.set_wakeup_fd(-1)
        for number in (*_STOPPING, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if folder:
            os.chdir(folder)
        os.execvp(command[0], command)  # noqa: S606 - the owner chose the command
    except OSError as error:
        os.write(2, f"cannot start {command[0]}: {error}\n".encode())
    finally:
        os._exit(127)


def _release_streams(*numbers: int) -> None:
    """Let go of the owner's streams: a reader of its output must not wait for us."""
    null = os.open(os.devnull, os.O_RDWR)
    for number in numbers:
        os.dup2(null, number)
    os.close(null)


def _watch(child: int, wake: int) -> int | None:
    """Wait until the child ends (its wait status), the owner is gone, or a signal asks us to stop (None)."""
    sources = [wake, 0]
    while True:
        ready = select.select(sources, [], [])[0]
        if 0 in ready:
            if os.read(0, 64) != b"stay":
                return None
            sources.remove(0)
            _release_streams(0, 2)
        if wake in ready:
            asked = os.read(wake, 64)
            if any(number in asked for number in _STOPPING):
                return None
            ended = _reap()
            if child in ended:
                return ended[child]


def _reap() -> dict[int, int]:
    """Collect every child that has ended: pid to wait status."""
    ended: dict[int, int] = {}
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            ended[pid] = status
    return ended


def _end_family(child: int, grace: float) -> None:
    """SIGTERM to the group, SIGKILL after the grace; then whatever left the group and fell to us."""
    for number, patience in ((signal.SIGTERM, grace), (signal.SIGKILL, 5.0)):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child, number)
        deadline = time.monotonic() + patience
        while _group_lives(child) and time.monotonic() < deadline:
            _reap()
            time.sleep(0.02)
    deadline = time.monotonic() + 5.0
    while (orphans := _own_children()) and time.monotonic() < deadline:
        for pid in orphans:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _reap()
        time.sleep(0.02)


def _group_lives(group: int) -> bool:
    _reap()
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _own_children() -> list[int]:
    """Living children of this process (Linux; elsewhere none, since orphans do not fall to us there)."""
    with contextlib.suppress(OSError):
        return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    return []


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
