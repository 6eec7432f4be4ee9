"""An ONNX file as a graph to look into and to change, without the `onnx` package.

Read and written through protobuf with the few fields that are touched here; protobuf keeps the others of each message
as they are. The `onnx` package would do the same at several times the size of the runtime's own code.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from numpy.typing import NDArray

__all__ = ["Graph", "Unlike", "attribute", "make_node"]

_FLOAT = 1  # TensorProto.DataType.FLOAT
_INT64 = 7
# Message → fields of onnx.proto as (name, number, type); a star marks repeated ones.
_SCHEMA: dict[str, tuple[tuple[str, int, str], ...]] = {
    "Dimension": (("dim_value", 1, "int64"), ("dim_param", 2, "string")),
    "Shape": (("dim", 1, "*Dimension"),),
    "Tensor": (("elem_type", 1, "int32"), ("shape", 2, "Shape")),
    "Type": (("tensor_type", 1, "Tensor"),),
    "ValueInfo": (("name", 1, "string"), ("type", 2, "Type")),
    "TensorProto": (
        ("dims", 1, "*int64"),
        ("data_type", 2, "int32"),
        ("float_data", 4, "*float"),
        ("int64_data", 7, "*int64"),
        ("name", 8, "string"),
        ("raw_data", 9, "bytes"),
    ),
    "Attribute": (
        ("name", 1, "string"),
        ("i", 3, "int64"),
        ("s", 4, "bytes"),
        ("g", 6, "Graph"),
        ("ints", 8, "*int64"),
    ),
    "Node": (
        ("input", 1, "*string"),
        ("output", 2, "*string"),
        ("name", 3, "string"),
        ("op_type", 4, "string"),
        ("attribute", 5, "*Attribute"),
    ),
    "Graph": (
        ("node", 1, "*Node"),
        ("name", 2, "string"),
        ("initializer", 5, "*TensorProto"),
        ("input", 11, "*ValueInfo"),
        ("output", 12, "*ValueInfo"),
        ("value_info", 13, "*ValueInfo"),
    ),
    "Model": (("graph", 7, "Graph"),),
}


class Unlike(Exception):
    """The graph is not built as a rewriting expects; its caller leaves it as it is."""


class Graph:
    """A parsed model with look-ups by tensor name."""

    def __init__(self, model: bytes) -> None:
        self.envelope = _messages()["Model"].FromString(model)
        graph = _messages()["Graph"].FromString(self.envelope.graph.SerializeToString())
        self.envelope.ClearField("graph")
        self.nodes: list[Any] = list(graph.node)
        self.weights: dict[str, Any] = {item.name: item for item in graph.initializer}
        self.inputs: list[Any] = list(graph.input)
        self.outputs: list[str] = [item.name for item in graph.output]
        self._index()

    def _index(self) -> None:
        self.maker = {name: node for node in self.nodes for name in node.output}
        self.users: dict[str, list[Any]] = {}
        for node in self.nodes:
            for name in node.input:
                self.users.setdefault(name, []).append(node)

    @property
    def nested(self) -> bool:
        """Whether a node holds a graph of its own, whose use of outer tensors is not seen here."""
        return any(item.HasField("g") for node in self.nodes for item in node.attribute)

    def made_by(self, name: str, *kinds: str) -> Any:
        """The node that makes a tensor, which must be of one of these kinds."""
        node = self.maker.get(name)
        if node is None or node.op_type not in kinds:
            raise Unlike(name)
        return node

    def used_once(self, name: str) -> bool:
        """Whether one node alone uses a tensor."""
        return len(self.users.get(name, [])) == 1 and name not in self.outputs

    def array(self, name: str) -> NDArray[Any]:
        """The values of a constant of float32 or int64."""
        item = self.weights.get(name)
        if item is None or item.data_type not in (_FLOAT, _INT64):
            raise Unlike(name)
        kind, loose = (np.float32, item.float_data) if item.data_type == _FLOAT else (np.int64, item.int64_data)
        values = np.frombuffer(item.raw_data, dtype=kind) if item.raw_data else np.asarray(loose, dtype=kind)
        return values.reshape(list(item.dims))

    def constant(self, name: str, values: NDArray[np.float32]) -> str:
        """Add a constant; its name."""
        data = np.ascontiguousarray(values).tobytes()
        make = _messages()["TensorProto"]
        self.weights[name] = make(name=name, data_type=_FLOAT, dims=values.shape, raw_data=data)
        return name

    def replace(self, swaps: dict[int, list[Any]]) -> None:
        """Put other nodes (or none) in the place of nodes, given by `id`."""
        self.nodes = [item for node in self.nodes for item in swaps.get(id(node), [node])]
        self._index()

    def between(self, start: str | None, ends: list[str]) -> bytes:
        """The model that computes `ends` from the tensor `start`, or from the inputs."""
        wanted, kept = set(ends), []
        for node in reversed(self.nodes):
            if wanted.intersection(node.output) and start not in node.output:
                kept.append(node)
                wanted.update(node.input)
        inputs = self.inputs if start is None else [_free_picture(start)]
        return self._serialized(kept[::-1], inputs, ends)

    def serialized(self) -> bytes:
        """The model as it is now."""
        return self._serialized(self.nodes, self.inputs, self.outputs)

    def _serialized(self, nodes: list[Any], inputs: list[Any], outputs: list[str]) -> bytes:
        used = {name for node in nodes for name in node.input}
        model = _messages()["Model"]()
        model.CopyFrom(self.envelope)
        model.graph.name = "network"
        model.graph.node.extend(nodes)
        model.graph.initializer.extend(item for name, item in self.weights.items() if name in used)
        model.graph.input.extend(inputs)
        # onnxruntime and OpenVINO infer the types of outputs.
        model.graph.output.extend(_messages()["ValueInfo"](name=name) for name in outputs)
        return bytes(model.SerializeToString())


def make_node(kind: str, inputs: list[str], output: str, like: Any = None) -> Any:
    """A new node, with the attributes of `like`."""
    attributes = like.attribute if like is not None else []
    return _messages()["Node"](op_type=kind, name=output, input=inputs, output=[output], attribute=attributes)


def attribute(node: Any, name: str, default: int = 0) -> int:
    """A node's whole-number attribute."""
    return next((int(item.i) for item in node.attribute if item.name == name), default)


def _free_picture(name: str) -> Any:
    """An input of float32 with four free axes."""
    message = _messages()
    axes = [message["Dimension"](dim_param=axis) for axis in ("batch", "channels", "height", "width")]
    tensor = message["Tensor"](elem_type=_FLOAT, shape=message["Shape"](dim=axes))
    return message["ValueInfo"](name=name, type=message["Type"](tensor_type=tensor))


@cache
def _messages() -> dict[str, Any]:
    """The message classes of `_SCHEMA`, in a pool of their own."""
    file = descriptor_pb2.FileDescriptorProto(name="network.proto", package="network", syntax="proto2")
    for message, fields in _SCHEMA.items():
        entry = file.message_type.add(name=message)
        for name, number, kind in fields:
            field = entry.field.add(name=name, number=number)
            field.label = field.LABEL_REPEATED if kind.startswith("*") else field.LABEL_OPTIONAL
            plain = kind.lstrip("*")
            if plain in _SCHEMA:
                field.type, field.type_name = field.TYPE_MESSAGE, f".network.{plain}"
            else:
                field.type = getattr(field, f"TYPE_{plain.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"network.{name}")) for name in _SCHEMA}
