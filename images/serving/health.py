"""grpc.health.v1 (`Check`), so that Kubernetes' gRPC probes work; the inference service joins it on the same server.

The two messages are small enough to be written by hand: a request is one text field `service`, an answer one enum.
See https://github.com/grpc/grpc/blob/master/doc/health-checking.md.
"""

from __future__ import annotations

import grpc
import grpc.aio

from .engine import Models

__all__ = ["grpc_server"]

_SERVING, _NOT_SERVING = b"\x08\x01", b"\x08\x02"
_MAX_MESSAGE = 64 * 2**20


def grpc_server(models: Models, address: str) -> tuple[grpc.aio.Server, int]:
    """A server bound to `address`, not started; and its port.

    Raises:
        RuntimeError: the address is taken.
    """
    options = [
        # Without it two servers share a port silently, and each gets half of the requests.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", _MAX_MESSAGE),
        ("grpc.max_send_message_length", _MAX_MESSAGE),
    ]
    server = grpc.aio.server(options=options)

    async def check(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        name = _service(request)
        if name and not models.known(name):
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no model {name!r} here")
        ready = models.get(name) is not None if name else models.ready
        return _SERVING if ready else _NOT_SERVING

    handlers = {"Check": grpc.unary_unary_rpc_method_handler(check)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("grpc.health.v1.Health", handlers),))
    return server, server.add_insecure_port(address)


def _service(request: bytes) -> str:
    """Field 1 of a HealthCheckRequest; names here are shorter than 128 bytes, so that their length is one byte."""
    if len(request) < 2 or request[0] != 0x0A or request[1] != len(request) - 2:
        return ""
    return request[2:].decode(errors="replace")
