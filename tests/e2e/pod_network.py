"""The cluster's network as far as deploy uses it: a predictor's Service leads to a real runtime of what its pods serve.

with PodNetwork(kserve, {OLD: running.url, NEW: other.url}) as network:
    Rollout(address=network.address)        # http://127.0.0.1:<port>/{service}
    network.failing[NEW] = 0.5              # half of its answers are 500, and its metrics tell of them
"""

from __future__ import annotations

import http.server
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Self

import httpx
from kserve_stand_in import KserveStandIn

__all__ = ["PodNetwork"]

_KEPT = ("content-type", "authorization", "x-api-key")


class PodNetwork:
    """A reverse proxy on loopback.

    Args:
        kserve: says which storageUri the ready pods of a Service serve.
        runtimes: storageUri → URL of the runtime that serves it as model `entrance`.

    Attributes:
        failing: storageUri → share of its users' requests that its pods answer with 500; its metrics count them.
        slow: storageUri → seconds that its pods take longer.
        broken: storageUri → what its pods answer our own pictures with instead of boxes (an HTTP status).
        watch: called with each path that is asked for.
    """

    def __init__(self, kserve: KserveStandIn, runtimes: dict[str, str]) -> None:
        self.failing: dict[str, float] = {}
        self.slow: dict[str, float] = {}
        self.broken: dict[str, int] = {}
        self.watch: Callable[[str], None] = lambda path: None
        self.asked: Counter[str] = Counter()
        self._kserve, self._runtimes = kserve, runtimes
        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}/{{service}}"

    def answer(self, verb: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, str, bytes]:
        """Status, content type and body."""
        self.watch(path)
        _, service, rest = path.split("/", 2)
        uri = self._kserve.serving(service) if self._kserve.deployment(service) else ""
        if uri not in self._runtimes:
            return 503, "text/plain", f"no endpoints of {service}".encode()
        self.asked[uri] += 1
        infer = rest.endswith("infer") or "infer?" in rest
        if infer and self.broken.get(uri):
            return self.broken[uri], "application/json", b'{"error": "the graph went mad"}'
        if infer and uri in self.slow:
            time.sleep(self.slow[uri])
        rest = rest.replace("entrance-shadow", "entrance")
        found = httpx.request(verb, f"{self._runtimes[uri]}/{rest}", headers=headers, content=body, timeout=30)
        text = found.content
        if rest == "metrics" and uri in self.failing:
            # As if users had asked it: 100 answers more with each look, of which a share failed.
            failed = round(self.asked[uri] * 100 * self.failing[uri])
            text += _counted("error", failed) + _counted("ok", self.asked[uri] * 100 - failed)
        return found.status_code, found.headers.get("content-type", ""), text


def _counted(outcome: str, number: int) -> bytes:
    return f'haechi_requests_total{{model="entrance",outcome="{outcome}",protocol="v2"}} {number}\n'.encode()


def _handler(network: PodNetwork) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer("GET")

        def do_POST(self) -> None:
            self._answer("POST")

        def _answer(self, verb: str) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            kept = {key: value for key, value in self.headers.items() if key.lower() in _KEPT}
            status, kind, data = network.answer(verb, self.path, kept, body)
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            """Keep the tests' output clean."""

    return Handler
