"""MLflow: runs with live metrics, and the registry with its aliases. The only module that imports mlflow.

mlflow is imported on the first `Tracker`, not with this module: the import takes seconds, and most steps need none.
Only what `mlflow-skinny` offers is used: a client that talks HTTP to a server.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from .errors import InputError, TrackingError
from .settings import Settings

__all__ = ["EXPERIMENT", "VERSION_TAG", "RegisteredVersion", "TrackedRun", "Tracker", "metric_names"]

EXPERIMENT = "training"  # the pipeline's name: the runs of trainings and of deploys lie together
VERSION_TAG = "haechi.version"  # the registry is looked up by this tag; MLflow's own number is only an index

_METRICS_A_REQUEST, _PARAMS_A_REQUEST, _NAME_LENGTH = 1000, 100, 250  # the server's limits
_CONNECT_SECONDS = 5.0
_MISSING, _EXISTING = "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS"
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class RegisteredVersion:
    """One version in MLflow's registry.

    Attributes:
        number: MLflow's own number, only an index.
        version: Haechi's version (12 hex digits), from tag `haechi.version`; empty where someone registered by hand.
        source: URI of the model folder.
        tags: all tags.
        description: Markdown for MLflow's page of it.
    """

    number: int
    version: str
    source: str
    tags: dict[str, str]
    description: str = ""


@dataclass(frozen=True)
class TrackedRun:
    """What MLflow knows of a run: parameters and tags as text, the latest value of each metric, and its status."""

    run_id: str
    status: str
    params: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]


def metric_names(names: Iterable[str]) -> dict[str, str]:
    """Names that MLflow takes, for names that may hold anything (a class called `person (down)`, say).

    Letters and digits of any script, `_`, `-`, `.`, space and `/` stay; anything else becomes `_`, and so does an
    empty, `.` or `..` part between slashes, because MLflow stores names as paths. Where two names become the same,
    the later one ends in `-` and six hex digits of its own SHA-256.
    """
    taken: dict[str, str] = {}
    for name in names:
        parts = [re.sub(r"[^\w\-. ]", "_", part) for part in name.split("/")]
        clean = "/".join("_" if part in ("", ".", "..") else part for part in parts)[:_NAME_LENGTH]
        if clean in taken.values():
            clean = f"{clean[: _NAME_LENGTH - 7]}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
        taken[name] = clean
    return taken


class Tracker:
    """A client of one MLflow server.

    Args:
        settings: names the tracking URI.

    Raises:
        TrackingError: no URI is set; from every method: the server cannot be reached or refuses the call.
    """

    def __init__(self, settings: Settings) -> None:
        if not settings.mlflow_tracking_uri:
            raise TrackingError(
                "MLFLOW_TRACKING_URI is not set", "Set it, or start the embedded server with `haechi up`."
            )
        # MLflow's default is 7 retries over minutes; say within seconds that a server is away.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # It would print links to standard output, into the middle of a verb's --json.
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        from mlflow import MlflowClient

        self.uri = settings.mlflow_tracking_uri.rstrip("/")
        self._client: Any = MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)
        self._reached = not self.uri.startswith("http")

    def start_run(self, experiment: str, name: str, tags: Mapping[str, str] | None = None) -> str:
        """Open a run (creating the experiment where needed); its id."""
        run = self._call(
            f"a run in experiment {experiment!r}",
            self._client.create_run,
            self._experiment(experiment),
            run_name=name,
            tags=dict(tags or {}),
        )
        return str(run.info.run_id)

    def log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        """Log parameters: text as it is, anything else as JSON. The same ones may be logged again, unchanged."""
        from mlflow.entities import Param

        names = metric_names(params)
        entries = [
            Param(names[key], value if isinstance(value, str) else _json(value)) for key, value in params.items()
        ]
        for some in _batches(entries, _PARAMS_A_REQUEST):
            self._call(f"parameters of run {run_id}", self._client.log_batch, run_id, params=some)

    def log_metrics(self, run_id: str, metrics: Mapping[str, float | None], step: int = 0) -> None:
        """Log metrics at a step, in one request up to 1000 of them.

        A value of None, NaN or infinity is left out, since a chart would show it as a number that nobody measured
        (MLflow keeps infinity as 1.8e308). Names go through `metric_names`.
        """
        from mlflow.entities import Metric

        known = {key: float(value) for key, value in metrics.items() if value is not None and math.isfinite(value)}
        names, now = metric_names(known), int(time.time() * 1000)
        entries = [Metric(names[key], value, now, step) for key, value in known.items()]
        for some in _batches(entries, _METRICS_A_REQUEST):
            self._call(f"metrics of run {run_id}", self._client.log_batch, run_id, metrics=some)

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags on a run; they may be set again with other values."""
        from mlflow.entities import RunTag

        entries = [RunTag(key, value) for key, value in tags.items()]
        for some in _batches(entries, _PARAMS_A_REQUEST):
            self._call(f"tags of run {run_id}", self._client.log_batch, run_id, tags=some)

    def log_artifact(self, run_id: str, path: Path, folder: str = "") -> None:
        """Keep a small file (a report) with a run. Models go to the object store, not here."""
        what = f"artifact {path.name} of run {run_id}"
        self._call(what, self._client.log_artifact, run_id, str(path), folder or None)

    def log_text(self, run_id: str, text: str, name: str) -> None:
        """Keep a text as the artifact `name` (such as `verdict.json`) of a run."""
        self._call(f"artifact {name} of run {run_id}", self._client.log_text, run_id, text, name)

    def finish(self, run_id: str, ok: bool = True) -> None:
        """Close the run as FINISHED or FAILED."""
        self._call(f"the end of run {run_id}", self._client.set_terminated, run_id, "FINISHED" if ok else "FAILED")

    def run(self, run_id: str) -> TrackedRun | None:
        """What is known of a run, or None where there is none (or its id is empty)."""
        found = self._call(f"run {run_id}", self._client.get_run, run_id, ignore=_MISSING) if run_id else None
        if found is None:
            return None
        data = found.data
        return TrackedRun(run_id, found.info.status, dict(data.params), dict(data.metrics), dict(data.tags))

    def find_run(self, experiment: str, tags: Mapping[str, str]) -> str:
        """Id of the oldest run in the experiment with these tags, or empty: how a repeated step finds its own run."""
        found = self._call(f"experiment {experiment!r}", self._client.get_experiment_by_name, experiment)
        if found is None:
            return ""
        query = " and ".join(f"tags.`{key}` = '{_check_model_name(value)}'" for key, value in tags.items())
        order, what = ["attributes.start_time ASC"], f"runs of experiment {experiment!r}"
        runs = self._call(what, self._client.search_runs, [found.experiment_id], query, max_results=1, order_by=order)
        return str(runs[0].info.run_id) if runs else ""

    def alias(self, model: str, alias: str) -> RegisteredVersion | None:
        """The version that an alias names, or None where there is no such model or alias."""
        _check_model_name(model)
        registered = self._call(f"model {model!r}", self._client.get_registered_model, model, ignore=_MISSING)
        number = (registered.aliases or {}).get(alias) if registered else None
        if number is None:
            return None
        what = f"model {model!r} version {number}"
        return _version(self._call(what, self._client.get_model_version, model, str(number)))

    def versions(self, model: str, version: str = "") -> list[RegisteredVersion]:
        """The registered versions of a model, oldest first; only those tagged `version` where it is given."""
        query = f"name='{_check_model_name(model)}'"
        if version:
            query += f" and tags.`{VERSION_TAG}`='{_check_model_name(version)}'"
        found: list[Any] = []
        token: str | None = None
        while True:
            what, search = f"versions of model {model!r}", self._client.search_model_versions
            page = self._call(what, search, query, max_results=1000, page_token=token)
            found += page
            token = page.token
            if not token:
                return sorted(map(_version, found), key=lambda item: item.number)

    def register(
        self, model: str, version: str, source: str, run_id: str, tags: Mapping[str, str], description: str = ""
    ) -> RegisteredVersion:
        """Register a version once; a repeated call finds it by its tag `haechi.version`, and updates tags and text.

        Two callers at the same moment may both create one; everyone then uses the lower number.

        Args:
            model: registered model's name; created where it is missing.
            version: Haechi's version, 12 hex digits.
            source: URI of the model folder.
            run_id: MLflow run that trained it, or empty.
            tags: what else to tell of the version.
            description: Markdown for MLflow's page of it.
        """
        wanted = {**tags, VERSION_TAG: version}
        what = f"model {model!r} version {version}"
        if not self.versions(model, version):
            self._call(what, self._client.create_registered_model, model, ignore=_EXISTING)
            create = self._client.create_model_version
            details: dict[str, Any] = {"tags": wanted, "description": description, "await_creation_for": 0}
            self._call(what, create, model, source, run_id=run_id or None, **details)
        found = self.versions(model, version)[0]
        for key, value in wanted.items():
            if found.tags.get(key) != value:
                self._call(what, self._client.set_model_version_tag, model, str(found.number), key, value)
        if found.description != description:
            self._call(what, self._client.update_model_version, model, str(found.number), description)
        return RegisteredVersion(found.number, version, found.source, {**found.tags, **wanted}, description)

    def set_alias(self, model: str, alias: str, number: int) -> None:
        """Let an alias name the version of this MLflow number."""
        what = f"alias {alias!r} of model {_check_model_name(model)!r}"
        self._call(what, self._client.set_registered_model_alias, model, alias, str(number))

    def tag_version(self, model: str, number: int, tags: Mapping[str, str]) -> None:
        """Set tags on the version of this MLflow number; they may be set again with other values."""
        what = f"model {_check_model_name(model)!r} version {number}"
        for key, value in tags.items():
            self._call(what, self._client.set_model_version_tag, model, str(number), key, value)

    def _experiment(self, name: str) -> str:
        what = f"experiment {name!r}"
        found = self._call(what, self._client.get_experiment_by_name, name)
        if found is None:
            # Parallel candidates start together: whoever comes second finds the first one's experiment.
            self._call(what, self._client.create_experiment, name, ignore=_EXISTING)
            found = self._call(what, self._client.get_experiment_by_name, name)
        if found.lifecycle_stage != "active":
            raise TrackingError(
                f"MLflow's {what} was deleted",
                f"Restore it (`mlflow experiments restore -x {found.experiment_id}`) or use another name.",
            )
        return str(found.experiment_id)

    def _call(self, what: str, work: Callable[..., Any], *args: Any, ignore: str = "", **options: Any) -> Any:
        """Call MLflow; None where it answers with the error code `ignore`; its other errors become ours.

        They have no cause: a traceback would show it, and its text names the URI with the credentials in it.
        """
        from mlflow.exceptions import MlflowException

        self._probe()
        try:
            return work(*args, **options)
        except MlflowException as error:
            if error.error_code == ignore:
                return None
            raise _explain(self.uri, what, error) from None
        except OSError as error:  # requests' errors, from the calls that carry artifacts
            raise _unreachable(self.uri, error) from None

    def _probe(self) -> None:
        """Before the first call, give a server that drops our packets 5 seconds instead of MLflow's minutes."""
        if self._reached:
            return
        import requests

        try:
            requests.get(f"{self.uri}/health", timeout=(_CONNECT_SECONDS, 20)).close()
        except requests.exceptions.ConnectTimeout as error:
            raise _unreachable(self.uri, error) from error
        except (requests.exceptions.RequestException, ValueError):
            return  # MLflow's own client tells it better, with its retries and TLS settings
        self._reached = True


def _version(found: Any) -> RegisteredVersion:
    tags = {str(key): str(value) for key, value in (found.tags or {}).items()}
    number, text = int(found.version), str(found.description or "")
    return RegisteredVersion(number, tags.get(VERSION_TAG, ""), str(found.source), tags, text)


def _check_model_name(name: str) -> str:
    if not _MODEL_NAME.fullmatch(name):
        raise InputError(
            f"{name!r} cannot be a model's name", "Use letters, digits, '.', '_' and '-', such as entrance-detector."
        )
    return name


def _explain(uri: str, what: str, error: Any) -> TrackingError:
    message = str(error)[:600]
    if "Invalid Host header" in message:
        return TrackingError(
            f"MLflow at {uri} does not accept that host name",
            "Start the server with --allowed-hosts naming the host (and port) of MLFLOW_TRACKING_URI.",
        )
    if " failed with exception " in message or "timeout exception" in message:
        return _unreachable(uri, message)
    plain = re.search(r"failed with error code (\d+)", message)  # an answer that is not MLflow's JSON
    status = int(plain[1]) if plain else int(error.get_http_status_code())
    if status in (401, 403):
        return TrackingError(
            f"MLflow at {uri} refuses our credentials for {what}: {message}",
            "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN) of an allowed user.",
        )
    if plain and status < 500:
        return TrackingError(f"{uri} does not answer like MLflow: {message}", "Check MLFLOW_TRACKING_URI.")
    remedy = "Mend what the message names." if status < 500 else "Look at the MLflow server's log."
    return TrackingError(f"MLflow at {uri} refused {what}: {message}", remedy)


def _unreachable(uri: str, error: Exception | str) -> TrackingError:
    return TrackingError(
        f"cannot reach MLflow at {uri}: {error}", "Check MLFLOW_TRACKING_URI and that the server is up."
    )


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _batches(items: Sequence[_Item], size: int) -> Iterator[list[_Item]]:
    source = iter(items)
    while some := list(islice(source, size)):
        yield some
