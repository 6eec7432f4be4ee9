"""`python -m haechi.serving`: the runtime without the rest of Haechi, as its image starts it."""

from __future__ import annotations

import argparse
import sys

from haechi.components.shared.errors import HaechiError

from .command import add_arguments, run


def main() -> int:
    """Parse the arguments and serve; an error of ours is one line and its exit code."""
    parser = argparse.ArgumentParser("haechi.serving", description="serve a model folder over HTTP and gRPC")
    add_arguments(parser)
    try:
        return run(parser.parse_args())
    except HaechiError as error:
        sys.stderr.write(f"haechi.serving: {error}\n")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
