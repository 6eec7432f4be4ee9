"""The runtime as a real process on loopback: what it answers, what it refuses, how it starts and ends."""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from starlette.requests import Request

from haechi.components.shared.errors import InputError, ModelError, OverloadError, SettingsError
from haechi.components.shared.files import read_json, write_json
from haechi.components.shared.images import encode_jpeg
from haechi.serving import app as serving_app
from haechi.serving import service as serving_service
from haechi.serving.app import create_app
from haechi.serving.command import add_arguments
from haechi.serving.engine import Engine, Models
from haechi.serving.pool import Pool
from haechi.serving.serve import serve
from haechi.serving.service import Call, Service
from haechi.serving.settings import ServingSettings
from haechi.serving.v1 import v1_request
from tests.serving_process import Running, running, start
from tests.tiny_models import cell_box, paint, shade, tiny_model_folder

SCENE = paint({(2, 3): shade(0, 0.9), (5, 5): shade(1, 0.6), (7, 7): shade(0, 0.3)})


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    with running(folder) as process:
        yield process


def b64(data: bytes) -> dict[str, Any]:
    return {"image": {"b64": base64.b64encode(data).decode()}}


def test_it_is_ready_within_seconds(server: Running) -> None:
    # Three seconds on an idle machine; importing alone can take that while other tests use both cores.
    assert server.seconds_to_ready < 10


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/", {"status": "alive"}),
        ("/v2/health/live", {"live": True}),
        ("/v2/health/ready", {"ready": True}),
        ("/v1/models", {"models": ["tiny"]}),
        ("/v1/models/tiny", {"name": "tiny", "ready": True}),
    ],
)
def test_health_and_models(server: Running, path: str, expected: dict[str, Any]) -> None:
    answer = httpx.get(server.url + path)
    assert (answer.status_code, answer.json()) == (200, expected)


def test_predict_gives_boxes_in_source_pixels_above_the_threshold(server: Running) -> None:
    body = {"instances": [b64(SCENE), b64(paint({}, width=640, height=320))]}
    answer = httpx.post(f"{server.url}/v1/models/tiny:predict", json=body)
    assert answer.status_code == 200
    first, second = answer.json()["predictions"]
    assert answer.json()["model_version"] == server.version
    assert (second["detections"], second["width"], second["height"]) == ([], 640, 320)
    # The cell of score 0.3 is below the threshold 0.5 of model.json.
    found = [(item["class"], item["class_id"], round(item["score"], 1), item["box"]) for item in first["detections"]]
    assert found == [("person", 0, 0.9, list(cell_box(2, 3))), ("dog", 1, 0.6, list(cell_box(5, 5)))]


def test_thresholds_are_those_of_each_class(tmp_path: Path) -> None:
    tiny_model_folder(tmp_path, ["person", "dog"])
    entry = read_json(tmp_path / "model.json")
    write_json(tmp_path / "model.json", entry | {"thresholds": {"person": 0.2, "dog": 0.7}})
    with running(tmp_path) as server:
        answer = httpx.post(
            f"{server.url}/v1/models/tiny:predict", content=SCENE, headers={"content-type": "image/png"}
        )
    scores = [(item["class"], round(item["score"], 1)) for item in answer.json()["predictions"][0]["detections"]]
    assert scores == [("person", 0.9), ("person", 0.3)]


@pytest.mark.parametrize(
    "content_type", ["image/png", "image/jpeg", "application/octet-stream", "", "IMAGE/PNG; x=y", "text/plain"]
)
def test_a_raw_image_needs_no_exact_content_type(server: Running, content_type: str) -> None:
    answer = httpx.post(
        f"{server.url}/v1/models/tiny:predict",
        content=SCENE,
        headers={"content-type": content_type} if content_type else {},
    )
    assert answer.status_code == 200 and len(answer.json()["predictions"]) == 1


@pytest.mark.parametrize("content_type", ["application/json", "application/json; charset=utf-8", "", "text/plain"])
def test_json_needs_no_exact_content_type(server: Running, content_type: str) -> None:
    text = base64.encodebytes(SCENE).decode()  # with line breaks, as command line tools write it
    body = json.dumps({"instances": [{"image": {"b64": text}}]}).encode()
    headers = {"content-type": content_type} if content_type else {}
    answer = httpx.post(f"{server.url}/v1/models/tiny:predict", content=body, headers=headers)
    assert answer.status_code == 200 and len(answer.json()["predictions"][0]["detections"]) == 2


GOOD = base64.b64encode(SCENE).decode()


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\n' + SCENE + b"\r\n--x--\r\n", "is a form"),
        (b"[]", "not an object"),
        (b"{}", "`instances` is not a list"),
        (b'{"instances": []}', "`instances` is not a list"),
        (b'{"instances": "x"}', "`instances` is not a list"),
        (b'{"instances": [1]}', r"instances\[0\].image.b64"),
        (b'{"instances": [{"image": "x"}]}', r"instances\[0\].image.b64"),
        (b'{"instances": [{"image": {"b64": 7}}]}', r"instances\[0\].image.b64"),
        (b'{"instances": [{"image": {"b64": "&&&&"}}]}', "not base64"),
        (b'{"instances": [{"image": {"b64": "abc"}}]}', "not base64"),
        ('{"instances": [{"image": {"b64": "é"}}]}'.encode(), "not base64"),
        (b'{"instances": [{"image": {"b64": ""}}]}', "the file is empty"),
        (b'{"instances": [{"image": {"b64": "aGVsbG8="}}]}', "not an image"),
        (
            json.dumps({"instances": [{"image": {"b64": GOOD}}, b64(SCENE[:200])]}).encode(),
            "image 1: the PNG is damaged",
        ),
        (json.dumps({"instances": [{}] * 65}).encode(), "at most 64"),
    ],
)
def test_bad_requests_get_400_and_a_reason(server: Running, body: bytes, match: str) -> None:
    answer = httpx.post(
        f"{server.url}/v1/models/tiny:predict", content=body, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400
    assert list(answer.json()) == ["error"]
    with pytest.raises(InputError, match=match):
        raise InputError(answer.json()["error"])


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", "/v1/models/other", 404),
        ("POST", "/v1/models/other:predict", 404),
        ("GET", "/v1/models/tiny:predict", 404),
        ("POST", "/v1/models/tiny", 405),
    ],
)
def test_wrong_addresses_get_a_json_error(server: Running, method: str, path: str, status: int) -> None:
    answer = httpx.request(method, server.url + path)
    assert answer.status_code == status and re.fullmatch(r".+\. .+\.", answer.json()["error"])


def test_a_raw_body_that_is_no_image_is_refused(server: Running) -> None:
    url = f"{server.url}/v1/models/tiny:predict"
    for data in (b"GIF89a" + b"\0" * 20, SCENE[:100], b"hello"):
        answer = httpx.post(url, content=data, headers={"content-type": "image/jpeg"})
        assert answer.status_code == 400 and answer.json()["error"]


def test_a_body_announced_too_large_is_refused_before_it_is_sent(server: Running) -> None:
    with socket.create_connection(("127.0.0.1", server.http), timeout=10) as wire:
        wire.sendall(
            b"POST /v1/models/tiny:predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\n"
            b"Content-Length: 70000000\r\n\r\n"
        )
        assert wire.recv(4096).startswith(b"HTTP/1.1 413")


def test_a_chunked_body_is_cut_off_at_the_limit(server: Running) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(70):
            yield b"\0" * 2**20

    try:
        answer = httpx.post(f"{server.url}/v1/models/tiny:predict", content=chunks(), timeout=30)
        assert answer.status_code == 413
    except httpx.TransportError:
        pass  # the server hung up while we were still sending, which is as good
    assert httpx.get(f"{server.url}/v2/health/live").status_code == 200


def test_bodies_share_one_bound_until_they_are_answered_and_small_ones_are_always_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serving_service, "_SMALL", 20)
    service = Service(Models(), Pool(1, 0), max_held=100)
    watched = create_app(service, max_body=100)
    assert isinstance(watched, serving_app._Watched)
    app = watched._app

    async def body(*sizes: int, answered: asyncio.Event) -> bytes:
        left = list(sizes)

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"x" * (left.pop(0) if left else 0), "more_body": bool(left)}

        call = Call("http", "/")
        scope = {"type": "http", "headers": [], "app": app, "method": "POST", "path": "/", "haechi.call": call}
        with service.observed(call):
            data = await serving_app.bounded_body(Request(scope, receive))
            await answered.wait()
        return data

    async def scene() -> None:
        later, now = asyncio.Event(), asyncio.Event()
        now.set()
        waiting = asyncio.create_task(body(40, 40, answered=later))
        await asyncio.sleep(0)
        with pytest.raises(OverloadError, match="of bodies"):
            await body(30, answered=now)
        assert len(await body(15, 5, answered=now)) == 20
        later.set()
        assert len(await waiting) == 80
        assert len(await body(90, answered=now)) == 90, "what was answered or refused counts no longer"

    asyncio.run(scene())


def test_health_answers_while_predictions_run(server: Running) -> None:
    """The event loop never decodes or computes."""
    big = encode_jpeg(np.random.default_rng(0).integers(0, 255, (2000, 3000, 3), dtype=np.uint8))
    body = {"instances": [b64(big)] * 3}
    done: list[int] = []

    def ask() -> None:
        done.append(httpx.post(f"{server.url}/v1/models/tiny:predict", json=body, timeout=60).status_code)

    askers = [threading.Thread(target=ask) for _ in range(2)]
    for asker in askers:
        asker.start()
    answered = 0
    with httpx.Client(timeout=30) as client:
        while any(asker.is_alive() for asker in askers):
            assert client.get(f"{server.url}/v2/health/live").status_code == 200
            answered += 1
            time.sleep(0.01)
    assert done == [200, 200]
    # Were the loop busy with them, at most one would be answered before, one between and one after.
    assert answered > 5


def test_overload_is_told_at_once_and_passes(tmp_path: Path) -> None:
    """One worker is held and one request waits: the next is refused with 503, and taken again afterwards."""
    folder = tiny_model_folder(tmp_path, ["person"])
    models, pool = Models(), Pool(workers=1, queue=1)
    models.put("tiny", Engine(tmp_path, folder, ServingSettings(threads=1)))
    app = create_app(Service(models, pool))
    hold = threading.Event()

    async def story() -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:

            async def ask() -> int:
                return (await client.post("/v1/models/tiny:predict", content=SCENE)).status_code

            held = asyncio.create_task(pool.run(hold.wait))
            await asyncio.sleep(0.05)
            waiting = asyncio.create_task(ask())
            await asyncio.sleep(0.05)
            codes = [await ask(), await ask()]
            health = (await client.get("/v2/health/ready")).status_code
            hold.set()
            await held
            return [*codes, health, await waiting, await ask()]

    try:
        assert asyncio.run(story()) == [503, 503, 200, 200, 200]
    finally:
        pool.close()


def test_a_client_that_goes_away_does_not_free_its_place_early() -> None:
    pool = Pool(workers=1, queue=0)
    hold = threading.Event()

    async def story() -> None:
        gone = asyncio.create_task(pool.run(hold.wait))
        await asyncio.sleep(0.05)
        gone.cancel()
        await asyncio.sleep(0.05)
        with pytest.raises(OverloadError, match="holds 1 requests"):
            await pool.run(lambda: None)
        hold.set()
        async with asyncio.timeout(30):
            while pool.taken:
                await asyncio.sleep(0.01)
        assert await pool.run(lambda: 7) == 7

    try:
        asyncio.run(story())
    finally:
        pool.close()


def test_alive_but_not_ready_while_the_model_loads() -> None:
    models = Models()
    models.announce("tiny")

    async def story() -> list[int]:
        transport = httpx.ASGITransport(create_app(Service(models, Pool(1, 0))))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            answers = [
                await client.get(path) for path in ("/", "/v2/health/live", "/v2/health/ready", "/v1/models/tiny")
            ]
            answers.append(await client.post("/v1/models/tiny:predict", content=SCENE))
            return [answer.status_code for answer in answers]

    assert asyncio.run(story()) == [200, 200, 503, 503, 503]


def health(port: int, service: bytes = b"") -> bytes:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        request = b"\x0a" + bytes([len(service)]) + service if service else b""
        answer: bytes = check(request, timeout=10)
        return answer


def test_grpc_health(server: Running) -> None:
    assert health(server.grpc) == b"\x08\x01"
    assert health(server.grpc, b"tiny") == b"\x08\x01"
    with pytest.raises(grpc.RpcError) as caught:
        health(server.grpc, b"other")
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_exits_with_0(tmp_path: Path, number: signal.Signals) -> None:
    tiny_model_folder(tmp_path, ["person"])
    big = paint({}, width=4000, height=3000)
    answers: list[int] = []
    with running(tmp_path) as server:

        def ask() -> None:
            body = {"instances": [b64(big)] * 10}
            answers.append(httpx.post(f"{server.url}/v1/models/tiny:predict", json=body, timeout=120).status_code)

        asker = threading.Thread(target=ask)
        asker.start()
        server.wait_for_requests(1)
        assert not answers, "the request should still be running when the signal comes"
        server.process.send_signal(number)
        asker.join()
        assert server.process.wait(timeout=40) == 0
    assert answers == [200]


def test_the_log_is_plain_lines_that_say_how_the_network_runs_even_after_two_signals(tmp_path: Path) -> None:
    tiny_model_folder(tmp_path, ["person"])
    with running(tmp_path) as server:
        server.process.send_signal(signal.SIGTERM)
        server.process.send_signal(signal.SIGTERM)
        told = server.process.communicate(timeout=40)[1]
    assert re.search(
        r"^\d\d:\d\d:\d\d backend (onnxruntime|openvino) \S+ (fp32|bf16), \d+ x \d+ threads: .+", told, re.M
    )
    assert "stopped" in told and "Traceback" not in told


def refusal(folder: Path, *arguments: str, **ports: int) -> tuple[int, str]:
    """Exit code and message of a server that should not start."""
    process = start(folder, *arguments, **ports).process
    try:
        message = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    return process.returncode, message


def test_a_folder_without_golden_images_is_refused_unless_allowed(tmp_path: Path) -> None:
    tiny_model_folder(tmp_path, ["person"], golden=False)
    code, message = refusal(tmp_path)
    assert code == ModelError.exit_code and "no golden images" in message and "--allow-unverified" in message
    with running(tmp_path, "--allow-unverified") as server:
        assert httpx.get(f"{server.url}/v1/models/tiny").json() == {"name": "tiny", "ready": True}


def test_golden_images_that_give_other_boxes_end_it(tmp_path: Path) -> None:
    tiny_model_folder(tmp_path, ["person"])
    golden = read_json(tmp_path / "golden" / "golden.json")
    golden["images"][0]["boxes"][0]["box"][0] += 20
    write_json(tmp_path / "golden" / "golden.json", golden)
    code, message = refusal(tmp_path)
    assert code == 7 and "golden images give other boxes" in message
    assert refusal(tmp_path, "--allow-unverified")[0] == 7


@pytest.mark.parametrize(
    ("spoil", "code", "match"),
    [
        (lambda folder: (folder / "model.onnx").write_bytes(b"x"), 5, "not the file that model.json describes"),
        (lambda folder: (folder / "model.onnx").unlink(), 7, "has no model.onnx"),
        (lambda folder: (folder / "model.json").write_text("{"), 7, "model.json cannot be read"),
        (lambda folder: (folder / "golden" / "empty.png").unlink(), 5, "golden images"),
        (lambda folder: (folder / "golden" / "golden.json").unlink(), 5, "has 0 golden images, model.json says 2"),
        (lambda folder: (folder / "golden" / "empty.png").write_bytes(b"x"), 5, "golden image empty.png"),
    ],
)
def test_a_damaged_folder_ends_it_with_the_reason(tmp_path: Path, spoil: Any, code: int, match: str) -> None:
    tiny_model_folder(tmp_path, ["person"])
    spoil(tmp_path)
    assert refusal(tmp_path)[0] == code
    assert match in refusal(tmp_path)[1]


def test_a_taken_port_is_named(server: Running, tmp_path: Path) -> None:
    tiny_model_folder(tmp_path, ["person"])
    code, message = refusal(tmp_path, http=server.http)
    assert code == InputError.exit_code and str(server.http) in message and "--http-port" in message
    code, message = refusal(tmp_path, grpc_port=server.grpc)
    assert code == InputError.exit_code and str(server.grpc) in message and "--grpc-port" in message


@pytest.mark.parametrize("wrong", ["99999", "-1", "http"])
@pytest.mark.parametrize("option", ["--http-port", "--grpc-port"])
def test_a_port_that_is_none_is_refused(option: str, wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--model", "m", f"{option}={wrong}"])
    assert option in capsys.readouterr().err


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="absent is not a model folder"):
        serve(tmp_path / "absent", 0, 0)


@pytest.mark.parametrize(
    ("env", "match"),
    [
        ({"HAECHI_SERVING_WORKERS": "-1"}, "WORKERS is -1"),
        ({"HAECHI_SERVING_QUEUE": "many"}, "QUEUE is 'many'"),
        ({"HAECHI_SERVING_ENGINE": "magic"}, "ENGINE is 'magic'"),
        ({"HAECHI_SERVING_SAMPLE_SHARE": "1.5"}, "SAMPLE_SHARE is 1.5"),
        ({"HAECHI_SERVING_TIMEOUT": "0"}, "TIMEOUT is 0.0"),
        ({"HAECHI_SERVING_WORKRES": "2"}, "WORKRES is no setting"),
        ({"HAECHI_SERVING_OIDC_ISSUER": "https://id"}, "only one of"),
    ],
)
def test_impossible_settings_are_refused(env: dict[str, str], match: str) -> None:
    with pytest.raises(SettingsError, match=match):
        ServingSettings.from_env(env)


def test_variables_that_kubernetes_makes_of_services_are_no_settings() -> None:
    links = ("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT", "PORT_8080_TCP", "PORT_8080_TCP_ADDR")
    names = [f"HAECHI_SERVING_{middle}{link}" for middle in ("", "CANARY_") for link in links]
    assert ServingSettings.from_env(dict.fromkeys(names, "tcp://10.0.0.1:80")) == ServingSettings()


def test_settings_come_from_the_environment() -> None:
    settings = ServingSettings.from_env(
        {"HAECHI_SERVING_QUEUE": "7", "HAECHI_SERVING_ENGINE": "", "HAECHI_BUCKET": "b"}
    )
    assert settings == ServingSettings(queue=7)


def test_json_that_claims_to_be_an_image_is_taken_at_its_word() -> None:
    assert v1_request(b"{}", "image/jpeg", {}).images == (b"{}",)


def test_the_runtime_needs_nothing_of_the_other_images() -> None:
    """Its image holds neither S3 client nor MLflow, pyarrow, kfp, torch."""
    code = (
        "import sys, haechi.serving.serve\n"
        "print(sorted({name.split('.')[0] for name in sys.modules}"
        " & {'minio', 'mlflow', 'pyarrow', 'kfp', 'torch', 'ultralytics', 'pandas', 'requests'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
