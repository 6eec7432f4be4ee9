"""What a request asks and what it gets, apart from any protocol."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from haechi.components.shared.detections import Detections
from haechi.components.shared.errors import InputError

__all__ = ["MAX_DET", "MAX_IMAGES", "MIN_CONF", "Image", "InferenceRequest", "Parameters", "Prediction"]

# Encoded bytes; RGB uint8 (height, width, 3); or RGB float32 (3, height, width) from 0 to 1.
Image = bytes | NDArray[np.uint8] | NDArray[np.float32]

MAX_IMAGES = 64
MAX_DET = 300
MIN_CONF = 0.001  # what lies lower is noise by the ten thousand


@dataclass(frozen=True)
class Parameters:
    """What one request may choose for itself.

    Attributes:
        conf: one confidence limit for every class; None takes those of the model folder.
        iou: overlap of the non-maximum suppression; None takes that of the model folder. End-to-end heads have none.
        max_det: detections an image at most.
        classes: names or numbers of the classes to report; empty for all.
    """

    conf: float | None = None
    iou: float | None = None
    max_det: int = MAX_DET
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.conf is not None and not MIN_CONF <= self.conf <= 1:
            raise InputError(f"parameter `conf` is {self.conf}", f"Give a number from {MIN_CONF} to 1.")
        if self.iou is not None and not 0 < self.iou <= 1:
            raise InputError(f"parameter `iou` is {self.iou}", "Give a number above 0 and up to 1.")
        if not 1 <= self.max_det <= MAX_DET:
            raise InputError(f"parameter `max_det` is {self.max_det}", f"Give a whole number from 1 to {MAX_DET}.")

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Parameters:
        """From a request's parameters: numbers or their text; `classes` as a list or text separated by commas.

        Names that are not ours are left alone: gateways and clients add their own.

        Raises:
            InputError: a value of another kind or out of its range.
        """
        conf, iou, most = (_number(values, name) for name in ("conf", "iou", "max_det"))
        if most is not None and not most.is_integer():
            raise InputError(f"parameter `max_det` is {most}", f"Give a whole number from 1 to {MAX_DET}.")
        return cls(conf, iou, MAX_DET if most is None else int(most), _classes(values.get("classes")))

    def class_ids(self, names: Sequence[str]) -> list[int]:
        """Indices into `names` of the classes asked for; empty for all.

        Raises:
            InputError: the model has no such class.
        """
        known = {name: index for index, name in enumerate(names)}
        numbers = {str(index): index for index in range(len(names))}
        unknown = [name for name in self.classes if name not in known and name not in numbers]
        if unknown:
            raise InputError(
                f"parameter `classes` names {', '.join(unknown)[:200]}", f"The model knows {', '.join(names)}."
            )
        return sorted({known[name] if name in known else numbers[name] for name in self.classes})


def _number(values: Mapping[str, Any], name: str) -> float | None:
    value = values.get(name)
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"parameter `{name}` is {str(value)[:80]!r}", "Give a number.")
    return number


def _classes(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    entries = value.split(",") if isinstance(value, str) else value
    if not isinstance(entries, list) or not all(isinstance(entry, str | int) for entry in entries):
        raise InputError(f"parameter `classes` is {str(value)[:80]!r}", "Give names, as a list or separated by commas.")
    # Each once: a sample keeps them, and a list may repeat a good name by the million.
    return tuple(dict.fromkeys(name for name in (str(entry).strip() for entry in entries) if name))


@dataclass(frozen=True)
class InferenceRequest:
    """Images of one request.

    Attributes:
        images: at least one and at most MAX_IMAGES.
        parameters: what it chooses for itself.
    """

    images: tuple[Image, ...]
    parameters: Parameters = field(default_factory=Parameters)

    def __post_init__(self) -> None:
        if not self.images:
            raise InputError("the request holds no image", "Send at least one.")
        if len(self.images) > MAX_IMAGES:
            raise InputError(f"the request holds {len(self.images)} images", f"Send at most {MAX_IMAGES} in one.")


@dataclass(frozen=True)
class Prediction:
    """What was found in one image.

    Attributes:
        detections: above the limits asked for.
        width, height: of the upright image in pixels.
        below: what just missed those limits; None where nobody looked.
    """

    detections: Detections
    width: int
    height: int
    below: Detections | None = None
