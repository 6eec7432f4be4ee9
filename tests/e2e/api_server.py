"""A real Kubernetes API server on loopback: etcd and kube-apiserver as child processes, without any controller.

What it stores, validates, defaults and refuses is real: server-side apply and its owners of fields, schemas, RBAC,
ServiceAccount and Pod Security admission, tokens of service accounts. No pod ever runs and no controller acts: nothing
makes a namespace's default service account, deletes a namespace's content or rolls a Deployment; see kserve_stand_in.

    with ApiServer(tmp_path) as server:
        server.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "models"}})
"""

from __future__ import annotations

import json
import os
import shutil
import ssl
import subprocess
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import urllib3
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from haechi.pipelines.servers import Server, answers, free_ports

__all__ = ["Answer", "ApiServer", "why_absent"]

SCRIPT = Path(__file__).resolve().parents[2] / ".ci" / "kube-apiserver"
APPLY = "application/apply-patch+yaml"
JSON = "application/json"
RBAC = "rbac.authorization.k8s.io"


@dataclass(frozen=True)
class Answer:
    """What the API server said: HTTP status and the object (or its Status)."""

    status: int
    body: dict[str, Any]

    @property
    def message(self) -> str:
        return str(self.body.get("message", ""))


class Etcd(Server):
    """etcd on free ports, for one API server."""

    name = "etcd"

    def _prepare(self) -> tuple[list[str], dict[str, str], list[str]]:
        self.port, peers = free_ports(2)
        client, peer = f"http://127.0.0.1:{self.port}", f"http://127.0.0.1:{peers}"
        command = [_etcd(), "--data-dir=etcd", f"--listen-client-urls={client}", f"--advertise-client-urls={client}"]
        command += [f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}"]
        return [*command, f"--initial-cluster=default={peer}"], dict(os.environ), []

    def ready(self) -> bool:
        return answers(self.port, "/health", want=200)


class ApiServer(Server):
    """kube-apiserver with RBAC. Its certificate is its own; the user `admin` may everything.

    Args:
        workdir: folder for etcd's data, certificates, kubeconfigs and logs.
    """

    name = "kube-apiserver"
    patience = 120.0

    def __init__(self, workdir: Path) -> None:
        super().__init__(workdir)
        self._etcd = Etcd(workdir)
        self._tokens = {"admin": "admin-token"}
        self._rounds = 0  # of _await_rights

    def start(self) -> None:
        self._etcd.start()
        try:
            super().start()
        except BaseException:
            self._etcd.stop()
            raise
        self._pool = urllib3.PoolManager(maxsize=8, ca_certs=str(self.certificate))  # tests and stand-ins are threads
        self._clean_environment = {**os.environ, "HOME": str(self.workdir)}  # kubectl keeps what it discovers in HOME

    def stop(self) -> None:
        super().stop()
        self._etcd.stop()

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    @property
    def certificate(self) -> Path:
        return self.workdir / "certificates" / "apiserver.crt"

    def _prepare(self) -> tuple[list[str], dict[str, str], list[str]]:
        (self.port,) = free_ports(1)
        key, tokens = self.workdir / "service-accounts.pem", self.workdir / "tokens.csv"
        _write_key(key)
        tokens.write_text(f'{self._tokens["admin"]},admin,admin,"system:masters"\n')
        command = [str(_binary()), f"--etcd-servers=http://127.0.0.1:{self._etcd.port}"]
        command += ["--bind-address=127.0.0.1", f"--secure-port={self.port}", "--cert-dir=certificates"]
        command += ["--authorization-mode=RBAC", f"--token-auth-file={tokens.name}", "--anonymous-auth=false"]
        command += ["--service-account-issuer=https://kubernetes.default.svc", "--service-cluster-ip-range=10.0.0.0/24"]
        command += [f"--service-account-{use}-file={key.name}" for use in ("key", "signing-key")]
        # The address 127.0.0.1 cannot be an endpoint of the Service `kubernetes`, and nobody asks for one.
        command += ["--endpoint-reconciler-type=none"]
        # No controller runs that would take its finalizer off a PersistentVolumeClaim again.
        command += ["--disable-admission-plugins=StorageObjectInUseProtection"]
        return command, dict(os.environ), []

    def ready(self) -> bool:
        if not self.certificate.is_file():
            return False
        request = urllib.request.Request(f"{self.url}/readyz")
        request.add_header("Authorization", f"Bearer {self._tokens['admin']}")
        try:
            context = ssl.create_default_context(cafile=str(self.certificate))
            with urllib.request.urlopen(request, timeout=5, context=context) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def request(self, verb: str, path: str, body: Any = None, user: str = "admin", kind: str = JSON) -> Answer:
        """One request as a user: `admin`, or a service account as `<namespace>/<name>`. Rights hold once it returns."""
        found = self._send(verb, path, body, user, kind)
        if verb != "GET" and found.status < 300 and path.startswith(f"/apis/{RBAC}/"):
            self._await_rights()
        return found

    def _send(self, verb: str, path: str, body: Any, user: str, kind: str) -> Answer:
        headers = {"Authorization": f"Bearer {self.token(user)}", "Content-Type": kind, "Accept": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        found = self._pool.request(verb, self.url + path, body=data, headers=headers)
        try:
            return Answer(found.status, json.loads(found.data))
        except ValueError:
            return Answer(found.status, {"message": found.data.decode(errors="replace").strip()})

    def get(self, path: str) -> dict[str, Any]:
        """The object at a path; fails the test where it is not there."""
        found = self.request("GET", path)
        assert found.status == 200, found.message
        return found.body

    def apply(self, body: dict[str, Any], user: str = "admin", manager: str = "test") -> dict[str, Any]:
        """Server-side apply; fails the test where it is refused."""
        path = f"{_path(body)}?fieldManager={manager}&fieldValidation=Strict"
        found = self.request("PATCH", path, body, user, APPLY)
        assert found.status in (200, 201), found.message
        return found.body

    def _await_rights(self) -> None:
        """Wait until the authorizer, which watches, has heard of all rights that are stored.

        Each kind's changes reach it in their order: once it knows of what is stored last, it knows of all before.
        """
        self._rounds += 1
        mark = f"round-{self._rounds}"
        rules = [{"apiGroups": [""], "resources": ["configmaps"], "resourceNames": [mark], "verbs": ["get"]}]
        subjects = [{"apiGroup": RBAC, "kind": "User", "name": mark}]
        asked = {"namespace": "default", "verb": "get", "resource": "configmaps", "name": mark}
        review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview"}
        for prefix, meta in (("", {"name": "heard-of", "namespace": "default"}), ("Cluster", {"name": "heard-of"})):
            own = {"apiVersion": f"{RBAC}/v1", "metadata": meta}
            reference = {"apiGroup": RBAC, "kind": f"{prefix}Role", "name": "heard-of"}
            for entry in (
                {**own, "kind": f"{prefix}Role", "rules": rules},
                {**own, "kind": f"{prefix}RoleBinding", "roleRef": reference, "subjects": subjects},
            ):
                stored = self._send("PATCH", f"{_path(entry)}?fieldManager=test&force=true", entry, "admin", APPLY)
                assert stored.status in (200, 201), stored.message
            # In the namespace kube-system nothing but the cluster's own binding can have allowed it.
            spec = {"user": mark, "resourceAttributes": asked | ({"namespace": "kube-system"} if prefix else {})}
            deadline = time.monotonic() + self.patience
            path = "/apis/authorization.k8s.io/v1/subjectaccessreviews"
            while not self._send("POST", path, {**review, "spec": spec}, "admin", JSON).body["status"]["allowed"]:
                assert time.monotonic() < deadline, "the authorizer has not heard of new rights"
                time.sleep(0.01)

    def token(self, user: str) -> str:
        """A user's bearer token; of a service account `<namespace>/<name>`, a real one from the API server."""
        if user not in self._tokens:
            namespace, name = user.split("/")
            path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{name}/token"
            wanted = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
            found = self.request("POST", path, wanted)
            assert found.status == 201, found.message
            self._tokens[user] = found.body["status"]["token"]
        return self._tokens[user]

    def kubeconfig(self, user: str = "admin") -> Path:
        """A kubeconfig file for a user (kubeconfig files may be JSON)."""
        path = self.workdir / f"{user.replace('/', '.')}.kubeconfig"
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {"name": "c", "cluster": {"server": self.url, "certificate-authority": str(self.certificate)}}
            ],
            "users": [{"name": "u", "user": {"token": self.token(user)}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u", "namespace": "kubeflow"}}],
            "current-context": "x",
        }
        path.write_text(json.dumps(config))
        return path

    def kubectl(self, *arguments: str, user: str = "admin", given: str = "") -> subprocess.CompletedProcess[str]:
        """Run kubectl as a user, with `given` as its standard input."""
        command = ["kubectl", f"--kubeconfig={self.kubeconfig(user)}", *arguments]
        done = subprocess.run(command, input=given, text=True, capture_output=True, env=self._clean_environment)
        if arguments[0] in ("apply", "create", "delete", "replace"):
            self._await_rights()
        return done

    def make_namespace(self, name: str, **labels: str) -> str:
        """A namespace with its default service account, which a controller makes in a cluster."""
        self.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
        self.make_service_account(name, "default")
        return name

    def make_service_account(self, namespace: str, name: str) -> str:
        """A service account; its name as a user of `request`, `kubeconfig` and `kubectl`."""
        meta = {"name": name, "namespace": namespace}
        self.apply({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta})
        return f"{namespace}/{name}"


def _path(body: dict[str, Any]) -> str:
    """The path of an object in the API, for kinds whose plural ends in a plain s."""
    version, kind, meta = body["apiVersion"], body["kind"], body["metadata"]
    root = "/api/v1" if version == "v1" else f"/apis/{version}"
    inside = f"/namespaces/{meta['namespace']}" if "namespace" in meta else ""
    return f"{root}{inside}/{kind.lower()}s/{meta['name']}"


def why_absent() -> str:
    """Why no API server can be started here; empty where one can."""
    if not shutil.which("etcd") and not _asset("etcd").is_file():
        return "etcd is not installed: apt-get install etcd-server, or set KUBEBUILDER_ASSETS"
    found = subprocess.run([SCRIPT, "--present"], capture_output=True, text=True)
    return found.stderr.strip() if found.returncode else ""


def _binary() -> Path:
    found = subprocess.run([SCRIPT, "--present"], capture_output=True, text=True, check=True)
    return Path(found.stdout.strip())


def _asset(name: str) -> Path:
    return Path(os.environ.get("KUBEBUILDER_ASSETS") or "/nonexistent") / name


def _etcd() -> str:
    return str(_asset("etcd")) if _asset("etcd").is_file() else "etcd"


def _write_key(path: Path) -> None:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    form = serialization.PrivateFormat.TraditionalOpenSSL
    path.touch(mode=0o600)
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
