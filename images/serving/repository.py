"""Administration: the model repository extension of the V2 protocol, as `tritonclient` speaks it."""

from __future__ import annotations

import json
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from haechi.components.shared.errors import InputError

from .app import allow, bounded_body
from .service import Role
from .swap import Swapper

__all__ = ["repository_routes"]


def repository_routes(swapper: Swapper) -> tuple[Route, ...]:
    """Index, load and unload; all of them want the role `admin`."""

    async def index(request: Request) -> Response:
        await allow(request, Role.ADMIN)
        only_ready = (await _body(request)).get("ready", False)
        if not isinstance(only_ready, bool):
            raise InputError(f"`ready` is {str(only_ready)[:40]!r}", "Give true or false.")
        return JSONResponse([row for row in swapper.index() if row["state"] == "READY" or not only_ready])

    async def load(request: Request) -> Response:
        await allow(request, Role.ADMIN)
        with_parameters = bool((await _body(request)).get("parameters"))
        return JSONResponse({"version": await swapper.load(request.path_params["name"], with_parameters)})

    async def unload(request: Request) -> Response:
        await allow(request, Role.ADMIN)
        await _body(request)
        swapper.unload(request.path_params["name"])
        return Response()

    return (
        Route("/v2/repository/index", index, methods=["POST"]),
        Route("/v2/repository/models/{name}/load", load, methods=["POST"]),
        Route("/v2/repository/models/{name}/unload", unload, methods=["POST"]),
    )


async def _body(request: Request) -> dict[str, Any]:
    data = await bounded_body(request)
    try:
        value = json.loads(data or b"{}")
    except (ValueError, RecursionError) as error:
        raise InputError(f"the body is not JSON ({error})", "Send a JSON object, or nothing.") from error
    if not isinstance(value, dict):
        raise InputError("the body is JSON, but not an object", "Send a JSON object, or nothing.")
    return value
