"""Hostile requests against one real process: refused with a reason, and nothing crashes, hangs, leaks or answers 5xx.

What single rooms refuse stands in their own tests; here is what spans them, what is made at random, and what is left behind.
"""

from __future__ import annotations

import base64
import contextlib
import gc
import io
import json
import re
import socket
import ssl
import struct
import subprocess
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tritonclient.grpc import service_pb2 as pb

from tests.serving_process import Running, running
from tests.tiny_models import paint, shade

SCENE = paint({(2, 3): shade(0, 0.9)})
B64 = base64.b64encode(SCENE).decode()
V1 = {"instances": [{"image": {"b64": B64}}], "parameters": {"conf": 0.4, "classes": ["person"]}}
V2 = {
    "id": "7",
    "inputs": [{"name": "images", "datatype": "BYTES", "shape": [1], "data": [B64]}],
    "outputs": [{"name": "boxes", "parameters": {"binary_data": True}}],
    "parameters": {"conf": 0.4, "max_det": 9, "camera": "door"},
}
PATHS = {"v1": "/v1/models/door:predict", "v2": "/v2/models/door/infer"}
INFER = "/inference.GRPCInferenceService/ModelInfer"
HANG = 5.0  # seconds that health may take while others use the processor too
random_requests = settings(
    max_examples=120, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True
)


class Watch:
    """Asks for health all along."""

    def __init__(self, server: Running) -> None:
        self.slowest, self.failed = 0.0, 0
        self._server = server
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        with httpx.Client(base_url=self._server.url, timeout=60) as client:
            while not self._end.wait(0.05):
                begun = time.monotonic()
                try:
                    self.failed += client.get("/v2/health/ready").status_code != 200
                except httpx.TransportError:
                    self.failed += 1
                self.slowest = max(self.slowest, time.monotonic() - begun)


def log_of(folder: Path) -> str:
    return (folder / "stderr").read_text()


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    """One process for all of it; at the end it is still alive, and its log tells of no failure of ours."""
    with (
        (folder / "stderr").open("w") as sink,
        running(folder, "--name", "door", stdout=subprocess.DEVNULL, stderr=sink) as process,
    ):
        yield process
        assert process.process.poll() is None
    log = log_of(folder)
    assert "Traceback" not in log and "failed" not in log, log[-5000:]
    # Nor do the libraries that read pictures write there what callers make them say.
    strange = [line for line in log.splitlines() if not re.match(r"\d\d:\d\d:\d\d ", line)]
    assert strange == [], strange[:20]
    assert process.process.returncode == 0


@pytest.fixture(autouse=True)
def healthy(server: Running) -> Iterator[None]:
    watch = Watch(server)
    try:
        yield
    finally:
        watch.close()
    assert watch.failed == 0 and watch.slowest < HANG, f"{watch.failed} failed, {watch.slowest:.1f} s"
    answer = httpx.post(f"{server.url}/v1/models/door:predict", content=SCENE, timeout=30)
    assert [row["class"] for row in answer.json()["predictions"][0]["detections"]] == ["person"]


def refused(answer: httpx.Response, status: int | tuple[int, ...] = 400) -> str:
    """The reason."""
    expected = status if isinstance(status, tuple) else (status,)
    assert answer.status_code in expected, f"{answer.status_code} {answer.text[:300]}"
    assert list(answer.json()) == ["error"]
    reason: str = answer.json()["error"]
    assert 5 < len(reason) < 2000
    return reason


def post(server: Running, path: str, body: Any, content_type: str = "", **headers: str) -> httpx.Response:
    fields = {"content-type": content_type} if content_type else {}
    return httpx.post(server.url + path, content=body, headers=fields | headers, timeout=60)


# Images that cost more than they weigh ----------------------------------------------------------------------------


def encoded(kind: str, size: tuple[int, int], mode: str = "L", **options: Any) -> bytes:
    sink = io.BytesIO()
    Image.new(mode, size).save(sink, kind, **options)
    return sink.getvalue()


def patched(data: bytes, at: int, value: bytes) -> bytes:
    return data[:at] + value + data[at + len(value) :]


def png_header(width: int, height: int) -> bytes:
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return patched(encoded("PNG", (32, 32), "RGB"), 12, head + struct.pack(">I", zlib.crc32(head)))


def png_with(kind: bytes, prefix: bytes) -> bytes:
    """A picture with a chunk beside it that becomes 200 MB."""
    data = kind + prefix + zlib.compress(b"\0" * 200_000_000, 9)
    chunk = struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    plain = encoded("PNG", (32, 32), "RGB")
    return plain[:33] + chunk + plain[33:]


def jpeg_header(width: int, height: int) -> bytes:
    data = encoded("JPEG", (32, 32), "RGB")
    return patched(data, data.index(b"\xff\xc0") + 5, struct.pack(">HH", height, width))


def tiff_tile() -> bytes:
    tags = {256: 32, 257: 32, 258: 8, 259: 8, 262: 1, 277: 1, 322: 30_000, 323: 30_000, 324: 134, 325: 100}
    rows = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + rows + struct.pack("<I", 0) + zlib.compress(b"\0" * 900_000)


IMAGES: dict[str, Callable[[], bytes]] = {
    "PNG that says 60000x60000": lambda: png_header(60_000, 60_000),
    "PNG that says 2^31 squared": lambda: png_header(2**31 - 1, 2**31 - 1),
    "PNG that says 0x0": lambda: png_header(0, 0),
    "PNG of 100 million true pixels": lambda: encoded("PNG", (10_000, 10_000), "1"),
    "PNG with a text of 200 MB": lambda: png_with(b"zTXt", b"k\0\0"),
    "PNG with a profile of 200 MB": lambda: png_with(b"iCCP", b"k\0\0"),
    "JPEG that says 65500x65500": lambda: jpeg_header(65_500, 65_500),
    "JPEG that says 6000x6000 and holds 32x32": lambda: jpeg_header(6_000, 6_000),
    "JPEG of 64 million true pixels": lambda: encoded("JPEG", (8_000, 8_000)),
    "JPEG of 60 MB of comments": lambda: b"\xff\xd8" + (b"\xff\xfe\xff\xff" + b"\0" * 65_533) * 900,
    "TIFF of 100 million true pixels": lambda: encoded("TIFF", (10_000, 10_000), "1", compression="group4"),
    "TIFF of a giant tile": tiff_tile,
    "TIFF that points at itself": lambda: b"II*\0" + struct.pack("<IHHHII", 8, 1, 254, 4, 1, 0) + struct.pack("<I", 8),
    "WebP of 64 million true pixels": lambda: encoded("WEBP", (8_000, 8_000), "RGB", method=0),
    "WebP that says 16384x16384": lambda: b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\x02\0\0\0" + b"\xff\x3f\0" * 2 + b"\0" * 8,
    "BMP that says 2^31 squared": lambda: patched(encoded("BMP", (8, 8), "RGB"), 18, b"\xff\xff\xff\x7f" * 2),
    "BMP upside down beyond all bounds": lambda: patched(encoded("BMP", (8, 8), "RGB"), 22, b"\0\0\0\x80"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images_that_cost_more_than_they_weigh_are_refused(server: Running, name: str) -> None:
    process = psutil.Process(server.process.pid)
    data = IMAGES[name]()
    before = process.memory_info().rss
    begun = time.process_time()
    refused(post(server, PATHS["v1"], data, "image/png"))
    many = json.dumps({"instances": [{"image": {"b64": base64.b64encode(data[: 2**20]).decode()}}] * 32}).encode()
    assert "image 0" in refused(post(server, PATHS["v1"], many, "application/json"))
    assert time.process_time() - begun < 10
    assert process.memory_info().rss - before < 400 * 2**20


def damaged(kind: str, every: int = 40, **options: Any) -> bytes:
    """A picture with a wrong byte now and then behind its head."""
    dots = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    sink = io.BytesIO()
    image = Image.fromarray(dots)
    (image.convert("1") if options.get("compression") == "group4" else image).save(sink, kind, **options)
    data = bytearray(sink.getvalue())
    for at in range(60, len(data) - 300, every):
        data[at] ^= 0x55
    return bytes(data)


LOUD: dict[str, Callable[[], bytes]] = {
    "fax": lambda: damaged("TIFF", compression="group4"),
    "LZW": lambda: damaged("TIFF", compression="tiff_lzw"),
    "deflate": lambda: damaged("TIFF", compression="tiff_adobe_deflate"),
    "JPEG in TIFF": lambda: damaged("TIFF", compression="jpeg"),
    "tags beyond the end": lambda: (
        b"II*\0" + struct.pack("<IH", 8, 20) + b"".join(struct.pack("<HHII", 256 + i, 3, 9, 10**9) for i in range(20))
    ),
    "more samples than there are": lambda: (
        b"II*\0" + struct.pack("<IHHHIIHHIII", 8, 2, 258, 3, 4096, 8, 277, 3, 1, 4096, 0) + b"\x08\0" * 4096
    ),
    **{kind: lambda kind=kind: damaged(kind) for kind in ("JPEG", "PNG", "BMP", "WEBP")},
}


@pytest.mark.parametrize("name", LOUD)
def test_a_damaged_picture_makes_no_library_write_into_the_log(server: Running, folder: Path, name: str) -> None:
    before = log_of(folder)
    answered(post(server, PATHS["v1"], LOUD[name](), "image/tiff"))
    assert log_of(folder) == before


# Bodies at random -------------------------------------------------------------------------------------------------

JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.sampled_from([B64, "=", "A" * 5000, "\0", 1e308, -0.0, 2**64, [], {}, [[]] * 40]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=12,
)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Ways to every part of a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(way for key, part in inner for way in places(part, (*at, key)))]


def exchanged(value: Any, way: tuple[Any, ...], junk: Any) -> Any:
    """The value with something else at one place."""
    if not way:
        return junk
    inner = {**value} if isinstance(value, dict) else [*value]
    inner[way[0]] = exchanged(value[way[0]], way[1:], junk)
    return inner


def answered(answer: httpx.Response) -> None:
    """Well, or refused with a reason."""
    if answer.status_code != 200:
        refused(answer)


@pytest.mark.parametrize(("path", "good"), [("v1", V1), ("v2", V2)])
def test_json_with_junk_anywhere_is_answered_or_refused(server: Running, path: str, good: Any) -> None:
    ways = places(good)

    @random_requests
    @given(st.lists(st.tuples(st.sampled_from(ways), JUNK), min_size=1, max_size=2))
    def ask(changes: list[tuple[tuple[Any, ...], Any]]) -> None:
        entry = good
        for way, junk in changes:
            with contextlib.suppress(KeyError, IndexError, TypeError):  # an earlier change took that place away
                entry = exchanged(entry, way, junk)
        answered(client.post(PATHS[path], json=entry))

    with httpx.Client(base_url=server.url, timeout=30) as client:
        ask()


@pytest.mark.parametrize("path", PATHS)
def test_any_bytes_of_any_type_are_answered_or_refused(server: Running, path: str) -> None:
    kinds = [
        "",
        "application/json",
        "image/jpeg",
        "image/*",
        "application/octet-stream",
        "multipart/form-data",
        ";",
        "é",
    ]
    starts = [
        b"",
        b"{",
        b'{"inputs":',
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        b"BM",
        b"RIFF\0\0\0\0WEBP",
        b"II*\0",
        b"\0",
    ]
    lengths = st.none() | st.integers(-5, 300).map(str) | st.text("0123456789+-_ e.", max_size=20)

    @random_requests
    @given(st.sampled_from(kinds), st.sampled_from(starts), st.binary(max_size=200), lengths)
    def ask(kind: str, start: bytes, rest: bytes, length: str | None) -> None:
        headers = {b"content-type": kind.encode()}
        if length is not None:
            headers[b"inference-header-content-length"] = length.strip().encode()
        answered(client.post(PATHS[path], content=start + rest, headers=headers))

    with httpx.Client(base_url=server.url, timeout=30) as client:
        ask()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "WEBP", "TIFF"])
def test_a_damaged_image_is_answered_or_refused(server: Running, kind: str) -> None:
    sink = io.BytesIO()
    Image.open(io.BytesIO(SCENE)).convert("RGB").save(sink, kind)
    good = sink.getvalue()
    # Where headers are, damage goes deeper.
    place = st.integers(0, 99) | st.integers(0, len(good) - 1)

    @random_requests
    @given(st.lists(st.tuples(place, st.integers(0, 255)), max_size=4), st.integers(1, len(good)))
    def ask(damage: list[tuple[int, int]], length: int) -> None:
        data = bytearray(good)
        for at, value in damage:
            data[at] = value
        answered(client.post(PATHS["v1"], content=bytes(data[: length if damage == [] else None])))

    with httpx.Client(base_url=server.url, timeout=30) as client:
        ask()


# Bodies made by hand ----------------------------------------------------------------------------------------------


def tensor(datatype: str, shape: list[int], data: bytes) -> bytes:
    """A V2 request whose `data` is JSON text as it stands."""
    row = {"name": "images", "datatype": datatype, "shape": shape}
    return (json.dumps({"inputs": [row]})[:-3] + ', "data": ').encode() + data + b"}]}"


BODIES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "texts as wide as the longest": (
        "v2",
        lambda: tensor("FP32", [3, 1000, 1000], b'["' + b"x" * 2000 + b'"' + b',""' * 2_999_999 + b"]"),
    ),
    "a number of 10 million digits": ("v2", lambda: tensor("UINT8", [10, 10, 3], b"[" + b"9" * 10_000_000 + b"]")),
    "numbers near nothing": ("v2", lambda: tensor("FP32", [3, 1, 1], b"[1e-400000,0." + b"0" * 10**6 + b"1,1E400]")),
    "a number 60 lists deep": ("v2", lambda: tensor("FP32", [3, 1, 1], b"[" * 60 + b"0.5" + b"]" * 60)),
    "1000 lists deep": ("v2", lambda: tensor("BYTES", [1], b"[" * 1000 + b"]" * 1000)),
    "64 beginnings of a JPEG": (
        "v2",
        lambda: tensor("BYTES", [64], json.dumps(["/9j/" + "A" * 400_000] * 64).encode()),
    ),
    "one key three times": ("v2", lambda: b'{"inputs":[],"inputs":{},"inputs":7}'),
    "900 objects deep": ("v2", lambda: b'{"parameters":' * 900 + b"{}" + b"}" * 900),
    "an id of zeros": ("v2", lambda: b'{"id":"' + b"\\u0000" * 100_000 + b'","inputs":[]}'),
    "half a character": ("v2", lambda: b'{"id":"\\ud800","inputs":[]}'),
    "a million empty objects": ("v1", lambda: b'{"instances":[' + b"{}," * 1_000_000 + b"{}]}"),
    "60 MB of base64": ("v1", lambda: b'{"instances":[{"image":{"b64":"' + b"A" * 60_000_000 + b'"}}]}'),
    "60 MB of blanks in base64": ("v1", lambda: b'{"instances":[{"image":{"b64":"' + b" " * 60_000_000 + b'"}}]}'),
    "base64 in other letters": ("v1", lambda: b'{"instances":[{"image":{"b64":"' + "é".encode() * 1000 + b'"}}]}'),
    "base64 that ends all the time": ("v1", lambda: b'{"instances":[{"image":{"b64":"' + b"A=" * 1000 + b'"}}]}'),
    "a key of 30 MB": ("v1", lambda: b'{"' + b"k" * 30_000_000 + b'":1}'),
    "a byte order mark": ("v1", lambda: b"\xef\xbb\xbf{}"),
    "UTF-16": ("v1", lambda: b"\xfe\xff\0{\0}"),
    "60 MB of blanks": ("v1", lambda: b" " * 60_000_000),
}


@pytest.mark.parametrize("name", BODIES)
def test_json_made_to_cost_is_refused(server: Running, name: str) -> None:
    path, make = BODIES[name]
    process = psutil.Process(server.process.pid)
    before = process.memory_info().rss
    refused(post(server, PATHS[path], make(), "application/json"))
    assert process.memory_info().rss - before < 600 * 2**20


@pytest.mark.parametrize(
    ("query", "body"),
    [
        ("conf=" + "9" * 20_000, SCENE),
        ("conf=nan", SCENE),
        ("conf=%00", SCENE),
        ("iou=inf&iou=0.5&conf=-0", SCENE),
        ("max_det=1e300", SCENE),
        ("max_det=%F0%9F%90%95", SCENE),
        ("classes=" + "dog," * 5000 + "%ff%fe", SCENE),
        ("conf=%ZZ", SCENE),
    ],
    ids=lambda value: str(value)[:20],
)
def test_queries_out_of_bounds_are_refused(server: Running, query: str, body: bytes) -> None:
    for path in PATHS.values():
        refused(post(server, f"{path}?{query}", body))


@pytest.mark.parametrize("path", [*PATHS.values(), "/v2/repository/index", "/v2/repository/models/door/load"])
@pytest.mark.parametrize("chunked", [False, True])
def test_empty_and_giant_bodies_are_refused(server: Running, path: str, chunked: bool) -> None:
    open_to_all = "repository" not in path
    giant = (b"\0" * 2**20 for _ in range(100)) if chunked else b"\0" * 100 * 2**20
    try:
        refused(post(server, path, giant), 413 if open_to_all else 403)
    except httpx.TransportError:  # the client may be still sending when it is hung up on
        assert not open_to_all or chunked
    refused(post(server, path, iter([b""]) if chunked else b""), 400 if open_to_all else 403)


# Addresses and connections as raw bytes ---------------------------------------------------------------------------


def spoken(server: Running, data: bytes, port: int = 0, seconds: float = 15.0) -> bytes:
    """All that comes back until the server hangs up or is silent."""
    parts: list[bytes] = []
    with (
        socket.create_connection(("127.0.0.1", port or server.http), timeout=seconds) as wire,
        contextlib.suppress(OSError),
    ):
        wire.sendall(data)
        wire.shutdown(socket.SHUT_WR)
        while part := wire.recv(65536):
            parts.append(part)
    return b"".join(parts)


def statuses(data: bytes) -> list[int]:
    return [int(line.split()[1]) for line in data.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")]


@pytest.mark.parametrize(
    "path",
    [
        b"/../../etc/passwd",
        b"/..%2f..%2fetc%2fpasswd",
        b"/v2/models/..%2f..%2fetc/infer",
        b"/v2/models/%2e%2e/ready",
        b"/v2/models/door%00/ready",
        b"/v2/models/door%0d%0aSet-Cookie:x/ready",
        b"/v2/models/%ff%fe%ed%a0%80/ready",
        b"/v2/models/" + b"a" * 20_000 + b"/ready",
        b"/v2/models/door/versions/" + b"%25" * 3000,
        b"//v2//models//door",
        b"/v2/models/door/",
        b"/v2/models//ready",
        b"/v1/models/door:predict:predict",
        b"/v1/models/:predict",
        b"/V2",
        b"/v2/models/door;x=1/ready",
        b"/v2/models/{name}",
        b"/docs/../metrics%00",
        b"/openapi.json/",
        b"*",
        b"http://other.example/v2/models/x",
    ],
    ids=lambda path: path[:30].decode(),
)
def test_tricks_in_the_address_find_nothing(server: Running, path: bytes) -> None:
    told = spoken(server, b"GET " + path + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert statuses(told)[0] in (400, 404, 405, 431), told[:300]
    head, _, body = told.partition(b"\r\n\r\n")
    assert b"set-cookie" not in head.lower() and json.loads(body)["error"]


POST = b"POST /v1/models/door:predict HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize(
    "data",
    [
        POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        POST + b"Content-Length: -1\r\n\r\n",
        POST + b"Content-Length: 1e3\r\n\r\n",
        POST + "Content-Length: ²\r\n\r\n".encode(),
        POST + b"Content-Length: 99999999999999999999999999\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffffff\r\nabc",
        POST + b"Transfer-Encoding: chunked\r\n\r\n-3\r\nabc\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabcdef\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\n3;" + b"x" * 200_000 + b"\r\nabc\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n" + b"".join(b"t%d: x\r\n" % n for n in range(5000)) + b"\r\n",
        POST + b"Transfer-Encoding: xchunked\r\n\r\nabc",
        POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        POST + b"Content-Length: 3\r\n\r\n",
        POST + b"Content-Encoding: gzip\r\nContent-Length: 1\r\n\r\nx",
        POST + b"Expect: 200-ok\r\nContent-Length: 1\r\n\r\nx",
        POST + b"X: \0\r\n\r\n",
        POST + b" folded: x\r\n\r\n",
        POST + b"X Y: z\r\n\r\n",
        POST + b"".join(b"H%d: x\r\n" % number for number in range(3000)) + b"\r\n",
        POST + b"H: " + b"x" * 100_000 + b"\r\n\r\n",
        b"GET /\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\xc3\xa9 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"G\xc3\x89T / HTTP/1.1\r\n\r\n",
        b"CONNECT other:443 HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"POST /v1/models/door:predict HTTP/1.0\r\n\r\n",
        b"POST /v1/models/door:predict HTTP/1.0\r\nContent-Length: 3\r\n\r\nabc",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 200,
        b"\0" * 100_000,
        b"\r\n" * 50_000,
    ],
    ids=lambda data: f"{zlib.crc32(data):x}",
)
def test_what_is_not_quite_http_is_refused_or_hung_up_on(server: Running, data: bytes) -> None:
    begun = time.monotonic()
    told = statuses(spoken(server, data))
    assert all(400 <= status < 500 for status in told), told
    assert time.monotonic() - begun < 14


def test_http_1_0_gets_its_answer(server: Running) -> None:
    told = spoken(server, b"GET /v2/health/live HTTP/1.0\r\n\r\n")
    assert statuses(told) == [200] and told.endswith(b'{"live":true}')


def test_other_methods_are_refused_everywhere(server: Running) -> None:
    paths = ("/", "/v2", "/v1/models", "/metrics", "/docs", "/openapi.json", *PATHS.values())
    for path in paths:
        for method in ("TRACE", "PUT", "DELETE", "PATCH", "OPTIONS", "PROPFIND"):
            answer = httpx.request(method, server.url + path)
            refused(answer, 405)
            assert answer.headers["allow"]


def test_any_header_is_answered(server: Running) -> None:
    names = [
        "accept",
        "x-request-id",
        "x-haechi-camera",
        "x-haechi-sample",
        "traceparent",
        "tracestate",
        "authorization",
    ]
    names += [
        "x-api-key",
        "content-encoding",
        "range",
        "if-none-match",
        "expect",
        "connection",
        "upgrade",
        "cookie",
        "te",
    ]
    known = [
        "application/openmetrics-text;version=x",
        "text/plain;version=",
        "bytes=0-1",
        "Bearer a.b.c",
        "gzip",
        "q=9;;,",
    ]
    value = st.sampled_from(known) | st.binary(max_size=60).map(
        lambda data: data.translate(None, b"\r\n\0").decode("latin-1")
    )

    @random_requests
    @given(
        st.dictionaries(st.sampled_from(names), value, max_size=5), st.sampled_from(["/metrics", "/v2", PATHS["v1"]])
    )
    def ask(headers: dict[str, str], path: str) -> None:
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode("latin-1")
        method = b"POST " if path == PATHS["v1"] else b"GET "
        length = b"content-length: %d\r\n\r\n" % (len(SCENE) if method == b"POST " else 0)
        head = method + path.encode() + b" HTTP/1.1\r\nhost: x\r\n" + lines + length
        told = statuses(spoken(server, head + (SCENE if method == b"POST " else b""), seconds=10))
        assert told and all(status < 500 for status in told), told

    ask()


# gRPC -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def channel(server: Running) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc}", options=[("grpc.max_send_message_length", -1)]) as channel:
        yield channel


def code_of(channel: grpc.Channel, data: bytes, path: str = INFER, **more: Any) -> grpc.StatusCode:
    try:
        channel.unary_unary(path, None, None)(data, timeout=60, **more)
    except grpc.RpcError as error:
        assert error.details()
        return error.code()  # type: ignore[no-any-return]
    return grpc.StatusCode.OK


GRPC_REFUSALS = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.RESOURCE_EXHAUSTED)


def typed_pixels() -> bytes:
    contents = pb.InferTensorContents(uint_contents=[1] * 2**25)
    row = pb.ModelInferRequest.InferInputTensor(datatype="UINT8", shape=[4096, 4096, 3], contents=contents)
    data: bytes = pb.ModelInferRequest(model_name="door", inputs=[row]).SerializeToString()
    return data


def length(data: bytes) -> bytes:
    """A protobuf length and what is so long."""
    size, parts = len(data), []
    while size > 0x7F:
        parts.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([*parts, size]) + data


MESSAGES: dict[str, Callable[[], bytes]] = {
    "16 million inputs": lambda: b"\x2a\0" * 2**24,
    "16 million raw contents": lambda: b"\x3a\0" * 2**24,
    "16 million parameters": lambda: b"\x22\0" * 2**24,
    "16 million elements of one input": lambda: b"\x2a" + length(b"\x2a" + length(b"\x42\0" * 2**24)),
    "32 million typed pixels": typed_pixels,
    "groups": lambda: b"\x0b" * 100_000,
    "a length without end": lambda: b"\xff" * 100_000,
    "a field longer than the message": lambda: b"\x3a\xff\xff\xff\x7f" + b"x" * 100_000,
    "100 MB": lambda: b"\0" * 100 * 2**20,
}


@pytest.mark.parametrize("name", MESSAGES)
def test_grpc_messages_made_to_cost_are_refused(server: Running, channel: grpc.Channel, name: str) -> None:
    data = MESSAGES[name]()
    process = psutil.Process(server.process.pid)
    before = process.memory_info().rss
    assert code_of(channel, data) in GRPC_REFUSALS
    assert process.memory_info().rss - before < 300 * 2**20


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_a_compressed_grpc_message_is_bounded_as_it_is_inflated(
    server: Running, channel: grpc.Channel, compression: grpc.Compression
) -> None:
    before = psutil.Process(server.process.pid).memory_info().rss
    assert code_of(channel, b"\0" * 150 * 2**20, compression=compression) is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert psutil.Process(server.process.pid).memory_info().rss - before < 200 * 2**20


def test_any_grpc_message_is_answered_or_refused(channel: grpc.Channel) -> None:
    rows = st.builds(
        lambda name, datatype, shape, contents: pb.ModelInferRequest.InferInputTensor(
            name=name, datatype=datatype, shape=shape, contents=contents
        ),
        st.text(max_size=5),
        st.sampled_from(["BYTES", "UINT8", "FP32", "FP16", ""]),
        st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 4), max_size=5),
        st.none()
        | st.builds(
            lambda items: pb.InferTensorContents(bytes_contents=items), st.lists(st.binary(max_size=9), max_size=3)
        )
        | st.builds(
            lambda items: pb.InferTensorContents(fp32_contents=items), st.lists(st.floats(width=32), max_size=12)
        ),
    )
    messages = st.builds(
        lambda inputs, raw, conf: pb.ModelInferRequest(
            model_name="door",
            inputs=inputs,
            raw_input_contents=raw,
            parameters={"conf": pb.InferParameter(double_param=conf)},
        ).SerializeToString(),
        st.lists(rows, max_size=2),
        st.lists(st.binary(max_size=40) | st.just(struct.pack("<I", len(SCENE)) + SCENE), max_size=2),
        st.floats(),
    )

    @random_requests
    @given(messages | st.binary(max_size=100))
    def ask(data: bytes) -> None:
        assert code_of(channel, data) in (grpc.StatusCode.OK, *GRPC_REFUSALS)

    ask()


@pytest.mark.parametrize(
    "path", ["/", "/x/y", "/inference.GRPCInferenceService/", INFER + "/x", "/" + "a" * 5000, "/é"]
)
def test_unknown_grpc_methods_are_unimplemented(channel: grpc.Channel, path: str) -> None:
    assert code_of(channel, b"", path.encode().decode("latin-1")) in (
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,  # the head is too large
    )


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def frame(kind: int, flags: int, stream: int, data: bytes, length: int | None = None) -> bytes:
    return (
        (len(data) if length is None else length).to_bytes(3, "big")
        + bytes([kind, flags])
        + struct.pack(">I", stream)
        + data
    )


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\0" * 100_000,
        PREFACE + b"\xff" * 100_000,
        PREFACE + frame(4, 0, 0, b"") + frame(0, 1, 1, b"data without a head"),
        PREFACE + frame(4, 0, 0, b"", 2**24 - 1),
        PREFACE + frame(4, 0, 0, b"") + frame(6, 0, 0, b"12345678") * 20_000,
        PREFACE + frame(4, 0, 0, b"") * 20_000,
        PREFACE + frame(4, 0, 0, b"") + frame(1, 0, 1, b"") + frame(9, 0, 1, b"\x40\x01a\x01b") * 20_000,
        PREFACE + frame(4, 0, 0, b"") + frame(8, 0, 0, b"\0\0\0\0") + frame(3, 0, 1, b"\0\0\0\x08") * 5000,
    ],
    ids=lambda data: f"{zlib.crc32(data):x}",
)
def test_garbage_at_the_grpc_port_is_hung_up_on(server: Running, channel: grpc.Channel, data: bytes) -> None:
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: spoken(server, data, server.grpc, seconds=3), range(4)))
    assert code_of(channel, b"", "/inference.GRPCInferenceService/ServerLive") is grpc.StatusCode.OK


def test_cancelled_calls_leave_room_for_others(server: Running, channel: grpc.Channel) -> None:
    message = pb.ModelInferRequest(model_name="door", raw_input_contents=[struct.pack("<I", len(SCENE)) + SCENE])
    message.inputs.add(name="images", datatype="BYTES", shape=[1])
    data = message.SerializeToString()
    ask = channel.unary_unary(INFER, None, None)
    for _ in range(1000):
        ask.future(data, timeout=30).cancel()
    end = time.monotonic() + 20
    while (code := code_of(channel, data)) is not grpc.StatusCode.OK:
        assert time.monotonic() < end, code


def test_clients_of_another_transport_are_hung_up_on(server: Running) -> None:
    context = ssl.create_default_context()
    for port in (server.http, server.grpc):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as wire, pytest.raises(OSError):
            context.wrap_socket(wire, server_hostname="door")


# All at once, and what is left ------------------------------------------------------------------------------------


def test_slow_clients_of_every_kind_take_nothing_from_others(server: Running) -> None:
    kinds = [
        b"",
        b"GET /v2",
        POST + b"X-Slow: ",
        POST + b"Content-Length: 1000\r\n\r\n{",
        POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab",
        POST + b"Expect: 100-continue\r\nContent-Length: 1000\r\n\r\n",
    ]
    with contextlib.ExitStack() as stack:
        wires = []
        for number in range(60):
            port = server.grpc if number % 7 == 6 else server.http
            wire = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
            wire.sendall(PREFACE if port == server.grpc else kinds[number % len(kinds)])
            if number % 3 == 0:
                wire.shutdown(socket.SHUT_WR)
            wires.append(wire)
        with httpx.Client(base_url=server.url, timeout=30) as client:
            for step in range(20):
                assert client.post(PATHS["v1"], content=SCENE).status_code == 200
                for wire in wires:
                    with contextlib.suppress(OSError):
                        wire.send(b"a") if step % 5 == 0 else None


def storm(server: Running) -> None:
    """A bit of all of the above."""
    for body in (b"", b"{", b"\0" * 2**20, SCENE[:200], b"\xff\xd8\xff" + b"\0" * 2**20, png_header(60_000, 60_000)):
        for path in PATHS.values():
            refused(post(server, path, body))
    for data in (POST + b"Content-Length: 1000\r\n\r\n{", b"\0" * 1000, POST + b"X: " + b"x" * 50_000):
        spoken(server, data)
        spoken(server, PREFACE + data, server.grpc, seconds=0.2)
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc}") as channel:
        for data in (b"", b"\xff" * 1000, b"\x2a\0" * 2**20):
            code_of(channel, data)
        channel.unary_unary(INFER, None, None).future(b"x" * 2**20).cancel()


def test_nothing_is_left_behind(server: Running) -> None:
    process = psutil.Process(server.process.pid)

    def held() -> tuple[int, int, float]:
        gc.collect()
        return process.num_fds(), process.num_threads(), process.memory_info().rss / 2**20

    for _ in range(4):
        storm(server)
    time.sleep(1)
    files, threads, memory = held()
    for _ in range(16):
        storm(server)
    end = time.monotonic() + 15  # what was half-closed is let go by a timer
    while (now := held())[0] > files + 2 and time.monotonic() < end:
        time.sleep(0.5)
    assert now[0] <= files + 2 and now[1] <= threads + 2, (files, threads, now)
    # One storm sends 4 MiB that are refused.
    assert now[2] < memory + 24, (memory, now)


def test_a_refused_body_is_let_go_at_once(server: Running, channel: grpc.Channel) -> None:
    process = psutil.Process(server.process.pid)
    sizes = []
    for _ in range(8):
        refused(post(server, PATHS["v1"], b"\0" * 50_000_000, "application/json"))
        refused(post(server, PATHS["v2"], b"\x89PNG\r\n\x1a\n" + b"\0" * 50_000_000))
        sizes.append(process.memory_info().rss / 2**20)
    # Eight times two would be 800 MB.
    assert max(sizes) - min(sizes) < 200, sizes
