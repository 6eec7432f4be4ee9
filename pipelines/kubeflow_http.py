"""The generated client of Kubeflow Pipelines, made to take nothing but the API's own JSON, of a bounded size, in bounded time.

By itself it follows redirections, reads without end, takes any page for an empty answer, and turns objects into texts.
"""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any
from urllib.parse import urljoin, urlsplit

import kfp_server_api
import urllib3

__all__ = ["Client", "WrongAnswer", "whole_object", "within"]

_MOST = 64 << 20  # bytes of an answer; a page of a hundred versions, each with its pipeline, is eight million
_PART = 1 << 16
_LOGIN = (
    "Most likely it is the login page: give --token-file (audience pipelines.kubeflow.org), or a session that has not ended "
    "in KF_PIPELINES_COOKIE; or the path is missing, as in https://<kubeflow>/pipeline."
)
_OTHER = "Check that --host leads to Kubeflow Pipelines, and that no proxy answers in its place."


class WrongAnswer(Exception):
    """What came is not the API's answer.

    Args:
        problem: a sentence about it, such as "it leads to http://b".
        remedy: what the user can do about it.
        status: the HTTP status; 0 where there was no whole answer.
    """

    def __init__(self, problem: str, remedy: str = _OTHER, status: int = 0) -> None:
        super().__init__(problem)
        self.remedy = remedy
        self.status = status


class Client(kfp_server_api.ApiClient):  # type: ignore[misc]  # the package has no types
    """The generated client within those bounds.

    Args:
        configuration: address, token and certificates.
        cookie: session cookie; empty for none.

    Every call raises, beside ApiException and urllib3's HTTPError:
        WrongAnswer: a redirection, a page, JSON that the API's models do not describe, or too much of it.
    """

    def __init__(self, configuration: kfp_server_api.Configuration, cookie: str) -> None:
        super().__init__(configuration, cookie=cookie or None)
        self.rest_client.pool_manager = _Pool(self.rest_client.pool_manager)

    def deserialize(self, response: Any, response_type: str) -> Any:
        """The answer as the API's model."""
        if not _fits(whole_object(response.data, response.status), response_type):
            raise _other_json(response.status)
        try:
            return super().deserialize(response, response_type)
        # Numbers and moments that are none.
        except (ValueError, TypeError, OverflowError, kfp_server_api.ApiException) as error:
            raise _other_json(response.status) from error


class _Pool:
    """Connections that follow no redirection and read each answer whole, up to the limit."""

    def __init__(self, pool: urllib3.PoolManager) -> None:
        self._pool = pool

    def request(self, method: str, url: str, **options: Any) -> urllib3.HTTPResponse:
        """As of PoolManager; always preloaded, and its text always UTF-8."""
        options |= {"preload_content": False, "redirect": False}
        response = self._pool.request(method, url, **options)
        try:
            moved = response.get_redirect_location()
            if moved:
                raise _redirected(urljoin(url, moved), response.status)
            body = _read(response).decode("utf-8", "replace").encode()
        # The generated client stumbles over this one.
        except urllib3.exceptions.SSLError as error:
            raise urllib3.exceptions.ProtocolError(str(error)) from error
        finally:
            response.close()
        return urllib3.HTTPResponse(body=io.BytesIO(body), status=response.status, reason=response.reason)


def whole_object(text: str | bytes, status: int = 200) -> dict[str, Any]:
    """The JSON object that `text` is.

    Raises:
        WrongAnswer: it is a page, or another kind of JSON.
    """
    try:
        told = json.loads(text)
    except (ValueError, RecursionError):
        raise WrongAnswer("it answers with a web page instead of the pipelines API", _LOGIN, status) from None
    if not isinstance(told, dict):
        raise _other_json(status)
    return told


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """What `call` returns or raises, if it does so within `seconds`: timeouts of sockets count from byte to byte.

    Raises:
        WrongAnswer: it did not; its thread is left behind.
    """
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    # A daemon: one that hangs must not keep the process from ending.
    threading.Thread(target=run, name="kubeflow", daemon=True).start()
    if not wait([future], seconds).done:
        remedy = (
            "Look in the dashboard whether it was done after all; submit again, or give an address nearer to the API."
        )
        raise WrongAnswer(f"there was no whole answer within {seconds:g} s", remedy)
    return future.result()


def _read(response: urllib3.BaseHTTPResponse) -> bytes:
    body = bytearray()
    for part in response.stream(_PART):
        body += part
        if len(body) > _MOST:
            raise WrongAnswer(f"its answer is over {_MOST >> 20} MiB", status=response.status)
    return bytes(body)


def _redirected(location: str, status: int) -> WrongAnswer:
    try:
        parts = urlsplit(location)
        where = f"{parts.scheme}://{parts.netloc}{parts.path}"
    except ValueError:
        where = "what is no URL"
    base, api, _ = where.partition("/apis/")
    if api:
        # The token is not sent on to another scheme, host or port, and its absence would be told as a refusal.
        remedy = (
            "Give that address as --host, if it is yours: a token goes to the address that is given and to no other."
        )
        return WrongAnswer(f"it leads to {base}", remedy, status)
    return WrongAnswer(f"it leads to {where} instead of answering", _LOGIN, status)


def _other_json(status: int) -> WrongAnswer:
    return WrongAnswer("it answers with other JSON than the pipelines API", _OTHER, status)


def _fits(value: Any, kind: str) -> bool:
    """Whether objects, lists and plain values are where the API's models have them; what they do not know may be there."""
    if value is None or kind == "object":
        return True
    if kind.startswith("list["):
        return isinstance(value, list) and all(_fits(one, kind[5:-1]) for one in value)
    if kind.startswith("dict("):
        return isinstance(value, dict)
    fields = getattr(getattr(kfp_server_api, kind, None), "openapi_types", None)
    if not fields:
        return not isinstance(value, dict | list)
    wires = getattr(kfp_server_api, kind).attribute_map
    return isinstance(value, dict) and all(_fits(value.get(wires[name]), inner) for name, inner in fields.items())
