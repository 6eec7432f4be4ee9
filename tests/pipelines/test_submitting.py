"""`haechi submit`: what reaches the Pipelines API.

A stand-in answers for the API, since no Kubeflow runs here: it keeps what kfp's own client sends.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from haechi.components.shared.errors import InputError
from haechi.pipelines.cli import main
from haechi.pipelines.submitting import SubmitError, submit

TOKEN = "token-of-the-test"


class _StandIn(BaseHTTPRequestHandler):
    runs: list[dict[str, Any]]
    tokens: set[str]

    def _answer(self, status: int, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.tokens.add(self.headers.get("Authorization", ""))
        if "healthz" in self.path:
            self._answer(200, {"multi_user": False})
        else:
            entry = {"experiment_id": "e1", "display_name": "training", "namespace": "team"}
            self._answer(200, {"experiments": [entry], "total_size": 1})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "unauthenticated"})
            return
        if self.path.endswith("/runs"):
            self.runs.append(body)
            self._answer(200, {"run_id": "r1", **{key: body[key] for key in ("display_name",) if key in body}})
        else:
            self._answer(200, {"experiment_id": "e1", "display_name": "training"})

    def log_message(self, *arguments: object) -> None:
        """Stay quiet."""


@pytest.fixture
def api() -> Iterator[tuple[str, type[_StandIn]]]:
    handler = type("Handler", (_StandIn,), {"runs": [], "tokens": set()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_run_reaches_the_api_with_its_parameters_and_its_token(
    api: tuple[str, type[_StandIn]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    host, stand_in = api
    token = tmp_path / "token"
    token.write_text(TOKEN + "\n")
    words = ["submit", "--host", host, "--namespace", "team", "--token-file", str(token), "--preset", "safety"]
    assert main([*words, "--set", "gpu_count=2", "--set", "seed=7", "--json"]) == 0
    out = capsys.readouterr()
    assert json.loads(out.out) == {"run_id": "r1", "url": f"{host}/#/runs/details/r1"}
    assert TOKEN not in out.out + out.err
    [run] = stand_in.runs
    sent = run["runtime_config"]["parameters"]
    assert (sent["gpu_count"], sent["seed"], sent["name"]) == ("2", 7, "safety")
    assert run["pipeline_spec"]["pipeline_spec"]["pipelineInfo"]["name"] == "training"
    assert "kubernetes" in run["pipeline_spec"]["platform_spec"]["platforms"]


def test_a_refused_token_is_told_with_the_remedy(api: tuple[str, type[_StandIn]]) -> None:
    with pytest.raises(SubmitError, match=r"401.*token"):
        submit({}, host=api[0], namespace="team", token="wrong")


def test_an_api_that_is_away_is_told_with_its_address() -> None:
    with pytest.raises(SubmitError, match=r"127\.0\.0\.1:9"):
        submit({}, host="http://127.0.0.1:9", namespace="team")


def test_a_host_that_is_no_url_is_refused() -> None:
    with pytest.raises(InputError, match="--host"):
        submit({}, host="kubeflow.example", namespace="team")


def test_a_token_file_that_is_missing_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "none"
    assert main(["submit", "--host", "http://127.0.0.1:9", "--token-file", str(missing)]) == 2
