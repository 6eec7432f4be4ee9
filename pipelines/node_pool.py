"""The parameters that send trainings to a pool of nodes, read as Kubernetes reads them, before anything is sent.

Pipelines hands both on as they are, and only when a training's turn comes: a `true` without quotes ends the run there, and
a key that Kubernetes does not know is passed over, so that the pod waits for ever.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from haechi.components.shared.errors import InputError

__all__ = ["check_pool"]

_KEY = re.compile(
    r"([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
)  # of labels and taints
_VALUE = re.compile(r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?")
_FIELDS = ("key", "operator", "value", "effect", "tolerationSeconds")
_OPERATORS = ("Exists", "Equal")
_EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")
_QUOTED = 'Write it as text, with quotes around true, false and numbers, as in cloud.google.com/gke-spot: "true".'


def check_pool(node_selector: Mapping[str, Any], tolerations: list[Any]) -> None:
    """Refuse what Pipelines or Kubernetes would refuse or pass over at the training's pod.

    Args:
        node_selector: labels that the node must have.
        tolerations: Kubernetes tolerations.

    Raises:
        InputError: a label, field or value that cannot be, named.
    """
    for key, value in node_selector.items():
        _check_text(f"the key {key!r} in node_selector", key, _KEY)
        _check_text(f"node_selector[{key}]", value, _VALUE)
    for position, entry in enumerate(tolerations):
        _check_toleration(f"tolerations[{position}]", entry)


def _check_toleration(where: str, entry: Any) -> None:
    if not isinstance(entry, Mapping):
        raise InputError(f"{where} is {entry!r}", "Write it as a mapping, as in {key: spot, operator: Exists}.")
    unknown = [key for key in entry if key not in _FIELDS]
    if unknown:
        raise InputError(f"{where} has no field {unknown[0]!r}", f"Kubernetes knows {', '.join(_FIELDS)}.")
    operator, effect, seconds = entry.get("operator", "Equal"), entry.get("effect", ""), entry.get("tolerationSeconds")
    if operator not in _OPERATORS:
        raise InputError(f"{where}.operator is {operator!r}", f"Give one of {', '.join(_OPERATORS)}.")
    if effect and effect not in _EFFECTS:
        raise InputError(f"{where}.effect is {effect!r}", f"Give one of {', '.join(_EFFECTS)}, or none for all.")
    if entry.get("key") or operator == "Equal":
        _check_text(f"{where}.key", entry.get("key"), _KEY)
    _check_text(f"{where}.value", entry.get("value", ""), _VALUE)
    if operator == "Exists" and entry.get("value"):
        raise InputError(f"{where} has a value, and its operator is Exists", "Leave it out, or take Equal.")
    if seconds is not None and (type(seconds) is not int or effect != "NoExecute"):
        raise InputError(f"{where}.tolerationSeconds is {seconds!r}", "Give a whole number, and the effect NoExecute.")


def _check_text(where: str, value: Any, pattern: re.Pattern[str]) -> None:
    if not isinstance(value, str):
        raise InputError(f"{where} is {value!r}", _QUOTED)
    if not pattern.fullmatch(value):
        raise InputError(f"{where} is {value!r}", "Kubernetes takes letters, digits, dots, dashes and underscores.")
