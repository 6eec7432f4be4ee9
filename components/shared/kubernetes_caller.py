"""Plain calls to a Kubernetes API server: connect as a pod or as a person does, send one request, tell refused from away.

What a refusal means to a user is told by those who call, each in words of its own; so these errors are none of ours.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["KubernetesCaller", "Refused", "Unreachable", "Unusable", "connect"]

_MESSAGE_LENGTH = 1000


class Refused(Exception):
    """The API server answered with an error.

    Attributes:
        status: of HTTP.
        message: the server's own words.
        fields: that it is about, such as `.spec.replicas`; empty where it names none.
    """

    def __init__(self, status: int, message: str, fields: tuple[str, ...] = ()) -> None:
        self.status, self.message, self.fields = status, message, fields
        super().__init__(f"{status}: {message}")


class Unreachable(Exception):
    """The API server cannot be reached, or did not answer in time: a write may have been done all the same."""


class Unusable(Exception):
    """The kubeconfig is there, and cannot be used."""


class KubernetesCaller:
    """One API server, as one user. Safe to share between threads.

    Args:
        client: a kubernetes ApiClient.
        timeout: seconds to connect, and to wait for an answer.
    """

    def __init__(self, client: Any, timeout: tuple[float, float]) -> None:
        self._client, self._timeout = client, timeout
        self.server: str = client.configuration.host

    def call(
        self,
        verb: str,
        path: str,
        body: dict[str, Any] | None = None,
        query: Sequence[tuple[str, str]] = (),
        content_type: str = "application/json",
    ) -> dict[str, Any]:
        """Send one request; the object that it answers with.

        Args:
            verb: GET, POST, PUT, PATCH or DELETE.
            path: such as `/api/v1/namespaces`, with a query of its own where that is easier.
            body: sent as JSON.
            query: parameters.
            content_type: of the body.

        Raises:
            Refused: it answered with a status of 400 or more.
            Unreachable: it did not answer.
        """
        import urllib3
        from kubernetes.client.exceptions import ApiException

        headers = {"Accept": "application/json"} | ({"Content-Type": content_type} if body is not None else {})
        try:
            found: dict[str, Any] = self._client.call_api(
                path,
                verb,
                query_params=list(query),
                header_params=headers,
                body=body,
                response_type="object",
                auth_settings=["BearerToken"],
                _return_http_data_only=True,
                _request_timeout=self._timeout,
            )
            return found
        except ApiException as error:
            raise _refused(error) from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise Unreachable(_short(error)) from error


def connect(
    timeout: tuple[float, float],
    kubeconfig: str = "",
    context: str = "",
    retries: int | None = None,
    connections: int | None = None,
) -> KubernetesCaller | None:
    """The cluster that a pod's service account, or else the kubeconfig, points to; None where neither is there.

    Args:
        timeout: as in KubernetesCaller.
        kubeconfig: file; empty for KUBECONFIG or ~/.kube/config. Where it or `context` is given, a pod's service account
            does not count.
        context: of that file; empty for its current one.
        retries: of a request whose connection fails; None for urllib3's own number.
        connections: kept open at once; None for the library's own number.

    Raises:
        Unusable: the kubeconfig is named or present, and cannot be used.
    """
    from kubernetes import client, config
    from kubernetes.config import kube_config

    configuration = client.Configuration()
    configuration.retries = retries
    configuration.connection_pool_maxsize = connections or configuration.connection_pool_maxsize
    named = bool(kubeconfig or context)
    if not named:
        try:
            config.load_incluster_config(client_configuration=configuration)
            return KubernetesCaller(client.ApiClient(configuration), timeout)
        except config.ConfigException:
            pass
    files = kubeconfig or kube_config.KUBE_CONFIG_DEFAULT_LOCATION
    if not named and not any(Path(name).expanduser().is_file() for name in files.split(":") if name):
        return None
    try:
        config.load_kube_config(files, context or None, client_configuration=configuration)
    # The library lets errors of YAML, base64 and of a broken file's structure through as they are.
    except Exception as error:
        raise Unusable(f"the kubeconfig {files} cannot be used ({_short(error)})") from error
    return KubernetesCaller(client.ApiClient(configuration), timeout)


def _short(error: Exception) -> str:
    cause = getattr(error, "reason", None) or error  # urllib3 wraps what happened
    return (str(cause).strip() or type(cause).__name__).splitlines()[0].split(" object at ")[-1][:300]


def _refused(error: Any) -> Refused:
    """The API server's own words: a Status object's, or its plain text."""
    body = error.body.decode(errors="replace") if isinstance(error.body, bytes) else str(error.body or error.reason)
    try:
        told = json.loads(body)
        causes = (told.get("details") or {}).get("causes") or []
        fields = tuple(str(cause["field"]) for cause in causes if cause.get("field"))
        return Refused(error.status, str(told["message"])[:_MESSAGE_LENGTH], fields)
    except (ValueError, KeyError, TypeError, AttributeError):
        return Refused(error.status, body.strip()[:_MESSAGE_LENGTH])
