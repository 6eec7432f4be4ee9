"""Measure any model on labelled images outside the pipeline: what `haechi evaluate` does."""

from __future__ import annotations

import ast
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..shared.detections import Detector, classes_of_graph, onnx_session
from ..shared.errors import InputError, ModelError, NoDataError
from ..shared.files import sha256_file
from ..shared.images import read_header
from ..shared.model_folder import ModelFolder
from ..shared.settings import Settings
from ..shared.storage import ordered_map
from ..shared.yolo_format import YoloData, own_label_path, read_data_yaml, read_labels, split_images
from .frames import CONF, detect_all, test_frame
from .score import TestFrame, remap, score_model

__all__ = ["evaluate_model"]

_THRESHOLD = 0.25
_IOU = 0.7


@dataclass(frozen=True)
class _Opened:
    """A model ready to run: its description for the answer, thresholds and NMS IoU."""

    described: dict[str, Any]
    detector: Detector
    thresholds: dict[str, float]
    iou: float


def evaluate_model(
    model: Path,
    data: Path,
    split: str = "test",
    conf: float = CONF,
    imgsz: int = 0,
    settings: Settings | None = None,
) -> dict[str, Any]:
    """COCO-protocol scores of a model on a YOLO dataset, classes matched by name.

    Args:
        model: a model folder, an `.onnx` file with class names in its metadata, or a `.pt` checkpoint (exported first;
            needs the train extra).
        data: a data.yaml, or the folder that holds one. Nothing outside that folder is read.
        split: `train`, `val` or `test`.
        conf: confidence from which detections count; AP wants the whole curve, so keep it near 0.
        imgsz: longer side of the input; 0 for the model's own.
        settings: threads and workers.

    Returns:
        `map50_95`, `map50`, `precision`, `recall` (means over classes with boxes; None where there is none), `images`,
        `per_class` (name → the same, with `boxes` and `images`), `unmatched` (classes of the data that the model
        lacks; their AP is None), `model` (name, version, imgsz, iou), `split`, and `seconds`.

    Raises:
        InputError: data.yaml, a label line or an image cannot be used.
        NoDataError: the split has no image or no label file.
        ModelError: the model cannot be opened, or has no class names.
    """
    model, data = Path(model), Path(data)
    settings = settings or Settings.from_env()
    if not 0 <= conf < 1:
        raise InputError(f"conf is {conf}", "Give a value from 0 to below 1.")
    described = read_data_yaml(data)
    images = _images(described, split)
    with _opened(model, imgsz, settings) as opened:
        frames = list(ordered_map(lambda image: _truth(image, described), images, settings.workers))
        start = time.monotonic()
        detectors = [(opened.detector, opened.iou)]
        found = detect_all(images, Path.read_bytes, str, detectors, settings.workers, conf)[0]
        seconds = time.monotonic() - start
    mapped = [remap(item, opened.detector.classes, described.names) for item in found]
    score = score_model(frames, mapped, described.names, opened.detector.classes, opened.thresholds)
    answer = score.to_json()
    for entry in answer["per_class"].values():
        entry["images"] = entry.pop("frames")
    return answer | {
        "images": len(images),
        "unmatched": [name for name, item in score.per_class.items() if not item.known],
        "split": split,
        "model": opened.described,
        "seconds": round(seconds, 3),
    }


def _images(data: YoloData, split: str) -> list[Path]:
    images = split_images(data, split)
    if not images:
        raise NoDataError(f"split {split} of {data.file} holds no image", "Check the entry, or choose another split.")
    # Without this a wrong folder would read as a set of background images, and every AP as null.
    if not any(own_label_path(data, image).is_file() for image in images):
        raise NoDataError(
            f"no image of split {split} of {data.file} has a label file",
            f"Labels belong beside the images, such as {own_label_path(data, images[0])}.",
        )
    return images


def _truth(image: Path, data: YoloData) -> TestFrame:
    name = str(image.relative_to(data.home))
    try:
        header = read_header(image.read_bytes())
    except InputError as error:
        raise InputError(f"{image}: {error.problem}", error.remedy) from error
    boxes = read_labels(own_label_path(data, image), data.names, header.width, header.height)
    return test_frame(name, name, data.names, boxes, data.names)


@contextmanager
def _opened(model: Path, imgsz: int, settings: Settings) -> Iterator[_Opened]:
    if model.suffix == ".onnx":
        yield _open_graph(model, imgsz, settings)
    elif model.suffix in (".pt", ".pth"):
        with tempfile.TemporaryDirectory(prefix="haechi-evaluate-") as scratch:
            yield _open_folder(_export(model, Path(scratch) / "model", imgsz, settings), imgsz, settings)
    else:
        yield _open_folder(model, imgsz, settings)


def _open_folder(folder: Path, imgsz: int, settings: Settings) -> _Opened:
    model = ModelFolder.load(folder)
    detector = Detector.from_onnx(
        folder / "model.onnx", model.classes, imgsz or model.imgsz, model.stride, settings.threads
    )
    described = {"name": model.name, "version": model.version, "imgsz": imgsz or model.imgsz, "iou": model.iou}
    return _Opened(described, detector, model.thresholds, model.iou)


def _open_graph(path: Path, imgsz: int, settings: Settings) -> _Opened:
    if not path.is_file():
        raise ModelError(f"there is no model {path}", "Give a model folder, an .onnx or a .pt file.")
    session = onnx_session(path, settings.threads)
    classes = classes_of_graph(session)
    if not classes:
        raise ModelError(
            f"{path} has no class names in its metadata", "Give a model folder, or export it with `haechi export`."
        )
    facts = session.get_modelmeta().custom_metadata_map
    size = imgsz or _longest(facts.get("imgsz", "")) or 640
    stride = _longest(facts.get("stride", "")) or 32
    detector = Detector.from_onnx(path, classes, size, stride, settings.threads)
    described = {"name": path.stem, "version": sha256_file(path)[:12], "imgsz": size, "iou": _IOU}
    return _Opened(described, detector, dict.fromkeys(classes, _THRESHOLD), _IOU)


def _longest(text: str) -> int:
    """A size from a graph's metadata, `640` or `[480, 640]`; 0 where it is not given."""
    try:
        value = ast.literal_eval(text)
        return int(max(value)) if isinstance(value, list | tuple) else int(value)
    except (ValueError, SyntaxError, TypeError):
        return 0


def _export(checkpoint: Path, folder: Path, imgsz: int, settings: Settings) -> Path:
    if not checkpoint.is_file():
        raise ModelError(f"there is no checkpoint {checkpoint}", "Give a model folder, an .onnx or a .pt file.")
    try:
        # The one place where a room calls another: a checkpoint cannot be measured before it is exported.
        from ..export.step import export_checkpoint

        name = re.sub(r"[^a-z0-9]+", "-", checkpoint.stem.lower()).strip("-") or "model"
        export_checkpoint(checkpoint, folder, name=name, imgsz=imgsz, threads=settings.threads)
    except ModuleNotFoundError as error:
        raise ModelError(
            f"{checkpoint} must be exported first, and {error.name} is not installed",
            "Install haechi[train], or give a model folder or an .onnx file.",
        ) from error
    return folder
