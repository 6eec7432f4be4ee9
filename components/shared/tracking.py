"""MLflow: runs with live metrics, and the registry with its aliases. The only module that imports mlflow."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import TrackingError
from .settings import Settings

__all__ = ["RegisteredVersion", "Tracker"]


@dataclass(frozen=True)
class RegisteredVersion:
    """One version in MLflow's registry.

    Attributes:
        number: MLflow's own number, only an index.
        version: Haechi's version (12 hex digits), from tag `haechi.version`.
        source: URI of the model folder.
        tags: all tags.
    """

    number: int
    version: str
    source: str
    tags: dict[str, str]


class Tracker:
    """A client of one MLflow server.

    Args:
        settings: names the tracking URI.

    Raises:
        TrackingError: no URI is set.
    """

    def __init__(self, settings: Settings) -> None:
        if not settings.mlflow_tracking_uri:
            raise TrackingError(
                "MLFLOW_TRACKING_URI is not set", "Set it, or start the embedded server with `haechi up`."
            )
        # MLflow's default is 7 retries with a growing pause; say within seconds that a server is away.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        self.uri = settings.mlflow_tracking_uri
        self._client = MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)

    def start_run(self, experiment: str, name: str, tags: Mapping[str, str] | None = None) -> str:
        """Open a run (creating the experiment where needed); its id."""
        raise NotImplementedError

    def log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        """Log parameters (MLflow keeps them as text)."""
        raise NotImplementedError

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log metrics at a step; names may not hold parentheses (MLflow refuses them)."""
        raise NotImplementedError

    def finish(self, run_id: str, ok: bool = True) -> None:
        """Close the run as FINISHED or FAILED."""
        raise NotImplementedError

    def alias(self, model: str, alias: str) -> RegisteredVersion | None:
        """The version that an alias names, or None."""
        raise NotImplementedError
