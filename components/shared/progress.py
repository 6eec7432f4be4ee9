"""Progress on standard error: plain lines that read well in a pod's log and in a terminal."""

from __future__ import annotations

import sys
import time
from datetime import UTC, datetime

from .errors import printable

__all__ = ["Progress", "say"]


def say(message: str) -> None:
    """Write one line with the time of day (UTC), without control characters of others."""
    sys.stderr.write(f"{datetime.now(UTC):%H:%M:%S} {printable(message)}\n")
    sys.stderr.flush()


class Progress:
    """Counts towards a total and says so every few seconds, and once at the end.

    Args:
        what: what is counted, such as `frames checked`.
        total: how many there will be; 0 where unknown.
        every: seconds between lines.
    """

    def __init__(self, what: str, total: int = 0, every: float = 5.0) -> None:
        self.what, self.total, self.every = what, total, every
        self.done = 0
        self._start = self._last = time.monotonic()

    def step(self, count: int = 1) -> None:
        """Count `count` more."""
        self.done += count
        if time.monotonic() - self._last >= self.every:
            self._last = time.monotonic()
            self._say()

    def close(self) -> None:
        """Say the final count."""
        self._say()

    def _say(self) -> None:
        seconds = max(1e-9, time.monotonic() - self._start)
        of = f" of {self.total}" if self.total else ""
        rate = self.done / seconds
        say(f"{self.done}{of} {self.what} ({rate:.{0 if rate >= 10 else 1}f}/s)")
