"""Submit the compiled pipeline to a Kubeflow Pipelines API server."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Mapping
from typing import Any

from haechi.components.shared.errors import HaechiError, InputError

from .compiling import COMPILED

__all__ = ["SubmitError", "submit"]


class SubmitError(HaechiError):
    """The Kubeflow Pipelines API cannot be reached or refuses the run."""

    exit_code = 11
    http_status = 502


def submit(
    parameters: Mapping[str, Any],
    *,
    host: str,
    namespace: str,
    token: str = "",
    experiment: str = "",
    run_name: str = "",
) -> dict[str, str]:
    """Start a run of `compiled/training.yaml`.

    Args:
        parameters: pipeline parameters, already checked.
        host: URL of the KFP API, such as https://kubeflow.example/pipeline.
        namespace: profile namespace that the run belongs to.
        token: bearer token; empty for none. Never logged.
        experiment: KFP experiment; empty for the pipeline's name.
        run_name: shown in the dashboard; empty lets KFP name it.

    Returns:
        {"run_id", "url"}.

    Raises:
        InputError: host is no URL.
        SubmitError: unreachable, refused or not found, with the remedy.
    """
    if not host.startswith(("http://", "https://")):
        raise InputError(
            f"--host is {host!r}, not a URL", "Write it as https://<kubeflow>/pipeline or http://localhost:8080."
        )
    import kfp

    package = COMPILED / "training.yaml"
    try:
        # The client prints links to standard output, which belongs to our report, and warns at every start that
        # servers before 2.0 are not for it.
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="This client only works with Kubeflow Pipeline")
            client = kfp.Client(host=host, namespace=namespace, existing_token=token or None)
            run = client.create_run_from_pipeline_package(
                str(package),
                arguments=dict(parameters),
                run_name=run_name or None,
                experiment_name=experiment or "training",
                namespace=namespace,
            )
    # kfp raises its own API errors, urllib3's, and plain RuntimeErrors for one and the same cause.
    except Exception as error:
        raise SubmitError(
            f"the pipelines API at {host} did not take the run ({_first_line(error)})",
            "Check --host, --namespace and the token (its audience is pipelines.kubeflow.org).",
        ) from error
    return {"run_id": run.run_id, "url": f"{host.rstrip('/')}/#/runs/details/{run.run_id}"}


def _first_line(error: Exception) -> str:
    status, reason = getattr(error, "status", ""), getattr(error, "reason", "")
    return (
        f"{status} {reason}".strip()
        if status
        else str(error).strip().splitlines()[0][:300]
        if str(error)
        else type(error).__name__
    )
