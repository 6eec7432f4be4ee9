"""Figures of the GPUs, where NVIDIA's library and a driver are present; never in the way of a scrape."""

from __future__ import annotations

import importlib
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

__all__ = ["GpuCollector"]

_PATIENCE = 0.2  # seconds that a scrape waits for the driver

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Reading:
    gpu: str
    name: str
    busy: float | None
    used: float
    total: float


class GpuCollector(Collector):
    """Asks the driver at each scrape, in a thread: one that hangs costs a scrape 0.2 s and the figures, no more.

    A process without `pynvml`, a driver or a GPU has no such figures.
    """

    def __init__(self) -> None:
        self._readings: list[_Reading] = []
        self._thread: threading.Thread | None = None
        self._absent = False
        self._library: Any = None

    def describe(self) -> list[Metric]:
        """Empty: registering must not ask the driver."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Use and memory by GPU; the readings of the last time while the driver is slow."""
        if self._absent:
            return
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._look, name="gpu", daemon=True)
            self._thread.start()
        self._thread.join(_PATIENCE)
        readings = self._readings
        if not readings:
            return
        labels = ("gpu", "name")
        busy = GaugeMetricFamily("haechi_gpu_utilization_ratio", "Share of time that a kernel ran.", labels=labels)
        used = GaugeMetricFamily("haechi_gpu_memory_used_bytes", "Memory in use by all processes.", labels=labels)
        total = GaugeMetricFamily("haechi_gpu_memory_total_bytes", "Memory there is.", labels=labels)
        for reading in readings:
            for family, value in ((busy, reading.busy), (used, reading.used), (total, reading.total)):
                if value is not None:
                    family.add_metric((reading.gpu, reading.name), value)
        yield from (busy, used, total)

    def _look(self) -> None:
        try:
            if self._library is None:
                library = importlib.import_module("pynvml")
                library.nvmlInit()
                self._library = library
        except Exception as error:
            # No package, no driver, no GPU: the same to us, and as good as always so.
            _log.info("no figures of GPUs: %s", error)
            self._absent = True
            return
        try:
            self._readings = [_read(self._library, index) for index in range(self._library.nvmlDeviceGetCount())]
        except Exception as error:
            self._readings = []
            _log.info("no figures of GPUs this time: %s", error)


def _read(library: Any, index: int) -> _Reading:
    handle = library.nvmlDeviceGetHandleByIndex(index)
    memory = library.nvmlDeviceGetMemoryInfo(handle)
    name = library.nvmlDeviceGetName(handle)
    try:
        busy = library.nvmlDeviceGetUtilizationRates(handle).gpu / 100
    except Exception:
        busy = None  # a slice of a card does not tell
    return _Reading(str(index), name if isinstance(name, str) else name.decode(), busy, memory.used, memory.total)
