"""Hygiene of HTTP connections: bounds on how long, how large and how many, so that no client can hold what others need.

uvicorn's protocol waits for ever for a head, takes heads of any size and hangs up on a client that has half-closed.
This one does not; what a body may take is bounded in `app.py`, and clients that do not read in the kernel (`patient`).
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from dataclasses import dataclass
from typing import Any, ClassVar

import httptools
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

__all__ = ["CROWDED", "Bounds", "Connection", "Lingering", "patient"]

CROWDED = "haechi.crowded"  # in a request's scope: its connection had to go for a newer one


@dataclass(frozen=True)
class Bounds:
    """What one connection may take.

    Attributes:
        connections: at the same time. Far more than requests may wait, and below the usual 1,024 files of a laptop.
        head_start: bytes that a client is taken to have sent when a request begins, so that new ones are not the slowest.
        head_seconds: until the head of a request is there, from its first byte or from the connection's beginning.
        head_bytes: of the address and all headers together.
        headers: number of headers.
        pipelined: requests that wait for the answer of one before them.
        unread_seconds: until a client that takes nothing of its answer is cut off.
        linger_seconds: that a client which still sends may take to see that its answer is there.
        farewell_seconds: between SIGTERM and the end of an idle connection: a request that is on its way still counts.
    """

    connections: int = 512
    head_start: int = 64 * 1024
    head_seconds: float = 10.0
    head_bytes: int = 32 * 1024
    headers: int = 100
    pipelined: int = 32
    unread_seconds: float = 30.0
    linger_seconds: float = 5.0
    farewell_seconds: float = 0.5


_OFFER = (b"connection", b"upgrade", b"http2-settings")


class _Excess(Exception):
    """A head with more than is allowed."""


class Connection(HttpToolsProtocol):
    """One HTTP connection. uvicorn makes it; its bounds are the class's."""

    bounds: ClassVar[Bounds] = Bounds()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0  # of a head, as the parser tells them
        self._raw_bytes = 0  # of a head, as they arrive
        self._since = 0.0  # when the latest request began, or the connection
        self._received = 0  # bytes since then
        self._leaving = False
        self._deaf = False

    @property
    def idle(self) -> bool:
        """Whether nothing is asked, or only a part of a head has come."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def waiting(self) -> bool:
        """Whether the client has to send something before anything goes on."""
        return (self.idle or (self.cycle.more_body and not self.pipeline)) and not self.transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the connection, or refuse it where there are too many and all of them wait for us."""
        super().connection_made(transport)  # type: ignore[arg-type]
        self._since = time.monotonic()
        if len(self.connections) > self.bounds.connections and not self._make_room():
            self._crowded()
            return self.transport.close()
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """Feed the parser; what it cannot read is answered as the rest of the API answers."""
        if self._deaf or self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        self._received += len(data)
        former, in_body = self.cycle, self.cycle is not None and self.cycle.more_body
        try:
            self._feed(data)
        except httptools.HttpParserError as error:
            excess = error.__context__ if isinstance(error.__context__, _Excess) else None
            return self._refuse(431, str(excess)) if excess else self._refuse(400, "this is not HTTP/1.1")
        self._raw_bytes = 0 if in_body or self.cycle is not former else self._raw_bytes + len(data)
        if self._raw_bytes > self.bounds.head_bytes:
            return self._refuse(431, f"the request's head has more than {self.bounds.head_bytes} bytes")
        if self.idle:
            self._await_head()

    def eof_received(self) -> bool:  # type: ignore[override]  # asyncio wants it, uvicorn annotates less
        """A client that has sent everything may close its side and still gets its answer."""
        waiting = not self.idle and not self.cycle.more_body
        if waiting:
            self.cycle.keep_alive = False
        return waiting

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timer too."""
        self._forget_timer()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """Count the head from here."""
        self._head_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Bound the address."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Bound the headers."""
        self._count(len(name) + len(value))
        if len(self.headers) >= self.bounds.headers:
            raise _Excess(f"the request has more than {self.bounds.headers} headers")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is there: its time is over, and the request begins."""
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise ValueError("this is no proxy")
            return
        self._forget_timer()
        if len(self.pipeline) >= self.bounds.pipelined:
            raise _Excess(f"more than {self.bounds.pipelined} requests wait for an answer on this connection")
        super().on_headers_complete()
        self._since, self._received = time.monotonic(), 0
        self.cycle.keep_alive = self.cycle.keep_alive and not self._leaving

    def on_message_complete(self) -> None:
        """The body is there."""
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def shutdown(self) -> None:
        """Leave after the answer at hand. An idle connection stays a moment, for a request that is on its way."""
        self._leaving = True
        if not self.idle:
            self.cycle.keep_alive = False
            return
        self._unset_keepalive_if_required()
        self.loop.call_later(self.bounds.farewell_seconds, self._leave)

    def _feed(self, data: bytes) -> None:
        """Feed the parser; where a client offers another protocol, what it sent is read again without the offer.

        Java's client offers h2c with its first request, and the parser takes the body for that protocol.
        """
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            head = self.parser.get_method() + b" " + self.url + b" HTTP/1.1\r\n"
            kept = [name + b": " + value + b"\r\n" for name, value in self.headers if name not in _OFFER]
            self.parser = httptools.HttpRequestParser(self)
            self._feed(head + b"".join(kept) + b"\r\n" + data[offer.args[0] :])

    def _make_room(self) -> bool:
        """Let another connection go, since this one may be a probe; False where none of them waits for its client.

        An idle one has been answered and can come back. Else it is the one whose body comes slowest, so that whoever
        holds connections by sending a byte now and then loses them first.
        """
        now = time.monotonic()  # the loop's own clock does not tell apart who comes within a millisecond
        others = [item for item in self.connections if item is not self and item.waiting]  # type: ignore[union-attr]
        if not others:
            return False
        min(others, key=lambda item: (not item.idle, item._pace(now)))._give_way()  # type: ignore[union-attr]
        return True

    def _pace(self, now: float) -> float:
        """Bytes a second of the latest request, from its head on."""
        return (self._received + self.bounds.head_start) / max(1e-9, now - self._since)

    def _give_way(self) -> None:
        if not self.idle:
            self.scope[CROWDED] = True  # type: ignore[literal-required]
            if not self.cycle.response_started:
                self._crowded()
        self.transport.close()

    def _leave(self) -> None:
        if self.idle:
            self.transport.close()

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > self.bounds.head_bytes:
            raise _Excess(f"the request's head has more than {self.bounds.head_bytes} bytes")

    def _await_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.bounds.head_seconds, self._late)

    def _forget_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _late(self) -> None:
        if self._raw_bytes:
            self._refuse(408, f"the request's head did not arrive within {self.bounds.head_seconds:g} s")
        else:
            self.transport.close()

    def _refuse(self, status: int, problem: str) -> None:
        """Answer without the application, and end the connection; what still comes is dropped."""
        self._deaf = True
        self._forget_timer()
        if not self.idle and not self.cycle.more_body:
            # Answers go in the order of the requests: those before this one get theirs.
            self.cycle.keep_alive = False
            return
        if not self.idle and (self.cycle.response_started or self.pipeline):
            return self.transport.close()
        if not self.idle:
            self.cycle.disconnected = True  # the application waits for a body that is not read any more
            self.cycle.message_event.set()
        self._answer(status, problem)
        # At once, what the client still sends would reset the connection, and with it the answer.
        self.transport.write_eof()
        self.loop.call_later(self.bounds.linger_seconds, self.transport.close)

    def _crowded(self) -> None:
        self._answer(503, "the server has as many connections as it takes", b"retry-after: 1\r\n")

    def _answer(self, status: int, problem: str, more: bytes = b"") -> None:
        body = json.dumps({"error": problem}).encode()
        head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + more + b"\r\n" + body)


class Lingering:
    """Around the application: where it has answered before the whole body came, the rest is read and dropped.

    Hanging up at once would reset the connection, and with it the answer that is still on its way to the client. Reading
    on for ever would let it send for ever; so the connection ends after a moment, and the answer says so.
    """

    def __init__(self, app: ASGIApp, seconds: float = Bounds.linger_seconds) -> None:
        self._app = app
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        headers = Headers(scope=scope) if scope["type"] == "http" else None
        if headers is None or (headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers):
            return await self._app(scope, receive, send)
        coming, last = True, False

        async def watched_receive() -> Message:
            nonlocal coming
            message = await receive()
            coming = message.get("more_body", False)
            return message

        async def watched_send(message: Message) -> None:
            nonlocal last
            if coming and message["type"] == "http.response.start":
                MutableHeaders(scope=message)["connection"] = "close"
            elif coming and not message.get("more_body", False):
                message, last = {**message, "more_body": True}, True
            await send(message)

        await self._app(scope, watched_receive, watched_send)
        if last:
            await self._drop(receive)
            await send({"type": "http.response.body"})

    async def _drop(self, receive: Receive) -> None:
        try:
            async with asyncio.timeout(self._seconds):
                while (await receive()).get("more_body", False):
                    pass
        except TimeoutError:
            pass


def patient(listener: socket.socket, seconds: float = Bounds.unread_seconds) -> None:
    """Let the kernel end connections whose peer takes nothing of what is sent to it for so long; Linux alone can."""
    if option := getattr(socket, "TCP_USER_TIMEOUT", None):
        listener.setsockopt(socket.IPPROTO_TCP, option, round(seconds * 1000))
