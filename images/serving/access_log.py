"""The access log: one line of JSON on standard output for each call, and never an image or a credential in it.

Progress and errors go to standard error; standard output holds nothing but these lines. They are written by a thread,
so that a reader that has stopped reading costs lines and not requests.
"""

from __future__ import annotations

import json
import logging
import os
import re
import select
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from haechi.components.shared.errors import HaechiError

from .backlog import Backlog
from .service import Call, Outcome

__all__ = ["AccessLog"]

_WAITING = 5000  # lines that wait for the reader of standard output
_FAILURES = 100  # lines a second for calls that failed: a flood of them must not fill the disk
_TEXT = 256  # characters of anything that a caller has a say in
_TRACE = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-")

_lines = logging.getLogger("haechi.access")


class AccessLog:
    """Writes one line a call: all that failed, within limits, and a share of the others.

    Health checks and scrapes are left out unless they fail.

    Args:
        share: of the good calls that get a line, 0 to 1; the request id alone decides which.
        count: told how many lines were `written`, `left_out` (failures beyond the limit) and `lost` (nobody read them).
        failures: lines a second for calls that failed; then one line says how many more there were.
    """

    def __init__(
        self, share: float = 1.0, count: Callable[[str, int], None] | None = None, failures: int = _FAILURES
    ) -> None:
        self._share = int(share * 2**32)
        self._count = count or (lambda outcome, number: None)
        self._failures = failures
        self._second, self._failed = 0, 0
        # These only ever grow: the loop adds to them, and the thread remembers how much of it has been told.
        self._left_out, self._told = 0, Counter[str]()
        self._told_at = time.monotonic()
        self._closing = False
        if not _lines.handlers:
            _lines.addHandler(_OUTPUT)
        _lines.setLevel(logging.INFO)
        _lines.propagate = False
        self._backlog = Backlog("access log", self._write, _WAITING)

    def started(self, call: Call) -> None:
        """Nothing is known yet."""

    def finished(self, call: Call) -> None:
        """Hand a line to the thread, if the call gets one."""
        outcome = call.outcome
        if call.probe and call.status in (
            200,
            503,
        ):  # not ready is an answer, asked for every second while a model loads
            return
        if outcome is Outcome.OK:
            if call.probe or zlib.crc32(call.request_id.encode()) >= self._share:
                return
        elif not self._may_fail():
            return
        self._backlog.put(_entry(call, outcome))

    def close(self, seconds: float = 1.0) -> None:
        """Write what waits, but not longer than `seconds`."""
        self._closing = True
        self._backlog.close(seconds)

    def _may_fail(self) -> bool:
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._failed = second, 0
        self._failed += 1
        if self._failed > self._failures:
            self._left_out += 1
            return False
        return True

    def _write(self, entries: list[dict[str, Any]]) -> None:
        gone = _OUTPUT.lost
        for entry in entries:
            # ASCII only: a line break, an escape sequence or a direction mark in a path stays a \u escape in its quotes.
            _lines.info(json.dumps(_presentable(entry), separators=(",", ":")))
        self._count("written", len(entries) - (_OUTPUT.lost - gone))
        missing = Counter(left_out=self._left_out, lost=self._backlog.lost + _OUTPUT.lost) - self._told
        if missing and (self._closing or time.monotonic() - self._told_at >= 1):
            self._told_at = time.monotonic()
            self._told += missing
            _lines.info(json.dumps({"time": _moment(time.time()), "event": "lines missing", **missing}))
            for outcome, number in missing.items():
                self._count(outcome, number)


def _entry(call: Call, outcome: Outcome) -> dict[str, Any]:
    """What is told of a call; made on the loop, so it only picks, and holds on to no image."""
    return {
        "time": time.time(),
        "request_id": call.request_id,
        "trace": call.traceparent,
        "protocol": call.protocol,
        "method": call.method,
        "path": call.path,
        "model": call.model,
        "version": call.engine.model.version if call.engine else "",
        "status": call.status,
        "outcome": outcome,
        "error": _reason(call),
        "caller": call.caller,
        "camera": call.camera,
        "bytes_in": call.bytes_in,
        "images": len(call.request.images) if call.request else None,
        "detections": sum(map(len, (item.detections for item in call.predictions))) if call.predictions else None,
        "total_ms": call.seconds,
        "stages": dict(call.stages.seconds),
    }


def _reason(call: Call) -> str:
    """Why it failed, in the words that the caller got; of what nobody foresaw only the kind, as it may quote anything."""
    error = call.error
    if error is None:
        return ""
    # As text at once: an exception holds its frames, and they hold the images.
    told = isinstance(error, HaechiError) or 400 <= call.status < 500
    return f"{type(error).__name__}: {error}"[:_TEXT] if told else type(error).__name__


def _presentable(entry: dict[str, Any]) -> dict[str, Any]:
    """The line: times as text and milliseconds, nothing empty, nothing long."""
    trace = _TRACE.match(entry["trace"])
    line = entry | {
        "time": _moment(entry["time"]),
        "trace": trace[1] if trace else "",
        "total_ms": round(entry["total_ms"] * 1000, 2),
        "stages_ms": {stage: round(seconds * 1000, 2) for stage, seconds in entry["stages"].items()},
    }
    del line["stages"]
    short = {name: value[:_TEXT] if isinstance(value, str) else value for name, value in line.items()}
    return {name: value for name, value in short.items() if value not in ("", None, {})}


def _moment(seconds: float) -> str:
    """RFC 3339 in UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class _StandardOutput(logging.Handler):
    """Writes to the descriptor itself: a thread that hangs there holds no lock that the end of the process needs."""

    def __init__(self) -> None:
        super().__init__()
        self.lost = 0

    def createLock(self) -> None:
        """None: one thread alone writes, and logging takes every handler's lock when the process ends."""
        self.lock = None

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line; without a reader it is gone."""
        data = f"{record.getMessage()}\n".encode()
        try:
            while data:
                data = data[_write(data) :]
        except OSError:
            self.lost += 1


def _write(data: bytes) -> int:
    if sys.__stdout__ is None:
        raise OSError("the process was started without a standard output; descriptor 1 is something else")
    try:
        return os.write(1, data)
    except BlockingIOError:
        # Whoever started us has made the pipe non-blocking.
        select.select([], [1], [])
        return 0


_OUTPUT = _StandardOutput()
