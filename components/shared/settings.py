"""Settings from the environment: the only module that reads `HAECHI_*` and `MLFLOW_TRACKING_URI`.

On the cluster the variables come from ConfigMap `haechi-settings` and Secret `haechi-s3`; on one machine
`haechi run` and `haechi demo` set them for the services they start.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from .errors import SettingsError

__all__ = ["ENDPOINT_CREDENTIALS", "GIT_CREDENTIALS", "Settings", "environment_with"]

# Where the pipeline mounts its Secrets.
GIT_CREDENTIALS = "/etc/haechi/git"
ENDPOINT_CREDENTIALS = "/etc/haechi/endpoint"


@dataclass(frozen=True)
class Settings:
    """Where the object store and MLflow are, and what this machine may use.

    Attributes:
        s3_endpoint: URL of the S3 API, `http://host:port` or `https://host`.
        s3_access_key, s3_secret_key: credentials; empty for anonymous access. Never printed.
        s3_region: region to sign for.
        bucket: the one bucket that holds Haechi's objects.
        mlflow_tracking_uri: MLflow server URL.
        cache_dir: folder for content-addressed frames kept between runs; empty for none.
        workers: concurrent transfers and decodes, at least 1.
        threads: compute threads for torch and onnxruntime; 0 lets them choose.
        roboflow_api_key: key for imports from Roboflow; empty where none are made. Never printed.
        git_credentials: folder with `username` and `password`, or `ssh-privatekey` and `known_hosts`, for the target
            `git:`; it need not exist.
        endpoint_credentials: folder with `api_key` or `token`, for a serving runtime that asks who calls; it need not
            exist.
    """

    s3_endpoint: str = ""
    s3_access_key: str = field(default="", repr=False)
    s3_secret_key: str = field(default="", repr=False)
    s3_region: str = "us-east-1"
    bucket: str = "haechi"
    mlflow_tracking_uri: str = ""
    cache_dir: str = ""
    workers: int = 8
    threads: int = 0
    roboflow_api_key: str = field(default="", repr=False)
    git_credentials: str = GIT_CREDENTIALS
    endpoint_credentials: str = ENDPOINT_CREDENTIALS

    def __post_init__(self) -> None:
        if self.s3_endpoint:
            _check_endpoint(self.s3_endpoint)
        if bool(self.s3_access_key) != bool(self.s3_secret_key):
            raise SettingsError(
                "only one of HAECHI_S3_ACCESS_KEY and HAECHI_S3_SECRET_KEY is set",
                "Set both, or neither for anonymous access.",
            )
        if self.workers < 1:
            raise SettingsError(f"HAECHI_WORKERS is {self.workers}", "Set it to 1 or more.")
        if self.threads < 0:
            raise SettingsError(f"HAECHI_THREADS is {self.threads}", "Set it to 0 (automatic) or more.")

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Settings:
        """Read the settings from `env` (default: the process's environment); an empty variable counts as unset."""
        env = os.environ if env is None else env
        return cls(
            s3_endpoint=env.get("HAECHI_S3_ENDPOINT", ""),
            s3_access_key=env.get("HAECHI_S3_ACCESS_KEY", ""),
            s3_secret_key=env.get("HAECHI_S3_SECRET_KEY", ""),
            s3_region=env.get("HAECHI_S3_REGION") or "us-east-1",
            bucket=env.get("HAECHI_BUCKET") or "haechi",
            mlflow_tracking_uri=env.get("MLFLOW_TRACKING_URI", ""),
            cache_dir=env.get("HAECHI_CACHE_DIR", ""),
            workers=_integer(env, "HAECHI_WORKERS", 8),
            threads=_integer(env, "HAECHI_THREADS", 0),
            roboflow_api_key=env.get("ROBOFLOW_API_KEY", ""),
            git_credentials=env.get("HAECHI_GIT_CREDENTIALS") or GIT_CREDENTIALS,
            endpoint_credentials=env.get("HAECHI_ENDPOINT_CREDENTIALS") or ENDPOINT_CREDENTIALS,
        )

    def to_env(self) -> dict[str, str]:
        """The inverse of `from_env`: variables to hand to a child process."""
        return {
            "HAECHI_S3_ENDPOINT": self.s3_endpoint,
            "HAECHI_S3_ACCESS_KEY": self.s3_access_key,
            "HAECHI_S3_SECRET_KEY": self.s3_secret_key,
            "HAECHI_S3_REGION": self.s3_region,
            "HAECHI_BUCKET": self.bucket,
            "MLFLOW_TRACKING_URI": self.mlflow_tracking_uri,
            "HAECHI_CACHE_DIR": self.cache_dir,
            "HAECHI_WORKERS": str(self.workers),
            "HAECHI_THREADS": str(self.threads),
            "ROBOFLOW_API_KEY": self.roboflow_api_key,
            "HAECHI_GIT_CREDENTIALS": self.git_credentials,
            "HAECHI_ENDPOINT_CREDENTIALS": self.endpoint_credentials,
        }

    @property
    def cache_path(self) -> Path | None:
        """The cache folder, or None where no cache is wanted."""
        return Path(self.cache_dir) if self.cache_dir else None


def environment_with(**changed: str) -> dict[str, str]:
    """This process's environment with some variables set, for a program that we start."""
    return {**os.environ, **changed}


def _check_endpoint(endpoint: str) -> None:
    try:
        parts = urlsplit(endpoint)
        # Reading the port checks it.
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        sound = False
        parts = urlsplit("")
    if "@" in endpoint:
        raise SettingsError(
            "HAECHI_S3_ENDPOINT holds credentials", "Put them in HAECHI_S3_ACCESS_KEY and HAECHI_S3_SECRET_KEY."
        )
    if not sound or parts.path.strip("/") or parts.query or parts.fragment:
        raise SettingsError(
            f"HAECHI_S3_ENDPOINT is {endpoint!r}, not a URL of scheme and host",
            "Set it to something like http://minio.minio:9000, without a path.",
        )


def _integer(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name, "")
    try:
        return int(text) if text else default
    except ValueError:
        raise SettingsError(
            f"{name} is {text!r}, not a whole number", f"Set it to a number such as {default}."
        ) from None
