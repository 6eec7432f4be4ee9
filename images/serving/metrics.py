"""Metrics: what `/metrics` tells Prometheus of the calls, the models, their detections and this process.

Label values are bounded: a model's name counts only where it is served, class names are those of the model that is
served now, and what belongs to a version is read from the models at each scrape, so that no swap leaves anything behind.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prometheus_client import (
    CollectorRegistry,
    Counter,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from haechi.components.shared.detections import Detections

from .app import allow
from .engine import Models
from .gpu import GpuCollector
from .inference import Prediction
from .service import Call, Outcome, Role
from .swap import Swap

__all__ = ["Metrics"]

_DURATIONS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0)
_STAGES = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0)
_BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64)
_TOGETHER = 256  # images
_CONFIDENCES = tuple(round(0.05 * step, 2) for step in range(1, 21))


class Metrics:
    """Watches calls, and answers `/metrics`; other rooms count by its methods, from any thread.

    Args:
        models: what is served.
    """

    def __init__(self, models: Models) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry = CollectorRegistry()
        self._models = models
        self._requests = Counter(
            "haechi_requests",
            "Calls that have ended, but for health checks and scrapes; protocol `http` is no prediction.",
            ("model", "protocol", "outcome"),
            registry=registry,
        )
        self._durations = Histogram(
            "haechi_request_duration_seconds",
            "From the head of a request to the end of its answer, of predictions that a model was found for.",
            ("model", "protocol"),
            buckets=_DURATIONS,
            registry=registry,
        )
        self._stages = Histogram(
            "haechi_stage_duration_seconds",
            "Of a request's stages: queue (for a thread), decode (with letterbox), infer (with the wait for a batch), post.",
            ("model", "stage"),
            buckets=_STAGES,
            registry=registry,
        )
        self._batches = Histogram(
            "haechi_batch_size", "Images in one run of the network.", ("model",), buckets=_BATCHES, registry=registry
        )
        self._swaps = Counter("haechi_swaps", "Models exchanged, or not.", ("model", "outcome"), registry=registry)
        self._samples = Counter(
            "haechi_samples",
            "Requests chosen as samples, by what became of them.",
            ("model", "outcome"),
            registry=registry,
        )
        self._lines = Counter("haechi_log_lines", "Lines of the access log.", ("outcome",), registry=registry)
        self._spans = Counter("haechi_spans", "Spans sent to the collector.", ("outcome",), registry=registry)
        self._children: dict[tuple[object, ...], Any] = {}
        self._live: dict[int, Call] = {}
        self._found = _Found()
        registry.register(_Served(models, self._live, self._found))
        registry.register(GpuCollector())
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)

    def started(self, call: Call) -> None:
        """One more in flight."""
        self._live[id(call)] = call

    def finished(self, call: Call) -> None:
        """Count a call."""
        self._live.pop(id(call), None)
        outcome = call.outcome
        if call.probe:
            return
        self._child(self._requests, call.model, call.protocol, outcome).inc()
        if call.engine is None:
            return
        self._child(self._durations, call.model, call.protocol).observe(call.seconds)
        for stage, seconds in dict(call.stages.seconds).items():
            self._child(self._stages, call.model, stage).observe(seconds)
        if call.predictions and outcome is Outcome.OK:
            self._found.add(call.model, call.engine.model.classes, call.predictions)

    def batches(self, model: str) -> Callable[[int], None]:
        """What to tell the number of images of each run of a model's network."""
        return self._batches.labels(model).observe

    def announce(self, model: str) -> None:
        """Tell of a model's swaps as zero: to Prometheus, a counter that appears with its first event did not rise."""
        for outcome in Swap:
            self._swaps.labels(model, outcome)

    def swapped(self, model: str, outcome: str) -> None:
        """Count an attempt to exchange a served model; `outcome` is one of a few words."""
        self._swaps.labels(model, outcome).inc()

    def sampled(self, model: str, outcome: str) -> None:
        """Count a request chosen as a sample; `outcome` is one of a few words."""
        self._samples.labels(model, outcome).inc()

    def logged(self, outcome: str, number: int) -> None:
        """Count lines of the access log."""
        self._lines.labels(outcome).inc(number)

    def traced(self, outcome: str, number: int) -> None:
        """Count spans."""
        self._spans.labels(outcome).inc(number)

    def routes(self) -> list[Route]:
        """`/metrics`, for whoever may predict: what a camera sees is nobody else's business."""
        return [Route("/metrics", self._answer)]

    async def _answer(self, request: Request) -> Response:
        await allow(request, Role.PREDICT)
        # In a thread, as hundreds of lines take milliseconds and a GPU's driver may take longer.
        body, content_type = await asyncio.to_thread(self.text, request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})

    def text(self, accept: str = "") -> tuple[bytes, str]:
        """All of it, as Prometheus text or as OpenMetrics where `accept` asks for it; and its content type."""
        try:
            encode, content_type = choose_encoder(accept)
        except TypeError:  # a version that is no number
            encode, content_type = choose_encoder("")
        return encode(self.registry), content_type

    def _child(self, metric: Counter | Histogram, *labels: str) -> Any:
        # The library's own way to a child takes a lock and makes text of each label.
        key = (metric, *labels)
        child = self._children.get(key)
        if child is None:
            child = self._children[key] = metric.labels(*labels)
        return child


class _Found:
    """Detections by model: by class, and how sure they were.

    They are counted by the hundred, since arrays take as long for a few as for many: what a request adds waits for others.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[tuple[str, tuple[str, ...]], list[Detections]] = {}
        self._images = 0
        self._classes: dict[str, dict[str, int]] = {}
        self._scores: dict[str, tuple[NDArray[np.int64], float]] = {}

    def add(self, model: str, names: Sequence[str], predictions: Sequence[Prediction]) -> None:
        """Take the detections of one request, whose classes have these names."""
        with self._lock:
            waiting = self._waiting.setdefault((model, tuple(names)), [])
            waiting.extend([item.detections for item in predictions])
            self._images += len(predictions)
            if self._images >= _TOGETHER:
                self._count()

    def _count(self) -> None:
        for (model, names), found in self._waiting.items():
            scores = np.concatenate([item.scores for item in found])
            ids = np.bincount(np.concatenate([item.class_ids for item in found]), minlength=len(names))
            bins = np.bincount(np.searchsorted(_CONFIDENCES, scores), minlength=len(_CONFIDENCES) + 1)
            classes = self._classes.setdefault(model, {})
            for name, number in zip(names, ids.tolist(), strict=False):
                classes[name] = classes.get(name, 0) + number
            former, total = self._scores.get(model, (np.zeros_like(bins), 0.0))
            self._scores[model] = bins + former, total + float(scores.sum(dtype=np.float64))
        self._waiting.clear()
        self._images = 0

    def classes(self, model: str, names: Sequence[str]) -> dict[str, int]:
        """Detections by class name, of those classes only; others are forgotten."""
        with self._lock:
            self._count()
            kept = self._classes.get(model, {})
            self._classes[model] = {name: kept.get(name, 0) for name in names}
            return dict(self._classes[model])

    def scores(self, model: str) -> tuple[list[tuple[str, float]], float]:
        """Buckets as Prometheus wants them, each with all below it, and the sum."""
        with self._lock:
            self._count()
            bins, total = self._scores.get(model, (np.zeros(len(_CONFIDENCES) + 1, np.int64), 0.0))
        limits = [*map(str, _CONFIDENCES), "+Inf"]
        return list(zip(limits, np.cumsum(bins).tolist(), strict=True)), total


class _Served(Collector):
    """What is read at the moment of a scrape: models, calls in flight, detections."""

    def __init__(self, models: Models, live: dict[int, Call], found: _Found) -> None:
        self._models = models
        self._live = live
        self._found = found

    def collect(self) -> Iterator[Metric]:
        """One family after the other."""
        info = GaugeMetricFamily(
            "haechi_model_info", "What is served; always 1.", labels=("model", "version", "engine", "precision")
        )
        ready = GaugeMetricFamily("haechi_model_ready", "1 where a model answers.", labels=("model",))
        # Not by model: which one a request is for may not be known before its body is there, and the pool is one for all.
        flying = [call for call in list(self._live.values()) if call.protocol != "http" and not call.probe]
        yield GaugeMetricFamily("haechi_requests_in_flight", "Predictions not answered yet.", value=len(flying))
        seen = CounterMetricFamily(
            "haechi_detections", "Detections that were answered.", labels=("model", "class_name")
        )
        sure = HistogramMetricFamily("haechi_detection_confidence", "Scores of those detections.", labels=("model",))
        for name in self._models.names():
            engine = self._models.get(name)
            ready.add_metric((name,), int(engine is not None))
            if engine is None:
                continue
            info.add_metric((name, engine.model.version, engine.backend.engine, engine.backend.precision), 1)
            for class_name, number in self._found.classes(name, engine.model.classes).items():
                seen.add_metric((name, class_name), number)
            sure.add_metric((name,), *self._found.scores(name))
        yield from (info, ready, seen, sure)
