"""Backends: which engine runs the network here, at what precision and with how many threads, and why.

The fastest way that gives the golden boxes is taken; where none of the faster ones does, or nothing can prove them,
it is the graph as it stands in onnxruntime, which is also what evaluate, label and export run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from haechi.components.shared.cpus import granted_cpus
from haechi.components.shared.detections import onnx_session, read_head
from haechi.components.shared.errors import HaechiError, InputError, IntegrityError, ModelError, SettingsError
from haechi.components.shared.images import decode
from haechi.components.shared.model_folder import GOLDEN_CONF, ModelFolder, check_golden, read_golden
from haechi.components.shared.parity import Tolerance
from haechi.components.shared.progress import say

from .openers import (
    CUDA,
    Backend,
    Source,
    cuda,
    openvino_bf16,
    openvino_fp32,
    openvino_installed,
    selective,
    whole,
)

__all__ = ["ENGINES", "PRECISIONS", "BackendOptions", "open_backend"]

ENGINES = ("auto", "onnxruntime", "openvino")
PRECISIONS = ("auto", "fp32", "bf16")
_MOST_STREAMS = 8  # beyond that, threads go into a run: each stream has memory of its own
# A handful of golden images speaks for all frames only if it leaves room: measured on 100 frames, a network whose
# golden images use up the whole tolerance fails on every second one.
_ROOMY = Tolerance(box_px=0.5, score=0.005)
_FEW = 8  # golden boxes
_MEASURED = 0.15  # seconds


@dataclass(frozen=True)
class BackendOptions:
    """What a backend may be.

    Attributes:
        engine: `onnxruntime`, `openvino`, or `auto` for the fastest that gives the golden boxes.
        precision: `fp32`, `bf16`, or `auto` for the lowest that gives the golden boxes with room to spare.
        threads: compute threads of one run; 0 chooses by the CPUs that are granted.
        streams: runs at the same time; 0 likewise.
    """

    engine: str = "auto"
    precision: str = "auto"
    threads: int = 0
    streams: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (("engine", self.engine, ENGINES), ("precision", self.precision, PRECISIONS)):
            if value not in known:
                raise InputError(f"{name} is {value!r}", f"Give one of {', '.join(known)}.")
        if self.threads < 0 or self.streams < 0:
            raise InputError(f"threads is {self.threads} and streams {self.streams}", "Give 0 (automatic) or more.")
        if self.engine == "onnxruntime" and self.precision == "bf16":
            raise InputError("onnxruntime has no bf16 for processors", "Choose the engine openvino, or fp32.")


_Opener = Callable[[Source], Backend]


def open_backend(folder: Path, model: ModelFolder, options: BackendOptions) -> Backend:
    """Open a model folder in the fastest way that its golden images prove.

    Also takes OpenCV's own threads away, process-wide: `streams` threads at work are all that the CPUs carry.

    Args:
        folder: the model folder.
        model: its description, digest already checked (`ModelFolder.load`).
        options: what is wanted; whatever is not `auto` is taken or refused.

    Raises:
        ModelError: the graph cannot be opened, or gives other boxes than the golden ones in every way allowed.
        IntegrityError: the golden images are not those of the description.
        SettingsError: the wanted engine is not installed, or nothing can prove it.
    """
    cv2.setNumThreads(1)
    threads, streams = _shares(options, granted_cpus().threads)
    head = read_head(onnx_session(folder / "model.onnx", 1), len(model.classes))
    boxes = sum(len(image.expected) for image in read_golden(folder)) if model.golden else 0
    source = Source(folder, model, threads, streams, head, boxes)
    refused: list[str] = []
    found = [_first(openers, source, refused) for openers in _openers(options, model)]
    good = [item for item in found if item is not None]
    if not good:
        raise ModelError(
            f"{folder} cannot be served: {'; '.join(refused)}",
            "Export it again, allow another engine or precision, or look for another onnxruntime.",
        )
    chosen = good[0] if len(good) == 1 else _faster(good, source, refused)
    chosen = replace(chosen, reason="; ".join([chosen.reason, *refused]))
    how = f"{chosen.engine} {chosen.provider} {chosen.precision}, {chosen.streams} x {chosen.threads} threads"
    say(f"backend {how}: {chosen.reason}")
    if not boxes:
        shown = f"none of its {model.golden} golden images has a box" if model.golden else "it has no golden images"
        say(
            f"WARNING: nothing proves that {model.name} {model.version} finds anything here: {shown}. "
            "Export it again with pictures in which it finds something."
        )
    return chosen


def _shares(options: BackendOptions, cpus: int) -> tuple[int, int]:
    """(threads, streams). Many runs of one thread each get more out of the same CPUs than one run of many."""
    streams = options.streams or min(_MOST_STREAMS, max(1, cpus // (options.threads or 1)))
    return options.threads or max(1, cpus // streams), streams


def _openers(options: BackendOptions, model: ModelFolder) -> list[list[_Opener]]:
    """Ways to open the model, for each engine the best first; an engine's first that passes is its offer."""
    demanded = options.engine == "openvino" or options.precision == "bf16"
    if not model.golden:
        if demanded:
            raise SettingsError(
                f"model {model.name} has no golden images that could prove another engine or precision",
                "Export it with images (`haechi export --images`), or choose the engine onnxruntime.",
            )
        return [[whole]]
    if demanded and not openvino_installed():
        raise SettingsError("OpenVINO is not installed", "Install haechi[openvino], or choose another engine.")
    openvino: list[_Opener] = [] if options.precision == "fp32" else [openvino_bf16]
    if demanded:
        # Measured slower than onnxruntime at the same precision, so float32 must be asked for.
        return [[*openvino, *([] if options.precision == "bf16" else [openvino_fp32])]]
    gpu: list[_Opener] = [cuda] if CUDA in ort.get_available_providers() else []
    offers: list[list[_Opener]] = [[*gpu, selective, whole]]
    if options.engine == "auto" and openvino and not gpu and openvino_installed():
        offers.append(openvino)
    return offers


def _first(openers: Sequence[_Opener], source: Source, refused: list[str]) -> Backend | None:
    """The first that opens and gives the golden boxes."""
    for opener in openers:
        try:
            return _proven(opener(source), source)
        except IntegrityError:
            raise
        # Each engine has errors of its own, and none of them may keep the next from serving.
        except Exception as error:
            text = error.problem if isinstance(error, HaechiError) else str(error)
            refused.append(f"not {opener.__name__.strip('_')}: {text}")
    return None


def _proven(backend: Backend, source: Source) -> Backend:
    """The backend with its golden agreement.

    Raises:
        ModelError: other boxes.
        IntegrityError: another number of golden images than described.
    """
    if not source.model.golden:
        return replace(backend, reason=f"{backend.reason}; no golden images prove anything faster")
    result = check_golden(source.folder, backend.detector, Tolerance() if backend.precision == "fp32" else _ROOMY)
    if result.images != source.model.golden:
        raise IntegrityError(
            f"{source.folder} has {result.images} golden images, model.json says {source.model.golden}",
            "Fetch the folder again.",
        )
    if backend.precision != "fp32" and result.boxes < _FEW:
        raise ModelError(f"{result.boxes} golden boxes prove nothing of a lower precision, {_FEW} would")
    if not result.ok:
        raise ModelError(
            f"the golden images give other boxes ({result.unmatched} unmatched, corners up to "
            f"{result.max_box_px:.2f} px and scores up to {result.max_score:.4f} off)"
        )
    return replace(backend, golden=result)


def _faster(backends: Sequence[Backend], source: Source, refused: list[str]) -> Backend:
    """The one with most images a second on the golden images."""
    images = [decode(image.data) for image in read_golden(source.folder)]
    rates = [_rate(backend, images) for backend in backends]
    best = int(np.argmax(rates))
    for backend, rate in zip(backends, rates, strict=True):
        refused.append(f"{backend.engine} {backend.precision} {rate:.0f} images/s")
    return backends[best]


def _rate(backend: Backend, images: Sequence[NDArray[np.uint8]]) -> float:
    """Images a second over a fraction of a second, with all streams at work."""

    def work(until: float) -> int:
        done = 0
        while time.perf_counter() < until:
            backend.detector.detect([images[done % len(images)]], conf=GOLDEN_CONF)
            done += 1
        return done

    with ThreadPoolExecutor(backend.streams) as pool:
        start = time.perf_counter()
        done = sum(pool.map(work, [start + _MEASURED] * backend.streams))
        return done / (time.perf_counter() - start)
