"""The API's description: one OpenAPI 3.1 document of all paths over HTTP, with the served model's name filled in.

It is written by hand beside the routes; tests compare it with the routes that the process has, send its examples, and
let schemathesis look for an answer that it does not tell of. gRPC describes itself by reflection.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from .openapi_parts import EXAMPLE_IMAGE, components, ref
from .tensors import INPUT
from .v2 import HEADER_LENGTH

__all__ = ["openapi"]

_BODY = (408, 413, 415, 503)  # what every request with a body may meet
_ABOUT = """\
JPEG in, boxes out. Boxes are `x1, y1, x2, y2` in pixels of the upright source image.

Every error is `{"error": "what is wrong. The remedy."}`. A path that is not listed gets 404, a method that is not listed
405 with `Allow`; GET also answers HEAD. Before a request gets that far, the connection itself may refuse it in the same
form: 400 (not HTTP), 408 (the head took longer than 10 s), 431 (more than 100 headers or 32 KiB of them), 503 (512
connections are busy)."""
_PREDICT = """\
The body is `{"instances": [...]}` as JSON, or one encoded image. The content type decides; where it is missing or says
nothing, such as `application/octet-stream`, the first bytes do."""
_INFER = f"""\
The body is JSON, one encoded image, or JSON followed by binary tensors: then the header
`Inference-Header-Content-Length` gives the length of the JSON, and the input has `binary_data_size` instead of `data`.
The one input tensor, best called `{INPUT}`, holds encoded images (BYTES), RGB from 0 to 255 (UINT8) or RGB from 0 to 1 (FP32).
Outputs hold the boxes of all images in one list; `num_detections` says how many belong to which image. They are JSON,
or binary where `binary_data_output` or an output's `binary_data` asks for it."""

_Table = dict[str, Any]


def openapi(model: str, guarded: bool = False) -> _Table:
    """The document.

    Args:
        model: the name that is served.
        guarded: predictions want a key or token here.
    """
    return {
        "openapi": "3.1.0",
        "info": {"title": "Haechi serving", "version": version("haechi"), "description": _ABOUT},
        # Relative to where this document lies: right behind a gateway that adds a prefix, too.
        "servers": [{"url": "."}],
        "tags": [
            {"name": "predict", "description": "Images to boxes."},
            {"name": "models", "description": "What is served, and whether it is ready."},
            {"name": "health", "description": "For probes and scrapers."},
            {"name": "admin", "description": "The model repository; wants the role `admin`."},
            {"name": "about", "description": "This description."},
        ],
        "paths": {**_v1(model, guarded), **_v2(model, guarded), **_repository(), **_process(guarded)},
        "components": components(model),
    }


def _v1(model: str, guarded: bool) -> _Table:
    row = {"class": "person", "class_id": 0, "score": 0.91, "box": [64.0, 96.0, 96.0, 128.0]}
    predictions = [{"detections": [row], "width": 320, "height": 320}]
    answer = {"predictions": predictions, "model_name": model, "model_version": "0123456789ab"}
    instances = [{"image": {"b64": EXAMPLE_IMAGE}}]
    examples: dict[str, _Table] = {
        "image": {"instances": instances},
        "limits": {"instances": instances, "parameters": {"conf": 0.4}},
    }
    return {
        "/v1/models": _get("models", "Names of the models", "ModelNames", {"models": [model]}, (), guarded),
        "/v1/models/{name}": _get(
            "models", "Whether a model is ready", "ModelReady", _ready(model), (404, 503), guarded, ("name",)
        ),
        "/v1/models/{name}:predict": {
            "post": _operation(
                "predict",
                "Detect, by the V1 protocol",
                _PREDICT,
                {200: _answer("Boxes by image.", "V1Answer", answer)},
                (400, 404, *_BODY, 504),
                guarded,
                parameters=("name", "conf", "iou", "max_det", "classes", *_TOLD),
                body=_bodies("V1Request", examples),
            )
        },
    }


_TOLD = ("X-Request-Id", "X-Haechi-Camera", "X-Haechi-Sample", "traceparent")


def _v2(model: str, guarded: bool) -> _Table:
    metadata = ("models", "A model's metadata", "ModelMetadata", None, (404, 503), guarded)
    ready = ("models", "Whether a model is ready to infer", "ModelReady", _ready(model), (404, 503), False)
    about = {"name": "haechi", "version": version("haechi"), "extensions": ["binary_tensor_data", "parameters"]}
    paths = {"/v2": _get("models", "The server's metadata", "ServerMetadata", about, ())}
    for place, named in (
        ("/v2/models/{name}", ("name",)),
        ("/v2/models/{name}/versions/{version}", ("name", "version")),
    ):
        paths[place] = _get(*metadata, parameters=named)
        paths[f"{place}/ready"] = _get(*ready, parameters=named)
        paths[f"{place}/infer"] = {"post": _infer(model, guarded, named)}
    return paths


def _infer(model: str, guarded: bool, named: tuple[str, ...]) -> _Table:
    row = {"name": INPUT, "datatype": "BYTES", "shape": [1], "data": [EXAMPLE_IMAGE]}
    black = {"name": INPUT, "datatype": "UINT8", "shape": [2, 2, 3], "data": [0] * 12}
    chosen = {
        "id": "7",
        "inputs": [row],
        "outputs": [{"name": "boxes"}],
        "parameters": {"conf": 0.4, "camera": "door-1"},
    }
    count = {"name": "num_detections", "datatype": "INT32", "shape": [1], "data": [1]}
    boxes = {"name": "boxes", "datatype": "FP32", "shape": [1, 4], "data": [64.0, 96.0, 96.0, 128.0]}
    answer = {"model_name": model, "model_version": "0123456789ab", "outputs": [count, boxes]}
    good = _answer("Tensors.", "V2Answer", answer)
    length = {
        "description": "Length of the JSON.",
        "schema": {"type": "string", "pattern": "^[0-9]+$"},
        "required": True,
    }
    good["content"]["application/octet-stream"] = {"schema": {"description": "JSON, then the binary tensors."}}
    good["headers"][HEADER_LENGTH] = {
        **length,
        "required": False,
        "description": "Of binary answers: the JSON's length.",
    }
    operation = _operation(
        "predict",
        "Detect, by the V2 protocol (Open Inference Protocol)",
        _INFER,
        {200: good},
        (400, 404, *_BODY, 504),
        guarded,
        parameters=(*named, "conf", "iou", "max_det", "classes", "camera", *_TOLD),
        body=_bodies("V2Request", {"image": {"inputs": [row]}, "pixels": {"inputs": [black]}, "chosen": chosen}),
    )
    operation["parameters"].append(
        {"name": HEADER_LENGTH, "in": "header", "schema": length["schema"], "description": "Of binary bodies only."}
    )
    return operation


def _repository() -> _Table:
    """Administration, which always wants somebody who is known."""
    index = {"name": "safety", "version": "0123456789ab", "state": "READY", "reason": ""}
    named = ("name",)
    return {
        "/v2/repository/index": _admin(
            "List the models with their state",
            "`ready` leaves out those that are not. `reason` says why the folder's content was refused, if it was.",
            {200: _answer("One row a model.", "RepositoryIndex", [index])},
            (),
            takes={"ready": {"type": "boolean"}},
        ),
        "/v2/repository/models/{name}/load": _admin(
            "Serve what the model folder holds now",
            "The former model serves until the other one has given its golden boxes, and goes on if it does not.",
            {200: _answer("The version that is served.", "RepositoryLoaded", {"version": "0123456789ab"})},
            (404, 409),
            named,
        ),
        "/v2/repository/models/{name}/unload": _admin(
            "Refused",
            "A process has one model; end it instead. It is here since clients of the protocol know it.",
            {},
            (404,),
            named,
        ),
    }


def _admin(
    summary: str,
    description: str,
    answers: dict[int, _Table],
    refused: tuple[int, ...],
    parameters: tuple[str, ...] = (),
    takes: _Table | None = None,
) -> _Table:
    body = {"schema": {"type": "object", "properties": takes or {}}, "examples": {"nothing": {"value": {}}}}
    operation = _operation(
        "admin", summary, description, answers, (400, *_BODY, *refused), True, parameters, {"application/json": body}
    )
    operation["requestBody"]["required"] = False
    return {"post": operation}


def _process(guarded: bool) -> _Table:
    text = {"schema": {"type": "string"}}
    metrics = {
        "description": "Metrics, as OpenMetrics where `Accept` asks for it.",
        "headers": {"X-Request-Id": ref("headers", "X-Request-Id")},
        "content": {"text/plain": text, "application/openmetrics-text": text},
    }
    page = _answer("A page that works without any other host.", "", None)
    page["content"] = {"text/html": text}
    about = _answer("This document.", "", None)
    about["content"] = {"application/json": {"schema": {"type": "object"}}}
    ready = _get("health", "Whether it takes predictions", "Ready", {"ready": True}, ())
    ready["get"]["responses"]["503"] = _answer("Not yet, or not any more.", "Ready", {"ready": False})
    return {
        "/": _get("health", "Alive", "Alive", {"status": "alive"}, ()),
        "/v2/health/live": _get("health", "Alive", "Live", {"live": True}, ()),
        "/v2/health/ready": ready,
        "/metrics": {"get": _operation("health", "Metrics for Prometheus", "", {200: metrics}, (), guarded)},
        "/docs": {"get": _operation("about", "This description as a page, with a form", "", {200: page}, (), False)},
        "/openapi.json": {"get": _operation("about", "This description", "", {200: about}, (), False)},
    }


def _ready(model: str) -> _Table:
    return {"name": model, "ready": True}


def _get(
    tag: str,
    summary: str,
    schema: str,
    example: Any,
    refused: tuple[int, ...],
    guarded: bool = False,
    parameters: tuple[str, ...] = (),
) -> _Table:
    answers = {200: _answer("What was asked for.", schema, example)}
    if schema == "ModelReady":
        answers[503] = _answer("It is still loading.", schema, {**example, "ready": False})
        refused = tuple(status for status in refused if status != 503)
    return {"get": _operation(tag, summary, "", answers, refused, guarded, parameters=parameters)}


def _answer(description: str, schema: str, example: Any) -> _Table:
    content: _Table = {"schema": ref("schemas", schema)} if schema else {}
    if example is not None:
        content["example"] = example
    headers = {"X-Request-Id": ref("headers", "X-Request-Id")}
    return {"description": description, "headers": headers, "content": {"application/json": content}}


def _bodies(schema: str, examples: dict[str, _Table]) -> _Table:
    """A request's body: JSON, or an image."""
    image = {"schema": ref("schemas", "Image")}
    entries = {name: {"value": value} for name, value in examples.items()}
    return {
        "application/json": {"schema": ref("schemas", schema), "examples": entries},
        "image/*": image,
        "application/octet-stream": image,
    }


def _operation(
    tag: str,
    summary: str,
    description: str,
    answers: dict[int, _Table],
    refused: tuple[int, ...],
    guarded: bool,
    parameters: tuple[str, ...] = (),
    body: _Table | None = None,
) -> _Table:
    statuses = sorted({*refused, *((401, 403) if guarded else ())})
    responses = {str(status): answer for status, answer in answers.items()}
    responses |= {str(status): ref("responses", str(status)) for status in statuses}
    operation: _Table = {"tags": [tag], "summary": summary, "responses": responses}
    if description:
        operation["description"] = description
    if parameters:
        operation["parameters"] = [ref("parameters", name) for name in parameters]
    if body:
        operation["requestBody"] = {"required": True, "content": body}
    operation["security"] = [{"bearer": []}, {"key": []}] if guarded else []
    return operation
