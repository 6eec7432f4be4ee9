"""The model's immutable place in the object store: `models/<name>/<version>/`, `model.json` last."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from haechi.components.shared.errors import IntegrityError
from haechi.components.shared.files import sha256_bytes, sha256_file
from haechi.components.shared.model_folder import ModelFolder
from haechi.components.shared.progress import say
from haechi.components.shared.storage import ObjectMissing, Store, ordered_map

__all__ = ["model_prefix", "publish"]

_MARKER = "model.json"
# What the model does in service. The rest of model.json (time, run, metrics, checkpoint) is where it came from, and may
# differ when a deterministic training is repeated and gives the very same graph.
_IN_SERVICE = ("name", "version", "classes", "imgsz", "stride", "thresholds", "iou", "onnx_sha256")
_TYPES = {".json": "application/json", ".html": "text/html; charset=utf-8", ".jpg": "image/jpeg", ".png": "image/png"}


def model_prefix(name: str, version: str) -> str:
    """Key prefix of a model folder, ending in a slash."""
    return f"models/{name}/{version}/"


def publish(store: Store, model: ModelFolder, folder: Path, report: Path | None = None) -> str:
    """Copy a model folder to its place, unless it is there, and check what the store gives back.

    A folder that is there already is kept as it is: the first one stays. Only a missing `report.html` is added.

    Args:
        store: the bucket.
        model: the folder's description.
        folder: the model folder.
        report: the evaluation's page; becomes `report.html`.

    Returns:
        `s3://<bucket>/models/<name>/<version>/`.

    Raises:
        IntegrityError: another model stands at that place, or the store does not give back what was written.
    """
    prefix = model_prefix(model.name, model.version)
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    if report is not None:
        files["report.html"] = report
    if _stored(store, prefix, model):
        say(f"{store.uri(prefix)} is there already")
        if report is not None and not store.exists(f"{prefix}report.html"):
            _write(store, prefix, {"report.html": report})
        _check(store, prefix, {"model.onnx": model.onnx_sha256})
    else:
        _write(store, prefix, {name: path for name, path in files.items() if name != _MARKER})
        _check(store, prefix, {name: sha256_file(path) for name, path in files.items() if name != _MARKER})
        # The marker makes the folder visible, so it goes last and only after the rest was read back.
        _write(store, prefix, {_MARKER: files[_MARKER]})
        say(f"{len(files)} files written to {store.uri(prefix)}")
    return store.uri(prefix)


def _write(store: Store, prefix: str, files: Mapping[str, Path]) -> None:
    def put(item: tuple[str, Path]) -> None:
        name, path = item
        store.put(prefix + name, path.read_bytes(), _TYPES.get(Path(name).suffix, "application/octet-stream"))

    for _ in ordered_map(put, sorted(files.items()), store.settings.workers):
        pass


def _check(store: Store, prefix: str, digests: Mapping[str, str]) -> None:
    names = sorted(digests)
    found = ordered_map(lambda name: sha256_bytes(store.get(prefix + name)), names, store.settings.workers)
    for name, digest in zip(names, found, strict=True):
        if digest != digests[name]:
            raise IntegrityError(
                f"{store.uri(prefix + name)} has SHA-256 {digest}, not {digests[name]}",
                "Look at the store's health, delete that folder and deploy again.",
            )


def _stored(store: Store, prefix: str, model: ModelFolder) -> bool:
    """Whether this model is there, whole."""
    try:
        entry = store.get_json(prefix + _MARKER)
    except ObjectMissing:
        return False
    except ValueError as error:
        raise IntegrityError(
            f"{store.uri(prefix + _MARKER)} is not JSON ({error})", "Delete that folder and deploy again."
        ) from error
    theirs, ours = _in_service(entry), _in_service(json.loads(json.dumps(vars(model))))
    other = sorted(key for key in _IN_SERVICE if theirs[key] != ours[key])
    if other:
        raise IntegrityError(
            f"{store.uri(prefix)} was written with another {', '.join(other)}, and a model folder never changes",
            "Export with the same settings as then, or train again to get a version of its own.",
        )
    return True


def _in_service(entry: Any) -> dict[str, Any]:
    return {key: entry.get(key) if isinstance(entry, dict) else None for key in _IN_SERVICE}
