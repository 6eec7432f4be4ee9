"""What a killed training resumes from: one file with everything, written whole, kept here and in the object store."""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..shared.errors import StorageError
from ..shared.files import read_json, sha256_file, write_bytes, write_json
from ..shared.progress import say
from ..shared.settings import Settings
from ..shared.storage import ObjectMissing, Store

__all__ = ["StateKeeper", "TrainPlan", "training_key", "write_failure"]

FORMAT_VERSION = 1
_LOCAL_SECONDS = 10.0
_DISTRIBUTIONS = ("ultralytics-opencv-headless", "ultralytics")


def training_key(
    dataset_digest: str, candidate: Mapping[str, Any], seed: int, base_sha256: str, only_run: str = ""
) -> str:
    """Digest (32 hex digits) of all that decides a training's outcome; equal key, equal checkpoint.

    The candidate's name is left out; the installed Ultralytics release and our own code are bound in, so that neither a
    new release nor an image that was rebuilt under an old tag is given what another one trained.

    Args:
        dataset_digest, candidate, seed, base_sha256: what is trained, how, and from what.
        only_run: the one run that may find it; empty for all.
    """
    settings = {key: value for key, value in candidate.items() if key not in ("name", "weights")}
    parts = [FORMAT_VERSION, _release(), _code(), dataset_digest, settings, seed, base_sha256]
    parts += [only_run] if only_run else []
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@cache
def _code() -> str:
    """Digest of the sources of this room and of what it shares with others."""
    here = Path(__file__).parent
    sources = sorted([*here.glob("*.py"), *(here.parent / "shared").glob("*.py")])
    listed = [f"{path.parent.name}/{path.name} {sha256_file(path)}" for path in sources]
    return hashlib.sha256("\n".join(listed).encode()).hexdigest()


def _release() -> str:
    for name in _DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return ""


@dataclass(frozen=True)
class TrainPlan:
    """What the trainer must know beyond Ultralytics' options; a file, because multi-GPU children read it too.

    Attributes:
        key: the training's key; empty keeps the state on this machine only.
        seed: of every epoch's randomness.
        covers: path of the materialised `covers.json`.
        mlflow_run: run that the metrics go to, or empty.
        upload_every: seconds between uploads of the state.
        cache: keep decoded pictures in memory.
        threads: compute threads, 0 for all.
    """

    key: str
    seed: int
    covers: str
    mlflow_run: str = ""
    upload_every: float = 60.0
    cache: bool = False
    threads: int = 0

    def write(self, folder: Path) -> None:
        """Write `plan.json` into the training's folder."""
        write_json(folder / "plan.json", asdict(self))

    @classmethod
    def read(cls, folder: Path) -> TrainPlan:
        """The inverse of `write`."""
        return cls(**read_json(folder / "plan.json"))


def write_failure(folder: Path, problem: str, remedy: str) -> None:
    """Leave the reason where the parent of a multi-GPU training finds it."""
    write_json(folder / "failure.json", {"problem": problem, "remedy": remedy})


class StateKeeper:
    """Keeps a training's state in a folder and under `state/train/<key>/`.

    Args:
        folder: local folder.
        settings: of the object store; without an endpoint the state stays local.
        key: from `training_key`.
        every: seconds between uploads; the last state of a training is always uploaded.
    """

    def __init__(self, folder: Path, settings: Settings, key: str, every: float = 60.0) -> None:
        self.folder, self.key, self.every = folder, key, every
        self._store = Store(settings) if settings.s3_endpoint and key else None
        self._prefix = f"state/train/{key}/"
        self._uploaded = self._kept = time.monotonic()

    def due(self) -> bool:
        """Whether it is time to keep a state: an older one resumes as exactly, it only repeats more epochs."""
        return time.monotonic() - self._kept >= min(_LOCAL_SECONDS, self.every)

    def save(self, state: dict[str, Any]) -> None:
        """Keep a state (tensors and plain values); `state["stop"]` marks the last one.

        An object store that is away for a moment costs only the upload: the epoch is on disk.
        """
        import torch

        buffer = io.BytesIO()
        torch.save({**state, "format": FORMAT_VERSION, "key": self.key}, buffer)
        write_bytes(self.folder / "state.pt", buffer.getvalue())
        self._kept = time.monotonic()
        due = time.monotonic() - self._uploaded >= self.every
        if self._store and (due or state["stop"]):
            try:
                self._store.put(self._prefix + "state.pt", buffer.getvalue())
                self._uploaded = time.monotonic()
            except StorageError as error:
                say(f"the training state was not uploaded: {error}")

    def load(self) -> dict[str, Any] | None:
        """The newest state of this training, from the folder or else from the store, or None."""
        import torch

        path = self.folder / "state.pt"
        if not path.is_file() and self._store:
            try:
                self._store.get_file(self._prefix + "state.pt", path)
            except ObjectMissing:
                return None
        if not path.is_file():
            return None
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return state if (state["format"], state["key"]) == (FORMAT_VERSION, self.key) else None

    def mlflow_run(self) -> str:
        """The MLflow run that a killed training had opened, or empty."""
        path = self.folder / "mlflow.json"
        if path.is_file():
            return str(read_json(path)["run_id"])
        try:
            return str(self._store.get_json(self._prefix + "mlflow.json")["run_id"]) if self._store else ""
        except ObjectMissing:
            return ""

    def keep_mlflow_run(self, run_id: str) -> None:
        """Remember the opened MLflow run, so that a resumed training goes on in it."""
        write_json(self.folder / "mlflow.json", {"run_id": run_id})
        if self._store:
            self._store.put_json(self._prefix + "mlflow.json", {"run_id": run_id})

    def finish(self, files: Path, result: dict[str, Any]) -> None:
        """Keep a finished training's files, `result.json` last, and drop the state it no longer needs."""
        if not self._store:
            return
        for path in sorted(files.iterdir()):
            self._store.put(self._prefix + path.name, path.read_bytes())
        self._store.put_json(self._prefix + "result.json", result)
        if self._store.exists(self._prefix + "state.pt"):
            self._store.remove(self._prefix + "state.pt")

    def finished(self, files: Path) -> dict[str, Any] | None:
        """Fetch a finished training's files into `files` and give its result, or None."""
        if not self._store:
            return None
        try:
            result: dict[str, Any] = self._store.get_json(self._prefix + "result.json")
        except ObjectMissing:
            return None
        for name in ("checkpoint.pt", "results.csv"):
            self._store.get_file(self._prefix + name, files / name)
        return result
