"""Kubeflow Pipelines' REST API as `haechi submit` needs it, over kfp's generated client.

`kfp.Client` itself has no timeouts, prints links to standard output, writes into ~/.config, waits 25 seconds on a refused
token, and takes no recurring run without a fixed version; the generated client below it does what is asked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kfp_server_api
import urllib3

from .kubeflow_errors import SubmitError, explain
from .kubeflow_settings import KubeflowSettings

__all__ = ["Kubeflow", "Server", "Version"]

_TIMEOUT = (10.0, 60.0)  # seconds to connect, to read
_OLDEST = (2, 17)
_PAGE = 100


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
        client = kfp_server_api.ApiClient(_configuration(settings), cookie=settings.cookie or None)
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
        equal = {"operation": "EQUALS", "key": "display_name", "string_value": name}
        found = self._call(
            f"look for the experiment {name!r}",
            self._experiments.experiment_service_list_experiments,
            filter=json.dumps({"predicates": [equal]}),
            namespace=self._namespace,
        ).experiments
        if not found:
            wanted = kfp_server_api.V2beta1Experiment(display_name=name, namespace=self._namespace or None)
            create = self._experiments.experiment_service_create_experiment
            found = [self._call(f"create the experiment {name!r}", create, wanted)]
        return str(found[0].experiment_id)

    def pipeline(self, name: str, description: str) -> str:
        """The id of the pipeline `name`, which is made, empty, where there is none."""
        api = self._pipelines
        try:
            found = self._call(
                f"look for the pipeline {name!r}",
                api.pipeline_service_get_pipeline_by_name,
                name,
                namespace=self._namespace,
            )
        except SubmitError as error:
            if error.status != 404:
                raise
            wanted = kfp_server_api.V2beta1Pipeline(
                name=name, display_name=name, description=description, namespace=self._namespace or None
            )
            found = self._call(f"create the pipeline {name!r}", api.pipeline_service_create_pipeline, wanted)
        return str(found.pipeline_id)

    def versions(self, pipeline_id: str) -> list[Version]:
        """The versions of a pipeline, the newest first."""
        rows = self._pages(
            "list the pipeline's versions",
            self._pipelines.pipeline_service_list_pipeline_versions,
            "pipeline_versions",
            pipeline_id=pipeline_id,
            sort_by="created_at desc",
        )
        return [Version(row.name or row.display_name, pipeline_id, row.pipeline_version_id) for row in rows]

    def upload(self, package: Path, pipeline_id: str, name: str, description: str) -> Version:
        """Upload a compiled pipeline as a new version."""
        try:
            made = self._call(
                f"take the version {name!r}",
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
        return Version(name, pipeline_id, str(made.pipeline_version_id))

    def start(self, run: kfp_server_api.V2beta1Run) -> str:
        """Start a run; its id."""
        return str(self._call("start the run", self._runs.run_service_create_run, run).run_id)

    def run(self, run_id: str) -> kfp_server_api.V2beta1Run:
        """A run with its state and tasks."""
        return self._call(f"tell the run {run_id}", self._runs.run_service_get_run, run_id)

    def recurring_runs(self, name: str) -> list[kfp_server_api.V2beta1RecurringRun]:
        """The recurring runs of that name in the namespace, whichever experiment they are in."""
        listing = self._recurring.recurring_run_service_list_recurring_runs
        rows = self._pages(
            "list the recurring runs", listing, "recurring_runs", namespace=self._namespace, sort_by="created_at desc"
        )
        return [row for row in rows if row.display_name == name]

    def create_recurring(self, wanted: kfp_server_api.V2beta1RecurringRun) -> str:
        """Make a recurring run; its id."""
        create = self._recurring.recurring_run_service_create_recurring_run
        return str(self._call("make the recurring run", create, wanted).recurring_run_id)

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
        asked = "say its version"
        answer = self._call(asked, self._health.healthz_service_get_healthz, _preload_content=False)
        moved = answer.retries.history[-1].redirect_location if answer.retries.history else ""
        try:
            told = json.loads(answer.data)
            server = Server(
                told.get("tag_name") or "unknown", bool(told.get("multi_user")), told.get("pipeline_store", "")
            )
        except (ValueError, AttributeError):
            raise SubmitError(
                f"{self.settings.host} answers with a web page instead of the pipelines API",
                "Most likely it is the login page: give --token-file (audience pipelines.kubeflow.org), or a session that "
                "has not ended in KF_PIPELINES_COOKIE; or the path is missing, as in https://<kubeflow>/pipeline.",
            ) from None
        if moved:
            # The token is not sent on to another scheme, host or port, and its absence would be told as a refusal.
            raise SubmitError(
                f"{self.settings.host} leads to {moved.partition('/apis/')[0]}",
                "Give that address as --host, if it is yours: a token goes to the address that is given and to no other.",
            )
        number = re.match(r"v?(\d+)\.(\d+)", server.version)
        if number and (int(number[1]), int(number[2])) < _OLDEST:
            raise SubmitError(
                f"Kubeflow Pipelines at {self.settings.host} is {server.version}",
                "The pipeline needs 2.17 or newer (node selectors, tolerations and Secrets as parameters): upgrade it.",
            )
        return server

    def _pages(self, doing: str, call: Callable[..., Any], field: str, **arguments: Any) -> Iterator[Any]:
        token = ""
        while True:
            answer = self._call(doing, call, page_size=_PAGE, page_token=token, **arguments)
            yield from getattr(answer, field) or []
            token = answer.next_page_token or ""
            if not token:
                return

    def _call(self, doing: str, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        try:
            return call(*arguments, _request_timeout=_TIMEOUT, **options)
        except (kfp_server_api.ApiException, urllib3.exceptions.HTTPError) as error:
            raise explain(error, doing, self.settings) from error


def _configuration(settings: KubeflowSettings) -> kfp_server_api.Configuration:
    configuration = kfp_server_api.Configuration(host=settings.host)
    configuration.ssl_ca_cert = settings.ca_file or None
    # A login page is found by following; what cannot be reached is told at once, without urllib3's warnings.
    configuration.retries = urllib3.Retry(total=None, connect=0, read=0, status=0, other=0, redirect=5)
    if settings.bearer():

        def renew(target: kfp_server_api.Configuration) -> None:
            target.api_key["authorization"] = settings.bearer()

        configuration.api_key_prefix["authorization"] = "Bearer"
        configuration.refresh_api_key_hook = renew
        renew(configuration)
    return configuration
