"""Bodies: what the JSON protocols share. A bounded parse, base64 text, images that are the whole body, and the camera."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import orjson

from haechi.components.shared.errors import InputError
from haechi.components.shared.images import sniff

__all__ = ["camera_of", "from_base64", "is_image", "json_bytes", "json_object"]

# Each value of a JSON text becomes an object of some 30 to 70 bytes, so that 64 MB of commas would take gigabytes.
_MAX_VALUES = 4 * 2**20
_MAX_CAMERA = 128


def is_image(body: bytes, content_type: str) -> bool:
    """Whether the whole body is meant as one image: its type says so, or is not JSON and the first bytes say so."""
    kind = content_type.partition(";")[0].strip().lower()
    return kind.startswith("image/") or (kind != "application/json" and sniff(body) is not None)


def json_object(body: bytes, form: str) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        body: UTF-8.
        form: what should have been sent, for errors.

    Raises:
        InputError: not JSON, not an object, or one of too many values.
    """
    if body.count(b",") + body.count(b"[") + body.count(b"{") > _MAX_VALUES:
        raise InputError(f"the JSON has more than {_MAX_VALUES} values", "Send tensors as binary data.")
    try:
        value = orjson.loads(body)
    except ValueError as error:
        if body.startswith(b"--"):  # as `curl -F` and web pages send files
            raise InputError("the body is a form", "Send the image itself: `curl --data-binary @frame.jpg`.") from error
        raise InputError(f"the body is not JSON ({error})", form) from error
    if not isinstance(value, dict):
        raise InputError("the body is JSON, but not an object", form)
    return value


def json_bytes(value: Any) -> bytes:
    """JSON in UTF-8; arrays may be numpy's, and float32 is written as short as it can be told apart."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def from_base64(text: Any, where: str, form: str) -> bytes:
    """Decode base64.

    Args:
        text: what should be base64 text; line breaks are allowed, command line tools wrap it at 76 characters.
        where: where it stands, for errors.
        form: what should have been sent.

    Raises:
        InputError: not text, or not base64.
    """
    if not isinstance(text, str):
        raise InputError(f"{where} is missing or not text", form)
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:
        raise InputError(f"{where} is not base64 ({error})", form) from error


def camera_of(parameters: Mapping[str, Any]) -> str:
    """The parameter `camera`, where the images come from; empty if it is not said.

    Raises:
        InputError: not text, or too long.
    """
    camera = parameters.get("camera", "")
    if not isinstance(camera, str) or len(camera) > _MAX_CAMERA:
        raise InputError(
            f"parameter `camera` is {str(camera)[:80]!r}", f"Give a name of up to {_MAX_CAMERA} characters."
        )
    return camera
