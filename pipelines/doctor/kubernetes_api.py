"""A small door to the Kubernetes API that only reads: each path is asked once, and a refusal is told as such."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from haechi.components.shared.kubernetes_caller import KubernetesCaller, Refused, Unreachable, Unusable
from haechi.components.shared.kubernetes_caller import connect as connect_to_cluster

from .findings import CannotLook

__all__ = ["BOUND", "Cluster", "connect"]

_TIMEOUT = (3, 10)  # seconds to connect, and to wait for an answer
_PAGE, _PAGES = 500, 20
_USUAL = "~/.kube/config"
_ANOTHER = "Correct it, name another with --kubeconfig and --context, or give --local."
# What option `operators` (manifests/components/operators) binds by itself.
BOUND = ("kubeflow", "haechi-serving", "mlflow", "kserve")
_ROLES = {"secrets": "haechi-view-keys", "services": "haechi-view-parts", "endpointslices": "haechi-view-parts"}


class Cluster:
    """One cluster, as one user. Safe to share between threads.

    Args:
        caller: sends the requests.
    """

    def __init__(self, caller: KubernetesCaller) -> None:
        self._caller, self.server = caller, caller.server
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
        return str(self._once("/version", self._version))

    def _alive(self) -> None:
        self.version()

    def _version(self) -> str:
        found = self._ask("GET", "/version")
        if found is None or "gitVersion" not in found:
            raise self._not_kubernetes()
        return str(found["gitVersion"])

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
        try:
            found: Any = self._caller.call(verb, path, body)
            if isinstance(found, dict):
                return found
            raise self._not_kubernetes()
        except Refused as error:
            if error.status == 404:
                return None
            raise self._refused(path, error) from error
        except Unreachable as error:
            raise CannotLook(
                f"the Kubernetes API server at {self.server} cannot be reached ({error})",
                "Start the cluster or correct the kubeconfig (--kubeconfig, --context); --local looks at this machine only.",
            ) from error

    def _not_kubernetes(self) -> CannotLook:
        return CannotLook(
            f"{self.server} does not answer like a Kubernetes API server: a proxy or a login page stands there",
            "Correct the server in the kubeconfig, or log in where the proxy wants it.",
        )

    def _refused(self, path: str, error: Refused) -> CannotLook:
        if error.status == 401:
            return CannotLook(
                f"{self.server} does not accept our credentials", "Renew the kubeconfig's token, or log in again."
            )
        if error.status == 403:
            return CannotLook(error.message, _role(path))
        return CannotLook(f"{self.server} answered {error.status} to {path}: {error.message}", "Try again later.")


def _role(path: str) -> str:
    """What lets a person see what is at a path: option `operators`, or its role where that binds none."""
    found = re.search(r"/namespaces/([^/?]+)(?:/([a-z]+))?", path)
    kind = (found and found[2]) or ""
    if found is None or found[1] in BOUND:
        group = "haechi-operators" if kind == "secrets" else "haechi-viewers"
        return (
            f"components: [../../components/operators] in your overlay, and join its group {group} (docs/manifests.md)"
        )
    role = _ROLES.get(kind, "haechi-view")
    return (
        f"kubectl -n {found[1]} create rolebinding {role} --clusterrole={role} --user=<you>   "
        "# of option operators, docs/manifests.md"
    )


def connect(kubeconfig: str = "", context: str = "") -> Cluster | None:
    """The cluster that a pod's service account, or the kubeconfig, points to; None where neither is there.

    Args:
        kubeconfig: file; empty for KUBECONFIG or ~/.kube/config.
        context: of that file; empty for its current one.

    Raises:
        CannotLook: the kubeconfig is named or present, and cannot be used.
    """
    from kubernetes.config import kube_config

    try:
        # As many connections as there are checks.
        caller = connect_to_cluster(_TIMEOUT, kubeconfig, context, retries=0, connections=32)
    except Unusable as error:
        raise CannotLook(str(error), _ANOTHER) from error
    if caller is None and kube_config.KUBE_CONFIG_DEFAULT_LOCATION not in ("", _USUAL):
        raise CannotLook(
            f"KUBECONFIG is {kube_config.KUBE_CONFIG_DEFAULT_LOCATION}, and there is no such file", _ANOTHER
        )
    return Cluster(caller) if caller else None
