"""Counts of samples: what became of the images of each camera and hour, so that samples can speak of all of them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

__all__ = ["Counts", "Row"]

_MAX_ROWS = 50_000  # camera-hours: 256 cameras and a store that is away for a week


class Row(NamedTuple):
    """What counts are kept by: a camera's folder, an hour in whole hours since 1970 (UTC), and what answered."""

    service: str
    hour: int
    camera: str
    model: str
    version: str


class Counts:
    """What became of the images of each camera and hour since it was last written down. Safe between threads.

    Names: `seen` (could be drawn), `opted_out` (could not), `dropped_quota` (drawn, but thinned), `kept` (decided to
    be kept), and of these `stored`, `dropped_queue` (no room to wait), `dropped_store` (the store did not take it),
    `dropped_exit` (the process ended before), `dropped_error` (it could not be written for another reason).

    Args:
        told: model and outcome of each sample, for metrics.
    """

    def __init__(self, told: Callable[[str, str], None] = lambda model, outcome: None) -> None:
        self._told = told
        self._lock = threading.Lock()
        self._rows: dict[Row, Counter[str]] = {}
        self._seen: dict[Row, int] = {}

    def add(self, row: Row, name: str, number: int = 1) -> int:
        """Count; for `seen`, the number that this process has seen of the row in all, else 0."""
        total = 0
        with self._lock:
            counter = self._rows.get(row)
            if counter is None:
                counter = self._new(row)
            counter[name] += number
            if name == "seen":
                total = self._seen[row] = self._seen.get(row, 0) + number
        if name == "stored" or name.startswith("dropped"):
            self._told(row.model, name)
        return total

    def take(self) -> dict[Row, Counter[str]]:
        """All counts since the last call."""
        with self._lock:
            rows, self._rows = self._rows, {}
            newest = max((row.hour for row in self._seen), default=0)
            self._seen = {row: seen for row, seen in self._seen.items() if row.hour >= newest - 1}
        return rows

    def _new(self, row: Row) -> Counter[str]:
        if len(self._rows) >= _MAX_ROWS:
            oldest = next(iter(self._rows))
            del self._rows[oldest]
            self._seen.pop(oldest, None)
        return self._rows.setdefault(row, Counter())
