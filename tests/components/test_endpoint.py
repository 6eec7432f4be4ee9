"""Asking a model's address: a guarded runtime, its keys, and answers that are none; against the real runtime."""

from __future__ import annotations

import http.server
import json
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_model_folder

from haechi.components.deploy import bounded
from haechi.components.deploy.credential import Credential
from haechi.components.deploy.endpoint import Denied, Endpoint, Unanswered, check_golden_at
from haechi.components.deploy.traffic import Prometheus
from haechi.components.shared.errors import SettingsError
from haechi.components.shared.files import read_json, write_json
from haechi.components.shared.model_folder import read_golden
from haechi.serving.api_keys import new_key
from haechi.serving.service import Role
from tests.serving_process import Running, running

KEY, LINE = new_key("deploy", [Role.PREDICT])
ADMIN, ADMIN_LINE = new_key("operator", [Role.ADMIN])
DRIPS = 10.0  # seconds for which an answer goes on in drips


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, Path]]:
    """A runtime that wants a key, and its model's folder."""
    root = tmp_path_factory.mktemp("guarded")
    tiny_model_folder(root / "model", ["person"], name="entrance")
    (root / "keys.jsonl").write_text(f"{LINE}\n{ADMIN_LINE}\n")
    env = {"HAECHI_SERVING_API_KEYS": str(root / "keys.jsonl")}
    with running(root / "model", "--name", "entrance", env=env) as server:
        yield server, root / "model"


def credential(folder: Path, **files: str) -> Credential:
    for name, text in files.items():
        (folder / name).write_text(text)
    return Credential(folder)


@pytest.mark.parametrize(
    "files",
    [{"api_key": KEY}, {"token": KEY}, {"api_key": f"{KEY}\n"}, {"api_key": "wrong", "token": KEY}, {"api_key": ADMIN}],
    ids=["a key", "as a token", "with a newline", "the token counts", "an administrator"],
)
def test_a_guarded_runtime_is_asked_with_what_the_folder_holds(
    guarded: tuple[Running, Path], tmp_path: Path, files: dict[str, str]
) -> None:
    server, folder = guarded
    endpoint = Endpoint(server.url, "entrance", 0.1, credential(tmp_path, **files))
    endpoint.check_known()
    assert check_golden_at(endpoint, folder, server.version).ok
    assert "haechi_requests_total" in endpoint.metrics()


def test_golden_images_without_a_box_are_said_to_prove_nothing(
    guarded: tuple[Running, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server, folder = guarded
    endpoint = Endpoint(server.url, "entrance", 0.1, credential(tmp_path, api_key=KEY))
    check_golden_at(endpoint, folder, server.version)
    assert "NOTHING PROVEN" not in capsys.readouterr().err
    shutil.copytree(folder, tmp_path / "empty")
    golden = read_json(tmp_path / "empty/golden/golden.json")
    golden["images"] = [image for image in golden["images"] if not image["boxes"]]
    write_json(tmp_path / "empty/golden/golden.json", golden)
    assert check_golden_at(endpoint, tmp_path / "empty", server.version).boxes == 0
    assert f"NOTHING PROVEN: no golden image of {server.version} has a box" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "sent"),
    [
        ({}, "no key or token was sent"),
        ({"api_key": "haechi_wrong"}, "X-API-Key was sent"),
        ({"token": "haechi_wrong"}, "Authorization was sent"),
    ],
)
def test_a_runtime_that_does_not_know_us_is_named_with_the_setting_and_never_with_the_key(
    guarded: tuple[Running, Path], tmp_path: Path, files: dict[str, str], sent: str
) -> None:
    server, folder = guarded
    endpoint = Endpoint(server.url, "entrance", 5.0, credential(tmp_path, **files))
    for ask in (endpoint.check_known, endpoint.metrics, lambda: check_golden_at(endpoint, folder, server.version)):
        with pytest.raises(Denied, match=rf"{server.url} answered 401 \(.*\); {sent}") as caught:
            ask()
        assert "wrong" not in str(caught.value)
        for word in ("`predict`", str(tmp_path), "haechi-endpoint", "HAECHI_ENDPOINT_CREDENTIALS"):
            assert word in caught.value.remedy


def test_a_key_that_is_rotated_counts_with_the_next_question(guarded: tuple[Running, Path], tmp_path: Path) -> None:
    endpoint = Endpoint(guarded[0].url, "entrance", 0.1, credential(tmp_path, api_key="haechi_old"))
    with pytest.raises(Denied):
        endpoint.check_known()
    (tmp_path / "api_key").write_text(KEY)
    endpoint.check_known()


@pytest.mark.parametrize("text", ["", " \n", "two words", "a\nb", "schlüssel", "x" * 9000])
def test_a_file_that_is_no_key_is_named_without_its_text(tmp_path: Path, text: str) -> None:
    found = credential(tmp_path, api_key=text)
    with pytest.raises(SettingsError, match="api_key is not one key or token") as caught:
        found.headers()
    assert text.strip() == "" or text not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "token").write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match=r"token cannot be read \(it is not text\)"):
        Credential(tmp_path).headers()
    assert Credential(tmp_path / "nowhere").headers() == {}


@contextmanager
def answering(status: int, headers: dict[str, str], seen: list[dict[str, str]]) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(dict(self.headers.items()))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Keep the tests' output clean."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_a_key_does_not_follow_a_redirect_and_a_netrc_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login someone password else\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    there: list[dict[str, str]] = []
    here: list[dict[str, str]] = []
    with answering(200, {}, there) as other, answering(307, {"Location": f"{other}/metrics"}, here) as url:
        endpoint = Endpoint(url, "entrance", 0.1, credential(tmp_path, token="mine"))
        with pytest.raises(Unanswered, match="answered 307"):
            endpoint.metrics()
    assert [headers["Authorization"] for headers in here] == ["Bearer mine"]
    assert not there


def test_a_403_says_which_role_is_wanted(tmp_path: Path) -> None:
    with answering(403, {}, []) as url:
        endpoint = Endpoint(url, "entrance", 0.1, credential(tmp_path, token="mine"))
        with pytest.raises(Denied, match="answered 403") as caught:
            endpoint.check_known()
        assert "role `predict`" in caught.value.remedy


# --- answers that are none ---------------------------------------------------------------------------------------------


@contextmanager
def saying(answer: Any) -> Iterator[str]:
    """A server whose every answer a function writes: it is called with the handler, after the request was read."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            try:
                answer(self)
            except OSError:
                self.close_connection = True  # nobody listens any more

        do_POST = do_GET

        def log_message(self, format: str, *args: object) -> None:
            """Keep the tests' output clean."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads, server.block_on_close = True, False
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def body(data: bytes, status: int = 200) -> Any:
    def answer(handler: Any) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    return answer


def outputs(**changed: Any) -> bytes:
    data = {"boxes": [0.0, 0.0, 1.0, 1.0], "scores": [0.5], "class_ids": [0], **changed}
    rows = [{"name": name, "data": values} for name, values in data.items()]
    return json.dumps({"model_version": "0" * 12, "outputs": rows}).encode()


DEEP = b"[" * 100_000


@pytest.mark.parametrize(
    "data",
    [
        outputs(class_ids=[10**30]),
        outputs(scores=[[0.5], []]),
        outputs(boxes=[1.0]),
        outputs(boxes={}),
        DEEP,
        b"[]",
        b'"x"',
        b'{"outputs": [1]}',
        b'{"outputs": {"a": 1}}',
        b"\xff",
    ],
    ids=[
        "a huge class",
        "ragged",
        "half a box",
        "an object",
        "deep",
        "a list",
        "text",
        "numbers",
        "no list",
        "no text",
    ],
)
def test_an_answer_of_another_form_is_told_as_one(guarded: tuple[Running, Path], data: bytes) -> None:
    image = read_golden(guarded[1])[0]
    with saying(body(data)) as url, pytest.raises(Unanswered, match="answered in another form than Haechi's V2"):
        Endpoint(url, "entrance", 0.1).detect(image)


@pytest.mark.parametrize(
    "data", [DEEP, b'{"error": ' + DEEP, b"[1]", b"x" * 10**6, json.dumps({"error": "y" * 10**6}).encode()]
)
def test_an_error_of_another_form_is_told_in_a_few_words(data: bytes) -> None:
    with saying(body(data, 500)) as url, pytest.raises(Unanswered, match="answered 500: ") as caught:
        Endpoint(url, "entrance", 0.1).metrics()
    assert len(str(caught.value)) < 600


def dripping_body(handler: Any) -> None:
    handler.send_response(200)
    handler.end_headers()
    drip(handler, b"x")


def dripping_headers(handler: Any) -> None:
    handler.send_response(200)
    handler.flush_headers()
    drip(handler, b"X: y\r\n")


def drip(handler: Any, data: bytes) -> None:
    end = time.monotonic() + DRIPS
    while time.monotonic() < end:
        handler.wfile.write(data)
        handler.wfile.flush()
        time.sleep(0.1)


def endless(handler: Any) -> None:
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b"x" * 2**16)


@pytest.mark.parametrize(
    ("answer", "seconds", "message"),
    [
        (dripping_body, 0.5, r"no whole answer within 0\.5 s"),
        (dripping_headers, 0.5, r"no whole answer within 0\.5 s"),
        (endless, 30.0, "answer is larger than 1 MiB"),
    ],
)
def test_an_answer_that_does_not_end_is_given_up(
    monkeypatch: pytest.MonkeyPatch, answer: Any, seconds: float, message: str
) -> None:
    monkeypatch.setattr(bounded, "SECONDS", seconds)
    monkeypatch.setattr(bounded, "MOST", 2**20)
    with saying(answer) as url:
        begun = time.monotonic()
        with pytest.raises(Unanswered, match=message):
            Endpoint(url, "entrance", 0.1).metrics()
        with pytest.raises(Unanswered, match=message):
            Prometheus(url, "models", "entrance-predictor", lambda: 1.0).total()
        assert time.monotonic() - begun < 2 * DRIPS, "nobody waited for the end"


def test_prometheus_is_not_followed_elsewhere() -> None:
    there: list[dict[str, str]] = []
    with (
        answering(200, {}, there) as other,
        answering(302, {"Location": other}, []) as url,
        pytest.raises(Unanswered, match="does not answer with numbers: 302"),
    ):
        Prometheus(url, "models", "entrance-predictor", lambda: 1.0).total()
    assert not there
