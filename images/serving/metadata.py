"""Metadata: what the Open Inference Protocol tells of server and model, for REST and gRPC."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from .engine import Engine
from .inference import MAX_DET, MAX_IMAGES, MIN_CONF
from .tensors import INPUT, INPUT_FORMS, OUTPUTS

__all__ = ["EXTENSIONS", "PLATFORM", "SERVER", "model_metadata", "server_metadata"]

SERVER = "haechi"
PLATFORM = "haechi_yolo"
# Triton's names for them.
EXTENSIONS = ("binary_tensor_data", "parameters")
_CONTENT = {
    "BYTES": "encoded images: JPEG, PNG, BMP, WebP or TIFF",
    "UINT8": "RGB pixels, height by width by 3, 0 to 255",
    "FP32": "RGB pixels, 3 by height by width, 0 to 1",
}


def server_metadata() -> dict[str, Any]:
    """Name, version and extensions of the server."""
    return {"name": SERVER, "version": version("haechi"), "extensions": list(EXTENSIONS)}


def model_metadata(name: str, engine: Engine) -> dict[str, Any]:
    """Tensors of a model.

    The protocol has one datatype an input: BYTES, which every camera has. The other forms that the same input takes
    are told in `properties`, with the class names and what a request may choose for itself.

    Args:
        name: what it is served as.
        engine: the model.
    """
    model, proof = engine.model, engine.backend.golden
    return {
        "name": name,
        "versions": [model.version],
        "platform": PLATFORM,
        "inputs": [_tensor(INPUT, "BYTES", INPUT_FORMS["BYTES"][0])],
        "outputs": [_tensor(name, datatype, shape) for name, (datatype, shape) in OUTPUTS.items()],
        "properties": {
            "classes": list(model.classes),
            "thresholds": dict(zip(model.classes, model.limits(), strict=True)),
            "imgsz": model.imgsz,
            # What it gave on this machine before it was ready; without a box nothing is proven.
            "proof": {"golden_images": proof.images if proof else 0, "golden_boxes": proof.boxes if proof else 0},
            "input_forms": [
                {"datatype": datatype, "shapes": [list(shape) for shape in shapes], "content": _CONTENT[datatype]}
                for datatype, shapes in INPUT_FORMS.items()
            ],
            "max_images": MAX_IMAGES,
            "parameters": {
                "conf": f"number from {MIN_CONF} to 1",
                "iou": "number above 0 and up to 1",
                "max_det": f"whole number from 1 to {MAX_DET}",
                "classes": "names, as a list or separated by commas",
                "camera": "where the images come from",
            },
        },
    }


def _tensor(name: str, datatype: str, shape: tuple[int, ...]) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": list(shape)}
