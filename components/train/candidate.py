"""A candidate: which network to train, from which weights, with which settings. Checked before anything runs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..shared.errors import InputError

__all__ = ["OPTIMIZERS", "OPTIONS", "Candidate"]

OPTIMIZERS = ("auto", "SGD", "MuSGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSProp")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_STRIDE = 32
_ANY = math.inf


def _number(low: float, high: float) -> Callable[[str, Any], float]:
    def check(key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise InputError(f"candidate option {key} is {value!r}, not a number", f"Give a number from {low:g}.")
        if not low <= value <= high:
            limit = f"from {low:g} to {high:g}" if high < _ANY else f"of at least {low:g}"
            raise InputError(f"candidate option {key} is {value!r}", f"Give a number {limit}.")
        return float(value)

    return check


def _whole(low: int, high: float = _ANY) -> Callable[[str, Any], int]:
    def check(key: str, value: Any) -> int:
        number = _number(low, high)(key, value)
        if number != int(number):
            raise InputError(f"candidate option {key} is {value!r}", "Give a whole number.")
        return int(number)

    return check


def _flag(key: str, value: Any) -> bool:
    # kfp hands booleans inside dictionaries through as they are; a number would be a slip.
    if not isinstance(value, bool):
        raise InputError(f"candidate option {key} is {value!r}", "Give true or false.")
    return value


def _optimizer(key: str, value: Any) -> str:
    names = {name.lower(): name for name in OPTIMIZERS}
    if str(value).lower() not in names:
        raise InputError(f"candidate option {key} is {value!r}", f"Give one of {', '.join(OPTIMIZERS)}.")
    return names[str(value).lower()]


def _freeze(key: str, value: Any) -> int | list[int]:
    if isinstance(value, list):
        return [_whole(0)(key, item) for item in value]
    return _whole(0)(key, value)


_share, _positive = _number(0, 1), _number(0, _ANY)

OPTIONS: dict[str, Callable[[str, Any], Any]] = {
    "lr0": _share,
    "lrf": _share,
    "momentum": _share,
    "weight_decay": _share,
    "warmup_epochs": _positive,
    "warmup_momentum": _share,
    "warmup_bias_lr": _share,
    "nbs": _whole(1),
    "optimizer": _optimizer,
    "cos_lr": _flag,
    "amp": _flag,
    "freeze": _freeze,
    "box": _positive,
    "cls": _positive,
    "dfl": _positive,
    "cls_pw": _share,
    "close_mosaic": _whole(0),
    "mosaic": _share,
    "mixup": _share,
    "cutmix": _share,
    "hsv_h": _share,
    "hsv_s": _share,
    "hsv_v": _share,
    "degrees": _number(0, 180),
    "translate": _share,
    "scale": _share,
    "shear": _number(0, 180),
    "perspective": _number(0, 0.001),
    "flipud": _share,
    "fliplr": _share,
    "bgr": _share,
    "multi_scale": _number(0, 0.9),
}
_INTEGERS = {"epochs": 1, "imgsz": 2 * _STRIDE, "batch": 1, "patience": 0}


@dataclass(frozen=True)
class Candidate:
    """What one training does, in Ultralytics' words.

    Attributes:
        name: names the run, the checkpoint and its place in the scorecard.
        model: architecture (`yolo11n`, `yolov8s`, `yolo26n`, …), or `champion` for the champion's.
        weights: what it starts from: empty for random weights, `champion`, or a path, file:// or s3:// URI of a .pt.
        epochs: passes over the training split, at least 1.
        imgsz: the longer side of the input in pixels, a multiple of 32, at least 64.
        batch: images a step, over all GPUs, at least 1.
        patience: epochs without a better val mAP50-95 after which it stops; 0 for never.
        options: further Ultralytics options, those of `OPTIONS` only.
    """

    name: str
    model: str
    weights: str = ""
    epochs: int = 100
    imgsz: int = 640
    batch: int = 16
    patience: int = 50
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise InputError(f"candidate name is {self.name!r}", "Give letters, digits, dots, dashes or underscores.")
        if not self.model:
            raise InputError(f"candidate {self.name} names no model", "Give one such as yolo11n, or champion.")
        for key, low in _INTEGERS.items():
            _whole(low)(key, getattr(self, key))
        if self.imgsz % _STRIDE:
            raise InputError(
                f"candidate option imgsz is {self.imgsz}", f"Give a multiple of {_STRIDE}, such as 320 or 640."
            )

    @classmethod
    def parse(cls, entry: Mapping[str, Any]) -> Candidate:
        """Read a candidate as it comes from a pipeline parameter, where whole numbers may be floats.

        Raises:
            InputError: an unknown key, or a value that its option does not take.
        """
        known = {"name", "model", "weights", *_INTEGERS}
        unknown = sorted(set(entry) - known - set(OPTIONS))
        if unknown:
            raise InputError(
                f"candidate {entry.get('name', '')!r} has unknown keys: {', '.join(unknown)}",
                f"Known are {', '.join(sorted(known | set(OPTIONS)))}.",
            )
        for key in ("name", "model", "weights"):
            if not isinstance(entry.get(key, ""), str):
                raise InputError(f"candidate key {key} is {entry[key]!r}", "Give text.")
        whole = {key: _whole(low)(key, entry[key]) for key, low in _INTEGERS.items() if key in entry}
        options = {key: OPTIONS[key](key, entry[key]) for key in sorted(OPTIONS) if key in entry}
        return cls(
            name=entry.get("name", ""),
            model=entry.get("model", ""),
            weights=entry.get("weights", ""),
            options=options,
            **whole,
        )

    def to_dict(self) -> dict[str, Any]:
        """The settings flat, as they were given, with the defaults filled in."""
        entry = asdict(self)
        options: dict[str, Any] = entry.pop("options")
        return entry | options
