"""HTTP connections as raw sockets: slow, half-closed, greedy and many clients, each told why or simply let go."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import re
import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import tritonclient.grpc
import uvicorn
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from haechi.serving.app import bounded_body, create_app
from haechi.serving.connections import Bounds, Connection, Lingering, patient
from haechi.serving.engine import Engine, Models
from haechi.serving.pool import Pool
from haechi.serving.service import Service
from haechi.serving.settings import ServingSettings
from tests.serving_process import running
from tests.tiny_models import paint, shade, tiny_model_folder

SCENE = paint({(2, 3): shade(0, 0.9)})
MAX_BODY = 256 * 1024
GET = b"GET /v2/health/ready HTTP/1.1\r\nHost: x\r\n\r\n"


class Tight(Connection):
    """The same with bounds that a test can wait for."""

    bounds = Bounds(
        connections=4,
        head_seconds=0.5,
        head_bytes=16 * 1024,
        headers=50,
        pipelined=8,
        linger_seconds=0.5,
        farewell_seconds=1.0,
    )


class Server:
    """uvicorn in a thread, with a tiny model, a route that answers much and one that waits for `go`."""

    def __init__(self, folder: Path) -> None:
        self.go = threading.Event()
        self.models, self.pool = Models(), Pool(workers=1, queue=1)
        model = tiny_model_folder(folder, ["person"])
        self.models.put("tiny", Engine(folder, model, ServingSettings(threads=1, engine="onnxruntime", batch=1)))
        routes = (Route("/much", _much), Route("/wait", self._wait, methods=["GET", "POST"]))
        app = Lingering(create_app(Service(self.models, self.pool), MAX_BODY, routes), Tight.bounds.linger_seconds)
        self.listener = socket.create_server(("127.0.0.1", 0))
        patient(self.listener, 1.0)
        config = uvicorn.Config(app, http=Tight, ws="none", log_level="error", timeout_graceful_shutdown=5)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    @property
    def address(self) -> tuple[str, int]:
        address: tuple[str, int] = self.listener.getsockname()
        return address

    @property
    def open(self) -> int:
        return len(self.server.server_state.connections)

    async def _wait(self, request: Request) -> Response:
        body = await bounded_body(request)
        await asyncio.to_thread(self.go.wait, 10)
        return Response(b"waited %d" % len(body))

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=self.server.config.get_loop_factory()) as runner:
            runner.run(self.server.serve(sockets=[self.listener]))

    def close(self) -> None:
        self.go.set()
        self.server.should_exit = True
        self.thread.join(10)
        self.pool.close()


async def _much(request: Request) -> Response:
    return Response(b"\0" * 32 * 2**20)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    try:
        wait_until(lambda: server.server.started)
        yield server
    finally:
        server.close()


def wait_until(true: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def connect(server: Server) -> socket.socket:
    return socket.create_connection(server.address, timeout=10)


def rest(wire: socket.socket) -> bytes:
    """All that comes until the server hangs up."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := wire.recv(65536):
            parts.append(part)
    return b"".join(parts)


def answer(wire: socket.socket) -> tuple[int, str]:
    """Status and body of one answer, the connection left open."""
    data = b""
    while b"\r\n\r\n" not in data:
        part = wire.recv(65536)
        assert part, f"hung up after {data!r}"
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head)
    while length and len(body) < int(length[1]):
        body += wire.recv(65536)
    return int(head.split()[1]), body.decode()


def status(data: bytes) -> int:
    return int(data.split()[1]) if data else 0


def message(data: bytes) -> str:
    """Of an answer that the server ended: always an error as the rest of the API has them."""
    head, _, body = data.partition(b"\r\n\r\n")
    assert b"connection: close" in head
    error: str = json.loads(body)["error"]
    return error


def test_a_head_that_drips_is_cut_off(server: Server) -> None:
    """Slow-loris: each byte must not buy more time."""
    begun = time.monotonic()
    with connect(server) as wire:
        wire.settimeout(0.05)
        data = b""
        for byte in b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X-A: b\r\n" * 50:
            wire.sendall(bytes([byte]))
            with contextlib.suppress(TimeoutError):
                data = wire.recv(65536)
                break
        assert status(data) == 408 and "did not arrive" in message(data)
        assert 0.4 < time.monotonic() - begun < 3


@pytest.mark.parametrize("first", [b"", GET])
def test_blank_lines_are_no_head(server: Server, first: bytes) -> None:
    with connect(server) as wire:
        wire.sendall(first)
        assert not first or answer(wire)[0] == 200
        end, closed = time.monotonic() + 5, False
        while not closed and time.monotonic() < end:
            try:
                wire.sendall(b"\r\n")
                closed = server.open == 0
            except OSError:
                closed = True
            time.sleep(0.02)
        assert closed


def test_a_connection_that_sends_nothing_is_let_go(server: Server) -> None:
    with connect(server) as wire:
        assert wire.recv(1) == b""
    wait_until(lambda: server.open == 0)


@pytest.mark.parametrize(
    ("head", "problem"),
    [
        (b"X-Big: " + b"a" * 20_000 + b"\r\n", "more than 16384 bytes"),
        (b"X-Big: " + b"a" * 3_000_000, "more than 16384 bytes"),
        (b"".join(b"X-%d: a\r\n" % number for number in range(60)), "more than 50 headers"),
        (b"".join(b"X-%d: a\r\n" % number for number in range(500_000)), "more than"),
    ],
)
def test_a_large_head_is_refused(server: Server, head: bytes, problem: str) -> None:
    with connect(server) as wire:
        with contextlib.suppress(ConnectionError):
            wire.sendall(b"GET / HTTP/1.1\r\n" + head + b"\r\n")
        data = rest(wire)
    assert status(data) == 431 and problem in message(data)


def test_a_long_address_is_refused(server: Server) -> None:
    with connect(server) as wire:
        wire.sendall(b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n")
        assert status(rest(wire)) == 431


def test_a_head_within_bounds_may_come_in_pieces(server: Server) -> None:
    head = b"GET / HTTP/1.1\r\nHost: x\r\nCookie: " + b"a" * 15_000 + b"\r\n\r\n"
    with connect(server) as wire:
        wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, len(head), 1000):
            wire.sendall(head[start : start + 1000])
            time.sleep(0.005)
        assert answer(wire)[0] == 200
        wire.sendall(head)
        assert answer(wire)[0] == 200, "each request is counted for itself"


def test_a_head_that_grows_behind_a_request_at_work_is_bounded_too(server: Server) -> None:
    with connect(server) as wire:
        wire.sendall(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(0.1)
        wire.sendall(b"GET / HTTP/1.1\r\nX-Big: " + b"a" * 100_000)
        time.sleep(0.1)
        server.go.set()
        data = rest(wire)
    assert status(data) == 200 and data.endswith(b"waited 0"), "what was asked before is answered, then it ends"


@pytest.mark.parametrize(
    "data",
    [
        b"hello\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # a TLS client
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET http://[ HTTP/1.1\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\n\r\n",
        b"CONNECT x:1 HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /wait HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nno number\r\n",
        b"GET / HTTP/1.1\r\nX: a\x00b\r\n\r\n",
    ],
)
def test_what_is_not_http_gets_400_and_a_reason(server: Server, data: bytes) -> None:
    with connect(server) as wire:
        wire.sendall(data)
        told = rest(wire)
    assert status(told) == 400 and "HTTP/1.1" in message(told)
    wait_until(lambda: server.open == 0)


def test_a_half_closed_client_gets_its_answer(server: Server) -> None:
    with connect(server) as wire:
        head = b"POST /v1/models/tiny:predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(SCENE)
        wire.sendall(head + SCENE)
        wire.shutdown(socket.SHUT_WR)
        data = rest(wire)
    assert status(data) == 200 and b'"person"' in data
    wait_until(lambda: server.open == 0)


def test_a_client_that_half_closes_within_its_body_is_let_go(server: Server) -> None:
    with connect(server) as wire:
        wire.sendall(b"POST /wait HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc")
        wire.shutdown(socket.SHUT_WR)
        rest(wire)
    wait_until(lambda: server.open == 0 and not server.server.server_state.tasks)


def test_pipelined_requests_are_answered_in_order(server: Server) -> None:
    names = [b"GET /v1/models/%d HTTP/1.1\r\nHost: x\r\n\r\n" % number for number in range(6)]
    with connect(server) as wire:
        wire.sendall(b"".join(names))
        wire.shutdown(socket.SHUT_WR)
        data = rest(wire)
    assert re.findall(rb"no model '(\d)'", data) == [b"0", b"1", b"2", b"3", b"4", b"5"]


def test_too_many_pipelined_requests_end_the_connection_after_some_answers(server: Server) -> None:
    with connect(server) as wire:
        with contextlib.suppress(ConnectionError):
            wire.sendall(GET * 10_000)
        data = rest(wire)
    assert 1 <= data.count(b"HTTP/1.1 200") <= Tight.bounds.pipelined + 1
    wait_until(lambda: server.open == 0)


def test_garbage_behind_a_good_request_does_not_take_its_answer(server: Server) -> None:
    with connect(server) as wire:
        wire.sendall(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(0.1)
        wire.sendall(b"garbage\r\n\r\n")
        time.sleep(0.1)
        server.go.set()
        data = rest(wire)
    assert status(data) == 200 and data.endswith(b"waited 0")


def test_a_new_client_takes_the_place_of_an_idle_one(server: Server) -> None:
    with contextlib.ExitStack() as stack:
        wires = [stack.enter_context(connect(server)) for _ in range(12)]
        for wire in wires[-3:]:
            wire.sendall(GET)
            assert answer(wire)[0] == 200
        assert server.open <= Tight.bounds.connections + 1


def test_a_client_too_many_is_told_to_come_back_where_all_others_are_busy(server: Server) -> None:
    with contextlib.ExitStack() as stack:
        busy = [stack.enter_context(connect(server)) for _ in range(Tight.bounds.connections)]
        for wire in busy:
            wire.sendall(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_until(lambda: len(server.server.server_state.tasks) == len(busy))
        data = rest(stack.enter_context(connect(server)))
        assert status(data) == 503 and b"retry-after: 1" in data and "connections" in message(data)
        server.go.set()
        assert [answer(wire)[0] for wire in busy] == [200] * len(busy)


@pytest.mark.parametrize(
    ("quick", "lost"),
    [(0, 0), (200, 1)],
    ids=["the one that has taken longest", "not the one that has taken longest, but the slowest"],
)
def test_a_new_client_takes_the_place_of_the_slowest_body(server: Server, quick: int, lost: int) -> None:
    head = b"POST /v1/models/tiny:predict HTTP/1.1\r\nHost: x\r\nContent-Length: 250000\r\n\r\n"
    with contextlib.ExitStack() as stack:
        wires = []
        for _ in range(Tight.bounds.connections):
            wires.append(stack.enter_context(connect(server)))
            wires[-1].sendall(head)
            time.sleep(0.05)
        wires[0].sendall(b"\0" * 1000 * quick)
        wait_until(lambda: len(server.server.server_state.tasks) == len(wires))
        probe = stack.enter_context(connect(server))
        probe.sendall(GET)
        assert answer(probe)[0] == 200
        data = rest(wires[lost])
        assert status(data) == 503 and b"retry-after: 1" in data and "connections" in message(data)
        assert server.open == Tight.bounds.connections


def test_bodies_that_drip_from_hundreds_of_clients_do_not_keep_probes_out(tmp_path: Path) -> None:
    tiny_model_folder(tmp_path, ["person"])
    head = b"POST /v1/models/tiny:predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n"
    with running(tmp_path, stdout=subprocess.DEVNULL) as process, contextlib.ExitStack() as stack:
        wires = []
        for _ in range(Bounds.connections + 40):  # the last ones take the places of the first
            wires.append(stack.enter_context(socket.create_connection(("127.0.0.1", process.http), 10)))
            wires[-1].sendall(head)
        for turn in range(4):
            for wire in wires[40:]:
                with contextlib.suppress(ConnectionError):
                    wire.sendall(b"\0")
            for path in ("live", "ready"):
                assert httpx.get(f"{process.url}/v2/health/{path}", timeout=5).status_code == 200, turn
        assert httpx.post(f"{process.url}/v1/models/tiny:predict", content=SCENE).status_code == 200
        counted = httpx.get(f"{process.url}/metrics").text
        assert 'outcome="overload"' in counted, "the operator sees that clients were sent away"


def test_a_client_that_does_not_read_is_cut_off(server: Server) -> None:
    with connect(server) as wire:
        wire.sendall(b"GET /much HTTP/1.1\r\nHost: x\r\n\r\n")
        assert wire.recv(1)
        assert server.open == 1
        wait_until(lambda: server.open == 0 and not server.server.server_state.tasks, 10)


def test_a_client_that_waits_for_100_continue_is_told_to_go_on(server: Server) -> None:
    with connect(server) as wire:
        wire.sendall(b"POST /wait HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n")
        assert wire.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        server.go.set()
        wire.sendall(b"abc")
        assert answer(wire) == (200, "waited 3")


@pytest.mark.parametrize(
    ("path", "length", "code"), [(b"/v1/models/tiny:predict", 10**8, 413), (b"/v1/models/other:predict", 10, 404)]
)
def test_a_client_that_waits_for_100_continue_is_refused_without(
    server: Server, path: bytes, length: int, code: int
) -> None:
    head = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\nExpect: 100-continue\r\n\r\n" % (path, length)
    with connect(server) as wire:
        wire.sendall(head)
        data = rest(wire)
    assert status(data) == code and message(data)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_too_large_gets_its_413_though_the_client_reads_late(server: Server, chunked: bool) -> None:
    """100 MB, sent without a look at what comes back: hanging up at once would reset the connection."""
    size = 10**8
    how = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % size
    with connect(server) as wire:
        wire.sendall(b"POST /v1/models/tiny:predict HTTP/1.1\r\nHost: x\r\n" + how + b"\r\n\r\n")
        if chunked:
            wire.sendall(b"%x\r\n" % size)
        for _ in range(100):
            wire.sendall(b"\0" * (size // 100))
        wire.sendall(b"\r\n0\r\n\r\n" if chunked else b"")
        data = rest(wire)
    assert status(data) == 413 and "more than 262144 bytes" in message(data)


def test_a_client_that_sends_for_ever_after_its_answer_is_cut_off(server: Server) -> None:
    begun = time.monotonic()
    with connect(server) as wire:
        wire.sendall(b"POST /v1/models/tiny:predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n")
        with pytest.raises(ConnectionError):
            while time.monotonic() - begun < 10:
                wire.sendall(b"\0")
                time.sleep(0.01)
    wait_until(lambda: server.open == 0 and not server.server.server_state.tasks)


def test_an_offer_to_upgrade_is_passed_over(server: Server) -> None:
    """Java's client offers h2c with each request, bodies included."""
    offer = b"Host: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
    head = b"POST /v1/models/tiny:predict HTTP/1.1\r\n" + offer + b"Content-Length: %d\r\n\r\n" % len(SCENE)
    with connect(server) as wire:
        for _ in range(2):
            wire.sendall(b"GET /v1/models HTTP/1.1\r\n" + offer + b"\r\n")
            assert answer(wire) == (200, '{"models":["tiny"]}')
            wire.sendall(head)
            time.sleep(0.02)
            wire.sendall(SCENE)
            assert answer(wire)[0] == 200


def test_at_the_end_a_request_on_its_way_is_still_answered(server: Server) -> None:
    with connect(server) as wire, connect(server) as silent:
        for each in (wire, silent):
            each.sendall(GET)
            assert answer(each)[0] == 200
        server.server.should_exit = True
        wait_until(lambda: not server.server.servers[0].sockets)
        time.sleep(0.3)
        wire.sendall(GET)
        data = rest(wire)
        assert status(data) == 200 and b"connection: close" in data
        assert rest(silent) == b""
    server.thread.join(5)
    assert not server.thread.is_alive()


def test_overload_is_told_within_50_ms(server: Server) -> None:
    hold = threading.Event()

    async def fill() -> None:
        await asyncio.gather(*(server.pool.run(hold.wait) for _ in range(2)))

    filling = threading.Thread(target=asyncio.run, args=[fill()])
    filling.start()
    wait_until(lambda: server.pool.taken == 2)
    seconds = []
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{server.address[1]}") as client:
            for _ in range(20):
                begun = time.monotonic()
                told = client.post("/v1/models/tiny:predict", content=SCENE)
                seconds.append(time.monotonic() - begun)
                assert told.status_code == 503 and told.headers["retry-after"] == "1"
    finally:
        hold.set()
        filling.join()
    # The median, since other tests may use both cores.
    assert statistics.median(seconds) < 0.05, seconds


def test_sigterm_is_not_ready_at_once_and_both_sides_end_what_has_begun(tmp_path: Path) -> None:
    tiny_model_folder(tmp_path, ["person"])
    big = paint({}, width=4000, height=3000)
    env = {"HAECHI_SERVING_ENGINE": "onnxruntime", "HAECHI_SERVING_BATCH": "1", "HAECHI_SERVING_WORKERS": "2"}
    with running(tmp_path, env=env) as process, socket.create_connection(("127.0.0.1", process.http), 10) as wire:
        wire.sendall(GET)
        assert answer(wire)[0] == 200
        client = tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{process.grpc}")
        tensor = tritonclient.grpc.InferInput("images", [12], "BYTES")
        tensor.set_data_from_numpy(np.array([big] * 12, dtype=np.object_))
        body = {"instances": [{"image": {"b64": base64.b64encode(big).decode()}}] * 12}
        with ThreadPoolExecutor(2) as askers:
            http = askers.submit(httpx.post, f"{process.url}/v1/models/tiny:predict", json=body, timeout=60)
            rpc = askers.submit(client.infer, "tiny", [tensor])
            process.wait_for_requests(2)
            assert not http.done() and not rpc.done(), "both should still run when the signal comes"
            process.process.terminate()
            time.sleep(0.2)
            wire.sendall(GET)
            assert answer(wire) == (503, '{"ready":false}')
            assert http.result().status_code == 200
            assert rpc.result().as_numpy("boxes") is not None
        client.close()
        assert process.process.wait(20) == 0
