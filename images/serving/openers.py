"""Openers: the ways in which a model folder's network can be opened, each as a `Backend` that nothing has proven yet."""

from __future__ import annotations

import importlib.util
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from haechi.components.shared.detections import Detector, Head, onnx_session
from haechi.components.shared.errors import ModelError
from haechi.components.shared.model_folder import ModelFolder
from haechi.components.shared.parity import Agreement

from .graph import Parts, lighten, take_apart
from .selective import SelectiveNetwork

__all__ = [
    "CUDA",
    "Backend",
    "Source",
    "cuda",
    "openvino_bf16",
    "openvino_fp32",
    "openvino_installed",
    "selective",
    "whole",
]

Floats = NDArray[np.float32]
_Network = Callable[[Floats], Floats]
_Outputs = Callable[[Floats], list[Floats]]

CUDA = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"
_ONNX = "onnxruntime"


@dataclass(frozen=True)
class Backend:
    """How the network is run.

    Attributes:
        engine: `onnxruntime` or `openvino`.
        provider: onnxruntime's name for where it runs, or OpenVINO's device.
        precision: `fp32` or `bf16`.
        threads: compute threads of one run.
        streams: threads that may call the detector at the same time.
        reason: why this one was chosen.
        detector: the network with its pre- and post-processing.
        golden: what the golden images gave; None where there are none.
    """

    engine: str
    provider: str
    precision: str
    threads: int
    streams: int
    reason: str
    detector: Detector
    golden: Agreement | None = None


@dataclass(frozen=True)
class Source:
    """A model folder with what every way of opening it needs; `boxes` is the number of its golden boxes."""

    folder: Path
    model: ModelFolder
    threads: int
    streams: int
    head: Head
    boxes: int

    @property
    def graph(self) -> bytes:
        """The ONNX file."""
        return (self.folder / "model.onnx").read_bytes()

    def parts(self) -> Parts | None:
        """The network in parts, where it can be taken apart and takes any number of images."""
        return take_apart(self.graph) if self.head.kind == "dense" and self.head.batch == 0 else None

    def backend(self, engine: str, provider: str, precision: str, reason: str, network: _Network) -> Backend:
        """The description around a network."""
        above = network if isinstance(network, SelectiveNetwork) else None
        model = self.model
        detector = Detector(network, self.head, model.classes, model.imgsz, model.stride, above)
        return Backend(engine, provider, precision, self.threads, self.streams, reason, detector)


def selective(source: Source) -> Backend:
    """onnxruntime on the network in parts, or with less work where it cannot be taken apart."""
    if not source.boxes:
        raise ModelError("no golden box could prove it")
    parts = source.parts()
    if parts is None:
        network = _only(_onnx(lighten(source.graph), source.threads))
        return source.backend(_ONNX, _CPU, "fp32", "the rewritten graph", network)
    return source.backend(
        _ONNX,
        _CPU,
        "fp32",
        "boxes only where a class scores",
        _assemble(parts, _onnx(parts.trunk, source.threads), source),
    )


def whole(source: Source) -> Backend:
    """onnxruntime on the graph as it stands."""
    network = _only(_onnx(source.graph, source.threads))
    return source.backend(_ONNX, _CPU, "fp32", "the graph as it stands", network)


def cuda(source: Source) -> Backend:
    """onnxruntime on an NVIDIA GPU, in full float32. Not run by the tests: no GPU there."""
    # TensorFloat-32, the default, rounds products to 10 bits.
    session = onnx_session(source.graph, source.threads, [(CUDA, {"use_tf32": "0"}), _CPU])
    # onnxruntime goes on without the GPU where a library is missing.
    if session.get_providers()[0] != CUDA:
        raise ModelError("onnxruntime's CUDA libraries cannot be loaded")
    name = source.head.input_name
    return source.backend(_ONNX, CUDA, "fp32", "a GPU is there", lambda batch: session.run(None, {name: batch})[0])


def openvino_bf16(source: Source) -> Backend:
    """OpenVINO in bfloat16, where the processor multiplies it."""
    return _openvino(source, "bf16")


def openvino_fp32(source: Source) -> Backend:
    """OpenVINO in float32."""
    return _openvino(source, "fp32")


def _openvino(source: Source, precision: str) -> Backend:
    # Its telemetry would fork this process at the import, to tell Google Analytics of it.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino  # type: ignore[import-untyped]

    core = openvino.Core()
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise ModelError("this processor has no bf16")
    config = {
        "NUM_STREAMS": source.streams,
        "INFERENCE_NUM_THREADS": source.threads * source.streams,
        "INFERENCE_PRECISION_HINT": "f32" if precision == "fp32" else precision,
        # The container's CPUs are not its own to pin.
        "ENABLE_CPU_PINNING": False,
    }
    parts = source.parts()
    compiled = core.compile_model(core.read_model(parts.trunk if parts else source.graph), "CPU", config)
    here = threading.local()

    def run(batch: Floats) -> list[Floats]:
        if not hasattr(here, "request"):  # a request serves one caller at a time
            here.request = compiled.create_infer_request()
        here.request.infer([batch], share_inputs=True)
        return [here.request.get_output_tensor(index).data.copy() for index in range(len(compiled.outputs))]

    network = _assemble(parts, run, source) if parts else _only(run)
    return source.backend("openvino", "CPU", precision, f"OpenVINO at {precision}", network)


def _assemble(parts: Parts, trunk: _Outputs, source: Source) -> SelectiveNetwork:
    """The network of a trunk and onnxruntime's branches, which work on too little for another engine to matter."""
    branches = [(_only(_onnx(branch.model, 1)), branch.margin) for branch in parts.branches]
    return SelectiveNetwork(trunk, branches, parts.bins)


def _onnx(graph: bytes, threads: int) -> _Outputs:
    session = onnx_session(graph, threads)
    name = session.get_inputs()[0].name
    return lambda batch: session.run(None, {name: batch})


def _only(run: _Outputs) -> _Network:
    return lambda batch: run(batch)[0]


def openvino_installed() -> bool:
    """Whether the package is there."""
    return importlib.util.find_spec("openvino") is not None
