"""Batching: many threads get what they asked for, in fewer runs."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numpy.typing import NDArray

from haechi.serving.batching import Batcher, batching_gain

Floats = NDArray[np.float32]


def image(value: float, side: int = 4, count: int = 1) -> Floats:
    return np.full((count, 3, side, side), value, dtype=np.float32)


class Network:
    """Gives each image's first value; counts its runs."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.sizes: list[int] = []
        self.at_once = self.most_at_once = 0
        self._seconds = seconds
        self._lock = threading.Lock()

    def __call__(self, batch: Floats) -> Floats:
        with self._lock:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        time.sleep(self._seconds)
        if np.isnan(batch).any():
            raise ValueError("nan")
        with self._lock:
            self.sizes.append(len(batch))
            self.at_once -= 1
        return batch[:, 0, 0, :1]


def ask(batcher: Batcher, inputs: list[Floats]) -> list[Floats]:
    with ThreadPoolExecutor(len(inputs)) as threads:
        return list(threads.map(batcher, inputs))


def test_each_thread_gets_its_own_rows_from_shared_runs() -> None:
    network = Network(0.02)
    batcher = Batcher(network, largest=8, wait=0.05)
    answers = ask(batcher, [image(value, count=1 + value % 2) for value in range(16)])
    for value, answer in enumerate(answers):
        assert answer.ravel().tolist() == [value] * (1 + value % 2)
    assert sum(network.sizes) == 24 and len(network.sizes) < 10 and max(network.sizes) <= 8


def test_shapes_never_share_a_run() -> None:
    network = Network(0.01)
    answers = ask(Batcher(network, 8, 0.02), [image(value, side=4 + 2 * (value % 2)) for value in range(10)])
    assert [answer.item() for answer in answers] == list(range(10))


def test_a_lone_request_waits_no_longer_than_it_must() -> None:
    network = Network()
    begun = time.monotonic()
    assert Batcher(network, 8, 0.01)(image(3)).item() == 3
    assert time.monotonic() - begun < 1
    assert network.sizes == [1]


def test_a_request_larger_than_a_batch_runs_alone() -> None:
    network = Network()
    assert len(Batcher(network, 4, 10.0)(image(1, count=9))) == 9, "and does not wait for more"


def test_no_more_runs_at_once_than_streams() -> None:
    network = Network(0.01)
    ask(Batcher(network, 1, 0.0, streams=2), [image(value) for value in range(12)])
    assert network.most_at_once == 2


def test_a_failed_run_fails_its_requests_and_no_later_one() -> None:
    network = Network(0.01)
    batcher = Batcher(network, 8, 0.01)
    with pytest.raises(RuntimeError, match="nan"):
        batcher(image(float("nan")))
    assert batcher(image(2)).item() == 2


def test_runs_are_observed() -> None:
    seen: list[int] = []
    ask(Batcher(Network(0.01), 4, 0.05, observe=seen.append), [image(value) for value in range(8)])
    assert sum(seen) == 8


@pytest.mark.parametrize(
    ("run", "least", "most"),
    [
        (lambda batch: time.sleep(0.01), 3.0, 4.5),  # a run costs the same whatever is in it
        (lambda batch: time.sleep(0.01 * len(batch)), 0.8, 1.3),  # each image costs the same
        (lambda batch: time.sleep(0.06), 1.0, 1.0),
    ],
)
def test_the_gain_is_measured(run: Network, least: float, most: float) -> None:
    assert least <= batching_gain(run, image(0)) <= most
