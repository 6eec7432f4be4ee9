"""The backlog: what the event loop hands to a thread that may be slow, without ever waiting for it."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["Backlog"]

_log = logging.getLogger(__name__)
_Item = TypeVar("_Item")


class Backlog(Generic[_Item]):
    """A bounded queue and the thread that empties it a few times a second.

    The thread looks by the clock instead of being woken: so handing something over costs the loop next to nothing,
    and the thread finds work enough at once to be worth its turn.

    Args:
        name: of the thread.
        work: told what has come since, oldest first; also if that is nothing.
        most: items held; more are lost.
        every: seconds between looks.
    """

    def __init__(self, name: str, work: Callable[[list[_Item]], None], most: int, every: float = 0.1) -> None:
        self.lost = 0  # only ever grows, and only the loop writes it
        self._work = work
        self._most = most
        self._every = every
        self._items: deque[_Item] = deque()
        self._closing = threading.Event()
        # A daemon: one that hangs in a full pipe must not keep the process.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, item: _Item) -> None:
        """Hand over an item; it is lost where too many wait already."""
        if len(self._items) >= self._most:
            self.lost += 1
        else:
            self._items.append(item)

    def close(self, seconds: float) -> None:
        """Let the thread finish what is there, but wait no longer than `seconds`."""
        self._closing.set()
        self._thread.join(seconds)

    def _run(self) -> None:
        while not self._closing.wait(self._every):
            self._turn()
        self._turn()

    def _turn(self) -> None:
        try:
            self._work([self._items.popleft() for _ in range(len(self._items))])
        except Exception:
            _log.exception("%s failed", self._thread.name)
