"""Routes of the V2 protocol: server and model metadata, readiness of a model, inference."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from haechi.components.shared.errors import NotReadyError

from .app import allow, bounded_body, call_of, service_of
from .inference import InferenceRequest
from .metadata import model_metadata, server_metadata
from .service import Role
from .v2 import HEADER_LENGTH, V2Exchange

__all__ = ["v2_routes"]


def v2_routes() -> list[Route]:
    """All of them but health, which every application has."""
    routes = [Route("/v2", _server)]
    for place in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
        routes += [
            Route(place, _model),
            Route(f"{place}/ready", _ready),
            Route(f"{place}/infer", _infer, methods=["POST"]),
        ]
    return routes


async def _server(request: Request) -> Response:
    return JSONResponse(server_metadata())


async def _model(request: Request) -> Response:
    await allow(request, Role.PREDICT)
    name, version = _asked(request)
    return JSONResponse(model_metadata(name, service_of(request).models.find(name, version)))


async def _ready(request: Request) -> Response:
    name, version = _asked(request)
    try:
        service_of(request).models.find(name, version)
    except NotReadyError:
        return JSONResponse({"name": name, "ready": False}, 503)
    return JSONResponse({"name": name, "ready": True})


async def _infer(request: Request) -> Response:
    call = call_of(request)
    call.protocol = "v2"
    await allow(request, Role.PREDICT)
    service = service_of(request)
    name, version = _asked(request)
    service.models.find(name, version)  # before a body is read for nothing
    headers = request.headers
    body = await bounded_body(request)
    exchange = V2Exchange(
        name, body, headers.get("content-type", ""), headers.get(HEADER_LENGTH), dict(request.query_params)
    )

    def parse() -> InferenceRequest:
        parsed = exchange.parse()
        call.camera = exchange.camera or call.camera
        return parsed

    answer, header_length = await service.infer(call, name, version, parse, exchange.answer)
    if header_length is None:
        return Response(answer, media_type="application/json")
    return Response(answer, media_type="application/octet-stream", headers={HEADER_LENGTH: str(header_length)})


def _asked(request: Request) -> tuple[str, str]:
    """Name and version in the address; the version may be empty."""
    return request.path_params["name"], request.path_params.get("version", "")
