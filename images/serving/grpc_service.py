"""The gRPC side: `inference.GRPCInferenceService`, with health and reflection beside it.

Messages are those of the package `tritonclient`, whose service is a superset of the protocol's; only what is answered
here is registered, and reflection tells of nothing else.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from operator import methodcaller
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1.health_pb2 import HealthCheckRequest
from tritonclient.grpc import service_pb2 as pb

from haechi.components.shared.errors import NotReadyError

from .grpc_calls import ARRIVING, Arriving, Context, Message, Read, Unary, Work
from .grpc_health import HEALTH, OPEN_STREAMS, REFLECTION, Health, Reflection, reflected
from .inference import InferenceRequest
from .metadata import model_metadata, server_metadata
from .service import REQUEST_ID, Call, Role, Service
from .swap import Swapper
from .v2_grpc import GrpcExchange

__all__ = ["GrpcSide"]

_INFERENCE = "inference.GRPCInferenceService"
_SPARE = 64  # RPCs at the same time beyond those of the pool, those whose message still arrives, and open streams
_CONNECTIONS = 384  # with those of HTTP still below the usual 1,024 files

_Methods = dict[str, tuple[Any, Work]]


class GrpcSide:
    """A server that is bound, not yet started.

    Args:
        service: what answers.
        address: host and port; port 0 takes a free one.
        max_message: bytes of one message, in and out.
        swapper: what administrators load models with; without one there is no administration.

    Attributes:
        port: that it is bound to.

    Raises:
        RuntimeError: the address is taken.
    """

    def __init__(self, service: Service, address: str, max_message: int, swapper: Swapper | None = None) -> None:
        self._health = Health(service.models, _INFERENCE)
        self._server = grpc.aio.server(
            options=[
                # Without it two servers share a port silently, and each gets half of the requests.
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", max_message),
                ("grpc.max_send_message_length", max_message),
                # Streams of a client whose machine has gone end with this.
                ("grpc.keepalive_time_ms", 60_000),
                ("grpc.keepalive_timeout_ms", 20_000),
                # Each is an open file, of which HTTP needs some; nor may those that ask nothing keep others out.
                ("grpc.max_allowed_incoming_connections", _CONNECTIONS),
                ("grpc.max_connection_idle_ms", 300_000),
                ("grpc.server_handshake_timeout_ms", 10_000),
            ],
            maximum_concurrent_rpcs=service.pool.workers + service.pool.queue + ARRIVING + OPEN_STREAMS + _SPARE,
        )
        arriving = Arriving()
        inference = _Inference(service, arriving, swapper).handlers()
        check = Unary(service, arriving, HEALTH, "Check", HealthCheckRequest, self._health.check).handler()
        health = {
            "Check": check,
            "Watch": grpc.unary_stream_rpc_method_handler(
                self._health.watch, HealthCheckRequest.FromString, methodcaller("SerializeToString")
            ),
        }
        pool = reflected(pb.DESCRIPTOR, inference)
        for name, handlers in ((_INFERENCE, inference), (HEALTH, health)):
            self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))
        Reflection((_INFERENCE, HEALTH, REFLECTION), pool).add_to(self._server)
        self.port: int = self._server.add_insecure_port(address)

    async def start(self) -> None:
        """Take requests."""
        await self._server.start()

    async def stop(self, seconds: float) -> None:
        """Tell those who watch that the end is near, take nothing new, and let what has begun end within `seconds`."""
        self._health.leave()
        await self._server.stop(seconds)


class _Inference:
    """The methods of GRPCInferenceService."""

    def __init__(self, service: Service, arriving: Arriving, swapper: Swapper | None) -> None:
        self._service = service
        self._arriving = arriving
        self._models = service.models
        self._repository = _Repository(swapper, self._allow).methods() if swapper else {}

    def handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        """By name."""
        methods: _Methods = {
            "ServerLive": (pb.ServerLiveRequest, self._live),
            "ServerReady": (pb.ServerReadyRequest, self._ready),
            "ModelReady": (pb.ModelReadyRequest, self._model_ready),
            "ServerMetadata": (pb.ServerMetadataRequest, self._server_metadata),
            "ModelMetadata": (pb.ModelMetadataRequest, self._model_metadata),
            "ModelInfer": (pb.ModelInferRequest, self._infer),
            **self._repository,
        }
        return {
            name: Unary(self._service, self._arriving, _INFERENCE, name, kind, work).handler()
            for name, (kind, work) in methods.items()
        }

    async def _live(self, call: Call, read: Read, context: Context) -> Message:
        return pb.ServerLiveResponse(live=True)

    async def _ready(self, call: Call, read: Read, context: Context) -> Message:
        return pb.ServerReadyResponse(ready=self._models.ready)

    async def _model_ready(self, call: Call, read: Read, context: Context) -> Message:
        message = await read()
        try:
            self._models.find(message.name, message.version)
        except NotReadyError:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=True)

    async def _server_metadata(self, call: Call, read: Read, context: Context) -> Message:
        return pb.ServerMetadataResponse(**server_metadata())

    async def _model_metadata(self, call: Call, read: Read, context: Context) -> Message:
        await self._allow(call, context, Role.PREDICT)
        message = await read()
        told = model_metadata(message.name, self._models.find(message.name, message.version))
        told.pop("properties")  # the protocol's message has no place for them
        return pb.ModelMetadataResponse(**told)

    async def _infer(self, call: Call, read: Read, context: Context) -> Message:
        headers = await self._allow(call, context, Role.PREDICT)
        message = await read()
        if REQUEST_ID not in headers:
            call.identify({**headers, REQUEST_ID: message.id})
        exchange = GrpcExchange(message)

        def parse() -> InferenceRequest:
            parsed = exchange.parse()
            call.camera = exchange.camera or call.camera
            return parsed

        name, version = message.model_name, message.model_version
        seconds = context.time_remaining()
        return await self._service.infer(call, name, version, parse, exchange.answer, seconds)

    async def _allow(self, call: Call, context: Context, role: Role) -> dict[str, str]:
        """The headers, once their sender may."""
        headers = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        call.caller = await self._service.access.check(headers, role)
        return headers


class _Repository:
    """The methods of the model repository extension; all of them want the role `admin`."""

    def __init__(self, swapper: Swapper, allow: Callable[[Call, Context, Role], Awaitable[object]]) -> None:
        self._swapper = swapper
        self._allow = allow

    def methods(self) -> _Methods:
        """By name."""
        return {
            "RepositoryIndex": (pb.RepositoryIndexRequest, self._index),
            "RepositoryModelLoad": (pb.RepositoryModelLoadRequest, self._load),
            "RepositoryModelUnload": (pb.RepositoryModelUnloadRequest, self._unload),
        }

    async def _index(self, call: Call, read: Read, context: Context) -> Message:
        await self._allow(call, context, Role.ADMIN)
        only_ready = (await read()).ready
        rows = [row for row in self._swapper.index() if row["state"] == "READY" or not only_ready]
        return pb.RepositoryIndexResponse(models=[pb.RepositoryIndexResponse.ModelIndex(**row) for row in rows])

    async def _load(self, call: Call, read: Read, context: Context) -> Message:
        await self._allow(call, context, Role.ADMIN)
        message = await read()
        await self._swapper.load(message.model_name, bool(message.parameters))
        return pb.RepositoryModelLoadResponse()

    async def _unload(self, call: Call, read: Read, context: Context) -> Message:
        await self._allow(call, context, Role.ADMIN)
        self._swapper.unload((await read()).model_name)
        return pb.RepositoryModelUnloadResponse()
