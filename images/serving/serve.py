"""`serve`: puts the rooms of the runtime together, and runs them until a signal comes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from haechi.components.shared.model_folder import ModelFolder
from haechi.components.shared.progress import say

from .access_log import AccessLog
from .app import create_app
from .auth import access_of
from .connections import Connection, Lingering
from .docs_page import docs_routes
from .engine import Engine, Models
from .grpc_service import GrpcSide
from .metrics import Metrics
from .pool import Pool
from .process import DRAIN_SECONDS, Server, address, listen, run
from .repository import repository_routes
from .sampler import open_sampler
from .service import BODIES_HELD, Observer, Open, Service
from .settings import ServingSettings
from .swap import Swapper
from .tracing import Tracing
from .v2_routes import v2_routes

__all__ = ["serve"]


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
    with contextlib.ExitStack() as closing:
        pool = Pool(1, settings.queue)
        models = Models(on_put=lambda engine: pool.resize(engine.workers))
        models.announce(name)
        metrics = Metrics(models)
        metrics.announce(name)
        access = access_of(settings)
        observers = [metrics, *_watchers(settings, metrics, closing)]
        service = Service(models, pool, settings.timeout, access, observers, BODIES_HELD * settings.max_body)
        closing.callback(pool.close)
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
        closing.callback(swapper.close)
        documentation = docs_routes(name, guarded=not isinstance(access, Open))
        routes = (*v2_routes(), *metrics.routes(), *repository_routes(swapper), *documentation)
        config = _config(create_app(service, settings.max_body, routes))

        async def load() -> None:
            first = await swapper.first()
            where = address(host, listener.getsockname()[1])
            say(f"{name} {first.version} is ready on {where} ({time.monotonic() - started:.1f} s)")
            if settings.watch:
                await swapper.watch()

        listener = closing.enter_context(contextlib.closing(listen(host, http_port)))
        grpc_side = partial(GrpcSide, service, address(host, grpc_port), settings.max_body, swapper)
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            runner.run(run(Server(config, models), grpc_side, listener, load))
    say("stopped: what had begun is answered")


def _watchers(settings: ServingSettings, metrics: Metrics, closing: contextlib.ExitStack) -> Iterator[Observer]:
    """Those who watch calls beside the metrics; each writes out what waits when the process ends."""
    if settings.otlp_endpoint:
        tracing = Tracing(metrics.traced)
        closing.callback(tracing.close)
        yield tracing
    log = AccessLog(settings.log_share, metrics.logged)
    closing.callback(log.close)
    yield log
    sampler = open_sampler(settings, metrics.sampled)
    if sampler:
        closing.callback(sampler.close)
        yield sampler


def _config(app: ASGIApp) -> uvicorn.Config:
    return uvicorn.Config(
        Lingering(app),
        http=Connection,
        ws="none",
        # There is nothing to open here, and a second signal would end its wait with a traceback.
        lifespan="off",
        # Longer than proxies keep theirs (60 s as a rule), so that they never send into a connection that we close.
        timeout_keep_alive=75,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )
