"""Parameters of a run that only its last steps use, read by those steps' own parsers before anything starts.

`haechi run` and `haechi submit` ask here before they send anything; the step `resolve` asks again for the runs that
were started in the dashboard or by another client.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..deploy.rollout import Rollout
from ..deploy.target import Target
from ..shared.errors import InputError
from ..train.candidate import Candidate

__all__ = ["check_parameters"]


def check_parameters(candidates: Sequence[Any] | None, target: str, rollout: Mapping[str, Any]) -> None:
    """Refuse what `train` or `deploy` would refuse hours later.

    Args:
        candidates: trainings to compare; None for the pipeline's default.
        target: where a promoted model goes; empty for `none`.
        rollout: steps and limits of a rollout on KServe that differ from the defaults.

    Raises:
        InputError: one that cannot be used, in the words of its step.
    """
    Target.parse(target)
    Rollout.parse(rollout)
    if candidates is None:
        return
    if not candidates:
        raise InputError("candidates is empty", "Name at least one training.")
    for entry in candidates:
        if not isinstance(entry, Mapping):
            raise InputError(f"candidates holds {entry!r}", "Give each one as a mapping, with name and model.")
        Candidate.parse({str(key): value for key, value in entry.items()})  # as JSON will have them
