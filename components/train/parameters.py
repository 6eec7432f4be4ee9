"""What all candidates' trainings are asked for alike, seed and device; checked on the way in.

Without torch, so that a run can be refused before it starts; whether a device is there, step.py finds out.
"""

from __future__ import annotations

import re

from ..shared.errors import InputError

__all__ = ["check_device", "check_seed"]

_DEVICE = re.compile(r"(|auto|cpu|mps|[0-9]+(,[0-9]+)*)")


def check_seed(seed: int) -> None:
    """Refuse a seed that numpy and torch do not take.

    Raises:
        InputError: it is negative.
    """
    if seed < 0:
        raise InputError(f"seed is {seed}", "Give 0 or more.")


def check_device(device: str) -> None:
    """Refuse what names no device on any machine.

    Raises:
        InputError: it is neither `auto` nor `cpu`, `mps` or GPU numbers.
    """
    if not _DEVICE.fullmatch(device):
        raise InputError(f"device is {device!r}", "Give auto, cpu, mps (on Apple), 0 or 0,1.")
