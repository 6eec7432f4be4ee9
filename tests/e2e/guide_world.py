"""docs/cluster.md, carried out: what a cluster has before the page begins, its commands in order, and what runs meanwhile.

Each command is run by bash in a folder that looks like the checkout, with kubectl on a real API server of its own (the page
deletes namespaces). The laptop's tunnels are addresses of real services. Where the page waits for a run, the run's last
step is done here: a model is stored, registered, and brought into service as the pipeline's service account.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import crds
from api_server import ApiServer
from kserve_stand_in import KserveStandIn
from pod_network import PodNetwork

from haechi.components.deploy.publish import publish
from haechi.components.shared.model_folder import ModelFolder
from haechi.components.shared.settings import Settings
from haechi.components.shared.storage import Store
from haechi.components.shared.tracking import Tracker
from tests.pipelines.kfp_stand_in import KfpStandIn

__all__ = ["PAGE", "ROOT", "Done", "Guide", "commands", "furnish"]

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "cluster.md"
CRDS = ROOT.parent / "shared" / "crds"
TARGET = "kserve:haechi-serving/safety"
_STATE = re.compile(r"(export |key\(\) |gateway=)")  # what later commands of the same shell go on with
_FORWARD = re.compile(r"kubectl port-forward -n (\S+) (\S+) \d+:(\d+) &")
_EXEC = re.compile(r"kubectl exec -n kubeflow deployment/haechi-reconciler -- haechi (.*)")


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    command: str
    code: int
    out: str
    err: str = ""


def commands(text: str) -> list[str]:
    """The commands of a page's `sh` blocks, each with its continuations, here-document or loop."""
    found: list[str] = []
    for block in re.findall(r"```sh\n(.*?)```", text, re.S):
        part: list[str] = []
        for line in block.splitlines():
            part.append(line)
            if not _is_open(part):
                found.append("\n".join(part))
                part = []
        assert not part, f"a command does not end: {part[0]}"
    return [command for command in found if command.strip()]


def _is_open(lines: list[str]) -> bool:
    document = re.search(r"<<'(\w+)'", lines[0])
    if document:
        return len(lines) == 1 or lines[-1] != document[1]
    return lines[-1].endswith("\\") or (lines[0].startswith("for ") and lines[-1] != "done")


def _plant_service(
    server: ApiServer, namespace: str, name: str, port: int, labels: dict[str, str] | None = None
) -> None:
    """A Service with a ready pod behind it."""
    meta = {"name": name, "namespace": namespace, "labels": labels or {}}
    spec = {"ports": [{"port": port}], "selector": {"app": name}}
    server.apply({"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": spec})
    _plant_endpoint(server, namespace, name, port)


def _plant_endpoint(server: ApiServer, namespace: str, name: str, port: int) -> None:
    meta = {"name": f"{name}-1", "namespace": namespace, "labels": {"kubernetes.io/service-name": name}}
    ready = {"addresses": ["10.1.0.1"], "conditions": {"ready": True}}
    entry = {"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": meta}
    server.apply({**entry, "addressType": "IPv4", "endpoints": [ready], "ports": [{"port": port}]})


def furnish(server: ApiServer, settings: Settings) -> None:
    """What step 1 of the page leaves behind: the parts of Kubeflow Pipelines, KServe and Envoy Gateway that we meet."""
    crds.load(server, crds.definitions(CRDS) + crds.without_schema())
    for name in ("kubeflow", "kserve", "envoy-gateway-system", "monitoring"):
        server.make_namespace(name)
    server.make_service_account("kubeflow", "pipeline-runner")
    for name, port in (("seaweedfs", 9000), ("ml-pipeline", 8888), ("ml-pipeline-ui", 80)):
        _plant_service(server, "kubeflow", name, port)
    owner = {"gateway.envoyproxy.io/owning-gateway-name": "kserve-ingress-gateway"}
    _plant_service(server, "envoy-gateway-system", "envoy-kserve-1", 80, owner)
    keys = {"accesskey": settings.s3_access_key, "secretkey": settings.s3_secret_key}
    meta = {"name": "mlpipeline-minio-artifact", "namespace": "kubeflow"}
    server.apply({"apiVersion": "v1", "kind": "Secret", "metadata": meta, "stringData": keys})
    ingress = {"enableGatewayApi": True, "kserveIngressGateway": "kserve/kserve-ingress-gateway"}
    data = {"deploy": json.dumps({"defaultDeploymentMode": "Standard"}), "ingress": json.dumps(ingress)}
    meta = {"name": "inferenceservice-config", "namespace": "kserve"}
    server.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": data})
    container: dict[str, Any] = {"name": "storage-initializer", "image": "kserve/storage-initializer:v0.20.0"}
    server.apply(
        {
            "apiVersion": "serving.kserve.io/v1alpha1",
            "kind": "ClusterStorageContainer",
            "metadata": {"name": "default"},
            "spec": {"container": container, "supportedUriFormats": [{"prefix": "s3://"}]},
        }
    )


@dataclass
class Guide:
    """The reader's shell and the world around it.

    Attributes:
        server: the cluster.
        room: working folder with the checkout's folders in it.
        settings: the store and MLflow that the tunnels lead to.
        pipelines: Kubeflow Pipelines.
        kserve, network: KServe's controller and the pods' network in haechi-serving.
        models: what the page's two rounds bring, each a folder and its description.
        runtime: URL of what serves the first model, at the end of the tunnel to the gateway.
    """

    server: ApiServer
    room: Path
    settings: Settings
    pipelines: KfpStandIn
    kserve: KserveStandIn
    network: PodNetwork
    models: list[tuple[ModelFolder, Path]]
    runtime: str
    _state: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("manifests", "pipelines", "docs", "Makefile", "pyproject.toml", "constraints.txt"):
            (self.room / name).symlink_to(ROOT / name)
        (self.room / ".venv").symlink_to(sys.prefix)
        states = [{"display_name": "deploy", "task_id": "deploy", "state": "SUCCEEDED"}]
        self.pipelines.progress = [{"state": "SUCCEEDED", "run_details": {"task_details": states}}]

    def carry_out(self, command: str) -> Done:
        """Run one command of the page, and let happen what a cluster would do then."""
        if forward := _FORWARD.fullmatch(command):
            done = self._tunnel(command, *forward.groups())
        elif inside := _EXEC.fullmatch(command):
            done = self._in_the_reconciler(command, shlex.split(inside[1]))
        elif command.startswith("kubectl delete -k "):
            with self._namespaces_go():
                done = self._shell(command, command)
        elif command.startswith("make "):
            done = self._shell(command, command.replace("make ", "make --dry-run ", 1))
        else:
            done = self._shell(command, command)
        if done.code == 0 and _STATE.match(command):
            self._state.append(self._here(command))
        self._happens_then(command)
        return done

    def shell(self, script: str) -> Done:
        """Run a script in the reader's shell as it stands after the page."""
        return self._shell(script, script)

    def _here(self, command: str) -> str:
        ends = {
            9000: self.settings.s3_endpoint,
            5000: self.settings.mlflow_tracking_uri,
            8080: self.pipelines.host,
            8081: self.runtime,
        }
        for port, url in ends.items():
            command = command.replace(f"http://localhost:{port}", url)
        return command

    def _shell(self, command: str, script: str, env: dict[str, str] | None = None) -> Done:
        """Run a script in the reader's shell; with `env`, in somebody else's."""
        lines = ["set -e", *([] if env else self._state), self._here(script)]
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HAECHI_", "MLFLOW_", "KF_"))}
        env = kept | {"KUBECONFIG": str(self.server.kubeconfig()), "HOME": str(self.room)} | (env or {})
        command_line = ["bash", "-c", "\n".join(lines)]
        done = subprocess.run(command_line, cwd=self.room, env=env, capture_output=True, text=True, timeout=300)
        return Done(command, done.returncode, done.stdout, done.stderr)

    @contextmanager
    def _namespaces_go(self) -> Iterator[None]:
        """Let go of namespaces that are deleted, as the controller does that empties them."""
        over = threading.Event()

        def work() -> None:
            while not over.wait(0.2):
                for item in self.server.get("/api/v1/namespaces")["items"]:
                    if item["status"]["phase"] == "Terminating":
                        item["spec"]["finalizers"] = []
                        path = f"/api/v1/namespaces/{item['metadata']['name']}/finalize"
                        self.server.request("PUT", path, item | {"apiVersion": "v1", "kind": "Namespace"})

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _tunnel(self, command: str, namespace: str, name: str, port: str) -> Done:
        """A tunnel cannot be dug without pods: look whether the Service has that port."""
        found = self._shell(command, f"kubectl get -n {namespace} {name} -o jsonpath='{{.spec.ports[*].port}}'")
        return found if port in found.out.split() else Done(command, 1, found.out, f"no port {port}: {found.err}")

    def _in_the_reconciler(self, command: str, words: list[str]) -> Done:
        """Run a verb as that pod would: its ConfigMap, its Secret, its service account."""
        config = self.server.get("/api/v1/namespaces/kubeflow/configmaps/haechi-settings")["data"]
        env = config | self.settings.to_env() | {"HAECHI_BUCKET": config["HAECHI_BUCKET"]}
        env["KUBECONFIG"] = str(self.server.kubeconfig("kubeflow/haechi-reconciler"))
        if words[0] == "rollback":
            words = [*words, "--rollout", f"address={self.network.address}"]
        return self._shell(command, shlex.join([".venv/bin/haechi", *words]), env)

    def _happens_then(self, command: str) -> None:
        if command.startswith("kubectl apply") and command.endswith("manifests/examples/kind"):
            _plant_endpoint(self.server, "mlflow", "mlflow", 5000)
            self._becomes_available("mlflow", "mlflow")
        if command.startswith(".venv/bin/haechi submit"):
            self.deploy(*self.models[len(self.pipelines.runs) - 1])

    def _becomes_available(self, namespace: str, name: str) -> None:
        path = f"/apis/apps/v1/namespaces/{namespace}/deployments/{name}"
        counts = dict.fromkeys(("replicas", "updatedReplicas", "readyReplicas", "availableReplicas"), 1)
        status = {"observedGeneration": self.server.get(path)["metadata"]["generation"], **counts}
        kind = "application/merge-patch+json"
        assert self.server.request("PATCH", f"{path}/status", {"status": status}, kind=kind).status == 200

    def deploy(self, model: ModelFolder, folder: Path) -> None:
        """What the last step of a run does."""
        publish(Store(self.settings), model, folder)
        uri = f"s3://{self.settings.bucket}/models/safety/{model.version}"
        Tracker(self.settings).register("safety", model.version, uri, "", {"haechi.verdict": "promote"})
        env = self.settings.to_env() | {"KUBECONFIG": str(self.server.kubeconfig("kubeflow/pipeline-runner"))}
        words = ["promote", "safety", model.version, "--target", TARGET, "--rollout", "steps=[50]"]
        words += ["--rollout", "bake=0.1", "--rollout", "poll=0.05", "--rollout", f"address={self.network.address}"]
        done = self._shell("deploy", shlex.join([".venv/bin/haechi", *words]), env)
        assert done.code == 0, done.err
