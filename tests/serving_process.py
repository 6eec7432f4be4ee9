"""The runtime as a real process on loopback, for tests of all its rooms."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx

from haechi.components.shared.files import read_json

__all__ = ["Running", "free_port", "running", "start"]


@dataclass
class Running:
    process: subprocess.Popen[str]
    http: int
    grpc: int
    version: str
    seconds_to_ready: float

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http}"

    def wait_for_requests(self, count: int) -> None:
        """Return once so many predictions have arrived and are not answered yet."""
        until = time.monotonic() + 60
        while f"haechi_requests_in_flight {count}.0" not in httpx.get(f"{self.url}/metrics", timeout=30).text:
            assert time.monotonic() < until, f"there are no {count} requests at work"
            time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start(
    folder: Path,
    *arguments: str,
    http: int = 0,
    grpc_port: int = 0,
    env: Mapping[str, str] | None = None,
    stdout: IO[str] | int | None = None,
    stderr: IO[str] | int = subprocess.PIPE,
) -> Running:
    http, grpc_port = http or free_port(), grpc_port or free_port()
    ports = ["--http-port", str(http), "--grpc-port", str(grpc_port)]
    process = subprocess.Popen(
        [sys.executable, "-m", "haechi.serving", "--model", str(folder), *ports, *arguments],
        stdout=stdout,
        stderr=stderr,
        text=True,
        env={**os.environ, "HAECHI_SERVING_THREADS": "1", **(env or {})},
    )
    return Running(process, http, grpc_port, "", 0.0)


@contextlib.contextmanager
def running(
    folder: Path,
    *arguments: str,
    env: Mapping[str, str] | None = None,
    stdout: IO[str] | int | None = None,
    stderr: IO[str] | int = subprocess.PIPE,
) -> Iterator[Running]:
    """A ready runtime of a model folder; ended by SIGTERM."""
    begun = time.monotonic()
    server = start(folder, *arguments, env=env, stdout=stdout, stderr=stderr)
    try:
        while time.monotonic() - begun < 60:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{server.url}/v2/health/ready").status_code == 200:
                    break
            assert server.process.poll() is None, server.process.communicate()[1]
            time.sleep(0.05)
        server.seconds_to_ready = time.monotonic() - begun
        server.version = read_json(folder / "model.json")["version"]
        yield server
    finally:
        server.process.terminate()
        try:
            server.process.communicate(timeout=40)
        except subprocess.TimeoutExpired:
            server.process.kill()
            server.process.communicate()
