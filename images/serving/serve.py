"""`serve`: the process. Opens the ports, loads and verifies the model, says when it is ready, drains on SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from pathlib import Path

import uvicorn

from haechi.components.shared.errors import InputError
from haechi.components.shared.model_folder import ModelFolder
from haechi.components.shared.progress import say

from .access_log import AccessLog
from .app import create_app
from .auth import access_of
from .connections import Connection, Lingering, patient
from .docs_page import docs_routes
from .engine import Engine, Models
from .grpc_service import GrpcSide
from .metrics import Metrics
from .pool import Pool
from .repository import repository_routes
from .sampler import open_sampler
from .service import Open, Service
from .settings import ServingSettings
from .swap import Swapper
from .tracing import Tracing
from .v2_routes import v2_routes

__all__ = ["serve"]

_DRAIN_SECONDS = 30


def serve(
    model: Path,
    http_port: int = 8080,
    grpc_port: int = 8081,
    host: str = "127.0.0.1",
    allow_unverified: bool = False,
    name: str = "",
    settings: ServingSettings | None = None,
) -> None:
    """Serve a model folder until SIGTERM or SIGINT, then finish what has begun and return.

    Args:
        model: the model folder.
        http_port, grpc_port: ports; 0 takes a free one.
        host: address to listen on.
        allow_unverified: serve a folder that has no golden images to prove it.
        name: what clients call the model; default as in its description.
        settings: default from the environment.

    Raises:
        ModelError, IntegrityError: the folder is unusable, unproven, or gives other boxes than its golden ones.
        InputError: a port is taken.
        SettingsError: a setting is malformed.
    """
    started = time.monotonic()
    settings = settings or ServingSettings.from_env()
    # For its name, and to fail before anything starts; the first load checks the rest.
    description = ModelFolder.load(model, verify=False)
    given, name = name, name or description.name
    pool = Pool(1, settings.queue)
    models = Models(on_put=lambda engine: pool.resize(engine.workers))
    models.announce(name)
    metrics = Metrics(models)
    log = AccessLog(settings.log_share, metrics.logged)
    tracing = Tracing(metrics.traced) if settings.otlp_endpoint else None
    sampler = open_sampler(settings, metrics.sampled)
    observers = [watcher for watcher in (metrics, log, tracing, sampler) if watcher]
    access = access_of(settings)
    service = Service(models, pool, settings.timeout, access, observers)
    swapper = Swapper(
        models,
        name,
        model,
        lambda folder, model: Engine(folder, model, settings, metrics.batches(name)),
        settings.watch,
        allow_unverified,
        any_name=bool(given),
        on_swap=lambda outcome, version: metrics.swapped(name, outcome),
    )
    documentation = docs_routes(name, guarded=not isinstance(access, Open))
    routes = (*v2_routes(), *metrics.routes(), *repository_routes(swapper), *documentation)
    config = uvicorn.Config(
        Lingering(create_app(service, settings.max_body, routes)),
        http=Connection,
        ws="none",
        # Longer than proxies keep theirs (60 s as a rule), so that they never send into a connection that we close.
        timeout_keep_alive=75,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_DRAIN_SECONDS,
    )

    async def load() -> None:
        first = await swapper.first()
        seconds = time.monotonic() - started
        say(f"{name} {first.version} is ready on {host}:{listener.getsockname()[1]} ({seconds:.1f} s)")
        if settings.watch:
            await swapper.watch()

    listener = _listen(host, http_port)
    patient(listener)
    with (
        contextlib.closing(listener),
        contextlib.closing(pool),
        contextlib.closing(swapper),
        asyncio.Runner(loop_factory=config.get_loop_factory()) as runner,
    ):
        server = _Server(config, models)
        grpc_side = partial(GrpcSide, service, f"{host}:{grpc_port}", settings.max_body, swapper)
        runner.run(_run(server, grpc_side, listener, load))
    if sampler:
        sampler.close()
    log.close()
    if tracing:
        tracing.close()
    say("stopped: what had begun is answered")


async def _run(
    server: _Server,
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


async def _drain(server: _Server, grpc_side: GrpcSide) -> None:
    await server.stopping.wait()
    await grpc_side.stop(_DRAIN_SECONDS)


class _Server(uvicorn.Server):
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


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise InputError(
            f"cannot listen on {host}:{port} ({error})",
            "Choose another --http-port or --host, or end what listens there.",
        ) from error
    return listener
