"""Graph surgery at load: the same network with less work, from the bytes of any YOLO-style ONNX file.

`lighten` rewrites two patterns whose results are equal but for the rounding of sums: a convolution that is split in
two afterwards becomes two (no split, no reordering of memory), and a 1x1 convolution over an enlarged map runs
before the enlarging. `take_apart` separates the box branches of a detector from the rest, so that boxes are worked
out only around the cells where some class scores.

Read and written through protobuf with the few fields that are touched here; it keeps the others as they are. The
`onnx` package, which would do the same, is several times the size of the runtime's own code.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from numpy.typing import NDArray

__all__ = ["Branch", "Parts", "lighten", "take_apart"]

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


@dataclass(frozen=True)
class Branch:
    """The convolutions that make box distances of one level's features.

    Attributes:
        model: ONNX bytes, (1, channels, h, w) to (1, 4 * bins, h, w), h and w free.
        margin: cells around a cell that its result depends on.
    """

    model: bytes
    margin: int


@dataclass(frozen=True)
class Parts:
    """A dense detector in parts.

    Attributes:
        trunk: ONNX bytes, the image to the class scores (n, classes, anchors) and the features of each level.
        branches: one a level, in the order of the trunk's features and of the anchors.
        bins: of the distribution that each distance is the mean of; 1 where the distance itself comes out.
    """

    trunk: bytes
    branches: tuple[Branch, ...]
    bins: int


class _Unlike(Exception):
    """The graph is not built as expected; it stays as it is."""


def lighten(model: bytes) -> bytes:
    """The same network with less work; unchanged where no pattern fits."""
    graph = _Graph(model)
    if graph.nested:
        return model
    changed = [_enlarge_later(graph), _split_earlier(graph)]
    return graph.serialized() if any(changed) else model


def take_apart(model: bytes) -> Parts | None:
    """Separate the box branches of a dense head (YOLOv8/11/26 as Ultralytics exports them); None for any other."""
    graph = _Graph(model)
    try:
        if graph.nested:
            return None
        scores, levels, bins = _head(graph)
        found = [_branch(graph, level) for level in levels]
    except _Unlike:
        return None
    trunk = graph.between(None, [scores, *(start for start, _ in found)])
    return Parts(
        lighten(trunk),
        tuple(Branch(graph.between(start, [end]), margin) for (start, margin), end in zip(found, levels, strict=True)),
        bins,
    )


class _Graph:
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
            raise _Unlike(name)
        return node

    def used_once(self, name: str) -> bool:
        """Whether one node alone uses a tensor."""
        return len(self.users.get(name, [])) == 1 and name not in self.outputs

    def array(self, name: str) -> NDArray[Any]:
        """The values of a constant of float32 or int64."""
        item = self.weights.get(name)
        if item is None or item.data_type not in (_FLOAT, _INT64):
            raise _Unlike(name)
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


def _head(graph: _Graph) -> tuple[str, list[str], int]:
    """(class scores, box distances of each level, bins) of a dense head."""
    parts = graph.made_by(graph.outputs[0], "Concat").input
    scores = parts[-1]
    graph.made_by(scores, "Sigmoid")
    # The distances to the four sides are cut into (left, top) and (right, bottom); nothing else is sliced.
    sliced = {node.input[0] for node in graph.nodes if node.op_type == "Slice"}
    if len(parts) != 2 or len(sliced) != 1:
        raise _Unlike("head")
    bins = 1
    last = graph.made_by(sliced.pop(), "Concat", "Reshape")
    if last.op_type == "Reshape":  # the mean of a distribution: a 1x1 convolution with the weights 0, 1, 2, …
        mean = graph.made_by(last.input[0], "Conv")
        weights = graph.array(mean.input[1]).ravel()
        bins = len(weights)
        if not np.array_equal(weights, np.arange(bins)):
            raise _Unlike("bins")
        name = mean.input[0]
        for kind in ("Softmax", "Transpose", "Reshape"):
            name = graph.made_by(name, kind).input[0]
        last = graph.made_by(name, "Concat")
    return scores, [graph.made_by(name, "Reshape").input[0] for name in last.input], bins


def _branch(graph: _Graph, end: str) -> tuple[str, int]:
    """(features, margin) of the chain of convolutions that ends in `end`: back to where others use the tensor too."""
    name, margin = end, 0
    while True:
        conv = graph.made_by(name, "Conv")
        margin += _reach(graph, conv)
        before = conv.input[0]
        activated = _activated(graph, before)
        if activated is None or not graph.used_once(before):
            return before, margin
        name = activated


def _reach(graph: _Graph, conv: Any) -> int:
    """Cells to each side that a size-keeping convolution looks at."""
    side = graph.array(conv.input[1]).shape[-1]
    expected = {"strides": [1, 1], "dilations": [1, 1], "pads": [side // 2] * 4, "kernel_shape": [side, side]}
    for item in conv.attribute:
        if item.name in expected and list(item.ints) != expected[item.name]:
            raise _Unlike(conv.name)
    return int(side // 2)


def _activated(graph: _Graph, name: str) -> str | None:
    """The tensor x where `name` is SiLU, x * sigmoid(x), and x is used for nothing else."""
    product = graph.maker.get(name)
    if product is None or product.op_type != "Mul":
        return None
    for value, gate in (product.input, product.input[::-1]):
        sigmoid = graph.maker.get(gate)
        if sigmoid is not None and sigmoid.op_type == "Sigmoid" and sigmoid.input[0] == value:
            alone = len(graph.users[value]) == 2 and graph.used_once(gate) and value not in graph.outputs
            return str(value) if alone else None
    return None


def _split_earlier(graph: _Graph) -> bool:
    """Split(SiLU(Conv(x))) over channels becomes one SiLU(Conv(x)) for each part."""
    swaps: dict[int, list[Any]] = {}
    for split in [node for node in graph.nodes if node.op_type == "Split" and _attribute(node, "axis") == 1]:
        try:
            before = _activated(graph, split.input[0])
            if before is None or not graph.used_once(split.input[0]):
                continue
            conv = graph.made_by(before, "Conv")
            sizes = [int(size) for size in graph.array(split.input[1])]
            constants = [graph.array(name) for name in conv.input[1:]]
        except (_Unlike, IndexError):
            continue
        if _attribute(conv, "group", 1) != 1:
            continue
        parts: list[Any] = []
        for index, output in enumerate(split.output):
            chosen = slice(sum(sizes[:index]), sum(sizes[: index + 1]))
            name = f"{conv.output[0]}/part{index}"
            inputs = [graph.constant(f"{name}/{k}", values[chosen]) for k, values in enumerate(constants)]
            parts += [
                _node("Conv", [conv.input[0], *inputs], name, conv),
                _node("Sigmoid", [name], f"{name}/sigmoid"),
                _node("Mul", [name, f"{name}/sigmoid"], output),
            ]
        gone = [conv, *graph.users[before]]
        swaps |= {id(node): [] for node in gone} | {id(split): parts}
    graph.replace(swaps)
    return bool(swaps)


def _enlarge_later(graph: _Graph) -> bool:
    """Conv1x1(Concat(Resize(a), b)) becomes Resize(Conv1x1(a)) + Conv1x1(b), for Resize by repeating cells."""
    swaps: dict[int, list[Any]] = {}
    for conv in [node for node in graph.nodes if node.op_type == "Conv"]:
        try:
            joined = graph.made_by(conv.input[0], "Concat")
            large, other = joined.input
            resize = graph.made_by(large, "Resize")
            small = graph.made_by(_activated(graph, resize.input[0]) or resize.input[0], "Conv")
            channels = graph.array(small.input[1]).shape[0]
            weights = graph.array(conv.input[1])
        except (_Unlike, ValueError):
            continue
        plain = weights.shape[2:] == (1, 1) and _attribute(conv, "group", 1) == 1 and _attribute(joined, "axis") == 1
        if not (plain and _repeats_cells(graph, resize) and graph.used_once(large) and graph.used_once(conv.input[0])):
            continue
        name = conv.output[0]
        first = graph.constant(f"{name}/first", weights[:, :channels])
        second = graph.constant(f"{name}/second", weights[:, channels:])
        swaps[id(resize)] = swaps[id(joined)] = []
        swaps[id(conv)] = [
            _node("Conv", [resize.input[0], first], f"{name}/small", conv),
            _node("Resize", [f"{name}/small", *resize.input[1:]], f"{name}/large", resize),
            _node("Conv", [other, second, *conv.input[2:]], f"{name}/other", conv),
            _node("Add", [f"{name}/other", f"{name}/large"], name),
        ]
    graph.replace(swaps)
    return bool(swaps)


def _node(kind: str, inputs: list[str], output: str, like: Any = None) -> Any:
    """A new node, with the attributes of `like`."""
    attributes = like.attribute if like is not None else []
    return _messages()["Node"](op_type=kind, name=output, input=inputs, output=[output], attribute=attributes)


def _attribute(node: Any, name: str, default: int = 0) -> int:
    return next((int(item.i) for item in node.attribute if item.name == name), default)


def _repeats_cells(graph: _Graph, resize: Any) -> bool:
    """Whether a Resize takes the nearest cell by fixed factors, and leaves images and channels alone."""
    mode = next((bytes(item.s) for item in resize.attribute if item.name == "mode"), b"nearest")
    if mode != b"nearest" or len(resize.input) != 3 or resize.input[1]:
        return False
    scales = graph.weights.get(resize.input[2])
    return scales is not None and list(graph.array(scales.name)[:2]) == [1, 1]


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
