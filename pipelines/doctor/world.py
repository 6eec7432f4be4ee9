"""What the checks look at: this machine's settings and, where one is named, the cluster and the services in front of it."""

from __future__ import annotations

import base64
import binascii
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from haechi.components.shared.errors import HaechiError, InputError, SettingsError, without_userinfo
from haechi.components.shared.settings import Settings

from ..kubeflow_settings import KubeflowSettings
from .findings import CannotLook, NotAsked
from .kubernetes_api import Cluster, connect

__all__ = ["Aim", "World"]


@dataclass(frozen=True)
class Aim:
    """Where to look.

    Attributes:
        workdir: of the embedded services.
        namespace: where runs' pods, settings and keys are.
        serving: namespace of the InferenceServices.
        service_account: that step pods run as.
        kubeconfig, context: which cluster; empty for the usual ones.
        local: look at no cluster.
        asked: options that were given and want a cluster, so that none is no health.
        host: URL of the Kubeflow Pipelines API; empty for what the environment names.
        token_file, ca_file: for it, as `haechi submit` takes them.
        label_studio: URL; empty for none.
        label_studio_token: of a user. Never printed.
        config_map, s3_secret, mlflow_secret: what the step pods get their settings from.
    """

    workdir: Path = Path(".haechi/run")
    namespace: str = "kubeflow"
    serving: str = "haechi-serving"
    service_account: str = "pipeline-runner"
    kubeconfig: str = ""
    context: str = ""
    local: bool = False
    asked: tuple[str, ...] = ()
    host: str = ""
    token_file: str = ""
    ca_file: str = ""
    label_studio: str = ""
    label_studio_token: str = field(default="", repr=False)
    config_map: str = "haechi-settings"
    s3_secret: str = "haechi-s3"  # noqa: S105 - the Secret's name, not a secret
    mlflow_secret: str = "haechi-mlflow"  # noqa: S105


class World:
    """Everything that checks may look at; lazy, so that a check costs only what it looks at.

    Args:
        aim: where to look.
        env: environment; None for the process's own.
        now: the clock, in seconds since 1970.
    """

    def __init__(self, aim: Aim, env: Mapping[str, str] | None = None, now: Callable[[], float] = time.time) -> None:
        self.aim, self.now, self._env = aim, now, env
        self.secrets: set[str] = {aim.label_studio_token}

    @cached_property
    def settings(self) -> Settings:
        """This machine's settings: the environment, else the services that `haechi up` left running in the workdir.

        Raises:
            CannotLook: the environment's settings cannot be read (check `settings` says why).
        """
        from ..services import running

        try:
            found = Settings.from_env(self._env)
        except SettingsError as error:
            raise CannotLook("the settings cannot be read, see check `settings`", error.remedy) from error
        if not found.s3_endpoint and not found.mlflow_tracking_uri:
            try:
                services = running(self.aim.workdir)
            except HaechiError:
                services = None  # check `services` tells
            found = services.settings() if services else found
        self.secrets |= {found.s3_access_key, found.s3_secret_key, found.roboflow_api_key}
        return found

    @property
    def forwarded(self) -> Settings:
        """The ways that the environment names to the cluster's own services; services of `haechi up` are others.

        Raises:
            CannotLook: the environment's settings cannot be read.
        """
        _ = self.settings  # says why they cannot be read, and keeps their secrets out of reports
        return self.read_settings()

    def read_settings(self) -> Settings:
        """The environment's settings, as they are.

        Raises:
            SettingsError: malformed.
        """
        return Settings.from_env(self._env)

    @cached_property
    def kubeflow(self) -> KubeflowSettings:
        """Where Kubeflow Pipelines is, and our way in.

        Raises:
            NotAsked: no host is named.
            CannotLook: the URL or a file cannot be used.
        """
        aim = self.aim
        try:
            found = KubeflowSettings.from_env(
                aim.host, aim.namespace, token_file=aim.token_file, ca_file=aim.ca_file, env=self._env
            )
        except (InputError, SettingsError) as error:
            if error.problem.startswith("--host is ''"):
                raise NotAsked("neither --host nor KF_PIPELINES_ENDPOINT names Kubeflow Pipelines") from error
            raise CannotLook(error.problem, error.remedy) from error
        self.secrets |= {found.bearer(), found.cookie}
        return found

    @cached_property
    def _connection(self) -> Cluster | CannotLook | None:
        try:
            return None if self.aim.local else connect(self.aim.kubeconfig, self.aim.context)
        except CannotLook as error:
            return error

    @property
    def cluster(self) -> Cluster:
        """The cluster.

        Raises:
            NotAsked: none is named.
            CannotLook: the kubeconfig cannot be used, or an option wants a cluster and there is none.
        """
        found = self._connection
        if isinstance(found, CannotLook):
            raise CannotLook(found.problem, found.remedy)
        if found is None and self.aim.local:
            raise NotAsked("--local was given")
        if found is None and self._asked:
            raise CannotLook(
                f"{', '.join(self._asked)} wants a cluster, and there is no kubeconfig and no service account",
                "Name one with --kubeconfig or KUBECONFIG, or give --local.",
            )
        if found is None:
            raise NotAsked("there is no kubeconfig and no service account")
        return found

    @cached_property
    def _asked(self) -> tuple[str, ...]:
        """The options that want a cluster; the profile of Kubeflow Pipelines wants none."""
        try:
            _ = self.kubeflow
        except NotAsked:
            return self.aim.asked
        except CannotLook:
            pass  # check `pipelines-api` tells
        return tuple(option for option in self.aim.asked if option != "--namespace")

    @property
    def server(self) -> str:
        """URL of the API server as far as it is known by now, without waiting; empty where it is not."""
        found = vars(self).get("_connection")
        return found.server if isinstance(found, Cluster) else ""

    @property
    def has_cluster(self) -> bool:
        """Whether a cluster is named, reachable or not."""
        return self._connection is not None

    def secret(self, namespace: str, name: str) -> dict[str, str] | None:
        """The decoded data of a Secret, kept out of every report; None where it does not exist."""
        found = self.cluster.get(f"/api/v1/namespaces/{namespace}/secrets/{name}")
        if found is None:
            return None
        data: dict[str, str] = {}
        for key, value in (found.get("data") or {}).items():
            try:
                data[key] = base64.b64decode(value).decode(errors="replace")
            except binascii.Error:
                data[key] = ""
        self.secrets |= {value.strip() for key, value in data.items() if key != "username"}
        return data

    def config(self, namespace: str, name: str) -> dict[str, str] | None:
        """The data of a ConfigMap, or None where it does not exist."""
        found = self.cluster.get(f"/api/v1/namespaces/{namespace}/configmaps/{name}")
        return None if found is None else dict(found.get("data") or {})

    def objects(self, namespace: str, kind: str, group: str = "", query: str = "") -> list[dict[str, Any]]:
        """The objects of a kind in a namespace; none where the cluster does not know the kind.

        Args:
            namespace: of the objects.
            kind: in the plural, such as `pods`.
            group: and version, such as `apps/v1`; empty for the core.
            query: as for `Cluster.collection`.
        """
        root = f"/apis/{group}" if group else "/api/v1"
        return self.cluster.collection(f"{root}/namespaces/{namespace}/{kind}", query) or []

    def redact(self, text: str) -> str:
        """The text without any secret that was seen, and without the credentials in URLs."""
        text = without_userinfo(text)
        # Also each line of one that holds several: where it is quoted, its line breaks look otherwise.
        words = {word for secret in list(self.secrets) for word in (secret, *secret.split())}
        for word in sorted(words, key=len, reverse=True):
            if len(word) >= 8:  # no check prints values; a short one (`minio`) would only tear host names apart
                text = text.replace(word, "***")
        return text
