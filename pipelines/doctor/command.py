"""The verb `haechi doctor`: its arguments, and what it does with them."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

from haechi.components.shared.errors import InputError

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
    parser.add_argument("--namespace", default="kubeflow", help="namespace of the runs (default %(default)s)")
    parser.add_argument("--serving", default="haechi-serving", help="namespace of the detectors (default %(default)s)")
    parser.add_argument("--service-account", default="pipeline-runner", help="that steps run as (default %(default)s)")
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
        namespace=arguments.namespace,
        serving=arguments.serving,
        service_account=arguments.service_account,
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


def _token(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"--label-studio-token-file {path} cannot be read ({error})", "Name a readable file."
        ) from error
    if not (token.isascii() and token.isprintable()):  # as no header may be; the token is not told
        raise InputError(
            f"--label-studio-token-file {path} holds more than one line, or other than ASCII",
            "Write one token into it and nothing else.",
        )
    return token
