"""The access log: what a line says, what never gets into one, and that no reader and no flood can do harm."""

from __future__ import annotations

import base64
import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from haechi.components.shared.errors import InputError
from haechi.serving.access_log import AccessLog
from haechi.serving.service import Call
from tests.serving_process import Running, running, start
from tests.tiny_models import paint, shade

SCENE = paint({(2, 3): shade(0, 0.9), (5, 5): shade(1, 0.6)})
PREDICT = "/v1/models/tiny:predict"


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("output") / "stdout"


@pytest.fixture(scope="module")
def server(folder: Path, output: Path) -> Iterator[Running]:
    with output.open("w") as stdout, running(folder, stdout=stdout) as process:
        yield process


class Lines(logging.Handler):
    """Keeps the lines instead of writing them."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.entries.append(json.loads(record.getMessage()))


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    handler = Lines()
    monkeypatch.setattr(logging.getLogger("haechi.access"), "handlers", [handler])
    return handler.entries


def line_of(output: Path, request_id: str) -> dict[str, Any]:
    """The line of one call; every line must be JSON of its own."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        entries = [json.loads(line) for line in output.read_text().splitlines() if line.endswith("}")]
        if found := [entry for entry in entries if entry.get("request_id") == request_id]:
            assert len(found) == 1
            return found[0]
        time.sleep(0.05)
    raise AssertionError(f"no line of {request_id}: {output.read_text()[-2000:]}")


def test_a_prediction_has_one_line_with_all_about_it(server: Running, output: Path) -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    headers = {"x-request-id": "one", "x-haechi-camera": "gate", "traceparent": f"00-{trace}-b7ad6b7169203331-01"}
    httpx.post(server.url + PREDICT, content=SCENE, headers=headers)
    entry = line_of(output, "one")
    assert abs(datetime.fromisoformat(entry["time"]).timestamp() - time.time()) < 60 and entry["time"].endswith("Z")
    stages = entry.pop("stages_ms")
    assert list(stages) == ["queue", "decode", "infer", "post"]
    assert 0 < sum(stages.values()) <= entry["total_ms"] < 10_000
    del entry["time"], entry["total_ms"]
    assert entry == {
        "request_id": "one",
        "trace": trace,
        "protocol": "v1",
        "method": "POST",
        "path": PREDICT,
        "model": "tiny",
        "version": server.version,
        "status": 200,
        "outcome": "ok",
        "camera": "gate",
        "bytes_in": len(SCENE),
        "images": 1,
        "detections": 2,
    }


def test_a_failure_says_why(server: Running, output: Path) -> None:
    httpx.post(server.url + PREDICT, content=b"[]", headers={"x-request-id": "wrong"})
    entry = line_of(output, "wrong")
    assert (entry["status"], entry["outcome"]) == (400, "refused")
    assert entry["error"].startswith("InputError: the body is JSON, but not an object")


def test_neither_images_nor_credentials_are_in_it(server: Running, output: Path) -> None:
    secret = "s3cr3t-value"
    body = {"instances": [{"image": {"b64": base64.b64encode(SCENE).decode()}}], "token": secret}
    headers = {"authorization": f"Bearer {secret}", "x-api-key": secret, "cookie": f"session={secret}"}
    for number, content in enumerate((json.dumps(body).encode(), SCENE + b"cut"[:1], SCENE[:200], b"{" + SCENE)):
        url = f"{server.url}{PREDICT}?token={secret}"
        httpx.post(url, content=content, headers={**headers, "x-request-id": f"secret-{number}"})
        line_of(output, f"secret-{number}")
    text = output.read_text()
    assert secret not in text
    assert base64.b64encode(SCENE)[:40].decode() not in text
    assert "IHDR" not in text


@pytest.mark.parametrize("number", range(3))
def test_no_caller_can_forge_a_line_or_move_the_cursor(server: Running, output: Path, number: int) -> None:
    forged = '%0A{"request_id":"forged"}%0D%1B[2J%E2%80%AE%C2%85%00'
    path = (f"/v1/models/{forged}:predict", f"/{forged}", f"/{'x' * 5000}")[number]
    httpx.post(
        server.url + path,
        headers={"x-request-id": f"path-{number}", "x-haechi-camera": "a\xe9\x85".encode("latin-1")},
    )
    entry = line_of(output, f"path-{number}")
    assert len(entry["path"]) <= 256
    assert "\n" in entry["path"] or number == 2  # the path is told as it is, but within its quotes
    text = output.read_bytes()
    assert not [byte for byte in text if byte != 10 and not 32 <= byte < 127]
    assert "forged" not in {json.loads(line).get("request_id") for line in text.splitlines()}


def test_health_checks_and_scrapes_leave_no_line(server: Running, output: Path) -> None:
    for path in ("/", "/v2/health/live", "/v2/health/ready", "/metrics"):
        httpx.get(server.url + path, headers={"x-request-id": f"probe{path}"})
    httpx.get(f"{server.url}/v1/models", headers={"x-request-id": "after"})
    line_of(output, "after")
    assert "probe/" not in output.read_text()


def call(status: int = 200, request_id: str = "", path: str = PREDICT, protocol: str = "v1") -> Call:
    made = Call(protocol, path, "POST", status=status)
    made.request_id = request_id or made.request_id
    made.error = InputError("no") if 400 <= status < 500 else None
    return made


@pytest.mark.parametrize(
    ("made", "logged"),
    [
        (call(path="/v2/health/ready", protocol="http"), False),
        # Not ready is an answer, and asked for every second while a model loads.
        (call(503, path="/v2/health/ready", protocol="http"), False),
        (call(500, path="/v2/health/ready", protocol="http"), True),
        (call(path="/v2/models/m/ready", protocol="v2"), False),
        (call(0, path="/grpc.health.v1.Health/Check", protocol="grpc"), False),
        (call(0, path="/inference.GRPCInferenceService/ModelReady", protocol="grpc"), False),
        (call(0, path="/inference.GRPCInferenceService/ModelInfer", protocol="grpc"), True),
        (call(401, path="/metrics", protocol="http"), True),
    ],
)
def test_health_checks_are_told_when_they_fail(lines: list[dict[str, Any]], made: Call, logged: bool) -> None:
    log = AccessLog()
    log.finished(made)
    log.close()
    assert len(lines) == logged


def test_the_request_id_decides_which_good_calls_are_told(lines: list[dict[str, Any]]) -> None:
    drawn = []
    for _ in range(2):
        log = AccessLog(share=0.3)
        for number in range(2000):
            log.finished(call(request_id=f"id-{number}"))
        log.close()
        drawn.append([entry["request_id"] for entry in lines])
        lines.clear()
    assert drawn[0] == drawn[1]
    assert 500 < len(drawn[0]) < 700


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (1.0, 300)])
def test_all_or_none_is_exact(lines: list[dict[str, Any]], share: float, expected: int) -> None:
    log = AccessLog(share=share)
    for number in range(300):
        log.finished(call(request_id=f"id-{number}"))
    log.close()
    assert len(lines) == expected


def test_a_flood_of_failures_is_cut_and_counted(lines: list[dict[str, Any]]) -> None:
    counted: dict[str, int] = {}
    log = AccessLog(share=0, count=lambda outcome, number: counted.update({outcome: counted.get(outcome, 0) + number}))
    for _ in range(3000):
        log.finished(call(404))
    log.close()
    told = [entry for entry in lines if "status" in entry]
    missing = sum(entry["left_out"] for entry in lines if entry.get("event") == "lines missing")
    assert 100 <= len(told) <= 200  # the clock may have struck in between
    assert len(told) + missing == 3000
    assert counted == {"written": len(told), "left_out": missing}


def test_what_waits_holds_no_image(lines: list[dict[str, Any]]) -> None:
    """An exception holds its frames, and those hold the body."""
    import gc
    import weakref

    class Body:
        pass

    def fail() -> tuple[Call, weakref.ref[Body]]:
        body = Body()
        made = call(400)
        try:
            raise InputError("no")
        except InputError as error:
            made.error = error
        return made, weakref.ref(body)

    log = AccessLog()
    log.close()  # nothing is taken out of the queue any more
    made, body = fail()
    log.finished(made)
    del made
    gc.collect()
    assert body() is None


BLOCKED = """
import json, sys, time
from haechi.serving.access_log import AccessLog
from haechi.serving.service import Call
counted = {}
log = AccessLog(count=lambda outcome, number: counted.update({outcome: counted.get(outcome, 0) + number}))
slowest = 0.0
for number in range(20_000):
    call = Call("v1", "/v1/models/tiny:predict", "POST", status=200)
    begun = time.perf_counter()
    log.finished(call)
    slowest = max(slowest, time.perf_counter() - begun)
    if number % 1000 == 0:
        time.sleep(0.05)
print(json.dumps({"slowest": slowest, "lost": log._backlog.lost}), file=sys.stderr)
log.close(0.5)
"""


def test_a_pipe_that_nobody_reads_costs_lines_and_nothing_else() -> None:
    process = subprocess.Popen([sys.executable, "-c", BLOCKED], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    begun = time.monotonic()
    assert process.stderr and process.stdout
    told = json.loads(process.stderr.readline())
    assert process.wait(10) == 0  # nor does the end of the process wait for the reader
    assert time.monotonic() - begun < 20
    assert told["lost"] > 10_000 and told["slowest"] < 0.5
    assert process.stderr.read() == b""
    text = process.stdout.read()
    assert len(text) > 30_000  # what the pipe holds
    process.stdout.close()
    process.stderr.close()


@pytest.mark.parametrize("reader", ["stuck", "gone"])
def test_the_runtime_answers_whatever_becomes_of_its_log(folder: Path, reader: str) -> None:
    server = start(folder, stdout=subprocess.PIPE)
    assert server.process.stdout and server.process.stderr
    try:
        wait_until(lambda: httpx.get(f"{server.url}/v2/health/ready").status_code == 200)
        if reader == "gone":
            server.process.stdout.close()
        with httpx.Client() as client:
            for _ in range(400):
                assert client.get(f"{server.url}/v1/models", headers={"x-request-id": "x" * 128}).status_code == 200
        if reader == "gone":
            wait_until(lambda: lines_lost(server.url) >= 1)  # told once a second
        server.process.terminate()
        assert server.process.wait(20) == 0
    finally:
        server.process.kill()
        errors = server.process.stderr.read()
        server.process.stderr.close()
        server.process.stdout.close()
        server.process.wait()
    assert "Traceback" not in errors and "Error" not in errors


def lines_lost(url: str) -> float:
    told = [line for line in httpx.get(f"{url}/metrics").text.splitlines() if "log_lines_total{" in line]
    return sum(float(line.split()[-1]) for line in told if 'outcome="lost"' in line)


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < end
        time.sleep(0.05)
