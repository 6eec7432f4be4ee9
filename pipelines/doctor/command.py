"""The verb `haechi doctor`: its arguments, and what it does with them."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

from haechi.components.shared.errors import InputError

from ..kubeflow_settings import check_header

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument(
        "--workdir",
        type=Path,
        default=Path(".haechi/run"),
        help="folder of the embedded services (default %(default)s)",
    )
    parser.add_argument("--local", action="store_true", help="look at this machine and its settings, at no cluster")
    parser.add_argument(
        "--kubeconfig", default="", help="kubeconfig (default: KUBECONFIG, ~/.kube/config, or the pod's)"
    )
    parser.add_argument("--context", default="", help="context of the kubeconfig (default: its current one)")
    # Without defaults, to tell what was asked for from what is usual.
    parser.add_argument("--namespace", help="namespace of the runs (default kubeflow)")
    parser.add_argument("--serving", help="namespace of the detectors (default haechi-serving)")
    parser.add_argument("--service-account", help="that steps run as (default pipeline-runner)")
    parser.add_argument("--host", default="", help="URL of the Kubeflow Pipelines API (default: KF_PIPELINES_ENDPOINT)")
    parser.add_argument("--token-file", default="", help="file with a bearer token for it")
    parser.add_argument("--ca-file", default="", help="certificates that its own is checked against")
    parser.add_argument("--label-studio", default="", metavar="URL", help="URL of Label Studio")
    parser.add_argument("--label-studio-token-file", type=Path, help="file with a user's access token for it")
    parser.add_argument(
        "--timeout", type=float, default=30.0, help="seconds for all checks together (default %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Look, report on standard output, and return 0 (healthy), 1 (faults) or 2 (could not look at everything).

    Raises:
        InputError: the token file cannot be read, or holds other than one token.
    """
    from .examine import examine
    from .report import as_json, as_lines
    from .world import Aim, World

    # Libraries warn of every retry and of every kubeconfig that is not there; the report says it once.
    logging.getLogger("urllib3").setLevel(logging.CRITICAL)
    aim = Aim(
        workdir=arguments.workdir,
        namespace=arguments.namespace or Aim.namespace,
        serving=arguments.serving or Aim.serving,
        service_account=arguments.service_account or Aim.service_account,
        asked=_asked(arguments),
        kubeconfig=arguments.kubeconfig,
        context=arguments.context,
        local=arguments.local,
        host=arguments.host,
        token_file=arguments.token_file,
        ca_file=arguments.ca_file,
        label_studio=arguments.label_studio,
        label_studio_token=_token(arguments.label_studio_token_file),
    )
    world = World(aim)
    diagnosis = examine(world, arguments.timeout)
    if arguments.json:
        text = json.dumps(as_json(diagnosis, world.redact), indent=2, ensure_ascii=False)
    else:
        text = "\n".join(as_lines(diagnosis, world.redact))
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
    return diagnosis.exit_code


def _asked(arguments: argparse.Namespace) -> tuple[str, ...]:
    """The options given that name parts of a cluster."""
    names = ("namespace", "serving", "service_account")
    return tuple(f"--{name.replace('_', '-')}" for name in names if getattr(arguments, name))


def _token(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"--label-studio-token-file {path} cannot be read ({error})", "Name a readable file."
        ) from error
    check_header(f"--label-studio-token-file {path}", token)
    return token
