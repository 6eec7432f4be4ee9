"""The command: arguments of `haechi serve` and of `python -m haechi.serving`, which the image starts."""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the runtime's arguments to a parser."""
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--name", default="", help="what clients call the model (default: as in its model.json)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    parser.add_argument("--http-port", type=_port, default=8080, help="HTTP port (default %(default)s)")
    parser.add_argument("--grpc-port", type=_port, default=8081, help="gRPC port (default %(default)s)")
    parser.add_argument("--allow-unverified", action="store_true", help="serve a folder that has no golden images")


def _port(text: str) -> int:
    # gRPC would take a larger one modulo 65536.
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError("give 0 (any that is free) to 65535")
    return int(text)


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal comes."""
    from .quiet import hush
    from .serve import serve

    hush()
    serve(
        arguments.model,
        http_port=arguments.http_port,
        grpc_port=arguments.grpc_port,
        host=arguments.host,
        allow_unverified=arguments.allow_unverified,
        name=arguments.name,
    )
    return 0
