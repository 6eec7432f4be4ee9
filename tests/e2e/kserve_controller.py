"""KServe's own controller and webhooks, and the controllers of Kubernetes, as child processes beside a real API server.

    with ApiServer(folder) as server, ControllerManager(server), KserveController(server):
        ...

What is real: which Deployments, Services, autoscalers and HTTPRoutes come out of an InferenceService, what its webhooks
write and refuse, which pods are made and replaced, which endpoints a Service has, what is collected. What is not: nodes
and gateways, see nodes_stand_in.py. `.ci/kserve-controller` builds the binaries, once.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import crds
import yaml
from api_server import ApiServer
from certificates import write_certificate

from haechi.pipelines.servers import Server, answers, free_ports

__all__ = ["ControllerManager", "KserveController", "folder", "why_no_controller"]

SCRIPT = Path(__file__).resolve().parents[2] / ".ci" / "kserve-controller"
# Those that a served model has to do with. Nodes are none: nobody writes their heartbeats.
_CONTROLLERS = (
    "deployment-controller",
    "replicaset-controller",
    "endpointslice-controller",
    "garbage-collector-controller",
    "serviceaccount-controller",
    "root-ca-certificate-publisher-controller",
    "horizontal-pod-autoscaler-controller",
    "disruption-controller",
)


class ControllerManager(Server):
    """kube-controller-manager, for a server that runs."""

    name = "kube-controller-manager"

    def __init__(self, server: ApiServer) -> None:
        super().__init__(server.workdir)
        self._server = server

    def _prepare(self) -> tuple[list[str], dict[str, str], list[str]]:
        (self.port,) = free_ports(1)
        config, key = self._server.kubeconfig(), self.workdir / "service-accounts.pem"
        command = [str(folder() / "kube-controller-manager"), "--leader-elect=false", "--bind-address=127.0.0.1"]
        command += [f"--{use}kubeconfig={config}" for use in ("", "authentication-", "authorization-")]
        command += [f"--secure-port={self.port}", "--cert-dir=controller-manager"]
        command += [f"--service-account-private-key-file={key}", f"--root-ca-file={self._server.certificate}"]
        command += [f"--controllers={','.join(_CONTROLLERS)}", "--horizontal-pod-autoscaler-sync-period=1s"]
        return command, dict(os.environ), []

    def ready(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1):
                return True
        except OSError:
            return False


class KserveController(Server):
    """KServe in mode Standard with the Gateway API, without Knative and Istio: its kinds, settings and webhooks too."""

    name = "kserve-controller"
    patience = 120.0

    def __init__(self, server: ApiServer) -> None:
        super().__init__(server.workdir)
        self._server = server

    def start(self) -> None:
        self._install()
        super().start()
        for hook in _documents("manifests.yaml"):
            self._server.apply(self._reached(hook))

    def _prepare(self) -> tuple[list[str], dict[str, str], list[str]]:
        self.port, self._health = free_ports(2)
        command = [str(folder() / "kserve-controller"), f"--webhook-port={self.port}", "--metrics-addr=0"]
        command += [f"--health-probe-addr=127.0.0.1:{self._health}"]
        # Its webhooks find their certificate below TMPDIR.
        ours = {"KUBECONFIG": str(self._server.kubeconfig()), "POD_NAMESPACE": "kserve", "TMPDIR": str(self.workdir)}
        return command, {**os.environ, **ours}, []

    def ready(self) -> bool:
        return answers(self._health, "/readyz", want=200)

    def _install(self) -> None:
        crds.load(self._server, _kinds())
        self._server.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "kserve"}})
        (config,) = _documents("inferenceservice.yaml")
        ingress = json.loads(config["data"]["ingress"]) | {"enableGatewayApi": True, "disableIstioVirtualHost": True}
        config["data"] |= {"ingress": json.dumps(ingress), "deploy": '{"defaultDeploymentMode": "Standard"}'}
        config["data"].pop("_example", None)
        config["metadata"] = {"name": "inferenceservice-config", "namespace": "kserve"}
        self._server.apply(config)
        for storage in _documents("default.yaml"):
            self._server.apply(storage)
        certificates = self.workdir / "k8s-webhook-server" / "serving-certs"
        certificates.mkdir(parents=True, exist_ok=True)
        write_certificate(self.workdir / "webhook.pem")
        for name in ("tls.crt", "tls.key"):
            shutil.copy(self.workdir / "webhook.pem", certificates / name)

    def _reached(self, hook: dict[str, Any]) -> dict[str, Any]:
        """A webhook configuration that leads to this process instead of to a Service."""
        certificate = (self.workdir / "webhook.pem").read_bytes().split(b"-----BEGIN PRIVATE")[0]
        for entry in hook["webhooks"]:
            path = entry["clientConfig"].pop("service")["path"]
            url = f"https://127.0.0.1:{self.port}{path}"
            entry["clientConfig"] = {"url": url, "caBundle": base64.b64encode(certificate).decode()}
        hook["metadata"] = {"name": hook["metadata"]["name"]}
        return hook


def _kinds() -> list[dict[str, Any]]:
    """The full definitions of KServe, and of the Gateway API what it uses; only the versions that are served."""
    files = [*sorted(folder().glob("serving.kserve.io_*.yaml")), *sorted((folder() / "gateway-api").glob("*.yaml"))]
    found = [entry for path in files for entry in yaml.load_all(path.read_text(), yaml.CSafeLoader) if entry]
    for entry in found:
        entry.pop("status", None)
        entry["metadata"].pop("creationTimestamp", None)
        spec = entry["spec"]
        spec["versions"] = [version for version in spec["versions"] if version["served"] or version["storage"]]
    return found


def _documents(name: str) -> list[dict[str, Any]]:
    return [entry for entry in yaml.safe_load_all((folder() / name).read_text()) if entry]


def why_no_controller() -> str:
    """Why KServe's own controller cannot be started here; empty where it can."""
    found = subprocess.run([SCRIPT, "--present"], capture_output=True, text=True)
    return found.stderr.strip() if found.returncode else ""


def folder() -> Path:
    """Where the binaries and manifests are."""
    found = subprocess.run([SCRIPT, "--present"], capture_output=True, text=True, check=True)
    return Path(found.stdout.strip())
