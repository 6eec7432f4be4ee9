"""What Kubeflow Pipelines' refusals mean: status, body and exception in, one error with its remedy out."""

from __future__ import annotations

import base64
import json
import time
from typing import Any

import kfp_server_api
import urllib3

from haechi.components.shared.errors import HaechiError

from .kubeflow_http import WrongAnswer
from .kubeflow_settings import AUDIENCE, KubeflowSettings

__all__ = ["RunFailed", "SubmitError", "explain", "token_fault"]

_SAID = 400  # characters of the server's own words


class SubmitError(HaechiError):
    """Kubeflow Pipelines cannot be reached or refuses a call.

    Args:
        problem, remedy: as in HaechiError; neither tells a token.
        status: the HTTP status; 0 where there was no answer.
    """

    exit_code = 11
    http_status = 502

    def __init__(self, problem: str, remedy: str = "", status: int = 0) -> None:
        super().__init__(problem, remedy)
        self.status = status


class RunFailed(HaechiError):
    """A run on the cluster failed, was stopped, or did not end in the time given."""

    exit_code = 31


def explain(error: Exception, doing: str, settings: KubeflowSettings) -> SubmitError:
    """The error to raise where the generated client raised `error`.

    Args:
        error: what the client or urllib3 raised, or a WrongAnswer.
        doing: what was being done, such as "create the experiment training".
        settings: of the call; names host and namespace, and the token is looked at for its audience.
    """
    if isinstance(error, WrongAnswer):
        return SubmitError(f"{settings.host} did not {doing}: {error}", error.remedy, error.status)
    if isinstance(error, urllib3.exceptions.HTTPError):
        return _unreachable(error, doing, settings)
    status = int(getattr(error, "status", 0) or 0)
    said = _words(error)
    remedy = {
        400: "Mend what it names; `haechi submit` and the server may be of different age.",
        401: _token_remedy(settings),
        403: _rights_remedy(settings),
        404: "Look at it in the dashboard; somebody may have deleted it meanwhile.",
        409: "Somebody made the same thing at this moment: submit again.",
        429: "Wait a minute and submit again.",
    }.get(status, "Submit again; if it stays so, read the log of deployment ml-pipeline.")
    return SubmitError(f"the pipelines API at {settings.host} did not {doing} ({said})", remedy, status)


def token_fault(token: str, now: float | None = None) -> str:
    """What is wrong with a token as far as the token itself tells, or empty.

    Args:
        token: a bearer token; only JSON Web Tokens tell anything. Never part of the answer.
        now: time in seconds since 1970; None for the clock's.
    """
    if not token:
        return "no token was sent"
    claims = _claims(token)
    expires, audience = claims.get("exp"), claims.get("aud")
    if isinstance(expires, int | float) and expires < (time.time() if now is None else now):
        return f"the token expired at {time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(expires))} UTC"
    audiences = [audience] if isinstance(audience, str) else audience
    if isinstance(audiences, list) and AUDIENCE not in audiences:
        return f"the token is for the audience {', '.join(map(str, audiences))}, not {AUDIENCE}"
    return ""


def _claims(token: str) -> dict[str, Any]:
    try:
        part = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    except (IndexError, ValueError):
        return {}
    return claims if isinstance(claims, dict) else {}


def _token_remedy(settings: KubeflowSettings) -> str:
    fault = token_fault(settings.bearer())
    fault = f"{fault[0].upper()}{fault[1:]}. " if fault else ""
    return (
        f"{fault}Make one by `kubectl create token default-editor -n {settings.namespace} --audience={AUDIENCE}`, write it "
        "to a file and name it by --token-file (behind Dex, KF_PIPELINES_COOKIE with the session's cookie does too)."
    )


def _rights_remedy(settings: KubeflowSettings) -> str:
    return (
        f"Check that the namespace {settings.namespace!r} exists as a profile and that the token's service account may "
        f"edit it (ClusterRole kubeflow-edit bound there); Istio's `RBAC: access denied` means the token did not count."
    )


def _unreachable(error: urllib3.exceptions.HTTPError, doing: str, settings: KubeflowSettings) -> SubmitError:
    cause = getattr(error, "reason", None) or error
    if isinstance(cause, urllib3.exceptions.SSLError):
        return SubmitError(
            f"the certificate of {settings.host} was not accepted ({_short(str(cause))})",
            "Give the authority that signed it by --ca-file, and the host by the name in the certificate.",
        )
    if isinstance(cause, urllib3.exceptions.TimeoutError) and not isinstance(
        cause, urllib3.exceptions.ConnectTimeoutError
    ):
        remedy = "Submit again, but look for a run in the dashboard first: all else that was begun is found and not made twice."
    else:
        remedy = "Check --host; from outside: `kubectl port-forward -n kubeflow svc/ml-pipeline-ui 8080:80`."
    return SubmitError(f"{settings.host} cannot be reached to {doing} ({_short(str(cause))})", remedy)


def _words(error: Exception) -> str:
    """The status and the server's own message, whichever of its forms it came in."""
    if not isinstance(error, kfp_server_api.ApiException):
        return _short(str(error) or type(error).__name__)
    try:
        body = json.loads(error.body or "")
        message = body.get("message") or body.get("error") or body.get("error_message") or ""
    except (ValueError, AttributeError, RecursionError):
        message = "" if "<html" in (error.body or "").lower() else error.body or ""
    return _short(f"{error.status} {error.reason or ''}".strip() + (f": {message}" if message else ""))


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SAID else f"{text[:_SAID]} …"
