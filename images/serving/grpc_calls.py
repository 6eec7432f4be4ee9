"""gRPC calls: an RPC from its first byte to its status, whatever it asks for."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from operator import methodcaller
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from haechi.components.shared.errors import DeadlineError, HaechiError, InputError, OverloadError

from .service import REQUEST_ID, Call, Service
from .wire import check_size

__all__ = ["ARRIVING", "Arriving", "Context", "Message", "Read", "Unary", "Work"]

ARRIVING = 64  # messages that may be waited for at the same time
_MESSAGE_SECONDS = 60.0
_DETAILS = 1000  # characters of an error; the trailer that carries it may have 8 KiB
_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    409: grpc.StatusCode.FAILED_PRECONDITION,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}

Message = Any  # protobuf's, which have no types of their own here
Context = Any  # grpc.aio.ServicerContext
_Messages = Any  # its iterator of bytes, whose own iterator is a generator
Read = Callable[[], Awaitable[Message]]
Work = Callable[[Call, Read, Context], Awaitable[Message]]

_log = logging.getLogger(__name__)


class Arriving:
    """Messages that are waited for: where there are too many, the one that has taken longest is given up.

    So that nobody who opens RPCs and sends nothing can keep probes and others out.
    """

    def __init__(self, most: int = ARRIVING) -> None:
        self._most = most
        self._limits: dict[asyncio.Timeout, None] = {}

    async def wait(self, message: Awaitable[bytes]) -> bytes:
        """The message.

        Raises:
            TimeoutError: it took too long, or longest of too many.
        """
        async with asyncio.timeout(_MESSAGE_SECONDS) as limit:
            self._limits[limit] = None
            if len(self._limits) > self._most:
                oldest = next(iter(self._limits))
                del self._limits[oldest]
                oldest.reschedule(0)
            try:
                return await message
            finally:
                self._limits.pop(limit, None)


class Unary:
    """An RPC of one message for one message: one `Call`, and errors as status codes.

    It is registered as one that takes a stream of messages, which is the same on the wire: so the caller is checked
    before a message is taken in, and an RPC whose message never comes ends by itself.

    Args:
        service: what answers.
        arriving: the messages that all RPCs wait for.
        place, method: full name of the gRPC service, and the method's.
        kind: class of the request's message.
        work: answers; reads the message when it wants it, or raises what `_status` knows.
    """

    def __init__(
        self,
        service: Service,
        arriving: Arriving,
        place: str,
        method: str,
        kind: Any,
        work: Work,
    ) -> None:
        self._service = service
        self._arriving = arriving
        self._path = f"/{place}/{method}"
        self._kind = kind
        self._work = work

    def handler(self) -> grpc.RpcMethodHandler:
        """As grpc registers it; messages come as bytes, so that a malformed one is answered as all else that is."""
        return grpc.stream_unary_rpc_method_handler(self._handle, None, methodcaller("SerializeToString"))

    async def _handle(self, messages: _Messages, context: Context) -> Message:
        call = Call("grpc", self._path)
        call.identify({key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)})
        with self._service.observed(call):
            try:
                answer = await self._work(call, lambda: self._read(call, messages), context)
            except asyncio.CancelledError:
                call.status = grpc.StatusCode.CANCELLED.value[0]
                raise
            except Exception as error:
                call.error = error
                code, details = _status(error, self._path)
                call.status = code.value[0]
                context.set_trailing_metadata(((REQUEST_ID, call.request_id),))
                await context.abort(code, details)
            context.set_trailing_metadata(((REQUEST_ID, call.request_id),))
            return answer

    async def _read(self, call: Call, messages: _Messages) -> Message:
        try:
            # Closed, or the library's own record of a refusal would hold the message until the next garbage collection.
            received: Any = aiter(messages)
            async with aclosing(received) as stream:
                data = await self._arriving.wait(anext(stream))
        except TimeoutError:
            raise DeadlineError("the message did not arrive in time", "Send it faster.") from None
        except StopAsyncIteration:
            raise InputError("the RPC holds no message", f"Send one {self._kind.DESCRIPTOR.name}.") from None
        call.bytes_in = len(data)
        self._service.hold(call, len(data))
        check_size(data, self._kind.DESCRIPTOR)
        try:
            return self._kind.FromString(data)
        except DecodeError:
            raise InputError(
                f"the message is no {self._kind.DESCRIPTOR.name}", "Make it from the .proto file."
            ) from None


def _status(error: Exception, path: str) -> tuple[grpc.StatusCode, str]:
    """Code and details of an error; those of our own failures stay in the log."""
    if isinstance(error, OverloadError):
        return grpc.StatusCode.RESOURCE_EXHAUSTED, str(error)
    if isinstance(error, HaechiError) and error.http_status in _CODES:
        return _CODES[error.http_status], str(error)[:_DETAILS]
    _log.error("%s failed", path, exc_info=error)
    return grpc.StatusCode.INTERNAL, "internal error; the server's log has the details"
