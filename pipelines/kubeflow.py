"""Kubeflow Pipelines' REST API as `haechi submit` needs it, over kfp's generated client.

`kfp.Client` itself has no timeouts, prints links to standard output, writes into ~/.config, waits 25 seconds on a refused
token, and takes no recurring run without a fixed version; the generated client below it does what is asked.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kfp_server_api
import urllib3

from .kubeflow_errors import SubmitError, explain
from .kubeflow_http import Client, WrongAnswer, whole_object, within
from .kubeflow_settings import KubeflowSettings

__all__ = ["Kubeflow", "Server", "Version"]

_TIMEOUT = (10.0, 60.0)  # seconds to connect, and to read the next bytes
_DEADLINE = 120.0  # seconds for a whole call, and for all pages of a list
_OLDEST = (2, 17)
_PAGE, _PAGES = 100, 100
_ID = re.compile(r"[\w.:-]{1,256}", re.ASCII)


@dataclass(frozen=True)
class Server:
    """What the API server says of itself.

    Attributes:
        version: its tag, such as `2.17.0`; `unknown` where its build did not say.
        multi_user: whether things belong to profile namespaces.
        store: `database` or `kubernetes` (pipelines are objects of the cluster).
    """

    version: str
    multi_user: bool
    store: str


@dataclass(frozen=True)
class Version:
    """One version of a pipeline, by its name and the ids that the server gave it."""

    name: str
    pipeline_id: str
    version_id: str


class Kubeflow:
    """The API of one Kubeflow Pipelines, after a first call that checks address, session and version.

    Args:
        settings: address, namespace and credentials.

    Raises:
        SubmitError: it cannot be reached, answers with a login page, or is older than 2.17.
    """

    def __init__(self, settings: KubeflowSettings) -> None:
        self.settings = settings
        client = Client(_configuration(settings), settings.cookie)
        self._health = kfp_server_api.HealthzServiceApi(client)
        self._experiments = kfp_server_api.ExperimentServiceApi(client)
        self._pipelines = kfp_server_api.PipelineServiceApi(client)
        self._uploads = kfp_server_api.PipelineUploadServiceApi(client)
        self._runs = kfp_server_api.RunServiceApi(client)
        self._recurring = kfp_server_api.RecurringRunServiceApi(client)
        self.server = self._ask_server()
        # A server for a single user wants no namespace, and keeps everything in its own.
        self._namespace = settings.namespace if self.server.multi_user else ""

    def link(self, path: str) -> str:
        """URL of a page of the dashboard, such as `runs/details/<id>`."""
        return f"{self.settings.ui or self.settings.host}/#/{path}"

    def experiment(self, name: str) -> str:
        """The id of the experiment `name`, which is made where there is none."""
        looking = f"look for the experiment {name!r}"
        equal = {"operation": "EQUALS", "key": "display_name", "string_value": name}
        found = self._call(
            looking,
            self._experiments.experiment_service_list_experiments,
            filter=json.dumps({"predicates": [equal]}),
            namespace=self._namespace,
        ).experiments
        if found:
            return self._id(looking, found[0], "experiment_id")
        wanted = kfp_server_api.V2beta1Experiment(display_name=name, namespace=self._namespace or None)
        create = self._experiments.experiment_service_create_experiment
        return self._make(f"create the experiment {name!r}", "experiment_id", create, wanted)

    def pipeline(self, name: str, description: str) -> str:
        """The id of the pipeline `name`, which is made, empty, where there is none."""
        api, namespace = self._pipelines, self._namespace
        look = api.pipeline_service_get_pipeline_by_name
        try:
            return self._make(f"look for the pipeline {name!r}", "pipeline_id", look, name, namespace=namespace)
        except SubmitError as error:
            if error.status != 404:
                raise
        wanted = kfp_server_api.V2beta1Pipeline(
            name=name, display_name=name, description=description, namespace=namespace or None
        )
        create = api.pipeline_service_create_pipeline
        return self._make(f"create the pipeline {name!r}", "pipeline_id", create, wanted)

    def versions(self, pipeline_id: str) -> list[Version]:
        """The versions of a pipeline, the newest first."""
        rows = self._pages(
            "list the pipeline's versions",
            self._pipelines.pipeline_service_list_pipeline_versions,
            "pipeline_versions",
            "pipeline_version_id",
            pipeline_id=pipeline_id,
            sort_by="created_at desc",
        )
        return [Version(row.name or row.display_name or "", pipeline_id, row.pipeline_version_id) for row in rows]

    def upload(self, package: Path, pipeline_id: str, name: str, description: str) -> Version:
        """Upload a compiled pipeline as a new version."""
        try:
            made = self._make(
                f"take the version {name!r}",
                "pipeline_version_id",
                self._uploads.upload_pipeline_version,
                str(package),
                name=name,
                pipelineid=pipeline_id,
                description=description,
            )
        except SubmitError as error:
            if error.status != 400:
                raise
            raise SubmitError(
                error.problem,
                "An upload tells no reason, missing rights among them: check that the token's service account may create "
                f"pipelines in {self.settings.namespace!r}, then read the log of deployment ml-pipeline.",
                error.status,
            ) from error
        return Version(name, pipeline_id, made)

    def start(self, run: kfp_server_api.V2beta1Run) -> str:
        """Start a run; its id."""
        return self._make("start the run", "run_id", self._runs.run_service_create_run, run)

    def run(self, run_id: str) -> kfp_server_api.V2beta1Run:
        """A run with its state and tasks."""
        return self._call(f"tell the run {run_id}", self._runs.run_service_get_run, run_id)

    def recurring_runs(self, name: str) -> list[kfp_server_api.V2beta1RecurringRun]:
        """The recurring runs of that name in the namespace, whichever experiment they are in."""
        rows = self._pages(
            "list the recurring runs",
            self._recurring.recurring_run_service_list_recurring_runs,
            "recurring_runs",
            "recurring_run_id",
            namespace=self._namespace,
            sort_by="created_at desc",
        )
        return [row for row in rows if row.display_name == name]

    def create_recurring(self, wanted: kfp_server_api.V2beta1RecurringRun) -> str:
        """Make a recurring run; its id."""
        create = self._recurring.recurring_run_service_create_recurring_run
        return self._make("make the recurring run", "recurring_run_id", create, wanted)

    def enable_recurring(self, recurring_run_id: str, enabled: bool) -> None:
        """Let a recurring run start runs, or not."""
        api = self._recurring
        verb = (
            api.recurring_run_service_enable_recurring_run
            if enabled
            else api.recurring_run_service_disable_recurring_run
        )
        self._call(f"{'enable' if enabled else 'disable'} the recurring run {recurring_run_id}", verb, recurring_run_id)

    def delete_recurring(self, recurring_run_id: str) -> None:
        """Delete a recurring run, if nobody else has; the runs that it started stay."""
        delete = self._recurring.recurring_run_service_delete_recurring_run
        try:
            self._call(f"delete the recurring run {recurring_run_id}", delete, recurring_run_id)
        except SubmitError as error:
            if error.status != 404:
                raise

    def _ask_server(self) -> Server:
        def ask(**options: Any) -> dict[str, Any]:
            # The generated model lacks the tag.
            answer = self._health.healthz_service_get_healthz(_preload_content=False, **options)
            return whole_object(answer.data)

        told = self._call("say its version", ask)
        server = Server(
            version=str(told.get("tag_name") or "unknown"),
            multi_user=bool(told.get("multi_user")),
            store=str(told.get("pipeline_store") or ""),
        )
        number = re.match(r"v?(\d+)\.(\d+)", server.version)
        if number and (int(number[1]), int(number[2])) < _OLDEST:
            raise SubmitError(
                f"Kubeflow Pipelines at {self.settings.host} is {server.version}",
                "The pipeline needs 2.17 or newer (node selectors, tolerations and Secrets as parameters): upgrade it.",
            )
        return server

    def _pages(self, doing: str, call: Callable[..., Any], field: str, key: str, **arguments: Any) -> Iterator[Any]:
        """The rows of all pages; each has its id in `key`."""
        token, until = "", time.monotonic() + _DEADLINE
        for _ in range(_PAGES):
            answer = self._call(doing, call, page_size=_PAGE, page_token=token, **arguments)
            for row in getattr(answer, field) or []:
                self._id(doing, row, key)
                yield row
            token = answer.next_page_token or ""
            if not token:
                return
            if time.monotonic() > until:
                break
        wrong = WrongAnswer("it gives page after page, without end", "Delete what is not needed in the dashboard.")
        raise explain(wrong, doing, self.settings)

    def _make(self, doing: str, key: str, call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
        """A call whose answer is one thing; its id."""
        return self._id(doing, self._call(doing, call, *arguments, **options), key)

    def _id(self, doing: str, answer: Any, key: str) -> str:
        told = str(getattr(answer, key) or "")
        if not _ID.fullmatch(told):
            raise explain(WrongAnswer(f"it tells no {key}", status=200), doing, self.settings)
        return told

    def _call(self, doing: str, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        try:
            return within(_DEADLINE, lambda: call(*arguments, _request_timeout=_TIMEOUT, **options))
        except (kfp_server_api.ApiException, urllib3.exceptions.HTTPError, WrongAnswer) as error:
            raise explain(error, doing, self.settings) from error


def _configuration(settings: KubeflowSettings) -> kfp_server_api.Configuration:
    configuration = kfp_server_api.Configuration(host=settings.host)
    configuration.ssl_ca_cert = settings.ca_file or None
    # What cannot be reached is told at once, without urllib3's warnings.
    configuration.retries = urllib3.Retry(total=None, connect=0, read=0, status=0, other=0)
    if settings.bearer():

        def renew(target: kfp_server_api.Configuration) -> None:
            target.api_key["authorization"] = settings.bearer()

        configuration.api_key_prefix["authorization"] = "Bearer"
        configuration.refresh_api_key_hook = renew
        renew(configuration)
    return configuration
