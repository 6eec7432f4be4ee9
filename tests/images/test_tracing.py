"""Tracing: what a collector receives of a real process over OTLP, and that one that is away does no harm."""

from __future__ import annotations

import itertools
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from haechi.components.shared.errors import DeadlineError, InputError, SettingsError
from haechi.serving.inference import InferenceRequest
from haechi.serving.service import Call
from haechi.serving.settings import ServingSettings
from haechi.serving.tracing import Tracing
from tests.serving_process import free_port, running, start
from tests.tiny_models import paint, shade

SCENE = paint({(2, 3): shade(0, 0.9), (5, 5): shade(1, 0.6)})
PREDICT = "/v1/models/tiny:predict"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector:
    """Receives spans as an OpenTelemetry collector does."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.resource: dict[str, Any] = {}
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                assert (self.path, self.headers["content-type"]) == ("/v1/traces", "application/x-protobuf")
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    collector.resource = attributes(resource.resource)
                    for scope in resource.scope_spans:
                        collector.spans.extend(scope.spans)
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def wait(self, count: int, seconds: float = 10.0) -> list[Span]:
        until(lambda: len(self.spans) >= count, seconds)
        return self.spans


def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def attributes(owner: Any) -> dict[str, Any]:
    return {entry.key: getattr(entry.value, entry.value.WhichOneof("value")) for entry in owner.attributes}


@pytest.fixture
def collector() -> Iterator[Collector]:
    receiver = Collector()
    thread = threading.Thread(target=receiver.server.serve_forever, args=(0.02,))
    thread.start()
    yield receiver
    receiver.server.shutdown()
    thread.join()
    receiver.server.server_close()


def env(url: str, **more: str) -> dict[str, str]:
    return {"OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_BSP_SCHEDULE_DELAY": "100", **more}


def test_a_request_is_a_span_of_the_callers_trace_with_its_stages(folder: Path, collector: Collector) -> None:
    names = {"OTEL_SERVICE_NAME": "gate", "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test"}
    with running(folder, env=env(collector.url, **names)) as server:
        collector.spans.clear()  # health checks that came too early
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1", "x-request-id": "one"}
        begun = time.time_ns()
        httpx.post(f"{server.url}{PREDICT}?token=secret", content=SCENE, headers={**headers, "x-haechi-camera": "door"})
        ended = time.time_ns()
        until(
            lambda: any(
                span.kind == Span.SPAN_KIND_SERVER and span.name.endswith(":predict") for span in collector.spans
            )
        )
        request = next(span for span in collector.spans if span.name.endswith(":predict"))
        stages = [span for span in collector.spans if span.parent_span_id == request.span_id]
    assert (request.trace_id.hex(), request.parent_span_id.hex(), request.trace_state) == (TRACE, PARENT, "vendor=1")
    assert request.name == "POST /v1/models/{name}:predict"
    assert attributes(request) == {
        "http.request.method": "POST",
        "http.route": "/v1/models/{name}:predict",
        "http.response.status_code": 200,
        "http.request.body.size": len(SCENE),
        "url.path": PREDICT,
        "url.scheme": "http",
        "haechi.request_id": "one",
        "haechi.camera": "door",
        "haechi.model": "tiny",
        "haechi.model_version": server.version,
        "haechi.images": 1,
        "haechi.detections": 2,
        "haechi.outcome": "ok",
    }
    stages.sort(key=lambda span: span.start_time_unix_nano)
    # Reading the body is decoding, and so is making pixels of it; reading the network's output and writing the answer.
    assert [span.name for span in stages] == ["queue", "decode", "decode", "infer", "post", "post"]
    assert {span.trace_id for span in stages} == {request.trace_id}
    times = [(span.start_time_unix_nano, span.end_time_unix_nano) for span in (request, *stages)]
    slack = 10_000_000  # clocks are read one after the other
    assert all(begun - slack <= first <= last <= ended + slack for first, last in times)
    assert times[0][0] - slack <= times[1][0] and times[-1][1] <= times[0][1] + slack
    assert all(left[1] <= right[0] + 1000 for left, right in itertools.pairwise(times[1:]))
    assert collector.resource["service.name"] == "gate"
    assert collector.resource["deployment.environment.name"] == "test"
    assert collector.resource["service.version"]


def test_what_waits_is_sent_when_the_process_ends(folder: Path, collector: Collector) -> None:
    with running(folder, env=env(collector.url, OTEL_BSP_SCHEDULE_DELAY="60000")) as server:
        httpx.post(server.url + PREDICT, content=SCENE)
        httpx.post(server.url + PREDICT, content=b"no image")
        assert not collector.spans
    statuses = [attributes(span)["http.response.status_code"] for span in collector.spans if "predict" in span.name]
    assert statuses == [200, 400]
    assert collector.resource["service.name"] == "haechi-serving"


@pytest.mark.parametrize(
    ("traceparent", "sampler", "expected"),
    [
        (f"00-{TRACE}-{PARENT}-00", "", False),  # the caller has decided
        (f"00-{TRACE}-{PARENT}-00", "always_on", True),
        ("", "parentbased_always_off", False),
        ("", "", True),
        ("nonsense\udcff", "", True),
    ],
)
def test_whoever_began_the_trace_decides_if_it_is_kept(
    monkeypatch: pytest.MonkeyPatch, collector: Collector, traceparent: str, sampler: str, expected: bool
) -> None:
    for name, value in env(collector.url, OTEL_TRACES_SAMPLER=sampler or "parentbased_always_on").items():
        monkeypatch.setenv(name, value)
    tracing = Tracing()
    tracing.finished(ended(traceparent=traceparent))
    tracing.close()
    assert bool(collector.spans) == expected


def ended(**fields: Any) -> Call:
    """A call that took 30 ms, 20 of them in the network."""
    call = Call(**{"protocol": "v1", "path": PREDICT, "method": "POST", "status": 200, **fields})
    call.stages.add("infer", time.perf_counter() - 0.02)
    call.seconds = 0.03
    return call


@pytest.fixture
def tracing(monkeypatch: pytest.MonkeyPatch, collector: Collector) -> Iterator[Tracing]:
    for name, value in env(collector.url).items():
        monkeypatch.setenv(name, value)
    tracing = Tracing()
    yield tracing
    tracing.close()


def test_grpc_calls_have_names_and_codes_of_grpc(tracing: Tracing, collector: Collector) -> None:
    call = ended(protocol="grpc", path="/inference.GRPCInferenceService/ModelInfer", method="", status=3)
    call.identify({"traceparent": f"00-{TRACE}-{PARENT}-01"})  # as metadata has it
    call.error = InputError("no")
    tracing.finished(call)
    _, span = sorted(collector.wait(2), key=lambda span: span.kind)
    assert (span.name, span.trace_id.hex()) == ("inference.GRPCInferenceService/ModelInfer", TRACE)
    told = attributes(span)
    assert (told["rpc.system.name"], told["rpc.response.status_code"]) == ("grpc", "INVALID_ARGUMENT")
    assert (told["error.type"], told["haechi.outcome"]) == ("InputError", "refused")
    assert span.status.code == Status.STATUS_CODE_UNSET  # the caller's mistake is no fault of the server


def test_a_grpc_call_goes_on_with_the_trace_in_its_metadata(folder: Path, collector: Collector) -> None:
    with (
        running(folder, env=env(collector.url)) as server,
        grpc.insecure_channel(f"127.0.0.1:{server.grpc}") as channel,
    ):
        ask = channel.unary_unary("/inference.GRPCInferenceService/ServerMetadata")
        ask(b"", metadata=(("traceparent", f"00-{TRACE}-{PARENT}-01"),))
        until(lambda: any(span.trace_id.hex() == TRACE for span in collector.spans))
    span = next(span for span in collector.spans if span.trace_id.hex() == TRACE)
    assert (span.name, span.parent_span_id.hex()) == ("inference.GRPCInferenceService/ServerMetadata", PARENT)
    assert attributes(span)["rpc.response.status_code"] == "OK"


def test_a_fault_of_the_server_is_an_error(tracing: Tracing, collector: Collector) -> None:
    tracing.finished(ended(status=504, error=DeadlineError("late")))
    span = next(span for span in collector.wait(2) if span.kind == Span.SPAN_KIND_SERVER)
    assert span.status.code == Status.STATUS_CODE_ERROR


def test_good_health_checks_are_no_spans(tracing: Tracing, collector: Collector) -> None:
    tracing.finished(ended(protocol="http", path="/v2/health/ready"))
    tracing.finished(ended(protocol="http", path="/v2/health/ready", status=503))
    tracing.close()
    assert [attributes(span).get("http.response.status_code") for span in collector.spans if span.kind == 2] == [503]


def test_text_of_callers_neither_breaks_nor_fills_a_batch(tracing: Tracing, collector: Collector) -> None:
    tracing.finished(ended(camera="\ud800" + "x" * 10_000, path="/\udcff"))
    span = next(span for span in collector.wait(2) if span.kind == Span.SPAN_KIND_SERVER)
    assert attributes(span)["haechi.camera"] == "?" + "x" * 255


def test_what_waits_holds_no_image(tracing: Tracing) -> None:
    images = (b"x" * 1000,)
    call = ended()
    call.request = InferenceRequest(images)
    before = sys.getrefcount(images)
    tracing._backlog.close(5)
    tracing.finished(call)
    del call
    assert sys.getrefcount(images) == before - 1


@contextmanager
def silent_collector() -> Iterator[str]:
    """Takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def no_collector() -> Iterator[str]:
    yield f"http://127.0.0.1:{free_port()}"


@pytest.mark.parametrize("away", [silent_collector, no_collector])
def test_a_collector_that_is_away_costs_spans_and_nothing_else(folder: Path, away: Any) -> None:
    with (
        away() as url,
        running(folder, env=env(url, OTEL_BSP_MAX_QUEUE_SIZE="50", OTEL_BSP_MAX_EXPORT_BATCH_SIZE="20")) as server,
    ):
        with httpx.Client() as client:
            for _ in range(100):
                assert client.get(f"{server.url}/v1/models").status_code == 200
            assert client.post(server.url + PREDICT, content=SCENE).status_code == 200
        begun = time.monotonic()
        server.process.terminate()
        _, errors = server.process.communicate(timeout=20)
        seconds = time.monotonic() - begun
    assert server.process.returncode == 0
    assert seconds < 5  # 2 of them for the collector
    assert errors.count("tracing: the collector does not take spans") <= 1
    assert not [line for line in errors.splitlines() if "export" in line or "Transient" in line or "Traceback" in line]


@pytest.mark.parametrize(
    "missing", ["opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http.trace_exporter"]
)
def test_missing_packages_are_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SettingsError, match=rf"{missing} is not installed. Install `haechi\[tracing\]`"):
        Tracing()


@pytest.mark.parametrize(
    ("variables", "match"),
    [
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "OTEL_EXPORTER_OTLP_PROTOCOL is 'grpc'"),
        ({"OTEL_BSP_SCHEDULE_DELAY": "-1"}, "an OTEL_* variable is malformed"),
    ],
)
def test_malformed_variables_stop_the_process_with_a_message(
    folder: Path, variables: dict[str, str], match: str
) -> None:
    server = start(folder, env=env("http://127.0.0.1:1", **variables))
    try:
        _, errors = server.process.communicate(timeout=30)
    finally:
        server.process.kill()
    assert (server.process.returncode, "Traceback" in errors) == (2, False), errors
    assert match in errors


def test_it_is_off_unless_a_collector_is_named() -> None:
    assert ServingSettings.from_env({"OTEL_SERVICE_NAME": "x"}).otlp_endpoint == ""
    assert ServingSettings.from_env({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}).otlp_endpoint == "http://c:4318"


def test_spans_are_counted(monkeypatch: pytest.MonkeyPatch, collector: Collector) -> None:
    counted = SimpleNamespace(exported=0, failed=0)

    def count(outcome: str, number: int) -> None:
        setattr(counted, outcome, getattr(counted, outcome) + number)

    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    tracing = Tracing(count)
    tracing.finished(ended())
    tracing.close()
    assert (counted.exported, counted.failed) == (2, 0)
