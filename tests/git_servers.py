"""Git servers on loopback that ask for credentials: git's own HTTP backend, and an SSH server that starts git's programs.

with git_over_http(folder) as url: ...             # {url}/bare.git, for the user `bot` with the password PASSWORD
with redirecting_to(url) as other: ...             # answers each request there with a redirect to the same path of `url`
with git_over_ssh(secret) as url: ...              # {url}/absolute/path/of/bare.git, for the key in `secret`
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.server
import os
import queue
import shlex
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncssh

__all__ = ["PASSWORD", "git_over_http", "git_over_ssh", "redirecting_to"]

PASSWORD = "s3cret-pa55"
_WANTED = "Basic " + base64.b64encode(f"bot:{PASSWORD}".encode()).decode()


@contextlib.contextmanager
def git_over_http(root: Path, asked: list[str] | None = None) -> Iterator[str]:
    """Serve the repositories below a folder; their URL without the repository's name.

    Args:
        root: the folder.
        asked: gets the header Authorization of each request, or "".
    """
    with _serving(_Handler) as server:
        server.root, server.asked = root, [] if asked is None else asked
        yield f"http://127.0.0.1:{server.server_port}"


@contextlib.contextmanager
def redirecting_to(url: str) -> Iterator[str]:
    """A server that sends each request on to another one; its URL."""
    with _serving(_Redirecting) as server:
        server.elsewhere = url
        yield f"http://127.0.0.1:{server.server_port}"


@contextlib.contextmanager
def _serving(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[_HttpServer]:
    with _HttpServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _HttpServer(http.server.ThreadingHTTPServer):
    daemon_threads = True
    root: Path
    asked: list[str]
    elsewhere: str


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _HttpServer

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.server.asked.append(self.headers.get("Authorization", ""))
        if self.headers.get("Authorization") != _WANTED:
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="git"')
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        path, _, query = self.path.partition("?")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        environment = {
            **os.environ,
            "GIT_PROJECT_ROOT": str(self.server.root),
            "GIT_HTTP_EXPORT_ALL": "1",
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "REQUEST_METHOD": self.command,
            "REMOTE_USER": "bot",
            "CONTENT_TYPE": self.headers.get("Content-Type", ""),
            "CONTENT_LENGTH": str(len(body)),
            "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
        }
        done = subprocess.run(["git", "http-backend"], input=body, capture_output=True, env=environment)
        head, _, data = done.stdout.partition(b"\r\n\r\n")
        fields = dict(line.split(": ", 1) for line in head.decode().splitlines())
        self.send_response(int(fields.pop("Status", "200").split()[0]))
        for name, value in fields.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Keep the tests' output clean."""


class _Redirecting(http.server.BaseHTTPRequestHandler):
    server: _HttpServer

    def do_GET(self) -> None:
        self.send_response(302)
        self.send_header("Location", self.server.elsewhere + self.path)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Keep the tests' output clean."""


@contextlib.contextmanager
def git_over_ssh(secret: Path) -> Iterator[str]:
    """Serve this machine's repositories to one key; the URL without the repository's path.

    Args:
        secret: existing folder; gets `ssh-privatekey` and `known_hosts` as the Secret `haechi-git` holds them.
    """
    host, client = (asyncssh.generate_private_key("ssh-ed25519") for _ in range(2))
    ports: queue.SimpleQueue[int] = queue.SimpleQueue()
    loop, stop = asyncio.new_event_loop(), asyncio.Event()

    async def serve() -> None:
        keys = asyncssh.import_authorized_keys(client.export_public_key().decode())
        options = {"server_host_keys": [host], "authorized_client_keys": keys, "encoding": None}
        async with asyncssh.listen("127.0.0.1", 0, process_factory=_start_git, **options) as server:
            ports.put(server.get_port())
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        port = ports.get(timeout=30)
        (secret / "ssh-privatekey").write_bytes(client.export_private_key())
        (secret / "known_hosts").write_bytes(f"[127.0.0.1]:{port} ".encode() + host.export_public_key())
        yield f"ssh://git@127.0.0.1:{port}"
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


async def _start_git(process: asyncssh.SSHServerProcess[bytes]) -> None:
    words = shlex.split(process.command or "")
    if not words or words[0] not in ("git-receive-pack", "git-upload-pack"):
        process.exit(1)
        return
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), asyncio.subprocess.PIPE)
    program = await asyncio.create_subprocess_exec(*words, **pipes)
    asked = asyncio.create_task(_pass_on(process.stdin, program.stdin))
    await asyncio.gather(_pass_on(program.stdout, process.stdout), _pass_on(program.stderr, process.stderr))
    process.exit(await program.wait())
    asked.cancel()


async def _pass_on(source: Any, sink: Any) -> None:
    while data := await source.read(65536):
        sink.write(data)
        await sink.drain()
