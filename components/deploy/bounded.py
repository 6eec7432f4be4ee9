"""One HTTP request that ends: in a given time and size, whatever the other side does, and where it was sent to."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import requests
from requests.auth import AuthBase

__all__ = ["MOST", "SECONDS", "Answer", "ask"]

SECONDS = 30.0  # for all of it, from the first packet to the last
MOST = 16 * 2**20  # bytes of an answer
_CONNECT = 5.0
_CHUNK = 8 * 1024


@dataclass(frozen=True)
class Answer:
    """A whole answer.

    Attributes:
        status, reason: of HTTP.
        body: at most `MOST` bytes.
    """

    status: int
    reason: str
    body: bytes

    @property
    def text(self) -> str:
        """The body as UTF-8; what is none is replaced."""
        return self.body.decode("utf-8", "replace")


def ask(
    verb: str,
    url: str,
    *,
    data: bytes | None = None,
    params: Mapping[str, str] | None = None,
    headers: Mapping[str, str] | None = None,
    auth: AuthBase | None = None,
) -> Answer:
    """Send one request and read its answer, whatever its status; a redirect is an answer like another.

    Args:
        verb, url, data, params, headers, auth: as requests has them.

    Raises:
        requests.RequestException: not reached, no whole answer within `SECONDS`, or one larger than `MOST`.
    """
    end = time.monotonic() + SECONDS
    ended: queue.SimpleQueue[Answer | BaseException] = queue.SimpleQueue()
    options: dict[str, Any] = {"data": data, "params": params, "headers": headers, "auth": auth}

    def work() -> None:
        try:
            ended.put(_read(verb, url, options, end))
        except BaseException as error:
            ended.put(error)

    # In a thread: requests' own limits count anew for each piece, so that whoever drips would hold us for ever.
    threading.Thread(target=work, daemon=True).start()
    try:
        found = ended.get(timeout=SECONDS)
    except queue.Empty:
        raise _late() from None
    if isinstance(found, BaseException):
        raise found
    return found


def _read(verb: str, url: str, options: dict[str, Any], end: float) -> Answer:
    # No session: each request may meet another pod. No redirects: another address is not to see what we send.
    limits = (_CONNECT, SECONDS)
    with requests.request(verb, url, **options, timeout=limits, allow_redirects=False, stream=True) as answer:
        body = bytearray()
        for part in answer.iter_content(_CHUNK):
            body += part
            if len(body) > MOST:
                raise requests.RequestException(f"its answer is larger than {MOST / 2**20:g} MiB")
            if time.monotonic() > end:
                raise _late()
        return Answer(answer.status_code, str(answer.reason), bytes(body))


def _late() -> requests.Timeout:
    return requests.Timeout(f"no whole answer within {SECONDS:g} s")
