"""The V1 protocol: the bytes of a request to images, and predictions to the bytes of an answer. No I/O, no loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from haechi.components.shared.errors import InputError

from .bodies import from_base64, is_image, json_bytes, json_object
from .engine import Engine
from .inference import MAX_IMAGES, InferenceRequest, Parameters, Prediction

__all__ = ["v1_answer", "v1_request"]

_FORM = 'Send {"instances": [{"image": {"b64": "<base64 of a JPEG>"}}]}, or the image itself as an image/* body.'


def v1_request(body: bytes, content_type: str, parameters: Mapping[str, Any]) -> InferenceRequest:
    """The request of a V1 predict body.

    An `image/*` body is one image. `application/json` (with any parameters) is the V1 form. Whatever else, or nothing,
    is told by its first bytes.

    Args:
        body, content_type: as they came.
        parameters: of the address; those in a JSON body go before them.

    Raises:
        InputError: not JSON of that form, not base64, too many instances, or a parameter is out of its range.
    """
    if is_image(body, content_type):
        return InferenceRequest((body,), Parameters.read(parameters))
    entry = json_object(body, _FORM)
    instances, own = entry.get("instances"), entry.get("parameters", {})
    if not isinstance(instances, list) or not instances:
        raise InputError("`instances` is not a list of at least one image", _FORM)
    if not isinstance(own, dict):
        raise InputError("`parameters` is not an object", _FORM)
    if len(instances) > MAX_IMAGES:
        raise InputError(f"`instances` has {len(instances)} images", f"Send at most {MAX_IMAGES} in one request.")
    images = tuple(_instance(entry, place) for place, entry in enumerate(instances))
    return InferenceRequest(images, Parameters.read({**parameters, **own}))


def v1_answer(name: str, engine: Engine, request: InferenceRequest, predictions: Sequence[Prediction]) -> bytes:
    """The V1 answer: per image the detections in pixels of the upright source image, and its size.

    Args:
        name: what the model is served as.
        engine, request, predictions: as the service has them.
    """
    model = engine.model
    rows = [
        {"detections": item.detections.to_list(model.classes), "width": item.width, "height": item.height}
        for item in predictions
    ]
    answer = {"predictions": rows, "model_name": name, "model_version": model.version}
    return json_bytes(answer)


def _instance(entry: Any, place: int) -> bytes:
    image = entry.get("image") if isinstance(entry, dict) else None
    text = image.get("b64") if isinstance(image, dict) else None
    return from_base64(text, f"`instances[{place}].image.b64`", _FORM)
