"""The V2 protocol over gRPC: messages to images, and predictions to messages. No I/O, no loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2 as pb

from haechi.components.shared.errors import InputError

from .bodies import camera_of
from .engine import Engine
from .inference import Image, InferenceRequest, Parameters, Prediction
from .tensors import InputTensor, chosen_outputs, output_tensors

__all__ = ["GrpcExchange"]

_CONTENTS = {"BYTES": "bytes_contents", "UINT8": "uint_contents", "FP32": "fp32_contents"}
_PORTION = 8192
_FORM = "Send one input tensor, its data in `raw_input_contents` or in the contents of its datatype."


class GrpcExchange:
    """One ModelInferRequest and the form of answer that it wishes for.

    Args:
        message: a ModelInferRequest.

    Attributes:
        camera: where the images come from; empty where it is not said, and before `parse`.
    """

    def __init__(self, message: Any) -> None:
        self._message = message
        self._outputs = chosen_outputs(())
        self.camera = ""

    def parse(self) -> InferenceRequest:
        """The request.

        Raises:
            InputError: the message contradicts itself, or asks for what is not offered.
        """
        parameters = _table(self._message.parameters)
        self.camera = camera_of(parameters)
        self._outputs = chosen_outputs([(row.name, _table(row.parameters)) for row in self._message.outputs])
        return InferenceRequest(self._images(), Parameters.read(parameters))

    def answer(self, engine: Engine, request: InferenceRequest, predictions: Sequence[Prediction]) -> Any:
        """The ModelInferResponse, its tensors in `raw_output_contents`."""
        name, version = self._message.model_name, engine.model.version
        answer = pb.ModelInferResponse(model_name=name, model_version=version, id=self._message.id)
        for tensor in output_tensors(engine.model.classes, predictions, self._outputs):
            answer.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
            answer.raw_output_contents.append(tensor.raw())
        return answer

    def _images(self) -> tuple[Image, ...]:
        if len(self._message.inputs) != 1:
            raise InputError(f"`inputs` holds {len(self._message.inputs)} tensors, not one", _FORM)
        row = self._message.inputs[0]
        tensor = InputTensor(row.name, row.datatype, tuple(row.shape), _table(row.parameters))
        filled = [field.name for field, _ in row.contents.ListFields()]
        raw = self._message.raw_input_contents
        if len(raw) + len(filled) != 1:
            raise tensor.error(f"has {len(raw)} raw contents and {', '.join(filled) or 'no'} typed contents", _FORM)
        if raw:
            return tensor.from_raw(memoryview(raw[0]))
        if filled != [_CONTENTS[tensor.datatype]]:
            raise tensor.error(
                f"has its data in `{filled[0]}`", f"{tensor.datatype} belongs in `{_CONTENTS[tensor.datatype]}`."
            )
        values = getattr(row.contents, filled[0])
        if tensor.datatype == "BYTES":
            return tensor.from_items(values)
        return tensor.from_values(_array(values, np.uint32 if tensor.datatype == "UINT8" else np.float32))


def _array(values: Sequence[Any], dtype: type[np.generic]) -> NDArray[Any]:
    """Typed contents as an array; portion by portion, between which other threads may run."""
    array = np.empty(len(values), dtype)
    for start in range(0, len(values), _PORTION):
        array[start : start + _PORTION] = values[start : start + _PORTION]
    return array


def _table(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values of a map of InferParameter."""
    chosen = {name: (value, value.WhichOneof("parameter_choice")) for name, value in parameters.items()}
    return {name: getattr(value, kind) for name, (value, kind) in chosen.items() if kind}
