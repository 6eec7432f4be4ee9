"""A small HTTP server on loopback that answers what a test says, for services that do not run where the tests run.

    with HttpStandIn({"/health": (200, {"status": "UP"}), "/whoami": (0, lambda headers: (401, "no"))}) as url:
        …

A body is text, what becomes JSON, or a function of the request's headers that gives status and body. Any other path is
answered by 404.
"""

from __future__ import annotations

import http.server
import json
import ssl
import threading
from collections.abc import Mapping
from typing import Any

__all__ = ["Answers", "HttpStandIn"]

Answers = Mapping[str, tuple[int, Any]]


class HttpStandIn:
    """The server, for one block; entering gives its URL.

    Args:
        answers: path without query → status and body.
        context: to speak TLS.
    """

    def __init__(self, answers: Answers, context: ssl.SSLContext | None = None) -> None:
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(answers))
        if context:
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self._url = f"http{'s' if context else ''}://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> str:
        self._thread.start()
        return self._url

    def __exit__(self, *details: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _handler(answers: Answers) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def _answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, body = answers.get(self.path.split("?")[0], (404, "no such page"))
            if callable(body):
                status, body = body(self.headers)
            data = (body if isinstance(body, str) else json.dumps(body)).encode()
            self.send_response(status)
            if status == 302:
                self.send_header("Location", "/dex/login")
            if data.startswith(b"<?xml"):
                self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_POST = do_HEAD = _answer

        def log_message(self, *arguments: object) -> None:
            """Stay quiet."""

    return Handler
