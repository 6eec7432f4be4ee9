"""The address of a model folder, such as a teacher's: what can be said of it before anything is fetched."""

from __future__ import annotations

from urllib.parse import urlsplit

from .errors import InputError

__all__ = ["check_address"]


def check_address(uri: str) -> None:
    """Refuse what cannot be a model folder: a path, a `file://` or an `s3://` URI may be one.

    Raises:
        InputError: it is empty, one file (a checkpoint, a bare graph), or of another scheme.
    """
    if not uri:
        raise InputError("the model folder's address is empty", "Give a path, a file:// or an s3:// URI.")
    if uri.endswith((".pt", ".pth")):
        raise InputError(
            f"{uri} is a checkpoint, not a model folder",
            f"Run `haechi export --checkpoint {uri} --out DIR` first and give DIR.",
        )
    if uri.endswith((".onnx", "/model.json")):
        raise InputError(f"{uri} is one file of a model folder", "Give the folder that holds it.")
    try:
        known = urlsplit(uri).scheme in ("", "file", "s3")
    except ValueError:  # half an IPv6 address in it
        known = False
    if not known:
        raise InputError(f"{uri!r} is not a model folder's address", "Give a path, a file:// or an s3:// URI.")
