"""`grpc.health.v1` and reflection: how Kubernetes' probes and tools such as grpcurl see the gRPC side."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from typing import Any

import grpc
import grpc.aio
from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

from haechi.components.shared.errors import NotFoundError

from .engine import Models
from .service import Call

__all__ = ["HEALTH", "OPEN_STREAMS", "REFLECTION", "Health", "Reflection", "reflected"]

HEALTH: str = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
REFLECTION: str = reflection.SERVICE_NAME
_LOOK_SECONDS = 0.5
_WATCHERS = 24
_REFLECTIONS = 8
OPEN_STREAMS = _WATCHERS + _REFLECTIONS  # at the same time; they need no key, and must not take the places of others
_MAX_NAME = 256  # characters; a watcher's question is kept as long as it watches
_REFLECTION_SECONDS = 30.0  # a forgotten stream must not hold a place, or the drain, for longer

_Status = health_pb2.HealthCheckResponse


class Health:
    """The health service. It asks the models themselves, so that it cannot tell anything else than they do.

    Args:
        models: what is served.
        place: the inference service's name, which is asked for as often as the empty one.
    """

    def __init__(self, models: Models, place: str) -> None:
        self._models = models
        self._whole = ("", place)
        self._leaving = asyncio.Event()
        self._watchers = 0

    def leave(self) -> None:
        """Serve no more; those who watch are told, and let go."""
        self._leaving.set()

    async def check(self, call: Call, read: Callable[[], Awaitable[Any]], context: Any) -> Any:
        """The status of the server (an empty name) or of a model.

        Raises:
            NotFoundError: no such model.
        """
        name = (await read()).service
        status = self._status(name)
        if status == _Status.SERVICE_UNKNOWN:
            raise NotFoundError(f"there is no model {name[:80]!r} here", f"Ask for {', '.join(self._models.names())}.")
        return _Status(status=status)

    async def watch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """Its status, and each other one that it comes to."""
        if len(request.service) > _MAX_NAME:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"no name has more than {_MAX_NAME} characters")
        if self._watchers >= _WATCHERS:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{_WATCHERS} watch already; ask with Check")
        told = None
        self._watchers += 1
        try:
            while True:
                if (status := self._status(request.service)) != told:
                    told = status
                    yield _Status(status=status)
                if self._leaving.is_set():
                    return
                with suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_SECONDS):
                        await self._leaving.wait()
        finally:
            self._watchers -= 1

    def _status(self, name: str) -> int:
        whole = name in self._whole
        if not whole and not self._models.known(name):
            return int(_Status.SERVICE_UNKNOWN)
        ready = self._models.ready if whole else self._models.get(name) is not None
        return int(_Status.SERVING if ready and not self._leaving.is_set() else _Status.NOT_SERVING)


class Reflection:
    """The reflection service, whose streams end.

    Args:
        names: full names of the services to tell of.
        pool: their descriptors.
    """

    def __init__(self, names: Sequence[str], pool: DescriptorPool) -> None:
        self._answers = reflection.aio.ReflectionServicer(names, pool=pool)
        self._open = 0

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register it."""
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(self, server)

    async def ServerReflectionInfo(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        """Answer the questions of one stream."""
        if self._open >= _REFLECTIONS:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{_REFLECTIONS} streams are open already")
        self._open += 1
        try:
            async with asyncio.timeout(_REFLECTION_SECONDS):
                async for answer in self._answers.ServerReflectionInfo(requests, context):
                    yield answer
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, f"the stream was open {_REFLECTION_SECONDS:.0f} s")
        finally:
            self._open -= 1


def reflected(file: Any, methods: Collection[str]) -> DescriptorPool:
    """Descriptors of what is served: `file` cut down to these methods, and health and reflection themselves.

    Args:
        file: descriptor of the .proto file.
        methods: names of those that are served.
    """
    pool = DescriptorPool()
    pool.Add(_cut(_proto(file), methods))
    for other in (health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR):
        pool.Add(_proto(other))
    return pool


def _proto(file: Any) -> FileDescriptorProto:
    proto = FileDescriptorProto()
    file.CopyToProto(proto)
    return proto


def _cut(proto: FileDescriptorProto, methods: Collection[str]) -> FileDescriptorProto:
    """Only these methods, and the messages that they reach; those need no other file."""
    cut = FileDescriptorProto(name=proto.name, package=proto.package, syntax=proto.syntax)
    for entry in proto.service:
        cut.service.add(name=entry.name, method=[method for method in entry.method if method.name in methods])
    messages = {f".{proto.package}.{message.name}": message for message in proto.message_type}
    found = {name for entry in cut.service for row in entry.method for name in (row.input_type, row.output_type)}
    reached: set[str] = set()
    while found:
        reached |= found
        found = {name for known in found for name in _refers(messages[known])} & messages.keys() - reached
    cut.message_type.extend(message for name, message in messages.items() if name in reached)
    return cut


def _refers(message: DescriptorProto) -> set[str]:
    """Names of the messages that its fields, and those of the messages inside of it, are of."""
    inner = {name for nested in message.nested_type for name in _refers(nested)}
    return inner | {field.type_name for field in message.field if field.type_name}
