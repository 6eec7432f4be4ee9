"""Parameters of a run: a preset, then `--set key=value`, checked against the pipeline's own parameter list."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from haechi.components.resolve.parameters import check_parameters
from haechi.components.shared.errors import InputError

from .node_pool import check_pool
from .submitting import Package

__all__ = ["PARAMETERS", "load_preset", "parse_settings", "preset_names", "run_parameters"]

_PRESETS = Path(__file__).parent / "presets"

# Name → type of every parameter of pipelines/training.py; a test keeps it equal to the compiled pipeline.
PARAMETERS: dict[str, type] = {
    "name": str,
    "classes": list,
    "sources": list,
    "imports": list,
    "quality": dict,
    "teacher": str,
    "class_map": dict,
    "bands": dict,
    "review_limit": int,
    "ratios": dict,
    "grouping": dict,
    "candidates": list,
    "thresholds": dict,
    "iou": float,
    "golden_images": int,
    "gate": dict,
    "target": str,
    "rollout": dict,
    "seed": int,
    "retrain": bool,
    "device": str,
    "train_cpu": str,
    "train_memory": str,
    "infer_cpu": str,
    "infer_memory": str,
    "gpu_type": str,
    "gpu_count": str,
    "node_selector": dict,
    "tolerations": list,
    "steps_image": str,
    "train_image": str,
    "settings_config_map": str,
    "s3_secret": str,
    "mlflow_secret": str,
    "roboflow_secret": str,
    "git_secret": str,
    "endpoint_secret": str,
}

# What the cluster would refuse only when the step's turn comes, hours into a run: name → what is right, and in words.
_CPU = re.compile(r"(?=.*[1-9])(\d+(\.\d+)?|\d+m)"), "CPUs such as 2 or 500m"
_MEMORY = re.compile(r"(?=.*[1-9])\d+(\.\d+)?[MGT]i?"), "memory with its unit, such as 4Gi or 500Mi"
_IMAGE = re.compile(r"\S+"), "an image's name"
_OBJECT = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?"), "the name of an object of the cluster"
# Mounted as a volume that has its name; both are optional, and a name without a Secret means none.
_MOUNTED = (
    re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"),
    "a Secret's name of letters, digits and hyphens, there or not",
)
_WORDS: dict[str, tuple[re.Pattern[str], str]] = {
    "train_cpu": _CPU,
    "train_memory": _MEMORY,
    "infer_cpu": _CPU,
    "infer_memory": _MEMORY,
    "gpu_count": (re.compile(r"\d+"), "a whole number; 0 for none"),
    "gpu_type": (re.compile(r"[a-z0-9.-]+/[A-Za-z0-9._-]+"), "a resource name such as nvidia.com/gpu"),
    "steps_image": _IMAGE,
    "train_image": _IMAGE,
    "settings_config_map": _OBJECT,
    "s3_secret": _OBJECT,
    "mlflow_secret": _OBJECT,
    "roboflow_secret": _OBJECT,
    "git_secret": _MOUNTED,
    "endpoint_secret": _MOUNTED,
}


def preset_names() -> list[str]:
    """Names of the presets that ship."""
    return sorted(path.stem for path in _PRESETS.glob("*.yaml"))


def load_preset(name: str) -> dict[str, Any]:
    """The parameters of a preset, by its name or as a path of a YAML file.

    Raises:
        InputError: no such preset, not a mapping, or a key that is no parameter.
    """
    path = _PRESETS / f"{name}.yaml" if name in preset_names() else Path(name)
    if not path.is_file():
        raise InputError(
            f"there is no preset {name!r}", f"Use one of {', '.join(preset_names())}, or a YAML file's path."
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML ({error})", "Mend the file.") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} is not a mapping of parameters", "Write one `key: value` a line.")
    return check(values, str(path))


def parse_settings(pairs: Iterable[str]) -> dict[str, Any]:
    """Parse `key=value` words; values are YAML, and dotted keys reach into a mapping or a list (`gate.min_boxes=5`)."""
    nested: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise InputError(f"--set {pair!r} is not key=value", "Write it as --set seed=3.")
        try:
            nested[key] = yaml.safe_load(text) if text else ""
        except yaml.YAMLError as error:
            raise InputError(f"the value of --set {key} is not YAML ({error})", "Quote it for your shell.") from error
    return nested


def run_parameters(preset: str, pairs: Iterable[str] = (), extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A preset with `extra` and `--set` words laid over it, checked.

    Raises:
        InputError: an unknown key or a value of the wrong type, named; or what a step would refuse at its turn.
    """
    values = {**(load_preset(preset) if preset else {}), **(extra or {})}
    for key, value in parse_settings(pairs).items():
        _assign(values, key, value)
    checked = check(values, "--set")
    check_parameters(json.loads(json.dumps({**_defaults(), **checked})))
    check_pool(checked.get("node_selector", {}), checked.get("tolerations", []))
    return checked


@cache
def _defaults() -> Mapping[str, Any]:
    return Package.read().parameters


def check(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return `values` with each checked against PARAMETERS (and whole numbers taken as floats where asked)."""
    checked: dict[str, Any] = {}
    for key, value in values.items():
        if key not in PARAMETERS:
            near = difflib.get_close_matches(key, PARAMETERS, n=1)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            raise InputError(
                f"{where}: {key!r} is no parameter of the pipeline", f"{hint}Known: {', '.join(PARAMETERS)}."
            )
        wanted = PARAMETERS[key]
        if wanted is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if wanted is str and isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            raise InputError(
                f"{where}: {key} is {json.dumps(value, default=str)}, not a {wanted.__name__}",
                f"Give a {wanted.__name__}.",
            )
        _check_json(key, value, where)
        pattern, words = _WORDS.get(key, (None, ""))
        if pattern and not pattern.fullmatch(str(value)):
            raise InputError(f"{where}: {key} is {value!r}", f"Give {words}.")
        checked[key] = value
    return checked


def _check_json(key: str, value: Any, where: str) -> None:
    """Parameters travel as JSON, which knows neither dates nor .nan nor a mapping in itself."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"{where}: {key} holds what JSON cannot ({error})", "Quote dates; leave .nan and .inf out."
        ) from error


def _assign(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Set `a.b.0.c` inside nested mappings and lists, on a copy of what is there."""
    head, *rest = dotted.split(".")
    if not all(rest):
        raise InputError(f"--set {dotted}: there is nothing between or after two dots", "Write it as gate.min_boxes=5.")
    if not rest:
        values[head] = value
        return
    copy: Any = json.loads(json.dumps(values.get(head, {})))
    values[head] = copy
    for step in rest[:-1]:
        copy = copy.setdefault(step, {}) if isinstance(copy, dict) else _item(copy, step, dotted)
    if isinstance(copy, dict):
        copy[rest[-1]] = value
    elif isinstance(copy, list):
        _item(copy, rest[-1], dotted)
        copy[int(rest[-1])] = value
    else:
        raise InputError(f"--set {dotted}: {'.'.join([head, *rest[:-1]])} is not a mapping or list", "Set it whole.")


def _item(values: Any, index: str, dotted: str) -> Any:
    if not isinstance(values, list) or not index.isdigit() or int(index) >= len(values):
        raise InputError(f"--set {dotted}: there is no item {index!r}", "Use a position that exists, from 0.")
    return values[int(index)]
