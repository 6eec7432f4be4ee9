"""A small door to the Kubernetes API for one InferenceService: get it, apply it, and say clearly what went wrong."""

from __future__ import annotations

import json
from typing import Any

from haechi.components.shared.errors import DeployError

__all__ = ["MANAGER", "InferenceServiceApi"]

MANAGER = "haechi-deploy"  # owns the fields that we apply, and no others
_TIMEOUT = (5, 30)  # seconds to connect, and to wait for an answer


class InferenceServiceApi:
    """The object `serving.kserve.io/v1beta1 InferenceService` of one namespace and name.

    Connects by the pod's service account where there is one, else by the kubeconfig (KUBECONFIG or ~/.kube/config).

    Args:
        namespace, name: of the object, which need not exist yet.

    Raises:
        DeployError: neither a service account nor a kubeconfig is there; from the methods: the API server is away,
            refuses us, or lacks the namespace or KServe.
    """

    def __init__(self, namespace: str, name: str) -> None:
        self.namespace, self.name = namespace, name
        self._client = _connect()
        self.server: str = self._client.configuration.host
        self._path = f"/apis/serving.kserve.io/v1beta1/namespaces/{namespace}/inferenceservices/{name}"

    def get(self) -> dict[str, Any] | None:
        """The object as it is now, or None where it does not exist."""
        return self._request("GET", absent=True)

    def apply(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Server-side apply as MANAGER, without force: another owner's field is not taken silently.

        Returns:
            The object as stored.
        """
        query = [("fieldManager", MANAGER), ("fieldValidation", "Strict")]
        return self._request("PATCH", manifest, query) or {}

    def deployment(self, name: str) -> dict[str, Any] | None:
        """A Deployment of the same namespace, or None where it does not exist."""
        return self._request("GET", absent=True, path=f"/apis/apps/v1/namespaces/{self.namespace}/deployments/{name}")

    def _request(
        self,
        verb: str,
        body: dict[str, Any] | None = None,
        query: list[tuple[str, str]] | None = None,
        absent: bool = False,
        path: str = "",
    ) -> dict[str, Any] | None:
        import urllib3
        from kubernetes.client.exceptions import ApiException

        headers = {"Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = "application/apply-patch+yaml"  # JSON is YAML; this type is what means "apply"
        try:
            found: dict[str, Any] = self._client.call_api(
                path or self._path,
                verb,
                query_params=query or [],
                header_params=headers,
                body=body,
                response_type="object",
                auth_settings=["BearerToken"],
                _return_http_data_only=True,
                _request_timeout=_TIMEOUT,
            )
            return found
        except ApiException as error:
            if absent and error.status == 404 and _message(error).startswith(("inferenceservices.", "deployments.")):
                return None
            raise self._explain(verb, error) from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise DeployError(
                f"cannot reach the Kubernetes API server at {self.server}: {error}",
                "Check the kubeconfig's server, or the network policy of this pod.",
            ) from error

    def _explain(self, verb: str, error: Any) -> DeployError:
        message, where = _message(error), f"InferenceService {self.namespace}/{self.name}"
        if error.status == 401:
            return DeployError(
                f"{self.server} does not accept our credentials: {message}", "Renew the token or kubeconfig."
            )
        if error.status == 403 and " cannot " in message:  # else admission, or a quota: below
            return DeployError(
                f"we may not {verb.lower()} {where}: {message}",
                "Give the step's service account (pipeline-runner) get, create and patch on "
                f"inferenceservices.serving.kserve.io and get on deployments.apps in namespace {self.namespace} "
                f"(Role haechi-deploy), and see that namespace {self.namespace} exists.",
            )
        if error.status == 404 and message.startswith("namespaces "):
            return DeployError(f"namespace {self.namespace!r} does not exist at {self.server}", "Create it first.")
        if error.status == 404:
            return DeployError(
                f"{self.server} knows no InferenceService (serving.kserve.io/v1beta1): {message}",
                "Install KServe in that cluster, or use another deploy target.",
            )
        if error.status == 409:
            return DeployError(
                f"{where} has fields that someone else manages: {message}",
                f"Remove those fields from the other manager's manifest, so that {MANAGER} may set them.",
            )
        if error.status in (400, 403, 422):
            return DeployError(f"the cluster refused {where}: {message}", "Mend what the message names.")
        return DeployError(f"{self.server} answered {error.status} for {where}: {message}", "Try again later.")


def _connect() -> Any:
    from kubernetes import client, config

    configuration = client.Configuration()
    try:
        config.load_incluster_config(client_configuration=configuration)
    except config.ConfigException:
        try:
            config.load_kube_config(client_configuration=configuration)
        except (config.ConfigException, OSError, ValueError) as error:
            raise DeployError(
                f"neither a pod's service account nor a usable kubeconfig is here ({error})",
                "Run in the cluster, or set KUBECONFIG to the kubeconfig of the cluster to deploy to.",
            ) from error
    return client.ApiClient(configuration)


def _message(error: Any) -> str:
    """The API server's own words: a Status object's message, or its plain text."""
    body = error.body.decode(errors="replace") if isinstance(error.body, bytes) else str(error.body or error.reason)
    try:
        return str(json.loads(body)["message"])[:1000]
    except (ValueError, KeyError, TypeError):
        return body.strip()[:1000]
