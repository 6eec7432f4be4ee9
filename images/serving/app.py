"""The HTTP side: routes, bounded bodies, and errors as `{"error": ...}`. What it answers is made by codecs and engine."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from haechi.components.shared.errors import HaechiError, OverloadError

from .codecs import v1_answer, v1_images
from .engine import Engine, Models

__all__ = ["MAX_BODY", "MAX_HELD", "create_app"]

MAX_BODY = 64 * 2**20
MAX_HELD = 8 * MAX_BODY  # of bodies that are still arriving, all connections together
_BODY_SECONDS = 60.0

_log = logging.getLogger(__name__)


@dataclass
class _Held:
    """How many bytes of bodies that are still arriving this process holds; only the event loop touches it."""

    bytes: int = 0


def create_app(models: Models) -> Starlette:
    """The application that serves `models` (Open Inference Protocol health, V1 predict)."""
    routes = [
        Route("/", _alive),
        Route("/v2/health/live", _live),
        Route("/v2/health/ready", _ready),
        Route("/v1/models", _list),
        # Before the next one, which would take the verb for a part of the name.
        Route("/v1/models/{name}:predict", _v1_predict, methods=["POST"]),
        Route("/v1/models/{name}", _v1_model),
    ]
    app = Starlette(
        routes=routes,
        exception_handlers={HaechiError: _failed, HTTPException: _failed, Exception: _failed},
    )
    app.state.models = models
    app.state.held = _Held()
    return app


async def _alive(request: Request) -> Response:
    return JSONResponse({"status": "alive"})


async def _live(request: Request) -> Response:
    return JSONResponse({"live": True})


async def _ready(request: Request) -> Response:
    ready = _models(request).ready
    return JSONResponse({"ready": ready}, 200 if ready else 503)


async def _list(request: Request) -> Response:
    return JSONResponse({"models": _models(request).names()})


async def _v1_model(request: Request) -> Response:
    ready = _known(request) is not None
    return JSONResponse({"name": request.path_params["name"], "ready": ready}, 200 if ready else 503)


async def _v1_predict(request: Request) -> Response:
    engine = _known(request)
    if engine is None:
        raise HTTPException(503, f"model {request.path_params['name']} is still loading")
    content_type = request.headers.get("content-type", "")
    body = await _bounded_body(request)

    def work() -> bytes:
        return v1_answer(engine.model, engine.predict(v1_images(body, content_type)))

    return Response(await engine.submit(work), media_type="application/json")


def _models(request: Request) -> Models:
    models: Models = request.app.state.models
    return models


def _known(request: Request) -> Engine | None:
    models, name = _models(request), request.path_params["name"]
    if not models.known(name):
        raise HTTPException(404, f"there is no model {name!r} here, only {', '.join(models.names())}")
    return models.get(name)


async def _bounded_body(request: Request) -> bytes:
    """The whole body, of at most MAX_BODY bytes, sent within a minute."""
    announced = request.headers.get("content-length", "0")
    if announced.isdigit() and int(announced) > MAX_BODY:
        raise _too_large()
    parts: list[bytes] = []
    size = 0
    held = request.app.state.held
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > MAX_BODY:
                    raise _too_large()
                held.bytes += len(part)
                parts.append(part)
                if held.bytes > MAX_HELD:
                    raise OverloadError(f"the server holds {held.bytes} bytes of bodies", "Try again in a moment.")
    except TimeoutError:
        raise HTTPException(408, f"the body did not arrive within {_BODY_SECONDS:.0f} s") from None
    except ClientDisconnect:
        raise HTTPException(400, "the client went away") from None
    finally:
        held.bytes -= sum(map(len, parts))
    return b"".join(parts)


def _too_large() -> HTTPException:
    # What is still coming is not read, so the connection cannot be used again.
    return HTTPException(413, f"the body has more than {MAX_BODY} bytes", {"connection": "close"})


async def _failed(request: Request, error: Exception) -> Response:
    """Any error as `{"error": ...}` with its status."""
    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)
    if isinstance(error, HaechiError):
        later = {"retry-after": "1"} if error.http_status == 503 else None
        return JSONResponse({"error": str(error)}, error.http_status, later)
    _log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return JSONResponse({"error": "internal error; the server's log has the details"}, 500)
