"""Parts of the OpenAPI document: schemas of what is sent and answered, parameters, refusals and credentials."""

from __future__ import annotations

from typing import Any

from .inference import MAX_DET, MAX_IMAGES, MIN_CONF
from .tensors import INPUT, INPUT_FORMS, OUTPUTS

__all__ = ["EXAMPLE_IMAGE", "components", "ref"]

# A grey PNG of 32x32 pixels: short enough to be read past, and a real image, so that the examples work.
EXAMPLE_IMAGE = (
    "iVBORw0KGgoAAAANSUhEUgAAACAAAAAgCAIAAAD8GO2jAAAAKklEQVR4nO3NQQEAAATAQMSURHwl+N0C7LKn47N6vQMAAAAAAAAA"
    "AIDDFsQpAWzCPowmAAAAAElFTkSuQmCC"
)

_NUMBER = {"type": "number"}
_COUNT = {"type": "integer", "minimum": 0}
_TEXT = {"type": "string"}
_VERSION = {"type": "string", "pattern": "^[0-9a-f]{12}$", "description": "First 12 hex digits of the graph's SHA-256."}
# What a request may choose for itself in the address.
_CHOICES: dict[str, dict[str, Any]] = {
    "conf": {
        **_NUMBER,
        "minimum": MIN_CONF,
        "maximum": 1,
        "description": "One confidence limit for every class, instead of the model's.",
    },
    "iou": {
        **_NUMBER,
        "exclusiveMinimum": 0,
        "maximum": 1,
        "description": "Overlap of the non-maximum suppression, instead of the model's.",
    },
    "max_det": {"type": "integer", "minimum": 1, "maximum": MAX_DET, "description": "Detections an image at most."},
    "classes": {
        **_TEXT,
        "description": "Names or numbers of the classes to report, separated by commas; others are left out.",
    },
}
# In the body, which goes before the address: also numbers as text, classes as a list, and null for what is not chosen.
_BODY_CHOICES: dict[str, dict[str, Any]] = {
    **{name: {**schema, "type": [schema["type"], "string", "null"]} for name, schema in _CHOICES.items()},
    "classes": {
        "type": ["array", "string", "null"],
        "items": {"type": ["string", "integer"]},
        "description": "Names or numbers of the classes to report, as a list or separated by commas.",
    },
}
_CAMERA = {
    **_TEXT,
    "maxLength": 128,
    "description": "Where the images come from; goes before the header X-Haechi-Camera.",
}
_HEADERS = {
    "X-Request-Id": "Of the caller, up to 128 printable ASCII characters; comes back, and stands in log and trace.",
    "X-Haechi-Camera": "Where the images come from; log and samples go by it.",
    "X-Haechi-Sample": "Whatever its value: no image of this request is kept as a sample.",
    "traceparent": "The trace that the request is part of (W3C Trace Context).",
}
# Status → what it means.
_REFUSALS = {
    400: "The request contradicts itself, an image is none, or a parameter is out of its range.",
    401: "No key or token, or one that is not valid.",
    403: "The caller is known and may not do this; or administration is switched off.",
    404: "There is no such model, or it is served in another version.",
    408: "The body did not arrive within 60 s.",
    409: "What the model folder holds was not taken; the former model goes on serving.",
    413: "The body is larger than HAECHI_SERVING_MAX_BODY.",
    415: "The body has a Content-Encoding; send it as it is.",
    503: "Too many requests wait already, or the model is still loading. Nothing is wrong with this one.",
    504: "The request took longer than HAECHI_SERVING_TIMEOUT.",
}
_ALSO = {
    401: {"WWW-Authenticate": {"schema": {"const": "Bearer"}, "required": True}},
    503: {
        "Retry-After": {
            "schema": {"type": "string", "pattern": "^[0-9]+$"},
            "description": "Seconds.",
            "required": True,
        }
    },
}


def ref(kind: str, name: str) -> dict[str, str]:
    """A reference to a part."""
    return {"$ref": f"#/components/{kind}/{name}"}


def components(model: str) -> dict[str, Any]:
    """All parts, for a process that serves `model`."""
    return {
        "schemas": _schemas(model),
        "parameters": _parameters(model),
        "responses": {str(status): _refusal(status, text) for status, text in _REFUSALS.items()},
        "headers": {"X-Request-Id": {"description": "The caller's own, or one made up.", "schema": _TEXT}},
        "securitySchemes": {
            "bearer": {
                "type": "http",
                "scheme": "bearer",
                "description": "An API key, or a JSON Web Token of the issuer.",
            },
            "key": {"type": "apiKey", "in": "header", "name": "X-Api-Key", "description": "An API key."},
        },
    }


def _refusal(status: int, text: str) -> dict[str, Any]:
    return {
        "description": text,
        "headers": {"X-Request-Id": ref("headers", "X-Request-Id"), **_ALSO.get(status, {})},
        "content": {"application/json": {"schema": ref("schemas", "Error")}},
    }


def _parameters(model: str) -> dict[str, Any]:
    # The name is the one that is served here, whatever the model is called in its folder.
    path = {
        "name": {"schema": {"type": "string", "enum": [model]}, "description": "The model, by its served name."},
        "version": {"schema": _VERSION, "description": "Fails with 404 where another version is served."},
    }
    query = {name: {"schema": schema} for name, schema in {**_CHOICES, "camera": _CAMERA}.items()}
    headers = {name: {"schema": _TEXT, "description": text} for name, text in _HEADERS.items()}
    return {
        **{name: {"name": name, "in": "path", "required": True, **entry} for name, entry in path.items()},
        **{name: {"name": name, "in": "query", **entry} for name, entry in query.items()},
        **{name: {"name": name, "in": "header", **entry} for name, entry in headers.items()},
    }


def _object(required: dict[str, Any], optional: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": {**required, **(optional or {})}, **more}


def _list(items: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, **more}


def _schemas(model: str) -> dict[str, Any]:
    name = {"const": model}
    encoded = {**_TEXT, "contentEncoding": "base64", "description": "An encoded image: JPEG, PNG, BMP, WebP or TIFF."}
    named = {"model_name": name, "model_version": _VERSION}
    return {
        "Error": _object({"error": {**_TEXT, "description": "What is wrong, and the remedy."}}),
        "Parameters": _object({}, _BODY_CHOICES, description="Names that are not listed are passed over."),
        "V1Request": _object(
            {"instances": _list(_object({"image": _object({"b64": encoded})}), minItems=1, maxItems=MAX_IMAGES)},
            {"parameters": ref("schemas", "Parameters")},
        ),
        "Detection": _object(
            {
                "class": _TEXT,
                "class_id": _COUNT,
                "score": {**_NUMBER, "minimum": 0, "maximum": 1},
                "box": _list(
                    _NUMBER, minItems=4, maxItems=4, description="x1, y1, x2, y2 in pixels of the upright image."
                ),
            }
        ),
        "V1Answer": _object(
            {
                "predictions": _list(
                    _object({"detections": _list(ref("schemas", "Detection")), "width": _COUNT, "height": _COUNT})
                ),
                **named,
            }
        ),
        **_v2_schemas(named, encoded),
        **_state_schemas(name),
    }


def _v2_schemas(named: dict[str, Any], encoded: dict[str, Any]) -> dict[str, Any]:
    shape = _list({"type": "integer", "minimum": 1}, description=_forms())
    data = _list(
        {}, description="Base64 text for BYTES; else numbers, flat or nested as the shape. Left out in the binary form."
    )
    binary = {"binary_data_size": {**_COUNT, "description": "Bytes of this tensor behind the JSON."}}
    entry = _object(
        {
            "name": {**_TEXT, "example": INPUT},
            "datatype": {"type": "string", "enum": list(INPUT_FORMS)},
            "shape": shape,
        },
        {"data": data, "parameters": _object({}, binary)},
    )
    outputs = {"type": "string", "enum": list(OUTPUTS)}
    flag = {"type": "boolean", "description": "As binary data behind the JSON."}
    row = _object(
        {"name": outputs, "datatype": _TEXT, "shape": _list(_COUNT)},
        {"data": _list({"type": ["number", "string"]}), "parameters": _object(binary)},
    )
    return {
        "V2Request": _object(
            {"inputs": _list(entry, minItems=1, maxItems=1)},
            {
                "id": {**_TEXT, "description": "Comes back."},
                "outputs": _list(
                    _object({"name": outputs}, {"parameters": _object({}, {"binary_data": flag})}),
                    description="Which to give; all where none is named.",
                ),
                "parameters": _object({}, {**_BODY_CHOICES, "camera": _CAMERA, "binary_data_output": flag}),
            },
        ),
        "V2Answer": _object(
            {**named, "outputs": _list(row, description="The boxes of all images in one list, in the images' order.")},
            {"id": _TEXT},
        ),
        "Image": {"description": f"{encoded['description']} Or JSON: what it is shows in its first bytes."},
    }


def _state_schemas(name: dict[str, Any]) -> dict[str, Any]:
    tensor = _object({"name": _TEXT, "datatype": _TEXT, "shape": _list({"type": "integer"})})
    flag = {"type": "boolean"}
    return {
        "Alive": _object({"status": {"const": "alive"}}),
        "Live": _object({"live": {"const": True}}),
        "Ready": _object({"ready": flag}),
        "ModelReady": _object({"name": name, "ready": flag}),
        "ModelNames": _object({"models": _list(_TEXT)}),
        "ServerMetadata": _object({"name": {"const": "haechi"}, "version": _TEXT, "extensions": _list(_TEXT)}),
        "ModelMetadata": _object(
            {
                "name": name,
                "versions": _list(_VERSION),
                "platform": _TEXT,
                "inputs": _list(tensor),
                "outputs": _list(tensor),
                "properties": _object(
                    {
                        "classes": _list(_TEXT),
                        "thresholds": {"type": "object", "additionalProperties": _NUMBER},
                        "imgsz": _COUNT,
                        "proof": _object({"golden_images": _COUNT, "golden_boxes": _COUNT}),
                        "input_forms": _list(
                            _object({"datatype": _TEXT, "shapes": _list(_list({"type": "integer"})), "content": _TEXT})
                        ),
                        "max_images": _COUNT,
                        "parameters": {"type": "object", "additionalProperties": _TEXT},
                    }
                ),
            }
        ),
        "RepositoryIndex": _list(
            _object({"name": _TEXT, "version": _TEXT, "state": {"enum": ["READY", "LOADING"]}, "reason": _TEXT})
        ),
        "RepositoryLoaded": _object({"version": _VERSION}),
    }


def _forms() -> str:
    """The shapes of all datatypes, in words."""
    return "; ".join(
        f"{datatype} {' or '.join(map(str, map(list, shapes)))}" for datatype, shapes in INPUT_FORMS.items()
    )
