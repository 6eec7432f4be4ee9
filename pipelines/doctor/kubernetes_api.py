"""A small door to the Kubernetes API that only reads: each path is asked once, and a refusal is told as such."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .findings import CannotLook

__all__ = ["Cluster", "connect"]

_TIMEOUT = (3, 10)  # seconds to connect, and to wait for an answer
_PAGE, _PAGES = 500, 20


class Cluster:
    """One cluster, as one user. Safe to share between threads.

    Args:
        client: a kubernetes ApiClient.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self.server: str = client.configuration.host
        self._known: dict[str, tuple[threading.Lock, list[Any]]] = {}
        self._lock = threading.Lock()

    def get(self, path: str) -> dict[str, Any] | None:
        """The object at a path, or None where it (or its kind, or its namespace) does not exist.

        Raises:
            CannotLook: refused, or the API server is away.
        """
        self._alive()
        found: dict[str, Any] | None = self._once(path, lambda: self._ask("GET", path))
        return found

    def collection(self, path: str, query: str = "") -> list[dict[str, Any]] | None:
        """All objects of a collection, or None where the cluster does not know the kind.

        Args:
            path: of the collection.
            query: such as `fieldSelector=type%3DWarning`.

        Raises:
            CannotLook: refused, more than 10,000 objects, or the API server is away.
        """
        self._alive()
        found: list[dict[str, Any]] | None = self._once(f"{path}?{query}", lambda: self._pages(path, query))
        return found

    def review(self, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """Ask a review (of access, of ourselves): a POST that stores nothing; None where the kind is not known."""
        self._alive()
        return self._ask("POST", path, body)

    def serves(self, group: str) -> bool:
        """Whether an API group, such as `gateway.networking.k8s.io`, is installed."""
        groups = (self.get("/apis") or {}).get("groups") or []
        return any(item.get("name") == group for item in groups)

    def user(self) -> str:
        """Who we are to the API server, or empty where it does not tell (before Kubernetes 1.28)."""
        self._alive()
        kind = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}
        found = self._once(
            "(self)", lambda: self._ask("POST", "/apis/authentication.k8s.io/v1/selfsubjectreviews", kind)
        )
        info: dict[str, Any] = ((found or {}).get("status") or {}).get("userInfo") or {}
        return str(info.get("username", ""))

    def version(self) -> str:
        """The API server's version; asked first, so that a server that is away costs one wait for all checks."""
        return str((self._once("/version", lambda: self._ask("GET", "/version")) or {}).get("gitVersion", ""))

    def _alive(self) -> None:
        self.version()

    def _pages(self, path: str, query: str) -> list[dict[str, Any]] | None:
        items: list[dict[str, Any]] = []
        token = ""
        for _ in range(_PAGES):
            more = f"&continue={quote(token)}" if token else ""
            found = self._ask("GET", f"{path}?limit={_PAGE}{more}" + (f"&{query}" if query else ""))
            if found is None:
                return None
            items += found.get("items") or []
            token = str((found.get("metadata") or {}).get("continue") or "")
            if not token:
                return items
        raise CannotLook(f"{path} holds more than {_PAGE * _PAGES} objects", "Delete what old runs left there.")

    def _once(self, key: str, work: Callable[[], Any]) -> Any:
        """The result of the first call for `key`; an error is kept like a value."""
        with self._lock:
            lock, kept = self._known.setdefault(key, (threading.Lock(), []))
        with lock:
            if not kept:
                try:
                    kept.append(work())
                except CannotLook as error:
                    kept.append(error)
            if isinstance(kept[0], CannotLook):
                raise CannotLook(kept[0].problem, kept[0].remedy)
            return kept[0]

    def _ask(self, verb: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any] | None:
        import urllib3
        from kubernetes.client.exceptions import ApiException

        try:
            found: dict[str, Any] = self._client.call_api(
                path,
                verb,
                header_params={"Accept": "application/json", "Content-Type": "application/json"},
                body=body,
                response_type="object",
                auth_settings=["BearerToken"],
                _return_http_data_only=True,
                _request_timeout=_TIMEOUT,
            )
            return found
        except ApiException as error:
            if error.status == 404:
                return None
            raise self._refused(path, error) from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise CannotLook(
                f"the Kubernetes API server at {self.server} cannot be reached ({_short(error)})",
                "Start the cluster or correct the kubeconfig (--kubeconfig, --context); --local looks at this machine only.",
            ) from error

    def _refused(self, path: str, error: Any) -> CannotLook:
        message = _message(error)
        if error.status == 401:
            return CannotLook(
                f"{self.server} does not accept our credentials", "Renew the kubeconfig's token, or log in again."
            )
        if error.status == 403:
            return CannotLook(
                message,
                "kubectl create clusterrolebinding doctor --clusterrole=view --user=<you>   # or ask who may look",
            )
        return CannotLook(f"{self.server} answered {error.status} to {path}: {message}", "Try again later.")


def connect(kubeconfig: str = "", context: str = "") -> Cluster | None:
    """The cluster that a pod's service account, or the kubeconfig, points to; None where neither is there.

    Args:
        kubeconfig: file; empty for KUBECONFIG or ~/.kube/config.
        context: of that file; empty for its current one.

    Raises:
        CannotLook: the kubeconfig is named or present, and cannot be used.
    """
    from kubernetes import client, config
    from kubernetes.config import kube_config

    configuration = client.Configuration()
    configuration.retries = 0
    configuration.connection_pool_maxsize = 32  # as many as there are checks
    if not kubeconfig and not context:
        try:
            config.load_incluster_config(client_configuration=configuration)
            return Cluster(client.ApiClient(configuration))
        except config.ConfigException:
            pass
    files = kubeconfig or kube_config.KUBE_CONFIG_DEFAULT_LOCATION
    named = bool(kubeconfig or context)
    if not named and not any(Path(name).expanduser().is_file() for name in files.split(":") if name):
        return None
    try:
        config.load_kube_config(files, context or None, client_configuration=configuration)
    # The library lets errors of YAML, base64 and of a broken file's structure through as they are.
    except Exception as error:
        raise CannotLook(
            f"the kubeconfig {files} cannot be used ({_short(error)})",
            "Correct it, name another with --kubeconfig and --context, or give --local.",
        ) from error
    return Cluster(client.ApiClient(configuration))


def _short(error: Exception) -> str:
    cause = getattr(error, "reason", None) or error  # urllib3 wraps what happened
    return (str(cause).strip() or type(cause).__name__).splitlines()[0].split(" object at ")[-1][:300]


def _message(error: Any) -> str:
    body = error.body.decode(errors="replace") if isinstance(error.body, bytes) else str(error.body or error.reason)
    try:
        return str(json.loads(body)["message"])[:600]
    except (ValueError, KeyError, TypeError):
        return body.strip()[:600]
