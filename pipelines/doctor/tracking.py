"""MLflow and Label Studio: there, what they claim to be, and willing to take our token."""

from __future__ import annotations

import base64
import json
from urllib.parse import unquote, urlsplit

from haechi.components.shared.errors import TrackingError
from haechi.components.shared.tracking import Tracker

from .cluster import pod_settings
from .findings import CannotLook, Finding, NotAsked
from .web import Answer, Unreached, fetch, resolves
from .world import World

__all__ = ["label_studio", "mlflow", "step_mlflow"]

_SEARCH = "/api/2.0/mlflow/registered-models/search?max_results=1"
_TOKENS = "# Label Studio → Account & Settings → Access Token; then --label-studio-token-file FILE"


def mlflow(world: World) -> list[Finding]:
    """The MLflow that this machine's settings name, with this machine's credentials."""
    uri = world.settings.mlflow_tracking_uri
    if not uri:
        raise NotAsked("MLFLOW_TRACKING_URI is not set and no `haechi up` runs in the workdir")
    if uri.startswith("http"):
        try:
            fetch(f"{uri.rstrip('/')}/health")
        except Unreached as error:
            return [error.finding("MLflow", "# the setting is MLFLOW_TRACKING_URI")]
    try:
        Tracker(world.settings).alias("haechi-doctor", "champion")
    except TrackingError as error:
        return [Finding(error.problem, "MLflow's answer says so", error.remedy)]
    return []


def step_mlflow(world: World) -> list[Finding]:
    """The MLflow that step pods use, with the credentials of their Secret."""
    aim = world.aim
    uri = pod_settings(world).mlflow_tracking_uri.rstrip("/")
    if not uri:
        return []  # check `step-settings` tells
    keys = world.secret(aim.namespace, aim.mlflow_secret)
    where = f"Secret {aim.namespace}/{aim.mlflow_secret}"
    if keys is not None and "token" not in keys and bool(keys.get("username")) != bool(keys.get("password")):
        fix = f"kubectl -n {aim.namespace} edit secret {aim.mlflow_secret}"
        return [Finding(f"{where} has only one of username and password", "MLflow wants both, or a token", fix)]
    if not resolves(uri):
        uri = world.forwarded.mlflow_tracking_uri.rstrip("/") or uri
    if not resolves(uri):
        raise CannotLook(
            f"{uri} has no address here, so MLflow was not asked with the steps' credentials",
            "kubectl -n mlflow port-forward service/mlflow 5000 & MLFLOW_TRACKING_URI=http://localhost:5000 haechi doctor",
        )
    try:
        answer = fetch(uri + _SEARCH, _authorization(uri, keys or {}))
    except Unreached as error:
        return [error.finding("MLflow", f"# the setting is MLFLOW_TRACKING_URI in ConfigMap {aim.config_map}")]
    return _judge(uri, where if keys is not None else f"nobody (there is no {where})", answer)


def label_studio(world: World) -> list[Finding]:
    """The Label Studio that --label-studio names, with the token."""
    url, token = world.aim.label_studio.rstrip("/"), world.aim.label_studio_token
    if not url:
        raise NotAsked("--label-studio was not given")
    try:
        health = fetch(f"{url}/health")
        if health.status != 200:
            return [_not_label_studio(url, health)]
        if not token:
            raise CannotLook("Label Studio's token was not tried: none was given", _TOKENS)
        return _token(url, token)
    except Unreached as error:
        return [error.finding("Label Studio", "kubectl -n haechi-review port-forward service/label-studio 8080")]


def _judge(uri: str, who: str, answer: Answer) -> list[Finding]:
    if answer.status == 200 and answer.json() is not None:
        return []
    if answer.says("Invalid Host header"):
        return [
            Finding(
                f"MLflow at {uri} answers {answer.status}: Invalid Host header",
                "it accepts only the host names that it was started with",
                "MLFLOW_SERVER_ALLOWED_HOSTS: …   # in ConfigMap mlflow/mlflow-settings, add the host of the URI",
            )
        ]
    if answer.status in (401, 403):
        fix = "kubectl create secret generic haechi-mlflow --from-literal=username=… --from-literal=password=…"
        cause = "user, password or token is wrong or lacks the right"
        return [Finding(f"MLflow at {uri} refuses {who} ({answer.status})", cause, fix)]
    return [
        Finding(
            f"{uri} answers {answer.status}, not like MLflow", "another server is there", "Correct MLFLOW_TRACKING_URI."
        )
    ]


def _authorization(uri: str, keys: dict[str, str]) -> dict[str, str]:
    """As MLflow's client asks: with the credentials of the URI before those of the Secret."""
    parts = urlsplit(uri)
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    if not user:
        user, password = keys.get("username", ""), keys.get("password", "")
    if user:
        return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}
    return {"Authorization": f"Bearer {keys['token']}"} if keys.get("token") else {}


def _token(url: str, token: str) -> list[Finding]:
    """A personal access token is a JSON Web Token that is exchanged first; a legacy one is sent as it is."""
    scheme = "Token"
    if token.count(".") == 2:
        body = json.dumps({"refresh": token}).encode()
        answer = fetch(f"{url}/api/token/refresh", {"Content-Type": "application/json"}, "POST", body)
        access = (answer.json() or {}).get("access")
        if answer.status != 200 or not access:
            return [_refused_token(url, answer, "the personal access token is expired, revoked, or of another server")]
        scheme, token = "Bearer", str(access)
    answer = fetch(f"{url}/api/current-user/whoami", {"Authorization": f"{scheme} {token}"})
    if answer.status in (401, 403):
        cause = "no user has this token, or this kind of token is switched off for the organization"
        return [_refused_token(url, answer, cause)]
    return [] if answer.status == 200 and answer.json() is not None else [_not_label_studio(url, answer)]


def _refused_token(url: str, answer: Answer, cause: str) -> Finding:
    return Finding(f"Label Studio at {url} refuses the token ({answer.status})", cause, _TOKENS)


def _not_label_studio(url: str, answer: Answer) -> Finding:
    fix = "Correct --label-studio; behind a path, name the path too."
    return Finding(f"{url} answers {answer.status}, not like Label Studio", "another server or a proxy is there", fix)
