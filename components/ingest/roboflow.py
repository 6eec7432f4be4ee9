"""Roboflow projects, downloaded by Roboflow's own SDK."""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path
from typing import Any

from ..shared.errors import InputError, SettingsError, StorageError

__all__ = ["download", "parse_roboflow_uri"]

_FORMATS = {"auto": "yolov8", "yolo": "yolov8", "coco": "coco", "voc": "voc"}
_URI = re.compile(r"roboflow://([^/]+)/([^/]+)/(\d+)/?")


def parse_roboflow_uri(uri: str) -> tuple[str, str, int]:
    """Workspace, project and version of `roboflow://workspace/project/version`.

    Raises:
        InputError: it is written otherwise.
    """
    match = _URI.fullmatch(uri)
    if match is None:
        raise InputError(f"{uri!r} is not roboflow://workspace/project/version", "The version is a number.")
    return match[1], match[2], int(match[3])


def download(uri: str, kind: str, folder: Path, api_key: str, sdk: Any = None) -> Path:
    """Download a version into `folder`; where it lies.

    Args:
        uri: `roboflow://workspace/project/version`.
        kind: `auto`, `yolo`, `coco` or `voc`.
        folder: an empty folder.
        api_key: Roboflow's key.
        sdk: the class `roboflow.Roboflow`, or one like it.

    Raises:
        SettingsError: there is no key.
        StorageError: Roboflow cannot be reached or refuses; the message has no key in it.
    """
    workspace, project, version = parse_roboflow_uri(uri)
    if not api_key:
        raise SettingsError(f"ROBOFLOW_API_KEY is not set, so {uri} cannot be downloaded", "Set it to your key.")
    if sdk is None:
        from roboflow import Roboflow as sdk  # type: ignore[no-redef]
    try:
        # The SDK prints its progress to standard output, which belongs to --json reports.
        with contextlib.redirect_stdout(sys.stderr):
            picked = sdk(api_key=api_key).workspace(workspace).project(project).version(version)
            picked.download(_FORMATS[kind], location=str(folder), overwrite=True)
    # The SDK raises RuntimeError, requests' errors and plain Exception alike.
    except Exception as error:
        told = str(error).replace(api_key, "***")
        raise StorageError(f"cannot download {uri} from Roboflow: {told}", "Check the names and the key.") from None
    return folder
