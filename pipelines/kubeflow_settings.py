"""Where Kubeflow Pipelines is and as whom we call it: the only module that reads `KF_PIPELINES_*`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from haechi.components.shared.errors import InputError, SettingsError

__all__ = ["AUDIENCE", "KubeflowSettings", "check_header"]

AUDIENCE = "pipelines.kubeflow.org"
_TOKEN = re.compile(r"ey[\w-]+\.[\w-]+\.[\w-]+")  # a JSON Web Token
# Where a pod finds its token if it projects one with that audience.
_PROJECTED = "/var/run/secrets/kubeflow/pipelines/token"


@dataclass(frozen=True)
class KubeflowSettings:
    """One API server of Kubeflow Pipelines and our way in.

    Attributes:
        host: URL of the API, `https://<kubeflow>/pipeline` or `http://ml-pipeline.kubeflow:8888`.
        namespace: profile namespace; of no account where Pipelines serves a single user.
        ui: URL of the dashboard, where it is not `host`.
        token: bearer token; empty for none, or where it is in a file.
        token_file: file with the token, read at every call, since kubelet renews projected tokens.
        cookie: session cookie `name=value` of a browser, for Kubeflow behind Dex; empty for none.
        ca_file: certificates that the server's is checked against; empty for the public ones.
    """

    host: str
    namespace: str = "kubeflow"
    ui: str = ""
    token: str = field(default="", repr=False)
    token_file: str = ""
    cookie: str = field(default="", repr=False)
    ca_file: str = ""

    def __post_init__(self) -> None:
        for option, url in (("--host", self.host), ("--ui", self.ui)):
            if url or option == "--host":
                _check_url(option, url)
        if not self.namespace:
            raise InputError("--namespace is empty", "Name the profile namespace that the run shall belong to.")
        if self.cookie and "=" not in self.cookie:
            raise SettingsError(
                "KF_PIPELINES_COOKIE is not name=value", "Copy name and value of the session cookie from the browser."
            )
        for option, path in (("--token-file", self.token_file), ("--ca-file", self.ca_file)):
            if _TOKEN.fullmatch(path):
                raise InputError(f"{option} is no file but looks like a token", "Write it to a file and name that.")
            if path and not (os.access(path, os.R_OK) and Path(path).is_file()):
                raise InputError(f"{option} {path} cannot be read", "Name a readable file.")
        check_header("KF_PIPELINES_COOKIE", self.cookie)
        check_header("KF_PIPELINES_TOKEN", self.token)

    @classmethod
    def from_env(
        cls,
        host: str = "",
        namespace: str = "",
        ui: str = "",
        token_file: str = "",
        ca_file: str = "",
        env: Mapping[str, str] | None = None,
    ) -> KubeflowSettings:
        """What is given, and for the rest `env` (default: the process's environment).

        A token comes from `token_file`, else `KF_PIPELINES_TOKEN`, else the file in `KF_PIPELINES_SA_TOKEN_PATH`,
        else the token that the pod projects for Pipelines, else there is none.

        Raises:
            InputError, SettingsError: no host, or one that is no URL; a file that cannot be read.
        """
        env = os.environ if env is None else env
        token = "" if token_file else env.get("KF_PIPELINES_TOKEN", "").strip()
        if not token_file and not token:
            token_file = env.get("KF_PIPELINES_SA_TOKEN_PATH", "")
            if not token_file and Path(_PROJECTED).is_file():
                token_file = _PROJECTED
        return cls(
            host=(host or env.get("KF_PIPELINES_ENDPOINT", "")).rstrip("/"),
            namespace=namespace or env.get("KF_PIPELINES_NAMESPACE") or "kubeflow",
            ui=(ui or env.get("KF_PIPELINES_UI_ENDPOINT", "")).rstrip("/"),
            token=token,
            token_file=token_file,
            cookie=env.get("KF_PIPELINES_COOKIE", ""),
            ca_file=ca_file,
        )

    def bearer(self) -> str:
        """The token as it is now, or empty.

        Raises:
            InputError: the token file went away, or holds something else.
        """
        if not self.token_file:
            return self.token
        try:
            token = Path(self.token_file).read_text(encoding="utf-8").strip()
            check_header(f"--token-file {self.token_file}", token)
            return token
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--token-file {self.token_file} cannot be read ({error})", "Write it again.") from error


def check_header(source: str, value: str) -> None:
    """Refuse what cannot go into a header, without telling it: the HTTP client's own error would.

    Args:
        source: the option or variable that holds it.
        value: a token or a cookie.

    Raises:
        InputError: it holds more than one line, or other than ASCII.
    """
    if not (value.isascii() and value.isprintable()):
        raise InputError(f"{source} holds more than one line, or other than ASCII", "Give one token and nothing else.")


def _check_url(option: str, url: str) -> None:
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        sound = False
    if "@" in url:
        raise InputError(f"{option} holds credentials", "Put the token into a file and name it by --token-file.")
    if not sound:
        raise InputError(
            f"{option} is {url!r}, not a URL",
            "Write it as https://<kubeflow>/pipeline or http://localhost:8080, or set KF_PIPELINES_ENDPOINT.",
        )
