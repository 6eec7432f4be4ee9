"""Sample records: one image that is kept, and what is written of it; docs/artifacts.md has the fields."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import cv2
import numpy as np

from haechi.components.shared.files import sha256_bytes
from haechi.components.shared.images import EXTENSIONS, sniff
from haechi.components.shared.model_folder import ModelFolder

from .inference import Image, Parameters, Prediction
from .sample_counts import Row
from .sampling import MARGIN, Decision, Design

__all__ = ["FORMAT_VERSION", "Origin", "Sample", "compact_json", "encoded", "record"]

FORMAT_VERSION = 1
_MODEL = ("name", "version", "onnx_sha256", "run_id", "dataset_digest")
_PNG = [cv2.IMWRITE_PNG_COMPRESSION, 1]


@dataclass(frozen=True)
class Origin:
    """What the samples of one call share.

    Attributes:
        row: service, camera-hour and model version.
        model, parameters: what answered, and what the request chose for itself.
        design: the rates.
        moment: when it was answered, UTC.
        request_id, protocol, camera: as in Call.
        images: how many the request held.
    """

    row: Row
    model: ModelFolder
    parameters: Parameters
    design: Design
    moment: datetime
    request_id: str
    protocol: str
    camera: str
    images: int


@dataclass(frozen=True)
class Sample:
    """One image that is to be kept.

    Attributes:
        origin: the call that it came with.
        place: its place among the call's images, from 0.
        image: as the request gave it.
        held: bytes of memory that it takes until it is written.
        prediction: what was answered.
        decision: why it is kept, and how probable that was.
        seen: images of its row that this process had seen, this one included.
    """

    origin: Origin
    place: int
    image: Image
    held: int
    prediction: Prediction
    decision: Decision
    seen: int


def record(sample: Sample, key: str, data: bytes, pod: str, process: str) -> bytes:
    """What is written beside an image: all that was said of it, as JSON.

    Args:
        sample: the image and its call.
        key, data: the object that it became.
        pod, process: who wrote it.
    """
    origin, decision, model = sample.origin, sample.decision, sample.origin.model
    return compact_json(
        {
            "format_version": FORMAT_VERSION,
            "request_id": origin.request_id,
            "protocol": origin.protocol,
            "place": sample.place,
            "images": origin.images,
            "time": origin.moment.isoformat(timespec="milliseconds"),
            "camera": origin.camera,
            "camera_folder": origin.row.camera,
            "service": origin.row.service,
            "pod": pod,
            "process": process,
            "seen": sample.seen,
            "model": {"served_as": origin.row.model} | {name: getattr(model, name) for name in _MODEL},
            "thresholds": model.thresholds,
            "parameters": asdict(origin.parameters),
            "image": {
                "key": key,
                "sha256": sha256_bytes(data),
                "bytes": len(data),
                "format": sniff(data),
                "came_as": str(sample.image.dtype) if isinstance(sample.image, np.ndarray) else "encoded",
                "width": sample.prediction.width,
                "height": sample.prediction.height,
            },
            "detections": sample.prediction.detections.to_list(model.classes),
            "below": below.to_list(model.classes) if (below := sample.prediction.below) else [],
            "reasons": decision.reasons,
            "probability": decision.probability,
            "probability_random": decision.random,
            "probability_uncertain": decision.uncertain,
            "thinning": decision.thinning,
            "design": asdict(origin.design) | {"margin": MARGIN},
        }
    )


def encoded(image: Image) -> tuple[bytes, str]:
    """Bytes and extension: encoded images as they came, tensors as PNG, which loses nothing of what the network saw."""
    if not isinstance(image, np.ndarray):
        return image, EXTENSIONS[str(sniff(image))]
    pixels = image if image.dtype == np.uint8 else np.rint(image * 255).astype(np.uint8).transpose(1, 2, 0)
    _, data = cv2.imencode(".png", cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2BGR), _PNG)
    return data.tobytes(), "png"


def compact_json(content: dict[str, Any]) -> bytes:
    """One object of the bucket; NaN is refused."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
