"""A small network built as Ultralytics exports its detectors, with random weights: the same patterns in 60 nodes.

Two levels (strides 8 and 16), a split block, an enlarged map, a box and a class branch each level, distances as the
mean of a distribution (or, with `bins` 1, as they come). The input is 128x128, the batch is free.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from haechi.components.shared.detections import Detector
from haechi.components.shared.files import sha256_file
from haechi.components.shared.images import decode, encode_jpeg
from haechi.components.shared.model_folder import GOLDEN_CONF, GoldenImage, ModelFolder, write_golden

__all__ = ["SIDE", "small_yolo", "small_yolo_folder"]

SIDE = 128
_CLASSES = ("person", "dog", "car")


class _Builder:
    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def constant(self, name: str, values: np.ndarray) -> str:
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def add(self, kind: str, inputs: list[str], output: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], output, **attributes))
        return output

    def conv(
        self,
        source: str,
        name: str,
        inside: int,
        outside: int,
        side: int,
        stride: int = 1,
        bias: float = 0,
        gain: float = 1.4,
    ) -> str:
        weights = self.random.normal(0, gain / np.sqrt(inside * side * side), (outside, inside, side, side))
        inputs = [
            source,
            self.constant(f"{name}.weight", weights.astype(np.float32)),
            self.constant(f"{name}.bias", (self.random.normal(0, 0.2, outside) + bias).astype(np.float32)),
        ]
        pad = side // 2 if stride < side or side == 1 else 0
        sizes = {"kernel_shape": [side, side], "strides": [stride, stride], "pads": [pad] * 4, "dilations": [1, 1]}
        return self.add("Conv", inputs, name, group=1, **sizes)

    def silu(self, source: str) -> str:
        return self.add("Mul", [source, self.add("Sigmoid", [source], f"{source}/sigmoid")], f"{source}/silu")

    def reshape(self, source: str, name: str, shape: list[int]) -> str:
        return self.add("Reshape", [source, self.constant(f"{name}.shape", np.asarray(shape, dtype=np.int64))], name)


def small_yolo(bins: int = 4, seed: int = 0) -> bytes:
    """The network's ONNX bytes."""
    net = _Builder(seed)
    stem = net.silu(net.conv("images", "stem", 3, 32, 8, stride=8))
    net.constant("halves", np.asarray([16, 16], dtype=np.int64))
    cut = net.silu(net.conv(stem, "cut", 32, 32, 1))
    net.nodes.append(helper.make_node("Split", [cut, "halves"], ["half0", "half1"], "split", axis=1))
    inner = net.silu(net.conv("half1", "inner", 16, 16, 3))
    fine = net.silu(net.conv(net.add("Concat", ["half0", "half1", inner], "block", axis=1), "fine", 48, 32, 1))
    coarse = net.silu(net.conv(fine, "coarse", 32, 32, 3, stride=2))
    net.constant("scales", np.asarray([1, 1, 2, 2], dtype=np.float32))
    sampling = {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}
    large = net.add("Resize", [coarse, "", "scales"], "large", **sampling)
    joined = net.silu(net.conv(net.add("Concat", [large, fine], "joined", axis=1), "mixed", 64, 32, 1))
    distances, logits = [], []
    for level, features in enumerate((joined, coarse)):
        box = net.silu(net.conv(features, f"box{level}a", 32, 16, 3))
        box = net.conv(net.silu(net.conv(box, f"box{level}b", 16, 16, 3)), f"box{level}c", 16, 4 * bins, 1, bias=1)
        distances.append(net.reshape(box, f"distances{level}", [0, 4 * bins, -1]))
        score = net.conv(
            net.silu(net.conv(features, f"score{level}a", 32, 16, 3)), f"score{level}b", 16, 3, 1, bias=-5, gain=14
        )
        logits.append(net.reshape(score, f"scores{level}", [0, 3, -1]))
    last = net.add("Concat", distances, "distances", axis=2)
    if bins > 1:
        last = net.add("Transpose", [net.reshape(last, "binned", [0, 4, bins, -1])], "turned", perm=[0, 2, 1, 3])
        last = net.add("Softmax", [last], "shares", axis=1)
        mean = net.constant("bins", np.arange(bins, dtype=np.float32).reshape(1, bins, 1, 1))
        last = net.reshape(net.add("Conv", [last, mean], "mean", kernel_shape=[1, 1]), "sides", [0, 4, -1])
    boxes = _boxes(net, last)
    scores = net.add("Sigmoid", [net.add("Concat", logits, "logits", axis=2)], "scores")
    net.add("Concat", [boxes, scores], "output0", axis=1)
    anchors = sum((SIDE // stride) ** 2 for stride in (8, 16))
    graph = helper.make_graph(
        net.nodes,
        "small_yolo",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("output0", TensorProto.FLOAT, ["batch", 7, anchors])],
        net.weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def _boxes(net: _Builder, sides: str) -> str:
    """Centre x, y, width, height in pixels from distances in cells, as `dist2bbox` does."""
    centres, strides = [], []
    for stride in (8, 16):
        count = SIDE // stride
        y, x = np.mgrid[:count, :count].reshape(2, -1) + 0.5
        centres.append(np.stack([x, y]))
        strides.append(np.full(count * count, stride))
    net.constant("centres", np.concatenate(centres, axis=1)[None].astype(np.float32))
    net.constant("strides", np.concatenate(strides)[None, None].astype(np.float32))
    net.constant("two", np.asarray(2, dtype=np.float32))
    for name, value in (("at0", 0), ("at2", 2), ("at4", 4), ("axis1", 1)):
        net.constant(name, np.asarray([value], dtype=np.int64))
    low = net.add("Sub", ["centres", net.add("Slice", [sides, "at0", "at2", "axis1"], "left_top")], "low")
    high = net.add("Add", ["centres", net.add("Slice", [sides, "at2", "at4", "axis1"], "right_bottom")], "high")
    middle = net.add("Div", [net.add("Add", [low, high], "both"), "two"], "middle")
    joined = net.add("Concat", [middle, net.add("Sub", [high, low], "size")], "cells", axis=1)
    return net.add("Mul", [joined, "strides"], "boxes")


def small_yolo_folder(folder: Path, golden: int = 6, bins: int = 4) -> ModelFolder:
    """A model folder around it, with golden images of noise."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(small_yolo(bins))
    detector = Detector.from_onnx(folder / "model.onnx", _CLASSES, SIDE, threads=1)
    random = np.random.default_rng(5)
    images = []
    for index in range(golden):
        coarse = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        data = encode_jpeg(np.repeat(np.repeat(coarse, 16, axis=0), 16, axis=1))
        images.append(GoldenImage(f"{index}.jpg", data, detector.detect([decode(data)], conf=GOLDEN_CONF)[0]))
    if images:
        write_golden(folder, images, _CLASSES)
    digest = sha256_file(folder / "model.onnx")
    thresholds = dict.fromkeys(_CLASSES, 0.25)
    model = ModelFolder("small", digest[:12], _CLASSES, SIDE, 32, thresholds, 0.7, digest, golden=golden)
    model.write(folder)
    return model
