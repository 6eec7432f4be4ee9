"""Quiet: the libraries that read pictures do not write on standard error what a caller makes them say.

A damaged picture is refused with a reason, and the access log has it. libtiff would add a line for each bad row, past
our log, and wait there when nobody reads it; Pillow warns and keeps each text for ever.
"""

from __future__ import annotations

import ctypes
import logging
import warnings

from PIL import _imaging

__all__ = ["hush"]


def hush() -> None:
    """Silence them for the whole process; to be called once, at its start."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    library = ctypes.CDLL(_imaging.__file__)  # and with it the libtiff that it is linked to
    for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
        # Hidden where libtiff is built in; Pillow itself has no way to say it.
        if setter := getattr(library, name, None):
            setter.argtypes, setter.restype = [ctypes.c_void_p], ctypes.c_void_p
            setter(None)
