"""One bounded HTTP request, and why it did not arrive: name, port, silence, certificate, or the wrong protocol."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import urllib3

from .findings import Finding

__all__ = ["Answer", "Unreached", "fetch", "resolves"]

_TIMEOUT = urllib3.Timeout(connect=3, read=6)
_BODY = 8 * 2**20  # bytes of an answer that are read; a list of runs repeats their pipelines


@dataclass(frozen=True)
class Answer:
    """Status, lower-case headers, and the beginning of the body."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> dict[str, Any] | None:
        """The body as a JSON object, or None where it is none."""
        try:
            value = json.loads(self.body)
        except ValueError:
            return None
        return value if isinstance(value, dict) else None

    def says(self, *words: str) -> bool:
        """Whether the body holds one of the words."""
        text = self.body.decode(errors="replace")
        return any(word in text for word in words)


class Unreached(Exception):
    """A request that got no HTTP answer; `cause` and `fix` tell why.

    Args:
        url: that was asked.
        cause: why it did not arrive.
        fix: what mends it.
    """

    def __init__(self, url: str, cause: str, fix: str) -> None:
        super().__init__(cause)
        self.url, self.cause, self.fix = url, cause, fix

    def finding(self, what: str, fix: str = "") -> Finding:
        """The finding that `what` cannot be reached; `fix` adds what helps with this thing alone."""
        return Finding(f"{what} at {self.url} cannot be reached", self.cause, "\n".join(filter(None, [self.fix, fix])))


def resolves(url: str) -> bool:
    """Whether the name in a URL has an address here; names of Services have one in the cluster only."""
    try:
        socket.getaddrinfo(urlsplit(url).hostname or "", None)
    except (OSError, ValueError):  # or it cannot be a name
        return False
    return True


def fetch(
    url: str,
    headers: Mapping[str, str] | None = None,
    verb: str = "GET",
    body: bytes | None = None,
    ca_file: str = "",
) -> Answer:
    """Ask once, follow no redirect, and wait seconds at most.

    Args:
        url, headers, verb, body: of the request.
        ca_file: certificates that the server's is checked against; empty for the system's.

    Raises:
        Unreached: no HTTP answer came.
    """
    if not _is_url(url):
        raise Unreached(url, "that is not a URL of scheme and host", "Write it as http://host:port or https://host.")
    try:
        with urllib3.PoolManager(timeout=_TIMEOUT, retries=False, ca_certs=ca_file or None) as pool:
            found = pool.request(verb, url, body=body, headers=dict(headers or {}), preload_content=False)
            data = found.read(_BODY)
            answer = Answer(found.status, {key.lower(): value for key, value in found.headers.items()}, data)
            found.release_conn()
    except (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError, ValueError) as error:
        raise _why(url, error) from error
    if answer.status == 400 and urlsplit(url).scheme == "http" and _speaks_tls(url):
        raise _plain_to_tls(url)
    return answer


def _is_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        return False


def _why(url: str, error: Exception) -> Unreached:
    parts, text = urlsplit(url), str(error)
    host = f"{parts.hostname}:{_port(url)}"
    if isinstance(error, urllib3.exceptions.NameResolutionError):
        return Unreached(
            url,
            f"the name {parts.hostname} has no address here",
            "Correct the host; names such as minio.minio exist inside the cluster only.",
        )
    if isinstance(error, urllib3.exceptions.NewConnectionError):
        return Unreached(url, f"nothing listens at {host}", "Start the service, or correct host and port.")
    if isinstance(error, urllib3.exceptions.ConnectTimeoutError):
        return Unreached(url, f"{host} drops our packets", "Look at firewalls and NetworkPolicies on the way.")
    if "CERTIFICATE_VERIFY_FAILED" in text:
        reason = text.split("CERTIFICATE_VERIFY_FAILED]")[-1].split("(_ssl")[0].strip(" :")
        return Unreached(
            url,
            f"its TLS certificate is not trusted ({reason})",
            "export SSL_CERT_FILE=/path/to/ca.pem   # the authority that signed it; in pods, mount it and set the same",
        )
    if parts.scheme == "https" and isinstance(error, urllib3.exceptions.SSLError):
        return Unreached(url, f"{host} does not speak TLS", f"Write http://{host}, or switch TLS on there.")
    if parts.scheme == "http" and _speaks_tls(url):
        return _plain_to_tls(url)
    if isinstance(error, urllib3.exceptions.ReadTimeoutError):
        return Unreached(url, f"{host} takes the connection and does not answer", "Look at the log of what runs there.")
    if isinstance(error, ValueError):  # its words repeat the header, and so the token
        return Unreached(
            url,
            "the URL, or what is sent with it, holds what HTTP does not take",
            "Look for blanks and line breaks in the setting and in the token.",
        )
    return Unreached(url, f"the connection broke ({text[:200]})", "Look at the log of what runs there.")


def _plain_to_tls(url: str) -> Unreached:
    parts = urlsplit(url)
    return Unreached(
        url, "it speaks TLS on that port, and the URL says http", f"Write https://{parts.hostname}:{_port(url)}"
    )


def _port(url: str) -> int:
    parts = urlsplit(url)
    return parts.port or (443 if parts.scheme == "https" else 80)


def _speaks_tls(url: str) -> bool:
    """Whether a TLS handshake succeeds, whoever signed the certificate; nothing is sent over it."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with contextlib.suppress(OSError, ValueError):
        address = (urlsplit(url).hostname or "", _port(url))
        with socket.create_connection(address, 3) as raw, context.wrap_socket(raw):
            return True
    return False
