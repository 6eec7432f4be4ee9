"""Graph surgery at load: the same network with less work, from the bytes of any YOLO-style ONNX file.

`lighten` rewrites two patterns whose results are equal but for the rounding of sums: a convolution that is split in
two afterwards becomes two (no split, no reordering of memory), and a 1x1 convolution over an enlarged map runs
before the enlarging. `take_apart` separates the box branches of a detector from the rest, so that boxes are worked
out only around the cells where some class scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .onnx_graph import Graph, Unlike, attribute, make_node

__all__ = ["Branch", "Parts", "lighten", "take_apart"]


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


def lighten(model: bytes) -> bytes:
    """The same network with less work; unchanged where no pattern fits."""
    graph = Graph(model)
    if graph.nested:
        return model
    changed = [_enlarge_later(graph), _split_earlier(graph)]
    return graph.serialized() if any(changed) else model


def take_apart(model: bytes) -> Parts | None:
    """Separate the box branches of a dense head (YOLOv8/11/26 as Ultralytics exports them); None for any other."""
    graph = Graph(model)
    try:
        if graph.nested:
            return None
        scores, levels, bins = _head(graph)
        found = [_branch(graph, level) for level in levels]
    except Unlike:
        return None
    trunk = graph.between(None, [scores, *(start for start, _ in found)])
    return Parts(
        lighten(trunk),
        tuple(Branch(graph.between(start, [end]), margin) for (start, margin), end in zip(found, levels, strict=True)),
        bins,
    )


def _head(graph: Graph) -> tuple[str, list[str], int]:
    """(class scores, box distances of each level, bins) of a dense head."""
    parts = graph.made_by(graph.outputs[0], "Concat").input
    scores = parts[-1]
    graph.made_by(scores, "Sigmoid")
    # The distances to the four sides are cut into (left, top) and (right, bottom); nothing else is sliced.
    sliced = {node.input[0] for node in graph.nodes if node.op_type == "Slice"}
    if len(parts) != 2 or len(sliced) != 1:
        raise Unlike("head")
    bins = 1
    last = graph.made_by(sliced.pop(), "Concat", "Reshape")
    if last.op_type == "Reshape":  # the mean of a distribution: a 1x1 convolution with the weights 0, 1, 2, …
        mean = graph.made_by(last.input[0], "Conv")
        weights = graph.array(mean.input[1]).ravel()
        bins = len(weights)
        if not np.array_equal(weights, np.arange(bins)):
            raise Unlike("bins")
        name = mean.input[0]
        for kind in ("Softmax", "Transpose", "Reshape"):
            name = graph.made_by(name, kind).input[0]
        last = graph.made_by(name, "Concat")
    return scores, [graph.made_by(name, "Reshape").input[0] for name in last.input], bins


def _branch(graph: Graph, end: str) -> tuple[str, int]:
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


def _reach(graph: Graph, conv: Any) -> int:
    """Cells to each side that a size-keeping convolution looks at."""
    side = graph.array(conv.input[1]).shape[-1]
    expected = {"strides": [1, 1], "dilations": [1, 1], "pads": [side // 2] * 4, "kernel_shape": [side, side]}
    for item in conv.attribute:
        if item.name in expected and list(item.ints) != expected[item.name]:
            raise Unlike(conv.name)
    return int(side // 2)


def _activated(graph: Graph, name: str) -> str | None:
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


def _split_earlier(graph: Graph) -> bool:
    """Split(SiLU(Conv(x))) over channels becomes one SiLU(Conv(x)) for each part."""
    swaps: dict[int, list[Any]] = {}
    for split in [node for node in graph.nodes if node.op_type == "Split" and attribute(node, "axis") == 1]:
        try:
            before = _activated(graph, split.input[0])
            if before is None or not graph.used_once(split.input[0]):
                continue
            conv = graph.made_by(before, "Conv")
            sizes = [int(size) for size in graph.array(split.input[1])]
            constants = [graph.array(name) for name in conv.input[1:]]
        except (Unlike, IndexError):
            continue
        if attribute(conv, "group", 1) != 1:
            continue
        parts: list[Any] = []
        for index, output in enumerate(split.output):
            chosen = slice(sum(sizes[:index]), sum(sizes[: index + 1]))
            name = f"{conv.output[0]}/part{index}"
            inputs = [graph.constant(f"{name}/{k}", values[chosen]) for k, values in enumerate(constants)]
            parts += [
                make_node("Conv", [conv.input[0], *inputs], name, conv),
                make_node("Sigmoid", [name], f"{name}/sigmoid"),
                make_node("Mul", [name, f"{name}/sigmoid"], output),
            ]
        gone = [conv, *graph.users[before]]
        swaps |= {id(node): [] for node in gone} | {id(split): parts}
    graph.replace(swaps)
    return bool(swaps)


def _enlarge_later(graph: Graph) -> bool:
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
        except (Unlike, ValueError):
            continue
        plain = weights.shape[2:] == (1, 1) and attribute(conv, "group", 1) == 1 and attribute(joined, "axis") == 1
        if not (plain and _repeats_cells(graph, resize) and graph.used_once(large) and graph.used_once(conv.input[0])):
            continue
        name = conv.output[0]
        first = graph.constant(f"{name}/first", weights[:, :channels])
        second = graph.constant(f"{name}/second", weights[:, channels:])
        swaps[id(resize)] = swaps[id(joined)] = []
        swaps[id(conv)] = [
            make_node("Conv", [resize.input[0], first], f"{name}/small", conv),
            make_node("Resize", [f"{name}/small", *resize.input[1:]], f"{name}/large", resize),
            make_node("Conv", [other, second, *conv.input[2:]], f"{name}/other", conv),
            make_node("Add", [f"{name}/other", f"{name}/large"], name),
        ]
    graph.replace(swaps)
    return bool(swaps)


def _repeats_cells(graph: Graph, resize: Any) -> bool:
    """Whether a Resize takes the nearest cell by fixed factors, and leaves images and channels alone."""
    mode = next((bytes(item.s) for item in resize.attribute if item.name == "mode"), b"nearest")
    if mode != b"nearest" or len(resize.input) != 3 or resize.input[1]:
        return False
    scales = graph.weights.get(resize.input[2])
    return scales is not None and list(graph.array(scales.name)[:2]) == [1, 1]
