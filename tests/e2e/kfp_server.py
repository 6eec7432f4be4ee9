"""The real API server of Kubeflow Pipelines, over MariaDB, SeaweedFS and the API server of the tests.

Upstream ships it as an image only; build the binary once and name it, and have MariaDB's server:

    git clone --depth 1 --branch 2.17.0 https://github.com/kubeflow/pipelines && cd pipelines
    CGO_ENABLED=1 go build -o ~/.cache/haechi/kfp-apiserver-2.17.0 ./backend/src/apiserver
    apt-get install mariadb-server-core

What it keeps, checks and refuses is real, tokens and their audience by TokenReview included. No controller runs: what it
starts stays an Argo Workflow or a ScheduledWorkflow that nobody acts on.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import urllib.request
from pathlib import Path
from typing import Any

from api_server import ApiServer
from certificates import write_certificate

from haechi.components.shared.settings import Settings
from haechi.components.shared.storage import Store
from haechi.pipelines.servers import Server, free_ports

__all__ = ["KfpServer", "MariaDb", "why_absent"]

VERSION = "2.17.0"
BINARY = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "haechi" / f"kfp-apiserver-{VERSION}"
_ADMISSION, _WEBHOOK = "admissionregistration.k8s.io/v1", "pipelineversions.pipelines.kubeflow.org"
_WEBHOOKS = (("MutatingWebhookConfiguration", "mutate"), ("ValidatingWebhookConfiguration", "validate"))


def why_absent() -> str:
    """Why the server cannot be started here; empty where it can."""
    if not BINARY.is_file():
        return f"there is no {BINARY}; tests/e2e/kfp_server.py tells how to build it"
    return "" if shutil.which("mariadbd") else "mariadbd is not installed: apt-get install mariadb-server-core"


class MariaDb(Server):
    """MariaDB on a free port of loopback, open to all."""

    name = "mariadb"

    def _prepare(self) -> tuple[list[str], dict[str, str], list[str]]:
        (self.port,) = free_ports(1)
        data = self.workdir / "mariadb"
        data.mkdir(exist_ok=True)
        # Without its own tables it knows no users and asks nobody; they would take half a minute to make.
        command = ["mariadbd", "--no-defaults", "--user=root", f"--datadir={data}", f"--port={self.port}"]
        command += [
            "--bind-address=127.0.0.1",
            "--socket=mariadb.sock",
            "--innodb-buffer-pool-size=32M",
            "--skip-grant-tables",
            "--character-set-server=utf8mb4",  # as MySQL 8, which upstream ships, has it
        ]
        return command, dict(os.environ), []

    def ready(self) -> bool:
        # The server greets first; its name is in the greeting.
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=2) as link:
                link.settimeout(2)
                return b"MariaDB" in link.recv(128)
        except OSError:
            return False


class KfpServer(Server):
    """The API server of Kubeflow Pipelines.

    Args:
        workdir: folder for its settings, data and logs.
        cluster: where it makes workflows and asks who a token's bearer is.
        settings: of an object store.
        multi_user: as Kubeflow runs it, or for a single user.
        objects: keep pipelines as objects of the cluster (--pipelinesStoreKubernetes).
    """

    name = "kfp-apiserver"
    patience = 180.0

    def __init__(
        self,
        workdir: Path,
        cluster: ApiServer,
        settings: Settings,
        *,
        multi_user: bool = False,
        objects: bool = False,
    ) -> None:
        super().__init__(workdir)
        self._objects, self._certificate = objects, self.workdir / "webhook.pem"
        self._database, self._cluster, self._settings, self._many = MariaDb(workdir), cluster, settings, multi_user

    def start(self) -> None:
        Store(self._settings).ensure_bucket()
        write_certificate(self._certificate)
        self._database.start()
        try:
            super().start()
        except BaseException:
            self._database.stop()
            raise
        for kind, verb in _WEBHOOKS if self._objects else ():
            self._cluster.apply(self._webhook(kind, verb))

    def stop(self) -> None:
        for kind, _ in _WEBHOOKS if self._objects else ():
            self._cluster.request("DELETE", f"/apis/{_ADMISSION}/{kind.lower()}s/{_WEBHOOK}")
        super().stop()
        self._database.stop()

    @property
    def host(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _prepare(self) -> tuple[list[str], dict[str, str], list[str]]:
        self.port, grpc = free_ports(2)
        (self.workdir / "config.json").write_text(json.dumps(self._config()))
        # One of its clients reads ~/.kube/config and nothing else.
        (self.workdir / ".kube").mkdir(exist_ok=True)
        shutil.copy(self._cluster.kubeconfig(), self.workdir / ".kube" / "config")
        env = {
            **os.environ,
            "HOME": str(self.workdir),
            "KUBECONFIG": str(self.workdir / ".kube" / "config"),
            "ML_PIPELINE_VISUALIZATIONSERVER_SERVICE_HOST": "127.0.0.1",
            "ML_PIPELINE_VISUALIZATIONSERVER_SERVICE_PORT": "9",
            "POD_NAMESPACE": "kubeflow",
            "MULTIUSER": str(self._many).lower(),
            "TAG_NAME": VERSION,
        }
        command = [str(BINARY), f"--config={self.workdir}", f"--httpPortFlag=:{self.port}", f"--rpcPortFlag=:{grpc}"]
        if self._objects:
            (self._hook,) = free_ports(1)
            command += ["--pipelinesStoreKubernetes=true", f"--webhookPortFlag=:{self._hook}"]
            command += [f"--webhookTLS{part}Path={self._certificate}" for part in ("Cert", "Key")]
        return [*command, "--logtostderr=true"], env, []

    def _config(self) -> dict[str, Any]:
        address = self._settings.s3_endpoint.removeprefix("http://")
        host, _, port = address.partition(":")
        return {
            "DBDriverName": "mysql",
            "DBConfig": {
                "MySQLConfig": {"Host": "127.0.0.1", "Port": str(self._database.port), "User": "root", "DBName": "kfp"},
                "ConMaxLifeTime": "120s",
            },
            "ObjectStoreConfig": {
                "Host": host,
                "Port": port,
                "AccessKey": self._settings.s3_access_key,
                "SecretAccessKey": self._settings.s3_secret_key,
                "BucketName": self._settings.bucket,
                "PipelinePath": "pipelines",
            },
            "InitConnectionTimeout": "30s",
            "DEFAULTPIPELINERUNNERSERVICEACCOUNT": "pipeline-runner",
            "CacheEnabled": "true",
        }

    def _webhook(self, kind: str, verb: str) -> dict[str, Any]:
        """As upstream's manifests have it, but by address and for the namespace kubeflow only."""
        rule = {"apiGroups": ["pipelines.kubeflow.org"], "apiVersions": ["v2beta1"], "resources": ["pipelineversions"]}
        hook = {
            "name": _WEBHOOK,
            "rules": [rule | {"operations": ["CREATE", "UPDATE"], "scope": "Namespaced"}],
            "admissionReviewVersions": ["v1"],
            "sideEffects": "None",
            "failurePolicy": "Fail",
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kubeflow"}},
            "clientConfig": {
                "url": f"https://127.0.0.1:{self._hook}/webhooks/{verb}-pipelineversion",
                "caBundle": base64.b64encode(self._certificate.read_bytes()).decode(),
            },
        }
        return {"apiVersion": _ADMISSION, "kind": kind, "metadata": {"name": _WEBHOOK}, "webhooks": [hook]}

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.host}/apis/v2beta1/healthz", timeout=5) as response:
                return bool(response.status == 200)
        except OSError:
            return False
