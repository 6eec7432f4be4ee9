"""`haechi submit`: the compiled pipeline to Kubeflow Pipelines, and a run or a recurring run of it."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import kfp_server_api

from haechi.components.shared.errors import InputError

from .cache_claim import write_with_claim
from .compiling import COMPILED, normalised
from .kubeflow import Kubeflow, Version
from .kubeflow_errors import SubmitError
from .scheduling import Schedule, recur

__all__ = ["Package", "Submitted", "schedule_training", "shipped_package", "submit_training"]

_DIGEST = 12  # hex digits in a version's name
_NAME = 128  # bytes of a name that the server takes
_PARAMETERS = 120_000  # bytes of parameters: they go to a process as one argument, and Linux takes 128 KiB
_ACCOUNT = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
_LOOKS, _PAUSE = 10, 0.5  # seconds between looks for a version that somebody else uploads


@dataclass(frozen=True)
class Package:
    """A compiled pipeline, ready to upload.

    Attributes:
        path: its IR file.
        name: the pipeline's.
        description: the pipeline's.
        version: the name that this content has on every server: the pipeline's name and the content's digest.
        parameters: name → default of what a run may set.
        steps: names of its steps.
    """

    path: Path
    name: str
    description: str
    version: str
    parameters: Mapping[str, Any]
    steps: Collection[str]

    @classmethod
    def read(cls, path: Path = COMPILED / "training.yaml") -> Package:
        """Read an IR file; what differs between patch releases of the SDK does not count for the digest."""
        documents = normalised(path.read_text(encoding="utf-8"))
        spec, info = documents[0], documents[0]["pipelineInfo"]
        digest = hashlib.sha256(json.dumps(documents, sort_keys=True).encode()).hexdigest()[:_DIGEST]
        executors = spec["deploymentSpec"]["executors"]
        inputs = spec["root"]["inputDefinitions"]["parameters"]
        return cls(
            path=path,
            name=info["name"],
            description=info.get("description", ""),
            version=f"{info['name']}-{digest}",
            parameters={name: entry.get("defaultValue", "") for name, entry in inputs.items()},
            steps=[name.removeprefix("exec-") for name in executors],
        )


@contextmanager
def shipped_package(cache_claim: str = "") -> Iterator[Package]:
    """The compiled pipeline that ships, with a claim mounted for frames where one is named.

    Raises:
        InputError: the claim's name cannot be.
    """
    if not cache_claim:
        yield Package.read()
        return
    with tempfile.TemporaryDirectory(prefix="haechi-submit-") as folder:
        path = Path(folder) / "training.yaml"
        yield Package.read(write_with_claim(COMPILED / "training.yaml", cache_claim, path))


@dataclass(frozen=True)
class Submitted:
    """What a submit came to.

    Attributes:
        id: of the run or the recurring run.
        url: its page in the dashboard.
        version: name of the pipeline's version; of a recurring run, the newest at this moment.
        uploaded: whether that version was new to the server.
        change: `started` for a run; `created`, `replaced`, `resumed` or `unchanged` for a recurring run.
        name: as the dashboard shows it.
    """

    id: str
    url: str
    version: str
    uploaded: bool
    change: str
    name: str


def submit_training(
    api: Kubeflow,
    parameters: Mapping[str, Any],
    *,
    experiment: str = "",
    run_name: str = "",
    service_account: str = "",
    package: Package | None = None,
) -> Submitted:
    """Upload the pipeline where the server has not got it yet, and start a run of exactly that version.

    Args:
        api: the server.
        parameters: pipeline parameters; the others keep their defaults.
        experiment: KFP experiment; empty for the pipeline's name.
        run_name: shown in the dashboard; empty for the pipeline's name and the time.
        service_account: that the pods run as; empty for the server's choice.
        package: the compiled pipeline; None for the one that ships.

    Raises:
        InputError: a parameter that the pipeline has not got, or too many; a name that the server could not keep.
        SubmitError: unreachable, refused or not found, with the remedy.
    """
    package = package or Package.read()
    name = run_name or f"{package.name} {datetime.now(UTC):%Y-%m-%d %H:%M:%S}"
    _check(parameters, package)
    _check_names(name, experiment, service_account)
    version, uploaded = _version(api, package)
    run = kfp_server_api.V2beta1Run(
        display_name=name,
        experiment_id=api.experiment(experiment or package.name),
        pipeline_version_reference=_reference(version.pipeline_id, version.version_id),
        runtime_config=kfp_server_api.V2beta1RuntimeConfig(parameters=dict(parameters)),
        service_account=service_account or None,
    )
    run_id = api.start(run)
    return Submitted(run_id, api.link(f"runs/details/{run_id}"), version.name, uploaded, "started", name)


def schedule_training(
    api: Kubeflow,
    parameters: Mapping[str, Any],
    schedule: Schedule,
    *,
    experiment: str = "",
    name: str = "",
    service_account: str = "",
    pin: bool = False,
    package: Package | None = None,
) -> Submitted:
    """Upload the pipeline, and see to it that one recurring run of that name starts runs of it by `schedule`.

    It takes the newest version at each start, never more than one run at a time, and makes up for no missed start.

    Args:
        api: the server.
        parameters: pipeline parameters of every run.
        schedule: when it starts.
        experiment: KFP experiment; empty for the pipeline's name.
        name: the recurring run's; empty for the pipeline's name and the model's.
        service_account: that the pods run as; empty for the server's choice.
        pin: stay with this version instead of the newest.
        package: the compiled pipeline; None for the one that ships.

    Raises:
        InputError: as of `submit_training`.
        SubmitError: as of `submit_training`; or the server has a newer version than this, which it would run instead.
    """
    package = package or Package.read()
    name = name or f"{package.name}-{parameters.get('name') or package.parameters['name']}"
    _check(parameters, package)
    _check_names(name, experiment, service_account)
    version, uploaded = _version(api, package)
    newest = version if uploaded else next(iter(api.versions(version.pipeline_id)), version)
    if not pin and newest.name != version.name:
        raise SubmitError(
            f"the newest version of {package.name} on the server is {newest.name}, and a recurring run would take it instead "
            f"of {version.name}",
            "Give --pin to stay with this one, delete the newer one in the dashboard, or submit from the newer release.",
        )
    wanted = kfp_server_api.V2beta1RecurringRun(
        display_name=name,
        description=f"{schedule}, by haechi submit" + (f", as {service_account}" if service_account else ""),
        experiment_id=api.experiment(experiment or package.name),
        # An empty version means the newest at each start.
        pipeline_version_reference=_reference(version.pipeline_id, version.version_id if pin else ""),
        runtime_config=kfp_server_api.V2beta1RuntimeConfig(parameters=dict(parameters)),
        trigger=schedule.trigger(),
        mode=kfp_server_api.RecurringRunMode.ENABLE,
        max_concurrency="1",
        no_catchup=True,
        service_account=service_account or None,
    )
    recurring_id, change = recur(api, wanted)
    url = api.link(f"recurringrun/details/{recurring_id}")
    return Submitted(recurring_id, url, version.name, uploaded, change, name)


def _version(api: Kubeflow, package: Package) -> tuple[Version, bool]:
    """The server's version with this content, uploaded where it is missing; and whether it was."""
    pipeline_id = api.pipeline(package.name, package.description)

    def known() -> Version | None:
        return next((version for version in api.versions(pipeline_id) if version.name == package.version), None)

    version = known()
    if version:
        return version, False
    try:
        return api.upload(package.path, pipeline_id, package.version, package.description), True
    except SubmitError as error:
        # Somebody submits the same at this moment; a server that keeps pipelines as objects lists it a little later.
        for _ in range(_LOOKS if error.status == 409 else 0):
            version = known()
            if version:
                return version, False
            time.sleep(_PAUSE)
        raise


def _check(parameters: Mapping[str, Any], package: Package) -> None:
    for name in parameters:
        if name not in package.parameters:
            raise InputError(
                f"{name!r} is no parameter of the pipeline {package.name}",
                f"Known: {', '.join(sorted(package.parameters))}.",
            )
    size = len(json.dumps(dict(parameters)).encode())
    if size > _PARAMETERS:
        raise InputError(
            f"the parameters are {size} bytes, and the pods of Pipelines take {_PARAMETERS}",
            "Name folders instead of single files in sources and imports.",
        )


def _check_names(name: str, experiment: str, service_account: str) -> None:
    """Refuse what the server refuses too late: it starts a run whose name does not fit, and then fails to note it."""
    for option, text in (("--run-name", name), ("--experiment", experiment)):
        # Its connection to the database takes no characters of four bytes.
        if text and (len(text.encode()) > _NAME or not text.strip() or not text.isprintable() or max(text) > "\uffff"):
            raise InputError(
                f"{option} is {text[:_NAME]!r}", f"Give {_NAME} bytes at most, printable, in one line, no emoji."
            )
    if service_account and not _ACCOUNT.fullmatch(service_account):
        raise InputError(
            f"--service-account is {service_account!r}", "Name one: lower-case letters, digits, hyphens and dots."
        )


def _reference(pipeline_id: str, version_id: str) -> kfp_server_api.V2beta1PipelineVersionReference:
    return kfp_server_api.V2beta1PipelineVersionReference(pipeline_id=pipeline_id, pipeline_version_id=version_id)
