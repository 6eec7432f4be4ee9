"""A model folder: everything that one exported model is, in one immutable place.

    model.onnx  model.json  checkpoint.pt  parity.json  golden/  report.html

The folder is the artifact `onnx_model`, the object prefix `models/<name>/<version>/`, what KServe mounts at
/mnt/models, and what a teacher is. `<version>` is the first 12 hex digits of the ONNX file's SHA-256.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .detections import Detections, Detector
from .errors import IntegrityError, ModelError
from .files import read_json, sha256_file, write_bytes, write_json
from .images import decode
from .parity import Agreement, Tolerance, agree, compare

__all__ = ["GOLDEN_CONF", "GoldenImage", "ModelFolder", "check_golden", "from_rows", "read_golden", "write_golden"]

FORMAT_VERSION = 1
GOLDEN_CONF = 0.1  # low enough that a weak first model has golden boxes too
_IOU = 0.7


@dataclass(frozen=True)
class GoldenImage:
    """One golden image: its encoded bytes, its file name in `golden/`, and the boxes that the ONNX model gave."""

    name: str
    data: bytes
    expected: Detections


@dataclass(frozen=True)
class ModelFolder:
    """The description in `model.json`.

    Attributes:
        name: registered model's name, kebab-case.
        version: first 12 hex digits of `onnx_sha256`.
        classes: ordered class names; the network's class indices.
        imgsz, stride: input size (longer side) and stride.
        thresholds: confidence at which each class is reported in service.
        iou: of the non-maximum suppression.
        onnx_sha256, checkpoint_sha256: digests of the two files; the latter empty where there is no checkpoint.
        golden: number of golden images; 0 means that nothing proves the folder, and `haechi serve` wants
            `--allow-unverified`.
        dataset_digest: what it was trained on, or empty.
        run_id: MLflow run, or empty.
        created_at: ISO 8601, UTC.
        training: the candidate's settings.
        metrics: validation metrics, such as `val/mAP50-95`.
        licence: of the weights.
        format_version: of this description.
    """

    name: str
    version: str
    classes: tuple[str, ...]
    imgsz: int
    stride: int
    thresholds: dict[str, float]
    iou: float
    onnx_sha256: str
    checkpoint_sha256: str = ""
    golden: int = 0
    dataset_digest: str = ""
    run_id: str = ""
    created_at: str = ""
    training: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    licence: str = "AGPL-3.0 (Ultralytics)"
    format_version: int = FORMAT_VERSION

    def write(self, folder: Path) -> None:
        """Write `model.json` into the folder."""
        write_json(folder / "model.json", asdict(self))

    @classmethod
    def load(cls, folder: Path, verify: bool = True) -> ModelFolder:
        """Read a model folder's description and check the graph's digest.

        Raises:
            ModelError: no such folder, no or another `model.json`.
            IntegrityError: `model.onnx` is not the file that was described.
        """
        try:
            entry = read_json(folder / "model.json")
            entry["classes"] = tuple(entry["classes"])
            model = cls(**entry)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ModelError(
                f"{folder} is not a model folder: model.json cannot be read ({error})",
                "Make one with `haechi export --checkpoint best.pt --out DIR`.",
            ) from error
        if model.format_version != FORMAT_VERSION:
            raise ModelError(
                f"{folder}/model.json has format_version {model.format_version}", f"This Haechi reads {FORMAT_VERSION}."
            )
        if not (folder / "model.onnx").is_file():
            raise ModelError(f"{folder} has no model.onnx", "Copy the whole folder, or export again.")
        if verify and sha256_file(folder / "model.onnx") != model.onnx_sha256:
            raise IntegrityError(
                f"{folder}/model.onnx is not the file that model.json describes", "Fetch the folder again."
            )
        return model

    def detector(self, folder: Path, threads: int = 0) -> Detector:
        """Open the graph as a detector."""
        return Detector.from_onnx(folder / "model.onnx", self.classes, self.imgsz, self.stride, threads)

    def limits(self) -> list[float]:
        """The reporting thresholds in class order."""
        return [self.thresholds[name] for name in self.classes]


def write_golden(folder: Path, images: list[GoldenImage], classes: tuple[str, ...]) -> None:
    """Write `golden/<name>` and `golden/golden.json` into a model folder."""
    for image in images:
        write_bytes(folder / "golden" / image.name, image.data)
    rows = [{"file": image.name, "boxes": image.expected.to_list(classes)} for image in images]
    write_json(folder / "golden" / "golden.json", {"conf": GOLDEN_CONF, "iou": _IOU, "images": rows})


def read_golden(folder: Path) -> list[GoldenImage]:
    """The golden images of a model folder; empty where it has none."""
    path = folder / "golden" / "golden.json"
    if not path.is_file():
        return []
    return [
        GoldenImage(row["file"], (folder / "golden" / Path(row["file"]).name).read_bytes(), from_rows(row["boxes"]))
        for row in read_json(path)["images"]
    ]


def from_rows(rows: list[dict[str, Any]]) -> Detections:
    """The inverse of `Detections.to_list`."""
    return Detections(
        np.asarray([row["box"] for row in rows], dtype=np.float32).reshape(-1, 4),
        np.asarray([row["score"] for row in rows], dtype=np.float32),
        np.asarray([row["class_id"] for row in rows], dtype=np.int64),
    )


def check_golden(folder: Path, detector: Detector, tolerance: Tolerance | None = None) -> Agreement:
    """Run the golden images through `detector` and compare with the golden boxes.

    Returns:
        The agreement; `ok` is False where there is no golden image.
    """
    results = []
    for image in read_golden(folder):
        pixels = decode(image.data)
        found = detector.detect([pixels], conf=GOLDEN_CONF, iou=_IOU)[0]
        results.append(compare(image.expected, found, GOLDEN_CONF, tolerance or Tolerance(), max(pixels.shape[:2])))
    return agree(results)
