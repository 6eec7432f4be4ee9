"""Tracing: each call as an OpenTelemetry span with its stages below it, sent to a collector over OTLP/HTTP.

On where the standard OTEL_EXPORTER_OTLP_ENDPOINT is set; the other OTEL_* variables (sampler, headers, service name,
batches) mean what OpenTelemetry's own documentation says. Spans are made by a thread after the call has ended: the loop
only notes what they need, and a collector that is away costs spans and nothing else.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

import grpc

from haechi.components.shared.errors import SettingsError
from haechi.components.shared.progress import say

from .backlog import Backlog
from .service import Call, Outcome

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

__all__ = ["Tracing"]

_WAITING = 2000  # calls that wait to become spans
_TEXT = 256  # characters of anything that a caller has a say in
_CODES = {code.value[0]: code.name for code in grpc.StatusCode}
_FAULTS = (Outcome.ERROR, Outcome.DEADLINE, Outcome.OVERLOAD)

_Value = str | int


@dataclass(frozen=True)
class _Ended:
    """What spans need of a call that has ended; times in seconds since 1970."""

    name: str
    attributes: dict[str, _Value]
    headers: dict[str, str]
    begin: float
    end: float
    stages: tuple[tuple[str, float, float], ...]
    fault: bool


class Tracing:
    """Hands calls to a collector.

    Args:
        count: told how many spans were `exported`, `failed`, and how many calls were `lost`.

    Raises:
        SettingsError: OpenTelemetry is not installed, or one of its variables is malformed.
    """

    def __init__(self, count: Callable[[str, int], None] | None = None) -> None:
        self._count = count or (lambda outcome, number: None)
        try:
            self._provider = _provider(self._count)
        except ImportError as error:
            raise SettingsError(
                f"OTEL_EXPORTER_OTLP_ENDPOINT is set, but {error.name} is not installed",
                "Install `haechi[tracing]`, or unset it.",
            ) from error
        except ValueError as error:
            raise SettingsError(
                f"an OTEL_* variable is malformed ({error})", "See OpenTelemetry's list of variables."
            ) from error
        self._lost = 0
        self._backlog = Backlog("tracing", self._make, _WAITING)

    def started(self, call: Call) -> None:
        """Nothing: the span is made at the end, with the times that it had."""

    def finished(self, call: Call) -> None:
        """Note the call for the thread."""
        outcome = call.outcome
        if call.probe and outcome is Outcome.OK:
            return
        # The call and its stages have clocks of their own; both are laid on the time of day as it is now.
        day, now = time.time(), time.perf_counter()
        begin = day - (time.monotonic() - call.begun)
        self._backlog.put(
            _Ended(
                _name(call),
                _attributes(call, outcome),
                {"traceparent": call.traceparent, "tracestate": call.tracestate},
                begin,
                begin + call.seconds,
                tuple((stage, day + begin - now, day + end - now) for stage, begin, end in tuple(call.stages.spans)),
                outcome in _FAULTS,
            )
        )

    def close(self, seconds: float = 2.0) -> None:
        """Send what waits, but not longer than `seconds`."""
        until = time.monotonic() + seconds
        self._backlog.close(seconds)
        # The library waits for a collector as long as one export may take.
        leaving = threading.Thread(target=self._provider.shutdown, daemon=True)
        leaving.start()
        leaving.join(max(0.0, until - time.monotonic()))

    def _make(self, calls: list[_Ended]) -> None:
        lost = self._backlog.lost - self._lost
        if lost:
            self._lost += lost
            self._count("lost", lost)
        if calls:
            _make_spans(self._provider, calls)


def _name(call: Call) -> str:
    if call.protocol == "grpc":
        return call.path.lstrip("/")
    return f"{call.method} {call.route}" if call.route else call.method


def _attributes(call: Call, outcome: Outcome) -> dict[str, _Value]:
    """By OpenTelemetry's semantic conventions; what they have no word for begins with `haechi.`."""
    told: dict[str, _Value]
    if call.protocol == "grpc":
        code = _CODES.get(call.status, str(call.status))
        told = {"rpc.system.name": "grpc", "rpc.method": call.path.lstrip("/"), "rpc.response.status_code": code}
    else:
        told = {"http.request.method": call.method, "url.scheme": "http", "url.path": call.path}
        told |= {"http.route": call.route, "http.request.body.size": call.bytes_in}
        if call.status:
            told["http.response.status_code"] = call.status
    if outcome is not Outcome.OK:
        told["error.type"] = type(call.error).__name__ if call.error else str(call.status)
    told |= {"haechi.outcome": outcome.value, "haechi.request_id": call.request_id, "haechi.camera": call.camera}
    told |= {"haechi.model": call.model, "enduser.id": call.caller}
    if call.engine:
        told["haechi.model_version"] = call.engine.model.version
    if call.request:
        told["haechi.images"] = len(call.request.images)
    if call.predictions is not None:
        told["haechi.detections"] = sum(len(item.detections) for item in call.predictions)
    return told


def _provider(count: Callable[[str, int], None]) -> TracerProvider:
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    given = OTELResourceDetector().detect().attributes
    resource = Resource.create(
        {"service.name": "haechi-serving", "service.version": version("haechi"), **given},
    )
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(_exporter(count)))
    return provider


def _exporter(count: Callable[[str, int], None]) -> SpanExporter:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import SpanExportResult

    class Counted(OTLPSpanExporter):
        """Counts spans, and says once that the collector is away and once that it is back."""

        away = False

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            result = super().export(spans)
            failed = result is not SpanExportResult.SUCCESS
            count("failed" if failed else "exported", len(spans))
            if failed is not self.away:
                self.away = failed
                say(f"tracing: the collector {'does not take spans; they are lost' if failed else 'takes spans'}")
            return result

    exporter = Counted()
    # It has lines of its own for every attempt, every few seconds and for as long as the collector is away.
    logging.getLogger("opentelemetry.exporter.otlp").setLevel(logging.CRITICAL)
    return exporter


def _make_spans(provider: TracerProvider, calls: Sequence[_Ended]) -> None:
    from opentelemetry.context import Context
    from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    tracer = provider.get_tracer("haechi.serving")
    propagator = TraceContextTextMapPropagator()
    for call in calls:
        context = propagator.extract(call.headers, context=Context())
        told = {name: value for name, value in call.attributes.items() if value != ""}
        attributes = {name: _clean(value) if isinstance(value, str) else value for name, value in told.items()}
        span = tracer.start_span(
            _clean(call.name), context, SpanKind.SERVER, attributes, start_time=_nanoseconds(call.begin)
        )
        if not span.is_recording():
            continue
        below = set_span_in_context(span, Context())
        for stage, begin, end in call.stages:
            tracer.start_span(stage, below, start_time=_nanoseconds(begin)).end(_nanoseconds(end))
        if call.fault:
            span.set_status(StatusCode.ERROR)
        span.end(_nanoseconds(call.end))


def _clean(text: str) -> str:
    """One lone surrogate in a camera's name would cost the whole batch: protobuf refuses it."""
    return text[:_TEXT].encode(errors="replace").decode()


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
