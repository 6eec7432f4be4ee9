"""The V2 protocol over HTTP: JSON and the binary tensor extension, to images and from predictions. No I/O, no loop.

See https://github.com/kserve/open-inference-protocol and Triton's extension_binary_data.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from haechi.components.shared.errors import InputError

from .bodies import camera_of, from_base64, is_image, json_bytes, json_object
from .engine import Engine
from .inference import Image, InferenceRequest, Parameters, Prediction
from .tensors import InputTensor, OutputTensor, chosen_outputs, output_tensors

__all__ = ["HEADER_LENGTH", "V2Exchange"]

HEADER_LENGTH = "inference-header-content-length"
_FORM = (
    'Send {"inputs": [{"name": "images", "datatype": "BYTES", "shape": [1], "data": ["<base64 of a JPEG>"]}]}, '
    "the binary form of it, or the image itself as an image/* body."
)


class V2Exchange:
    """One request and the form of answer that it wishes for.

    Args:
        name: what the model is served as.
        body, content_type: as they came.
        header_length: of the JSON in front of binary data, as it came; None where the body is all JSON or an image.
        query: parameters of the address; those in the body go before them.

    Attributes:
        id: the caller's, echoed; empty where there is none, and before `parse`.
        camera: where the images come from, likewise.
    """

    def __init__(
        self, name: str, body: bytes, content_type: str, header_length: str | None, query: Mapping[str, str]
    ) -> None:
        self._name = name
        self._body = body
        self._content_type = content_type
        self._header_length = header_length
        self._query = query
        self._outputs = chosen_outputs(())
        self._binary: frozenset[str] = frozenset()
        self.id = ""
        self.camera = ""

    def parse(self) -> InferenceRequest:
        """The request.

        Raises:
            InputError: the body is malformed, contradicts itself, or asks for what is not offered.
        """
        if self._header_length is None and is_image(self._body, self._content_type):
            self.camera = camera_of(self._query)
            return InferenceRequest((self._body,), Parameters.read(self._query))
        length = self._json_length()
        entry = json_object(self._body[:length], _FORM)
        parameters = {**self._query, **_table(entry, "parameters", "the request")}
        self.id = _text(entry.get("id", ""), "`id`")
        self.camera = camera_of(parameters)
        self._choose(entry, parameters)
        images = _input(entry, memoryview(self._body)[length:])
        return InferenceRequest(images, Parameters.read(parameters))

    def answer(
        self, engine: Engine, request: InferenceRequest, predictions: Sequence[Prediction]
    ) -> tuple[bytes, int | None]:
        """The answer's body, and the length of its JSON where binary data follow."""
        tensors = output_tensors(engine.model.classes, predictions, self._outputs)
        entry: dict[str, Any] = {"model_name": self._name, "model_version": engine.model.version}
        if self.id:
            entry["id"] = self.id
        rows, parts = [], []
        for tensor in tensors:
            row: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape}
            if tensor.name in self._binary:
                parts.append(tensor.raw())
                row["parameters"] = {"binary_data_size": len(parts[-1])}
            else:
                row["data"] = _flat(tensor)
            rows.append(row)
        text = json_bytes({**entry, "outputs": rows})
        return (b"".join([text, *parts]), len(text)) if parts else (text, None)

    def _json_length(self) -> int:
        if self._header_length is None:
            return len(self._body)
        text = self._header_length
        length = int(text) if text.isascii() and text.isdigit() and len(text) < 16 else -1
        if not 0 < length <= len(self._body):
            raise InputError(
                f"the header Inference-Header-Content-Length is {text[:40]!r} for a body of {len(self._body)} bytes",
                "Give the length of the JSON in front of the binary data.",
            )
        return length

    def _choose(self, entry: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
        """Which outputs, and which of them as binary data."""
        default = _flag(parameters, "binary_data_output", False)
        wanted = [
            (_text(item.get("name"), "an output's `name`"), _table(item, "parameters", "an output"))
            for item in _objects(entry, "outputs")
        ]
        self._outputs = chosen_outputs(wanted)
        own = {name: _flag(table, "binary_data", default) for name, table in wanted}
        self._binary = frozenset(name for name in self._outputs if own.get(name, default))


def _input(entry: Mapping[str, Any], binary: memoryview) -> tuple[Image, ...]:
    """The images of the one input tensor."""
    inputs = _objects(entry, "inputs")
    if len(inputs) != 1:
        raise InputError(f"`inputs` holds {len(inputs)} tensors, not one", _FORM)
    row = inputs[0]
    shape = row.get("shape")
    if not isinstance(shape, list):
        raise InputError("an input's `shape` is not a list", _FORM)
    parameters = _table(row, "parameters", "an input")
    tensor = InputTensor(
        _text(row.get("name"), "an input's `name`"),
        _text(row.get("datatype"), "an input's `datatype`"),
        tuple(shape),
        parameters,
    )
    size = parameters.get("binary_data_size")
    if (size is None) == ("data" not in row):
        raise tensor.error("has both `data` and `binary_data_size`, or neither", _FORM)
    if size is not None and (type(size) is not int or size != len(binary)):
        raise tensor.error(
            f"has `binary_data_size` {str(size)[:40]} and {len(binary)} bytes follow the JSON",
            "Let them agree, and give the JSON's length in the header Inference-Header-Content-Length.",
        )
    if size is not None:
        return tensor.from_raw(binary)
    if len(binary):
        raise tensor.error(f"has `data`, yet {len(binary)} bytes follow the JSON", "Send one of them.")
    return _from_json(tensor, row["data"])


def _from_json(tensor: InputTensor, data: Any) -> tuple[Image, ...]:
    if not isinstance(data, list):
        raise tensor.error("has `data` that is no list", _FORM)
    if tensor.datatype != "BYTES":
        return tensor.from_values(data)
    tensor.check_elements(len(data))  # before a million of them are decoded
    items = [item[0] if isinstance(item, list) and len(item) == 1 else item for item in data]
    where = f"input `{tensor.name[:80]}`: `data"
    return tensor.from_items([from_base64(item, f"{where}[{place}]`", _FORM) for place, item in enumerate(items)])


def _flat(tensor: OutputTensor) -> Any:
    return tensor.values if isinstance(tensor.values, list) else tensor.values.ravel()


def _objects(entry: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    rows = entry.get(name, [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"`{name}` is not a list of objects", _FORM)
    return rows


def _table(entry: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    table = entry.get(name, {})
    if not isinstance(table, dict):
        raise InputError(f"`{name}` of {where} is not an object", _FORM)
    return table


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where} is missing or not text", _FORM)
    return value


def _flag(table: Mapping[str, Any], name: str, default: bool) -> bool:
    value = table.get(name, default)
    if not isinstance(value, bool):
        raise InputError(f"parameter `{name}` is {str(value)[:40]!r}", "Give true or false.")
    return value
