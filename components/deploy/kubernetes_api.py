"""A small door to the Kubernetes API for one InferenceService and what stands around it; it says clearly what went wrong."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from haechi.components.shared.errors import DeployError
from haechi.components.shared.kubernetes_caller import KubernetesCaller, Refused, Unreachable, Unusable, connect

__all__ = ["MANAGER", "Away", "Conflict", "Forbidden", "InferenceServiceApi", "Raced"]

MANAGER = "haechi-deploy"  # owns the fields that we apply, and no others
_TIMEOUT = (5, 30)  # seconds to connect, and to wait for an answer
_OURS = ".metadata.annotations.haechi.io/"
_APPLY = "application/apply-patch+yaml"  # JSON is YAML; this type is what means "apply"
# What a message of "there is no such object" begins with; other 404s mean that the kind itself is not there.
_OBJECTS = ("inferenceservices.", "deployments.", "leases.", "configmaps ", "httproutes.")


class Away(DeployError):
    """The API server cannot be reached or answers 5xx: worth another try."""


class Forbidden(DeployError):
    """The account lacks a right."""


class Conflict(DeployError):
    """Somebody else manages a field.

    Attributes:
        fields: which, as `.spec.predictor.model.storageUri`.
    """

    fields: tuple[str, ...] = ()


class Raced(Away):
    """Somebody else changed the object at the same moment: worth another try."""


class InferenceServiceApi:
    """The object `serving.kserve.io/v1beta1 InferenceService` of one namespace and name.

    Connects by the pod's service account where there is one, else by the kubeconfig (KUBECONFIG or ~/.kube/config).

    Args:
        namespace, name: of the object, which need not exist yet.

    Raises:
        DeployError: neither a service account nor a kubeconfig is there; from the methods: the API server is away,
            refuses us, or lacks the namespace or KServe.
    """

    def __init__(self, namespace: str, name: str, caller: KubernetesCaller | None = None) -> None:
        self.namespace, self.name = namespace, name
        self._caller = caller or _connect()
        self.server = self._caller.server
        self._path = f"/apis/serving.kserve.io/v1beta1/namespaces/{namespace}/inferenceservices/{name}"

    def beside(self, name: str) -> InferenceServiceApi:
        """Another InferenceService of the same namespace, over the same connection."""
        return InferenceServiceApi(self.namespace, name, self._caller)

    def get(self) -> dict[str, Any] | None:
        """The object as it is now, or None where it does not exist."""
        return self._request("GET", absent=True)

    def check_namespace(self) -> None:
        """Raise a DeployError where the namespace does not exist; one that we may not look at counts as there."""
        path = f"/api/v1/namespaces/{self.namespace}"
        with suppress(Forbidden):
            self._request("GET", path=path)

    def apply(self, manifest: dict[str, Any], dry_run: bool = False) -> dict[str, Any]:
        """Server-side apply as MANAGER, without force: another owner's field is not taken silently.

        But for annotations `haechi.io/*`, which are nobody else's: whoever edits one would lock every deploy out.

        Args:
            manifest: all that we want to own of the object; what we owned and leave out now is removed.
            dry_run: let schema, webhooks, rights and owners speak, and change nothing.

        Returns:
            The object as stored.
        """
        query = [("fieldManager", MANAGER), ("fieldValidation", "Strict")]
        query += [("dryRun", "All")] if dry_run else []
        try:
            return self._request("PATCH", manifest, query) or {}
        except Conflict as error:
            if not error.fields or not all(field.startswith(_OURS) for field in error.fields):
                raise
        return self._request("PATCH", manifest, [*query, ("force", "true")]) or {}

    def delete(self) -> None:
        """Delete the object, if it is there."""
        self._request("DELETE", absent=True)

    def deployment(self, name: str) -> dict[str, Any] | None:
        """A Deployment of the same namespace, or None where it does not exist."""
        return self._request("GET", absent=True, path=f"/apis/apps/v1/namespaces/{self.namespace}/deployments/{name}")

    def pods(self, predictor: str) -> list[dict[str, Any]]:
        """The pods of a predictor's Deployment, by its name."""
        path = f"/api/v1/namespaces/{self.namespace}/pods"
        found = self._request("GET", query=[("labelSelector", f"app=isvc.{predictor}")], path=path) or {}
        return list(found.get("items") or [])

    def route(self) -> dict[str, Any] | None:
        """The HTTPRoute that KServe makes of it where Gateway API is on, or None."""
        group = "/apis/gateway.networking.k8s.io/v1"
        return self._request(
            "GET", absent=True, path=f"{group}/namespaces/{self.namespace}/httproutes/{self.name}", optional=True
        )

    def serves_group(self, group: str) -> bool:
        """Whether the API server knows an API group, such as `gateway.networking.k8s.io`."""
        found = self._request("GET", path="/apis") or {}
        return any(item.get("name") == group for item in found.get("groups") or [])

    def config_map(self, namespace: str, name: str) -> dict[str, str] | None:
        """The data of a ConfigMap, or None where it does not exist."""
        path = f"/api/v1/namespaces/{namespace}/configmaps/{name}"
        found = self._request("GET", absent=True, path=path, optional=True)
        return None if found is None else dict(found.get("data") or {})

    def lease(self, name: str) -> dict[str, Any] | None:
        """A Lease of the same namespace, or None where it does not exist."""
        return self._request("GET", absent=True, path=self._leases(name))

    def write_lease(self, lease: dict[str, Any]) -> dict[str, Any]:
        """Make a Lease, or replace the one that was read (then it has a resourceVersion).

        Raises:
            Raced: somebody was faster.
        """
        known = "resourceVersion" in lease["metadata"]
        path = self._leases(lease["metadata"]["name"] if known else "")
        kind = "application/json"
        return self._request("PUT" if known else "POST", lease, path=path.rstrip("/"), content_type=kind) or {}

    def _leases(self, name: str) -> str:
        return f"/apis/coordination.k8s.io/v1/namespaces/{self.namespace}/leases/{name}"

    def _request(
        self,
        verb: str,
        body: dict[str, Any] | None = None,
        query: list[tuple[str, str]] | None = None,
        absent: bool = False,
        path: str = "",
        optional: bool = False,
        content_type: str = _APPLY,
    ) -> dict[str, Any] | None:
        try:
            return self._caller.call(verb, path or self._path, body, query or (), content_type)
        except Refused as error:
            if absent and error.status == 404 and (optional or error.message.startswith(_OBJECTS)):
                return None
            explained = self._explain(verb, error.status, error.message)
            if isinstance(explained, Conflict):
                explained.fields = error.fields
            raise explained from error
        except Unreachable as error:
            raise Away(
                f"cannot reach the Kubernetes API server at {self.server}: {error}",
                "Check the kubeconfig's server, or the network policy of this pod.",
            ) from error

    def _explain(self, verb: str, status: int, message: str) -> DeployError:
        where = f"InferenceService {self.namespace}/{self.name}"
        if status == 401:
            return DeployError(
                f"{self.server} does not accept our credentials: {message}", "Renew the token or kubeconfig."
            )
        if status == 403 and " cannot " in message:  # else admission, or a quota: below
            return Forbidden(
                f"we may not {verb.lower()} {where}: {message}",
                "Give the step's service account (pipeline-runner) the Role haechi-deploy of manifests/base/serving in "
                f"namespace {self.namespace}, and see that namespace {self.namespace} exists.",
            )
        if status == 404 and message.startswith("leases."):
            return Raced(f"the Lease of {where} was deleted: {message}", "Try again.")
        if status == 404 and message.startswith("namespaces "):
            return DeployError(f"namespace {self.namespace!r} does not exist at {self.server}", "Create it first.")
        if status == 404:
            return DeployError(
                f"{self.server} knows no InferenceService (serving.kserve.io/v1beta1): {message}",
                "Install KServe in that cluster, or use another deploy target.",
            )
        if status == 409 and "conflict with" not in message:
            return Raced(f"{where} is being changed by somebody else: {message}", "Try again.")
        if status == 409:
            return Conflict(
                f"{where} has fields that someone else manages: {message}",
                f"Remove those fields from the other manager's manifest, so that {MANAGER} may set them.",
            )
        if status in (400, 403, 422):
            return DeployError(f"the cluster refused {where}: {message}", "Mend what the message names.")
        return Away(f"{self.server} answered {status} for {where}: {message}", "Try again later.")


def _connect() -> KubernetesCaller:
    remedy = "Run in the cluster, or set KUBECONFIG to the kubeconfig of the cluster to deploy to."
    try:
        caller = connect(_TIMEOUT)
    except Unusable as error:
        raise DeployError(str(error), remedy) from error
    if caller is None:
        raise DeployError("neither a pod's service account nor a kubeconfig is here", remedy)
    return caller
