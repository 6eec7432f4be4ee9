"""Serve the deployed model with `haechi serve` and ask it about a frame that it has never seen."""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from haechi.components.shared.dataset import Box
from haechi.components.shared.settings import Settings

from ..processes import GuardedProcess, ServiceError, tail
from ..servers import answers, free_ports
from .world import RawFrame

__all__ = ["Prediction", "ask", "serving"]

_PATIENCE = 60.0


@dataclass(frozen=True)
class Prediction:
    """One answered request.

    Attributes:
        frame: key of the frame.
        url: where it was asked.
        model, version: as the server told.
        boxes: rows `{"class", "class_id", "score", "box"}` in pixels.
        truth: rows `{"class", "box"}`.
        milliseconds: from sending to the answer.
    """

    frame: str
    url: str
    model: str
    version: str
    boxes: tuple[dict[str, Any], ...]
    truth: tuple[dict[str, Any], ...]
    milliseconds: float

    def to_json(self) -> dict[str, Any]:
        """The entry of summary.json."""
        return asdict(self) | {"boxes": list(self.boxes), "truth": list(self.truth)}


@contextmanager
def serving(model: Path, log: Path, settings: Settings) -> Iterator[str]:
    """A `haechi serve` process for the block; yields its base URL once the model has proven itself.

    Raises:
        ServiceError: it did not become ready; the message ends with its log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    http, grpc = free_ports(2)
    command = [sys.executable, "-m", "haechi.pipelines.cli", "serve", "--model", str(model)]
    command += ["--http-port", str(http), "--grpc-port", str(grpc)]
    process = GuardedProcess(command, log, {**os.environ, "HAECHI_THREADS": str(settings.threads)}, grace=5.0)
    try:
        deadline = time.monotonic() + _PATIENCE
        while not answers(http, "/v2/health/ready", want=200):
            if not process.alive() or time.monotonic() > deadline:
                raise ServiceError(f"`haechi serve` did not become ready; its log ends:\n{tail(log)}\n", f"See {log}.")
            time.sleep(0.1)
        yield f"http://127.0.0.1:{http}"
    finally:
        process.stop()


def ask(base: str, name: str, frame: RawFrame) -> Prediction:
    """Send one frame to the V1 endpoint.

    Raises:
        ServiceError: the server refused it or went away.
    """
    url = f"{base}/v1/models/{name}:predict"
    request = urllib.request.Request(url, data=frame.data, headers={"content-type": "image/jpeg"})  # noqa: S310
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    started = time.monotonic()
    try:
        with opener.open(request, timeout=30) as response:
            answer = json.load(response)
    except (OSError, ValueError) as error:
        told = error.read().decode(errors="replace") if isinstance(error, urllib.error.HTTPError) else str(error)
        raise ServiceError(f"{url} did not answer ({told})", "See the server's log.") from error
    seconds = time.monotonic() - started
    return Prediction(
        frame=frame.key,
        url=url,
        model=str(answer["model_name"]),
        version=str(answer["model_version"]),
        boxes=tuple(answer["predictions"][0]["detections"]),
        truth=tuple(_row(box) for box in frame.boxes or ()),
        milliseconds=round(1000 * seconds, 1),
    )


def _row(box: Box) -> dict[str, Any]:
    return {"class": box.class_name, "box": [box.x1, box.y1, box.x2, box.y2]}
