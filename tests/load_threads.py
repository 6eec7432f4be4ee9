"""Threads that ask a server without a pause while a test does something else."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Self

__all__ = ["LoadThreads"]


class LoadThreads:
    """Runs `works` side by side for as long as the block lasts; each looks at `ended` again and again.

    Attributes:
        ended: true from the end of the block on.
        seen: what the works count.
        wrong: what they complain of; an exception ends its work and counts as a complaint.
    """

    def __init__(self, *works: Callable[[], None]) -> None:
        self.seen: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=[work]) for work in works]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()

    @property
    def ended(self) -> bool:
        return self._end.is_set()

    def _work(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self.wrong.append(repr(error))
