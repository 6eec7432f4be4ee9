"""Live metrics of a training in MLflow: needed at the start, never fatal later."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ..shared.errors import TrackingError
from ..shared.progress import say
from ..shared.settings import Settings
from ..shared.tracking import EXPERIMENT, Tracker

__all__ = ["EpochReporter", "metric_table", "open_run"]

_PAUSE = 60.0
_NAMES = {
    "metrics/precision(B)": "val/precision",
    "metrics/recall(B)": "val/recall",
    "metrics/mAP50(B)": "val/mAP50",
    "metrics/mAP50-95(B)": "val/mAP50-95",
    "lr/pg0": "lr",
}


def metric_table(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Ultralytics' metrics of one epoch under our names; learning rates of further groups are left out."""
    named = {_NAMES.get(key, key): float(value) for key, value in metrics.items()}
    return {key: value for key, value in named.items() if not key.startswith(("metrics/", "lr/"))}


def open_run(settings: Settings, name: str, params: Mapping[str, Any], tags: Mapping[str, str], known: str) -> str:
    """Open the MLflow run of a training, or go on in the one that a killed training had opened.

    Returns:
        The run's id; empty where no tracking URI is set, which is said.

    Raises:
        TrackingError: MLflow cannot be reached.
    """
    if not settings.mlflow_tracking_uri:
        say("MLFLOW_TRACKING_URI is not set: no metrics are tracked")
        return ""
    tracker = Tracker(settings)
    if known:
        try:
            tracker.log_params(known, params)
            return known
        except TrackingError:
            say(f"MLflow run {known} cannot be continued; opening another")
    run_id = tracker.start_run(EXPERIMENT, name, tags)
    tracker.log_params(run_id, params)
    return run_id


class EpochReporter:
    """Logs to one MLflow run; a server that went away costs a warning and a pause, not the training.

    Args:
        settings: name the server.
        run_id: from `open_run`; empty logs nothing.
    """

    def __init__(self, settings: Settings, run_id: str) -> None:
        self._run_id = run_id
        self._tracker = Tracker(settings) if run_id else None
        self._quiet_until = 0.0

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log one epoch's metrics."""
        # Each failing call blocks for the client's retries, so leave the server alone for a while after one.
        if self._tracker is None or time.monotonic() < self._quiet_until:
            return
        try:
            self._tracker.log_metrics(self._run_id, metrics, step)
        except TrackingError as error:
            self._quiet_until = time.monotonic() + _PAUSE
            say(f"metrics of epoch {step} were not tracked, the training goes on: {error}")

    def finish(self, ok: bool) -> None:
        """Close the run."""
        if self._tracker is None:
            return
        try:
            self._tracker.finish(self._run_id, ok)
        except TrackingError as error:
            say(f"MLflow run {self._run_id} was not closed: {error}")
