"""The process: both ports up at once, a model that loads beside them, and a drain of both sides on a signal."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Coroutine, Iterator

import uvicorn

from haechi.components.shared.errors import InputError
from haechi.components.shared.progress import say

from .connections import patient
from .engine import Models
from .grpc_service import GrpcSide

__all__ = ["DRAIN_SECONDS", "Server", "address", "listen", "run"]

DRAIN_SECONDS = 30


async def run(
    server: Server,
    open_grpc: Callable[[], GrpcSide],
    listener: socket.socket,
    load: Callable[[], Coroutine[None, None, None]],
) -> None:
    """Both sides up at once, alive but not ready; the model loads beside them, and its failure ends them."""
    try:
        grpc_side = open_grpc()
    except RuntimeError as error:
        raise InputError(f"cannot listen for gRPC ({error})", "Choose another --grpc-port.") from error
    await grpc_side.start()
    say(f"listening on {listener.getsockname()[1]} for HTTP and {grpc_side.port} for gRPC, loading")
    loading = asyncio.create_task(load())
    loading.add_done_callback(lambda task: server.stop() if task.cancelled() or task.exception() else None)
    # Both sides at the same time, so that the process ends within one period of grace.
    draining = asyncio.create_task(_drain(server, grpc_side))
    try:
        await server.serve(sockets=[listener])
    finally:
        loading.cancel()
        server.stopping.set()
        await draining
    with contextlib.suppress(asyncio.CancelledError):
        await loading


async def _drain(server: Server, grpc_side: GrpcSide) -> None:
    await server.stopping.wait()
    await grpc_side.stop(DRAIN_SECONDS)


class Server(uvicorn.Server):
    """uvicorn's server, but a signal that it has obeyed does not kill the process afterwards: draining exits with 0.

    Attributes:
        stopping: set from the first signal on.
    """

    def __init__(self, config: uvicorn.Config, models: Models) -> None:
        super().__init__(config)
        self.stopping = asyncio.Event()
        self._models = models

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take SIGTERM and SIGINT for the loop's lifetime."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        yield

    def stop(self) -> None:
        """Not ready from now on; take no new connection, finish what has begun; a second time, do not wait for clients."""
        self._models.leaving = True
        self.stopping.set()
        self.force_exit = self.should_exit
        self.should_exit = True


def address(host: str, port: int) -> str:
    """Host and port as one text, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def listen(host: str, port: int) -> socket.socket:
    """A socket of ours alone.

    Raises:
        InputError: the address is taken or none of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise InputError(
            f"cannot listen on {address(host, port)} ({error})",
            "Choose another --http-port or --host, or end what listens there.",
        ) from error
    patient(listener)
    return listener
