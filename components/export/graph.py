"""From a checkpoint to an ONNX graph whose bytes depend on the weights alone, and both of them as detectors."""

from __future__ import annotations

import ast
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from ..shared.detections import Detector, Floats, onnx_session, read_head
from ..shared.errors import InputError, ModelError
from ..shared.files import write_bytes
from ..shared.yolo import load_detector

__all__ = ["OPSET", "Checkpoint", "torch_detector", "write_onnx"]

OPSET = 19  # the newest that Triton 23.05 reads
_FORGOTTEN = (
    "date",
    "description",
    "args",
    "docs",
    "batch",
)  # time and place of the export, not properties of the model
_DEFAULT_IMGSZ = 640


class Checkpoint:
    """A detection checkpoint on disk: its classes, stride and input size.

    Args:
        path: the .pt file, loaded weights-only.

    Raises:
        ModelError: not a detection checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        model = load_detector(path)
        names = model.names
        self.classes = tuple(str(names[key]) for key in sorted(names))
        self.stride = int(model.stride.max())
        trained = model.args.get("imgsz", _DEFAULT_IMGSZ) if isinstance(model.args, dict) else _DEFAULT_IMGSZ
        self.imgsz = int(max(trained) if isinstance(trained, list | tuple) else trained)
        if len(set(self.classes)) != len(self.classes):
            raise ModelError(f"{path} has two classes of one name", "Rename one and train again.")

    def input_size(self, imgsz: int) -> int:
        """The input size to export for: `imgsz`, or the one of the training where it is 0.

        Raises:
            InputError: not a multiple of the stride.
        """
        size = imgsz or self.imgsz
        if size < self.stride or size % self.stride:
            raise InputError(f"imgsz is {size}", f"Give a multiple of the network's stride {self.stride}.")
        return size


def write_onnx(checkpoint: Checkpoint, target: Path, imgsz: int) -> None:
    """Export to ONNX with free batch, height and width, simplified; the same checkpoint gives the same bytes.

    Ultralytics puts the time of the export and the path of the training data into the graph's metadata; what stays
    is class names, stride, input size, task, and who made the network under which licence.

    Raises:
        ModelError: the network cannot be exported.
    """
    import onnx
    from ultralytics import YOLO

    with tempfile.TemporaryDirectory(prefix="haechi-export-") as folder:
        # The exporter writes next to the checkpoint, which may lie where nothing can be written.
        copy = Path(folder) / "checkpoint.pt"
        shutil.copyfile(checkpoint.path, copy)
        try:
            with warnings.catch_warnings():
                # The tracer warns of itself (its successor cannot make these graphs dynamic) and of each constant.
                warnings.simplefilter("ignore")
                made = YOLO(str(copy), task="detect").export(
                    format="onnx", dynamic=True, simplify=True, opset=OPSET, imgsz=imgsz, device="cpu", verbose=False
                )
        # torch.onnx raises a type of its own for each operator it cannot translate.
        except Exception as error:
            raise ModelError(
                f"{checkpoint.path} cannot be exported to ONNX ({error})",
                "Export a network of the YOLOv8, YOLO11 or YOLO26 families.",
            ) from error
        graph = onnx.load(str(made))
    kept = {entry.key: entry.value for entry in graph.metadata_props if entry.key not in _FORGOTTEN}
    del graph.metadata_props[:]
    # Intermediate shapes are annotations that runtimes infer anew; their order and wording change from run to run.
    del graph.graph.value_info[:]
    onnx.helper.set_model_props(graph, dict(sorted(kept.items())))
    if ast.literal_eval(kept["names"]) != dict(enumerate(checkpoint.classes)):
        raise ModelError(f"the graph exported from {checkpoint.path} lost its class names", "Export again.")
    write_bytes(target, graph.SerializeToString(deterministic=True))


def torch_detector(checkpoint: Checkpoint, graph: Path, imgsz: int) -> Detector:
    """The checkpoint itself as a detector, in float32 with fused layers, read like the graph exported from it."""
    import torch

    head = read_head(onnx_session(graph, threads=1), len(checkpoint.classes))
    model: Any = load_detector(checkpoint.path)
    model.end2end = head.kind == "end2end"
    model = model.fuse(verbose=False).eval()

    def run(batch: Floats) -> Floats:
        with torch.inference_mode():
            out = model(torch.from_numpy(batch))
        raw = out[0] if isinstance(out, list | tuple) else out
        return np.asarray(raw.numpy(), dtype=np.float32)

    return Detector(run, head, checkpoint.classes, imgsz, checkpoint.stride)
