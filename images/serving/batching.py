"""Dynamic batching: runs of the network that several threads ask for at nearly the same time become one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = ["Batcher", "batching_gain"]

Floats = NDArray[np.float32]
Run = Callable[[Floats], Floats]

_TRIAL = 4  # images in the trial run
_TOO_LONG = 0.05  # seconds: a run of one image that takes longer keeps a CPU busy by itself


@dataclass
class _Group:
    """Inputs of one shape that will share a run."""

    parts: list[Floats] = field(default_factory=list)
    size: int = 0
    full: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)
    output: Floats | None = None
    error: BaseException | None = None


class Batcher:
    """Runs `run` for many threads at once; call it in place of `run`.

    The first thread to come with a shape leads: it waits until its group is full, the time is over and a run may
    begin; while other runs are under way the group goes on growing, so that load alone makes batches.

    Args:
        run: float32 (n, 3, h, w) to (n, …).
        largest: images in one run at most.
        wait: seconds that a leader waits for others.
        streams: runs at the same time.
        observe: told the number of images of each run; called in a worker's thread.
    """

    def __init__(
        self, run: Run, largest: int, wait: float, streams: int = 1, observe: Callable[[int], None] | None = None
    ) -> None:
        self._run = run
        self._largest = largest
        self._wait = wait
        self._running = threading.BoundedSemaphore(streams)
        self._observe = observe or (lambda size: None)
        self._lock = threading.Lock()
        self._open: dict[tuple[int, ...], _Group] = {}

    def __call__(self, batch: Floats) -> Floats:
        """The output for `batch`, alone or among others."""
        shape = batch.shape[1:]
        with self._lock:
            group = self._open.get(shape)
            leads = group is None or group.size + len(batch) > self._largest
            if group is None or leads:
                group = self._open[shape] = _Group()
            place = group.size
            group.parts.append(batch)
            group.size += len(batch)
            if group.size >= self._largest:
                group.full.set()
        if leads:
            self._lead(group, shape)
        else:
            group.done.wait()
        if group.error is not None:
            # One broken run fails each of its requests; every thread raises an exception of its own.
            raise RuntimeError(f"the network failed: {group.error}") from group.error
        if group.output is None:
            raise RuntimeError("the network gave no output")
        return group.output[place : place + len(batch)]

    def _lead(self, group: _Group, shape: tuple[int, ...]) -> None:
        group.full.wait(self._wait)
        with self._running:
            with self._lock:
                if self._open.get(shape) is group:
                    del self._open[shape]
            try:
                group.output = self._run(group.parts[0] if len(group.parts) == 1 else np.concatenate(group.parts))
                self._observe(group.size)
            except BaseException as error:
                group.error = error
            finally:
                group.done.set()


def batching_gain(run: Run, batch: Floats) -> float:
    """How many times faster images go through `run` by fours than one by one, measured with `batch` (1, 3, h, w).

    1.0 without a trial where one image alone takes so long that the machine is busy with it: on CPUs compute-bound
    networks gain nothing.
    """
    single = min(_seconds(run, batch) for _ in range(2))
    if single > _TOO_LONG:
        return 1.0
    four = np.repeat(batch, _TRIAL, axis=0)
    return _TRIAL * single / max(1e-9, min(_seconds(run, four) for _ in range(2)))


def _seconds(run: Run, batch: Floats) -> float:
    begun = time.perf_counter()
    run(batch)
    return time.perf_counter() - begun
