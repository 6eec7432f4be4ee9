"""The HTTP side: routes, bounded bodies, who may call, and errors as `{"error": ...}`."""

from __future__ import annotations

import asyncio
import logging
from functools import partial

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from haechi.components.shared.errors import HaechiError, OverloadError

from .connections import CROWDED
from .service import REQUEST_ID, Call, Role, Service
from .settings import ServingSettings
from .v1 import v1_answer, v1_request

__all__ = ["allow", "bounded_body", "call_of", "create_app", "service_of"]

_BODY_SECONDS = 60.0
_ALSO = {401: {"www-authenticate": "Bearer"}, 503: {"retry-after": "1"}}
# Instead of what the router says.
_TOLD = {
    404: "there is no such address. See /docs for all that there are.",
    405: "this address does not take that method. See the header Allow, or /docs.",
}

_log = logging.getLogger(__name__)


def create_app(service: Service, max_body: int = ServingSettings.max_body, more: tuple[BaseRoute, ...] = ()) -> ASGIApp:
    """The application: Open Inference Protocol health and V1.

    Args:
        service: what answers.
        max_body: bytes of one request's body.
        more: routes of other rooms (metrics, documentation, administration).
    """
    routes = [
        Route("/", _alive),
        Route("/v2/health/live", _live),
        Route("/v2/health/ready", _ready),
        Route("/v1/models", _list),
        # Before the next one, which would take the verb for a part of the name.
        Route("/v1/models/{name}:predict", _v1_predict, methods=["POST"]),
        Route("/v1/models/{name}", _v1_model),
        *more,
    ]
    app = Starlette(routes=routes, exception_handlers={HaechiError: failed, HTTPException: failed, Exception: failed})
    # A redirect would go wherever the caller's Host header says.
    app.router.redirect_slashes = False
    app.state.service = service
    app.state.max_body = max_body
    return _Watched(app, service)


class _Watched:
    """Around everything: one `Call` a request, its id in the answer, its status, and the observers told of it."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        call = Call("http", scope["path"], scope["method"])
        call.identify(headers)
        scope["haechi.call"] = call

        async def watched_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                call.status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = call.request_id
            await send(message)

        with self._service.observed(call):
            try:
                await self._app(scope, receive, watched_send)
            finally:
                self._place(call, scope)

    def _place(self, call: Call, scope: Scope) -> None:
        """Route and model by what the router has found; a name in the path counts only if it is a model's."""
        call.route = getattr(scope.get("route"), "path", "")
        name = scope.get("path_params", {}).get("name", "")
        if not call.model and self._service.models.known(name):
            call.model = name


def call_of(request: Request) -> Call:
    """The call that a request is."""
    call: Call = request.scope["haechi.call"]
    return call


def service_of(request: Request) -> Service:
    """The service that answers it."""
    service: Service = request.app.state.service
    return service


async def allow(request: Request, role: Role) -> None:
    """Let the request go on if its caller may.

    Raises:
        AccessError: unknown, or not allowed.
    """
    call_of(request).caller = await service_of(request).access.check(request.headers, role)


async def _alive(request: Request) -> Response:
    return JSONResponse({"status": "alive"})


async def _live(request: Request) -> Response:
    return JSONResponse({"live": True})


async def _ready(request: Request) -> Response:
    ready = service_of(request).models.ready
    return JSONResponse({"ready": ready}, 200 if ready else 503)


async def _list(request: Request) -> Response:
    await allow(request, Role.PREDICT)
    return JSONResponse({"models": service_of(request).models.names()})


async def _v1_model(request: Request) -> Response:
    await allow(request, Role.PREDICT)
    name = request.path_params["name"]
    models = service_of(request).models
    if not models.known(name):
        models.find(name)
    ready = models.get(name) is not None
    return JSONResponse({"name": name, "ready": ready}, 200 if ready else 503)


async def _v1_predict(request: Request) -> Response:
    call = call_of(request)
    call.protocol = "v1"
    await allow(request, Role.PREDICT)
    name = request.path_params["name"]
    service_of(request).models.find(name)  # before a body is read for nothing
    content_type = request.headers.get("content-type", "")
    body = await bounded_body(request)
    parse = partial(v1_request, body, content_type, dict(request.query_params))
    answer = await service_of(request).infer(call, name, "", parse, partial(v1_answer, name))
    return Response(answer, media_type="application/json")


async def bounded_body(request: Request) -> bytes:
    """The whole body, no larger than is allowed, sent within a minute."""
    if (coding := request.headers.get("content-encoding", "identity")) != "identity":
        raise HTTPException(415, f"the body's coding {coding[:40]!r} is not read. Send it as it is.")
    most = request.app.state.max_body
    announced = request.headers.get("content-length", "0")
    if announced.isdigit() and int(announced) > most:
        raise _too_large(most)
    parts: list[bytes] = []
    size = 0
    call, service = call_of(request), service_of(request)
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise _too_large(most)
                service.hold(call, len(part))
                parts.append(part)
    except TimeoutError:
        raise HTTPException(408, f"the body did not arrive within {_BODY_SECONDS:.0f} s. Send less at once.") from None
    except ClientDisconnect:
        if CROWDED in request.scope:
            raise OverloadError("the body came slowest of too many connections", "Send it faster.") from None
        raise HTTPException(400, "the client went away") from None
    finally:
        call.bytes_in = size
    return b"".join(parts)


def _too_large(most: int) -> HTTPException:
    return HTTPException(
        413, f"the body has more than {most} bytes. Send fewer or smaller images; the operator sets the limit."
    )


async def failed(request: Request, error: Exception) -> Response:
    """Any error as `{"error": ...}` with its status."""
    call_of(request).error = error
    if isinstance(error, HTTPException):
        told = _TOLD.get(error.status_code, error.detail)
        return JSONResponse({"error": told}, error.status_code, error.headers)
    if isinstance(error, HaechiError):
        later = _ALSO.get(error.http_status)
        return JSONResponse({"error": str(error)}, error.http_status, later)
    _log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return JSONResponse({"error": "internal error; the server's log has the details"}, 500)
