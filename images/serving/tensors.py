"""Tensors: those of the Open Inference Protocol to images, and predictions to tensors. REST and gRPC share them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from haechi.components.shared.errors import InputError

from .inference import MAX_IMAGES, Image, Prediction

__all__ = ["INPUT", "INPUT_FORMS", "OUTPUTS", "InputTensor", "OutputTensor", "chosen_outputs", "output_tensors"]

INPUT = "images"
# Datatype → shapes: encoded images; RGB from 0 to 255; RGB from 0 to 1.
INPUT_FORMS: dict[str, tuple[tuple[int, ...], ...]] = {
    "BYTES": ((-1,), (-1, 1)),
    "UINT8": ((-1, -1, 3), (-1, -1, -1, 3)),
    "FP32": ((3, -1, -1), (-1, 3, -1, -1)),
}
# Name → datatype and shape. All images' boxes stand in one list, in the images' order, so that nothing is padded.
OUTPUTS: dict[str, tuple[str, tuple[int, ...]]] = {
    "num_detections": ("INT32", (-1,)),
    "boxes": ("FP32", (-1, 4)),
    "scores": ("FP32", (-1,)),
    "class_ids": ("INT32", (-1,)),
    "labels": ("BYTES", (-1,)),
    "sizes": ("INT32", (-1, 2)),
}
_DTYPES: dict[str, np.dtype[Any]] = {"UINT8": np.dtype("<u1"), "FP32": np.dtype("<f4"), "INT32": np.dtype("<i4")}
_FORM = "Send BYTES [n], UINT8 [h, w, 3] or [n, h, w, 3], or FP32 [3, h, w] or [n, 3, h, w]."
# What Triton's extensions ask of a tensor and nobody here gives.
_FOREIGN = ("shared_memory_region", "shared_memory_byte_size", "shared_memory_offset", "classification")


@dataclass(frozen=True)
class InputTensor:
    """What a request says of its input tensor.

    Attributes:
        name: any; only errors tell it.
        datatype: as in INPUT_FORMS.
        shape: one of its shapes, at most MAX_IMAGES images.
        parameters: those of the tensor; shared memory is not offered.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    parameters: Mapping[str, Any]

    def __post_init__(self) -> None:
        _nothing_foreign(f"input `{self.name[:80]}`", self.parameters)
        forms = INPUT_FORMS.get(self.datatype, ())
        sizes = all(type(size) is int and size > 0 for size in self.shape)
        if not sizes or not any(_fits(self.shape, form) for form in forms):
            raise self.error(f"is {self.datatype[:20]} of shape {str(list(self.shape))[:80]}", _FORM)
        if self.images > MAX_IMAGES:
            raise self.error(f"holds {self.images} images", f"Send at most {MAX_IMAGES} in one request.")

    @property
    def images(self) -> int:
        """How many images it holds."""
        return self.shape[0] if len(self.shape) != 3 else 1

    def error(self, problem: str, remedy: str) -> InputError:
        """An error that names this tensor."""
        return InputError(f"input `{self.name[:80]}` {problem}", remedy)

    def from_raw(self, raw: memoryview) -> tuple[Image, ...]:
        """Images of the tensor's bytes, row-major and little-endian; pixels are views, nothing is copied.

        Raises:
            InputError: there are more or fewer bytes than the shape wants.
        """
        if self.datatype == "BYTES":
            return self._split(raw)
        dtype = _DTYPES[self.datatype]
        expected = math.prod(self.shape) * dtype.itemsize
        if len(raw) != expected:
            raise self.error(
                f"has {len(raw)} bytes", f"{self.datatype} of shape {list(self.shape)} takes exactly {expected}."
            )
        return self._pixels(np.frombuffer(raw, dtype))

    def from_values(self, values: Any) -> tuple[Image, ...]:
        """Images of numbers: an array, or lists, flat or nested as the shape says.

        Raises:
            InputError: other than numbers of the datatype, or not as many as the shape wants.
        """
        wanted = "whole numbers from 0 to 255" if self.datatype == "UINT8" else "numbers"
        refusal = self.error(f"has data other than {wanted}", f"Send pixels as {wanted}.")
        # Before numpy looks: it gives every element the room of the longest text, terabytes for a hostile list.
        if isinstance(values, list) and not _numbers(values):
            raise refusal
        try:
            array = np.asarray(values)
        except (ValueError, OverflowError) as error:
            raise self.error(
                "is nested unevenly", f"Send a list, flat or nested as its shape {list(self.shape)}."
            ) from error
        if (array.ndim != 1 and array.shape != self.shape) or array.size != math.prod(self.shape):
            raise self.error(
                f"has data of shape {str(list(array.shape))[:80]}",
                f"Send {math.prod(self.shape)} numbers, flat or nested as its shape {list(self.shape)}.",
            )
        if self.datatype == "UINT8" and (array.dtype.kind not in "iu" or array.min() < 0 or array.max() > 255):
            raise refusal
        with np.errstate(over="ignore"):  # what becomes infinite is refused with all else that is not from 0 to 1
            return self._pixels(array.astype(_DTYPES[self.datatype], copy=False))

    def check_elements(self, number: int) -> None:
        """Raise an InputError where a BYTES tensor's shape wants more or fewer elements than there are."""
        if number != self.images:
            raise self.error(f"has {number} elements", f"Its shape {list(self.shape)} takes {self.images}.")

    def from_items(self, items: Sequence[bytes]) -> tuple[Image, ...]:
        """Images of a BYTES tensor's elements.

        Raises:
            InputError: there are more or fewer than the shape says.
        """
        self.check_elements(len(items))
        return tuple(items)

    def _pixels(self, array: NDArray[Any]) -> tuple[Image, ...]:
        return tuple(array.reshape((self.images, *self.shape[-3:])))

    def _split(self, raw: memoryview) -> tuple[Image, ...]:
        """The elements of a BYTES tensor, each after its length in 4 bytes."""
        items: list[bytes] = []
        at = 0
        for place in range(self.images):
            start = at + 4
            at = start + int.from_bytes(raw[at:start], "little")
            if at > len(raw) or start > len(raw):
                raise self.error(
                    f"ends within element {place} of {self.images}",
                    "Write each element after its length in 4 bytes, little-endian.",
                )
            items.append(bytes(raw[start:at]))
        if at != len(raw):
            raise self.error(f"has {len(raw) - at} bytes after its {self.images} elements", "Let shape and data agree.")
        return tuple(items)


@dataclass(frozen=True)
class OutputTensor:
    """A tensor of the answer.

    Attributes:
        name, datatype: as in OUTPUTS.
        shape: its sizes.
        values: a contiguous array of the datatype, or text for BYTES.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: NDArray[Any] | list[str]

    def raw(self) -> bytes:
        """Its bytes, row-major and little-endian; text after its length in 4 bytes."""
        if isinstance(self.values, np.ndarray):
            return self.values.tobytes()
        items = [text.encode() for text in self.values]
        return b"".join(part for item in items for part in (len(item).to_bytes(4, "little"), item))


def chosen_outputs(wanted: Sequence[tuple[str, Mapping[str, Any]]]) -> tuple[str, ...]:
    """Names of the outputs to give: those asked for (name and parameters), or all where none is.

    Raises:
        InputError: there is no such output, one is asked for twice, or what is asked of it is not offered.
    """
    names = tuple(name for name, _ in wanted)
    for name, parameters in wanted:
        if name not in OUTPUTS:
            raise InputError(f"there is no output `{name[:80]}`", f"Ask for {', '.join(OUTPUTS)}.")
        _nothing_foreign(f"output `{name}`", parameters)
    if len(set(names)) != len(names):
        raise InputError("an output is asked for twice", "Ask for each once.")
    return names or tuple(OUTPUTS)


def output_tensors(
    classes: Sequence[str], predictions: Sequence[Prediction], names: Collection[str]
) -> list[OutputTensor]:
    """The answer's tensors of these names; boxes are x1, y1, x2, y2 and sizes width, height, in source pixels."""
    found = [item.detections for item in predictions]
    ids = np.concatenate([item.class_ids for item in found])
    values: dict[str, NDArray[Any] | list[str]] = {
        "num_detections": np.array([len(item) for item in found]),
        "boxes": np.concatenate([item.boxes for item in found]).reshape(-1, 4),
        "scores": np.concatenate([item.scores for item in found]),
        "class_ids": ids,
        "labels": [classes[index] for index in ids],
        "sizes": np.array([(item.width, item.height) for item in predictions]),
    }
    return [_output(name, values[name]) for name in names]


def _output(name: str, values: NDArray[Any] | list[str]) -> OutputTensor:
    datatype = OUTPUTS[name][0]
    if isinstance(values, list):
        return OutputTensor(name, datatype, (len(values),), values)
    return OutputTensor(name, datatype, values.shape, np.ascontiguousarray(values, dtype=_DTYPES[datatype]))


def _fits(shape: tuple[int, ...], form: tuple[int, ...]) -> bool:
    return len(shape) == len(form) and all(want in (-1, size) for size, want in zip(shape, form, strict=True))


def _numbers(values: list[Any], depth: int = 4) -> bool:
    """Whether lists, nested at most so deep, hold nothing but numbers."""
    kinds = set(map(type, values))
    if list in kinds:
        return depth > 1 and len(kinds) == 1 and all(_numbers(row, depth - 1) for row in values)
    return kinds <= {int, float}


def _nothing_foreign(where: str, parameters: Mapping[str, Any]) -> None:
    foreign = [name for name in _FOREIGN if name in parameters]
    if foreign:
        raise InputError(
            f"{where} has the parameter `{foreign[0]}`", "That extension is not offered here: leave it out."
        )
