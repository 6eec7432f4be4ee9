"""`haechi predict`: images, folders and image URLs in; boxes as plain rows and drawn pictures out.

The model is a folder on this machine or a V1 endpoint; both give the same boxes, since both are the same code.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import requests

from haechi.components.shared.drawing import draw_boxes
from haechi.components.shared.errors import InputError, ModelError, NoDataError
from haechi.components.shared.files import write_bytes
from haechi.components.shared.images import IMAGE_SUFFIXES, MAX_BYTES, Pixels, decode, encode_jpeg
from haechi.components.shared.model_folder import ModelFolder
from haechi.components.shared.settings import Settings

__all__ = ["predict"]

Row = dict[str, Any]
# An encoded image and its pixels in; `detections`, `width`, `height` and `model_version` out.
_Predictor = Callable[[bytes, Pixels], Row]

_TIMEOUT = (5, 60)  # seconds to connect, and between two bytes
_DEADLINE = 120.0  # seconds for a whole download
_TRIES = 4


def predict(
    inputs: Sequence[str],
    model: Path | None = None,
    endpoint: str = "",
    out: Path | None = None,
    conf: float | None = None,
) -> list[Row]:
    """Detect in images, one row an image, in the order given.

    Args:
        inputs: image files, folders of images (with all below them), and http(s) URLs of images.
        model: model folder to run here; exactly one of `model` and `endpoint` is given.
        endpoint: V1 URL such as http://127.0.0.1:8080/v1/models/safety.
        out: folder for the pictures with their boxes drawn, as JPEG; none where None.
        conf: report boxes from this score up, for all classes; None for the model's own thresholds. An endpoint never
            reports less than its own thresholds.

    Returns:
        Rows `{"input", "width", "height", "detections": [{"class", "class_id", "score", "box"}], "model_version"}`, with
        `"drawn"` (path) where `out` is given; an input that cannot be used is `{"input", "error"}`, and the others go on.

    Raises:
        InputError: no or both of model and endpoint, or a malformed one.
        ModelError, IntegrityError: the folder is unusable, or the endpoint cannot be reached or has no such model.
    """
    if (model is None) == (not endpoint):
        raise InputError("give exactly one of --model and --endpoint", "Name a model folder or a server.")
    if conf is not None and not 0 <= conf <= 1:
        raise InputError(f"conf is {conf}", "Give a score from 0 to 1.")
    detect = _local(model, conf) if model is not None else _remote(endpoint, conf or 0.0)
    names: set[str] = set()
    rows: list[Row] = []
    for name, load in _expand(inputs):
        try:
            data = load()
            # Decoded here in any case: an endpoint then meets no file that cannot be read.
            pixels = decode(data)
            row = {"input": name, **detect(data, pixels)}
            if out is not None:
                path = out / _unique(name, names)
                write_bytes(path, encode_jpeg(draw_boxes(pixels, _labels(row["detections"]))))
                row["drawn"] = str(path)
        except (InputError, NoDataError) as error:
            row = {"input": name, "error": str(error)}
        rows.append(row)
    return rows


def _expand(inputs: Sequence[str]) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Each image's name and how to read it; what cannot be found fails when it is read, as any other."""
    for text in inputs:
        path = Path(text)
        if "://" in text:
            yield text, partial(_download, text)
        elif path.is_dir():
            found = sorted(item for item in path.rglob("*") if item.suffix.lower() in IMAGE_SUFFIXES and item.is_file())
            for item in found:
                yield str(item), partial(_read, item)
            if not found:
                yield text, partial(_empty, path)
        else:
            yield text, partial(_read, path)


def _empty(folder: Path) -> bytes:
    raise NoDataError(f"{folder} holds no images", f"Give a folder with {', '.join(IMAGE_SUFFIXES)} files.")


def _read(path: Path) -> bytes:
    try:
        # One byte more than allowed tells decode that the file is too large, without reading all of it.
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error})", "Check the path.") from error


def _download(url: str) -> bytes:
    """The body of an http(s) URL, bounded in size and time."""
    if urlsplit(url).scheme not in ("http", "https"):
        raise InputError(f"{url} is not an http or https URL", "Fetch the image yourself and give the file.")
    end = time.monotonic() + _DEADLINE
    try:
        with requests.get(url, stream=True, timeout=_TIMEOUT) as answer:
            answer.raise_for_status()
            data = bytearray()
            for part in answer.iter_content(2**16):
                data += part
                if len(data) > MAX_BYTES:
                    raise InputError(f"{url} has more than {MAX_BYTES} bytes", "Give a smaller image.")
                if time.monotonic() > end:
                    raise InputError(f"{url} did not arrive within {_DEADLINE:.0f} s", "Fetch it yourself.")
            return bytes(data)
    except requests.RequestException as error:
        raise InputError(f"{url} cannot be fetched ({error})", "Check the address.") from error


def _local(folder: Path, conf: float | None) -> _Predictor:
    model = ModelFolder.load(folder)
    detector = model.detector(folder, Settings.from_env().threads)
    limits = model.limits() if conf is None else [conf] * len(model.classes)

    def detect(data: bytes, pixels: Pixels) -> Row:
        found = detector.detect([pixels], conf=min(limits), iou=model.iou)[0].above(limits)
        height, width = pixels.shape[:2]
        rows = found.to_list(model.classes)
        return {"width": width, "height": height, "detections": rows, "model_version": model.version}

    return detect


def _remote(endpoint: str, conf: float) -> _Predictor:
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or "/v1/models/" not in parts.path:
        raise InputError(
            f"--endpoint is {endpoint!r}, not the V1 URL of a model",
            "Write it like http://127.0.0.1:8080/v1/models/<name>.",
        )
    url = endpoint.removesuffix("/").removesuffix(":predict") + ":predict"
    session = requests.Session()

    def detect(data: bytes, pixels: Pixels) -> Row:
        answer = _ask(session, url, {"instances": [{"image": {"b64": base64.b64encode(data).decode()}}]})
        try:
            first = answer["predictions"][0]
            kept = [item for item in first["detections"] if item["score"] >= conf]
            size = {"width": first["width"], "height": first["height"]}
        except (KeyError, IndexError, TypeError) as error:
            raise ModelError(f"{url} answered in another form than Haechi's V1", "Check the endpoint.") from error
        return {**size, "detections": kept, "model_version": str(answer.get("model_version", ""))}

    return detect


def _ask(session: requests.Session, url: str, body: Row) -> Any:
    """One V1 call; a busy server is asked again a few times.

    Raises:
        InputError: the server refuses this image.
        ModelError: it cannot be reached, has no such model, or stays busy: the other images would fare no better.
    """
    for attempt in range(_TRIES):
        try:
            answer = session.post(url, json=body, timeout=_TIMEOUT)
        except requests.RequestException as error:
            raise ModelError(
                f"{url} cannot be reached ({error})", "Check --endpoint and that the server is up."
            ) from error
        if answer.status_code not in (429, 503):
            break
        time.sleep(0.5 * 2**attempt)
    if answer.status_code in (400, 413, 415, 422):
        raise InputError(f"the server refuses the image: {_reason(answer)}", "Send another one.")
    if answer.status_code != 200:
        raise ModelError(f"{url} answered {answer.status_code}: {_reason(answer)}", "Check --endpoint and the server.")
    try:
        return answer.json()
    except ValueError as error:
        raise ModelError(f"{url} answered with something that is not JSON", "Check --endpoint.") from error


def _reason(answer: requests.Response) -> str:
    try:
        return str(answer.json()["error"])
    except (ValueError, KeyError, TypeError):
        return answer.text[:200] or answer.reason


def _labels(detections: Sequence[Row]) -> list[tuple[str, list[float]]]:
    """What is drawn: the strongest last, on top of the others."""
    return [(f"{item['class']} {item['score']:.2f}", item["box"]) for item in reversed(detections)]


def _unique(name: str, taken: set[str]) -> str:
    """A file name for a drawn picture: the input's stem, numbered where another input has the same."""
    stem = Path(unquote(urlsplit(name).path) if "://" in name else name).stem.replace("/", "_") or "image"
    choice, number = stem, 2
    while choice in taken:
        choice, number = f"{stem}-{number}", number + 1
    taken.add(choice)
    return f"{choice}.jpg"
