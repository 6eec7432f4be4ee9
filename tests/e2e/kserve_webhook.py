"""A stand-in for KServe 0.20's admission webhooks on InferenceServices, as a real HTTPS server on loopback.

It writes the deployment mode as an annotation, and refuses what KServe refuses of a name, a predictor's name and a
canary. A refusal reaches the caller as HTTP 403, like a missing right, with the message "admission webhook … denied".
"""

from __future__ import annotations

import base64
import datetime
import http.server
import ipaddress
import json
import re
import ssl
import threading
from pathlib import Path
from typing import Any, Self

from api_server import ApiServer
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

__all__ = ["MODE", "KserveWebhook", "refusal"]

MODE = "serving.kserve.io/deploymentMode"
_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_SCALING = ("maxReplicas", "scaleTarget", "scaleMetric", "autoScaling", "workerSpec")


class KserveWebhook:
    """The webhooks for all namespaces of a server, while the block runs.

    Attributes:
        mode: the cluster's default deployment mode, `Standard` or `Knative`.
        deny: a reason to refuse everything with; empty for none.
    """

    def __init__(self, server: ApiServer, folder: Path) -> None:
        self.mode, self.deny = "Standard", ""
        self._server, self._certificate = server, folder / "webhook.pem"
        _write_certificate(self._certificate)
        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._certificate)
        self._http.socket = context.wrap_socket(self._http.socket, server_side=True)
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._server.apply(self._configuration("MutatingWebhookConfiguration", "defaulter"))
        self._server.apply(self._configuration("ValidatingWebhookConfiguration", "validator"))
        return self

    def __exit__(self, *details: object) -> None:
        for plural in ("mutatingwebhookconfigurations", "validatingwebhookconfigurations"):
            self._server.request("DELETE", f"/apis/admissionregistration.k8s.io/v1/{plural}/inferenceservice")
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def answer(self, path: str, request: dict[str, Any]) -> dict[str, Any]:
        """The AdmissionReview's response."""
        response: dict[str, Any] = {"uid": request["uid"], "allowed": True}
        new, old = request["object"], request.get("oldObject")
        if path == "/defaulter":
            notes = new["metadata"].get("annotations")
            if self.mode == "Standard" and MODE not in (notes or {}):
                patch = [] if notes is not None else [{"op": "add", "path": "/metadata/annotations", "value": {}}]
                key = MODE.replace("/", "~1")
                patch += [{"op": "add", "path": f"/metadata/annotations/{key}", "value": self.mode}]
                response |= {"patchType": "JSONPatch", "patch": base64.b64encode(json.dumps(patch).encode()).decode()}
            return response
        reason = self.deny or refusal(new, old)
        if reason:
            response |= {"allowed": False, "status": {"code": 403, "reason": "Forbidden", "message": reason}}
        return response

    def _configuration(self, kind: str, name: str) -> dict[str, Any]:
        rule = {"apiGroups": ["serving.kserve.io"], "apiVersions": ["v1beta1"], "resources": ["inferenceservices"]}
        client = {
            "url": f"https://127.0.0.1:{self._http.server_port}/{name}",
            "caBundle": base64.b64encode(self._certificate.read_bytes().split(b"-----BEGIN PRIVATE")[0]).decode(),
        }
        hook = {
            "name": f"inferenceservice.kserve-webhook-server.{name}",
            "clientConfig": client,
            "rules": [rule | {"operations": ["CREATE", "UPDATE"]}],
            "admissionReviewVersions": ["v1"],
            "sideEffects": "None",
        }
        return {
            "apiVersion": "admissionregistration.k8s.io/v1",
            "kind": kind,
            "metadata": {"name": "inferenceservice"},
            "webhooks": [hook],
        }


def refusal(new: dict[str, Any], old: dict[str, Any] | None) -> str:
    """Why KServe refuses an InferenceService; empty where it does not."""
    if not _NAME.fullmatch(new["metadata"]["name"]):
        return f"the InferenceService {new['metadata']['name']!r} is invalid: a name begins with a letter"
    predictor = new["spec"]["predictor"]
    if "model" not in predictor:
        return "exactly one of the predictor's implementations must be given"
    if old is not None:
        before, mode = old["spec"]["predictor"], (old.get("status") or {}).get("deploymentMode", "")
        now = (new["metadata"].get("annotations") or {}).get(MODE, mode)
        if mode and now != mode:
            return f"update rejected: deploymentMode cannot be changed from {mode!r} to {now!r}"
        if before.get("name") != predictor.get("name") and _uri(before) == _uri(predictor):
            return "predictor.name change requires a model change (e.g. storageUri)"
    return _canary_refusal(new)


def _canary_refusal(new: dict[str, Any]) -> str:
    stable, canaries = new["spec"]["predictor"], new["spec"].get("canary") or []
    if not canaries:
        return ""
    if (new["metadata"].get("annotations") or {}).get(MODE) != "Standard":
        return "canary is only supported in Standard deployment mode"
    seen = {stable.get("name", "")}
    for index, canary in enumerate(canaries):
        own = canary["predictor"]
        name = own.get("name", "")
        if not name:
            return f"canary[{index}] predictor.name is required"
        if name in seen:
            return f"canary predictor.name {name!r} is taken"
        seen.add(name)
        if "model" not in own:
            return f"canary {name!r} predictor: exactly one of [model, …] must be given"
        for field in _SCALING:
            if own.get(field):
                return f"canary {name!r} must not set {field} (canary uses fixed replicas)"
        if own.get("minReplicas", 0) > stable.get("minReplicas", 1):
            return f"canary {name!r} minReplicas must not exceed stable predictor minReplicas"
    total = sum(canary.get("trafficPercent", 0) for canary in canaries)
    return f"sum of canary trafficPercent values ({total}) must be <= 100" if total > 100 else ""


def _uri(predictor: dict[str, Any]) -> str:
    return str((predictor.get("model") or {}).get("storageUri", ""))


def _handler(webhook: KserveWebhook) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            review = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            response = webhook.answer(self.path.split("?")[0], review["request"])
            data = json.dumps({"apiVersion": review["apiVersion"], "kind": review["kind"], "response": response})
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data.encode())

        def log_message(self, format: str, *args: object) -> None:
            """Keep the tests' output clean."""

    return Handler


def _write_certificate(path: Path) -> None:
    """A key and a certificate for 127.0.0.1 that signs itself, in one file."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "kserve-webhook-server")])
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
    certificate = builder.add_extension(address, critical=False).sign(key, hashes.SHA256())
    form = serialization.PrivateFormat.PKCS8
    path.touch(mode=0o600)
    path.write_bytes(
        certificate.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    )
