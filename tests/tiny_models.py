"""Tiny detectors as real model folders: real ONNX graphs, run by onnxruntime, whose boxes can be worked out by hand.

The network looks at a picture through a grid of square cells (32 px by default, aligned to the input's top left).
Each cell is one anchor, and its box is the cell itself. The score of class c is

    score = clip(1 - distance / radius, 0, 1)

where `distance` is the Euclidean distance, in RGB from 0 to 1, between the cell's mean colour and the class's colour
in `COLOURS`. So on a picture whose sides are multiples of 32 and whose longer side is the model's `imgsz` (no scaling,
no padding), a cell painted `shade(c, 0.8)` is exactly one box of class c with score 0.8, and black or grey cells
give nothing at all. The head is `dense`: (batch, 4 + classes, anchors), with free batch, height and width.

    folder = tmp_path / "model"
    model = tiny_model_folder(folder, ["person", "dog"])
    data = paint({(2, 3): shade(0, 0.9), (5, 5): shade(1, 0.6)})      # PNG bytes, 320×320
    model.detector(folder).detect([decode(data)])                     # person at 64,96,96,128; dog at 160,160,192,192
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from haechi.components.shared.files import sha256_file, write_json
from haechi.components.shared.images import decode
from haechi.components.shared.model_folder import GOLDEN_CONF, GoldenImage, ModelFolder, write_golden

__all__ = ["CELL", "COLOURS", "cell_box", "paint", "shade", "tiny_model_folder", "tiny_network"]

CELL = 32
# Far enough from each other, from black and from the letterbox's grey that a radius of 0.5 tells them apart.
COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255), (0, 255, 255))


def shade(index: int, score: float = 1.0, radius: float = 0.5) -> tuple[int, int, int]:
    """The colour to which class `index` gives `score` (±0.006, as colours are whole numbers)."""
    reference = np.asarray(COLOURS[index], dtype=float)
    darker = 1 - (1 - score) * radius / np.linalg.norm(reference / 255)
    red, green, blue = (round(value * darker) for value in reference)
    return red, green, blue


def cell_box(column: int, row: int, cell: int = CELL) -> tuple[int, int, int, int]:
    """Corners of a cell in pixels."""
    return column * cell, row * cell, (column + 1) * cell, (row + 1) * cell


def paint(
    cells: Mapping[tuple[int, int], tuple[int, int, int]],
    width: int = 320,
    height: int = 320,
    cell: int = CELL,
    ground: tuple[int, int, int] = (0, 0, 0),
) -> bytes:
    """A PNG with the cells (column, row) painted; another `ground` makes another file of the same boxes."""
    pixels = np.full((height, width, 3), ground, dtype=np.uint8)
    for (column, row), colour in cells.items():
        pixels[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell] = colour
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


def tiny_network(classes: Sequence[str], cell: int = CELL, radius: float = 0.5, shift: float = 0.0) -> onnx.ModelProto:
    """The graph described above.

    Args:
        classes: at most as many as there are COLOURS.
        cell: side of a cell in pixels.
        radius: colour distance at which a score has fallen to 0; a smaller one makes a blinder model.
        shift: pixels by which every box lies too far right, for a model that is worse in a known way: 8 of 32 gives
            IoU 0.6 with the truth.
    """
    count = len(classes)
    colours = np.asarray(COLOURS[:count], dtype=np.float32).reshape(1, count, 3, 1, 1) / 255
    constants = {
        "colours": colours,
        "slope": np.float32(-1 / radius),
        "one": np.float32(1),
        "zero": np.float32(0),
        "side": np.full((1, 1, 1, 1), cell, dtype=np.float32),
        "cell": np.float32(cell),
        "half_x": np.float32(cell / 2 + shift),
        "half_y": np.float32(cell / 2),
        "i0": np.int64(0),
        "i1": np.int64(1),
        "i2": np.int64(2),
        "i3": np.int64(3),
        "axis1": np.asarray([1], dtype=np.int64),
        "axis2": np.asarray([2], dtype=np.int64),
        "v1": np.asarray([1], dtype=np.int64),
        "as_row": np.asarray([1, 1, 1, -1], dtype=np.int64),
        "as_column": np.asarray([1, 1, -1, 1], dtype=np.int64),
        "flat": np.asarray([0, 0, -1], dtype=np.int64),
    }
    node = helper.make_node
    nodes = [
        node("AveragePool", ["images"], ["means"], kernel_shape=[cell, cell], strides=[cell, cell]),
        # Scores: distance of each cell's mean to each class's colour.
        node("Unsqueeze", ["means", "axis1"], ["means5"]),
        node("Sub", ["means5", "colours"], ["differences"]),
        node("Mul", ["differences", "differences"], ["squares"]),
        node("ReduceSum", ["squares", "axis2"], ["sums"], keepdims=0),
        node("Sqrt", ["sums"], ["distances"]),
        node("Mul", ["distances", "slope"], ["sloped"]),
        node("Add", ["sloped", "one"], ["raw_scores"]),
        node("Clip", ["raw_scores", "zero", "one"], ["scores"]),
        # Boxes: the grid's centres, expanded to (batch, 1, rows, columns).
        node("Shape", ["means"], ["shape"]),
        node("Gather", ["shape", "i0"], ["n"], axis=0),
        node("Gather", ["shape", "i2"], ["rows"], axis=0),
        node("Gather", ["shape", "i3"], ["columns"], axis=0),
        *[node("Unsqueeze", [name, "i0_list"], [f"{name}1"]) for name in ("n", "rows", "columns")],
        node("Concat", ["n1", "v1", "rows1", "columns1"], ["grid"], axis=0),
        *_centres("columns", "half_x", "as_row", "cx"),
        *_centres("rows", "half_y", "as_column", "cy"),
        node("Expand", ["side", "grid"], ["sides"]),
        node("Concat", ["cx", "cy", "sides", "sides", "scores"], ["head"], axis=1),
        node("Reshape", ["head", "flat"], ["output0"]),
    ]
    constants["i0_list"] = np.asarray([0], dtype=np.int64)
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, "height", "width"])],
        [helper.make_tensor_value_info("output0", TensorProto.FLOAT, ["batch", 4 + count, "anchors"])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, {"names": str(dict(enumerate(classes))), "stride": str(cell), "task": "detect"})
    onnx.checker.check_model(model, full_check=True)
    return model


def _centres(size: str, half: str, layout: str, out: str) -> list[onnx.NodeProto]:
    node = helper.make_node
    return [
        node("Range", ["i0", size, "i1"], [f"{out}_index"]),
        node("Cast", [f"{out}_index"], [f"{out}_float"], to=TensorProto.FLOAT),
        node("Mul", [f"{out}_float", "cell"], [f"{out}_start"]),
        node("Add", [f"{out}_start", half], [f"{out}_centre"]),
        node("Reshape", [f"{out}_centre", layout], [f"{out}_laid"]),
        node("Expand", [f"{out}_laid", "grid"], [out]),
    ]


def tiny_model_folder(
    path: Path,
    classes: Sequence[str],
    *,
    name: str = "tiny",
    imgsz: int = 320,
    cell: int = CELL,
    radius: float = 0.5,
    shift: float = 0.0,
    threshold: float = 0.5,
    golden: bool = True,
    checkpoint: bytes = b"",
    dataset_digest: str = "",
) -> ModelFolder:
    """Write a complete model folder of a tiny network at `path`; its description.

    Args:
        path: the folder, made where missing.
        classes: ordered class names, at most six.
        name, imgsz, dataset_digest: as in ModelFolder.
        cell, radius, shift: of `tiny_network`; other values give another version.
        threshold: reporting confidence of every class.
        golden: write two golden images, one with every class and one with none; without them nothing proves the folder.
        checkpoint: bytes to stand as `checkpoint.pt` (not loadable by torch); none for no such file.
    """
    path.mkdir(parents=True, exist_ok=True)
    onnx.save(tiny_network(classes, cell, radius, shift), path / "model.onnx")
    if checkpoint:
        (path / "checkpoint.pt").write_bytes(checkpoint)
    digest = sha256_file(path / "model.onnx")
    model = ModelFolder(
        name=name,
        version=digest[:12],
        classes=tuple(classes),
        imgsz=imgsz,
        stride=cell,
        thresholds=dict.fromkeys(classes, threshold),
        iou=0.7,
        onnx_sha256=digest,
        checkpoint_sha256=sha256_file(path / "checkpoint.pt") if checkpoint else "",
        golden=2 if golden else 0,
        dataset_digest=dataset_digest,
        created_at="2026-01-01T00:00:00+00:00",
        metrics={"val/mAP50-95": 0.5, "val/mAP50": 0.5},
        licence="MIT",
    )
    if golden:
        _write_golden(path, model)
    write_json(path / "parity.json", {"ok": True if golden else None, "images": model.golden})
    model.write(path)
    return model


def _write_golden(path: Path, model: ModelFolder) -> None:
    cell, side = model.stride, model.imgsz
    detector = model.detector(path, threads=1)
    every = {(index, index): shade(index, 0.9) for index in range(len(model.classes))}
    images = []
    for name, cells in (("every_class.png", every), ("empty.png", {})):
        data = paint(cells, side, side, cell)
        found = detector.detect([decode(data)], conf=GOLDEN_CONF, iou=model.iou)[0]
        images.append(GoldenImage(name, data, found))
    write_golden(path, images, model.classes)
