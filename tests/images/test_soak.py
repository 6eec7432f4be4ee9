"""Load for a while: every request is answered well, and memory, files and threads stay where they were after the warm-up.

HAECHI_SOAK_SECONDS makes it as long as you like; 600 is what a release wants.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import tritonclient.grpc

from haechi.components.shared.images import decode, encode_jpeg
from tests.load_threads import LoadThreads
from tests.serving_process import Running, running
from tests.tiny_models import paint, shade

SECONDS = float(os.environ.get("HAECHI_SOAK_SECONDS", "40"))
# Width, height, and how many pixels become one in the model, whose sides are 320 at most.
SIZES = ((640, 640, 2), (1280, 640, 4), (1920, 960, 6), (640, 1280, 4))


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    with running(folder, "--name", "door", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        yield process


def pictures() -> list[bytes]:
    """One scene as cameras of several sizes send it."""
    cells = {(2, 3): shade(0, 0.9), (4, 4): shade(1, 0.7)}
    return [encode_jpeg(decode(paint(cells, width, height, 32 * gain)), 95) for width, height, gain in SIZES]


class Load(LoadThreads):
    """Threads that ask without a pause until the end, each in its own way."""

    def __init__(self, server: Running) -> None:
        self._server = server
        self._images = pictures()
        super().__init__(self._v1, self._v2, self._grpc, self._refused)

    def _turns(self, kind: str) -> Iterator[bytes]:
        while not self.ended:
            yield self._images[self.seen[kind] % len(self._images)]
            self.seen[kind] += 1

    def _v1(self) -> None:
        with httpx.Client(base_url=self._server.url, timeout=60) as client:
            for image in self._turns("v1"):
                told = client.post("/v1/models/door:predict", content=image).json()
                assert [row["class"] for row in told["predictions"][0]["detections"]] == ["person", "dog"], told

    def _v2(self) -> None:
        for image in self._turns("v2"):  # a connection each
            told = httpx.post(f"{self._server.url}/v2/models/door/infer", content=image, timeout=60).json()
            assert told["outputs"][0]["data"] == [2], told

    def _grpc(self) -> None:
        with tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{self._server.grpc}") as client:
            for image in self._turns("grpc"):
                tensor = tritonclient.grpc.InferInput("images", [1], "BYTES")
                tensor.set_data_from_numpy(np.array([image], dtype=object))
                assert client.infer("door", [tensor]).as_numpy("num_detections").tolist() == [2]

    def _refused(self) -> None:
        with httpx.Client(base_url=self._server.url, timeout=60) as client:
            for image in self._turns("refused"):
                assert client.post("/v1/models/door:predict", content=image[:-5000]).status_code == 400
                assert client.get("/metrics").status_code == 200
                time.sleep(0.02)


def soak(process: psutil.Process, seconds: float) -> list[tuple[float, int, int]]:
    """Memory in MiB, files and threads, four times a second."""
    seen = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        seen.append((process.memory_info().rss / 2**20, process.num_fds(), process.num_threads()))
        time.sleep(0.25)
    return seen


def test_under_load_memory_is_flat_after_the_warm_up(server: Running) -> None:
    process = psutil.Process(server.process.pid)
    with Load(server) as load:
        soak(process, min(60.0, SECONDS / 4))  # arenas of the allocator fill for the first thousands of requests
        seen = soak(process, SECONDS)
    assert load.wrong == [] and all(load.seen[kind] > SECONDS for kind in ("v1", "v2", "grpc")), load.seen
    half = len(seen) // 2
    first, second = seen[:half], seen[half:]
    memory = [statistics.median(row[0] for row in rows) for rows in (first, second)]
    print(f"\n{dict(load.seen)} MiB {memory[0]:.0f} -> {memory[1]:.0f}, peak {max(row[0] for row in seen):.0f}")
    # The median hardly moves: 10 kB left behind by each request would be 10 MiB within the shortest run.
    assert memory[1] < memory[0] + 3, memory
    assert max(row[1] for row in second) <= max(row[1] for row in first) + 5
    # grpc's core makes threads while a busy machine lets its work pile up; one left by each hundredth request would be 40.
    assert max(row[2] for row in second) <= max(row[2] for row in first) + 10
