"""The pool: a bounded number of threads and of requests that wait for one, so that the event loop never does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from haechi.components.shared.errors import DeadlineError, OverloadError

__all__ = ["Pool"]

_Result = TypeVar("_Result")


class Pool:
    """Threads that outlive every model, so that a swap of models never meets a closed pool.

    Args:
        workers: requests worked on at the same time.
        queue: requests that may wait beyond those; one more is refused at once.
    """

    def __init__(self, workers: int, queue: int) -> None:
        self.workers = workers
        self.queue = queue
        self._threads = _threads(workers)
        self._taken = 0

    @property
    def taken(self) -> int:
        """Requests at hand, running and waiting."""
        return self._taken

    async def run(self, work: Callable[[], _Result], seconds: float | None = None) -> _Result:
        """Run `work` in a thread.

        Args:
            work: what to do.
            seconds: time until nobody wants the answer any more; work that has not begun by then never does.

        Raises:
            OverloadError: as many requests wait as may.
            DeadlineError: the time is over.
        """
        if self._taken >= self.workers + self.queue:
            raise OverloadError(f"the server holds {self._taken} requests already", "Try again in a moment.")
        # Counted until the thread is free again, also where the client has gone meanwhile.
        self._taken += 1
        loop = asyncio.get_running_loop()
        deadline = None if seconds is None else time.monotonic() + seconds
        future = self._threads.submit(_in_time, work, deadline)
        future.add_done_callback(lambda _: _on_loop(loop, self._release))
        try:
            async with asyncio.timeout(seconds):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            raise DeadlineError(f"no answer within {seconds} s", "Send fewer images, or allow more time.") from None

    def resize(self, workers: int) -> None:
        """Work on another number of requests at a time from now on; what has begun or waits ends in the old threads."""
        if workers != self.workers:
            former, self._threads = self._threads, _threads(workers)
            self.workers = workers
            former.shutdown(wait=False)

    def close(self) -> None:
        """Let running work end and the threads go."""
        self._threads.shutdown(wait=True)

    def _release(self) -> None:
        self._taken -= 1


def _threads(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="worker")


def _in_time(work: Callable[[], _Result], deadline: float | None) -> _Result:
    if deadline is not None and time.monotonic() >= deadline:
        raise DeadlineError("the request waited past its deadline", "Try again in a moment, or allow more time.")
    return work()


def _on_loop(loop: asyncio.AbstractEventLoop, work: Callable[[], None]) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(work)
