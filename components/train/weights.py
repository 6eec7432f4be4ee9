"""What a training starts from: the architecture that Ultralytics ships, and base weights that are really here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

from ..shared.errors import InputError, ModelError
from ..shared.files import sha256_file
from ..shared.settings import Settings
from ..shared.storage import ObjectMissing, Store, parse_s3_uri
from ..shared.yolo import load_detector
from .candidate import Candidate

__all__ = ["Base", "resolve_base"]

_SCALED = re.compile(r"(yolov?\d+)([a-z])")


@dataclass(frozen=True)
class Base:
    """Where the network comes from.

    Attributes:
        architecture: name of a network description, such as `yolo11n.yaml`; empty where the checkpoint brings it.
        checkpoint: local .pt to start from, or None for random weights.
        sha256: digest of that file, or empty.
    """

    architecture: str
    checkpoint: Path | None
    sha256: str


def resolve_base(candidate: Candidate, name: str, champion: str, settings: Settings, work: Path) -> Base:
    """Find the architecture and fetch the base weights of a candidate.

    Args:
        candidate: says what is wanted.
        name: the registered model, whose champion may be meant.
        champion: its version, or empty where there is none.
        settings: of the object store.
        work: folder for fetched weights.

    Raises:
        InputError: an unknown architecture, no champion, or weights that are not there or cannot be used.
        StorageError: the object store cannot be reached.
    """
    warm = candidate.model == "champion"
    if warm and candidate.weights not in ("", "champion"):
        raise InputError(
            f"candidate {candidate.name} takes its model from the champion but weights from {candidate.weights!r}",
            "Name an architecture such as yolo11n, or leave weights empty.",
        )
    architecture = "" if warm else _architecture(candidate)
    source = "champion" if warm else candidate.weights
    if not source:
        return Base(architecture, None, "")
    path = _champion(candidate, name, champion, settings, work) if source == "champion" else None
    path = path or _fetch(candidate, source, settings, work)
    try:
        load_detector(path)
    except ModelError as error:
        raise InputError(f"candidate {candidate.name}: {error.problem}", error.remedy) from error
    return Base(architecture, path.resolve(), sha256_file(path))


def _architecture(candidate: Candidate) -> str:
    """Check the name against the descriptions inside the installed package; nothing is downloaded."""
    package = find_spec("ultralytics")
    folders = list(package.submodule_search_locations or []) if package else []
    match = _SCALED.fullmatch(candidate.model)
    if match:
        for folder in folders:
            for path in sorted(Path(folder).glob(f"cfg/models/*/{match[1]}.yaml")):
                description = yaml.safe_load(path.read_text(encoding="utf-8"))
                if match[2] in description.get("scales", {}):
                    return f"{candidate.model}.yaml"
    raise InputError(
        f"candidate {candidate.name}: there is no architecture {candidate.model!r} in Ultralytics",
        "Name one such as yolo11n, yolov8n, yolo26n or a larger one (s, m, l, x), or champion; "
        "a .pt file goes into `weights`.",
    )


def _champion(candidate: Candidate, name: str, champion: str, settings: Settings, work: Path) -> Path:
    if not champion:
        raise InputError(
            f"candidate {candidate.name} starts from the champion of {name}, but there is none yet",
            "Give weights or an architecture for the first round, or promote a model first.",
        )
    return _download(candidate, Store(settings), f"models/{name}/{champion}/checkpoint.pt", work)


def _fetch(candidate: Candidate, source: str, settings: Settings, work: Path) -> Path:
    if source.startswith("s3://"):
        bucket, key = parse_s3_uri(source)
        return _download(candidate, Store(settings, bucket), key, work)
    path = Path(unquote(urlsplit(source).path)) if source.startswith("file://") else Path(source)
    if not path.is_file():
        raise InputError(
            f"candidate {candidate.name}: there is no file {path} on this machine, and nothing is downloaded",
            "Put the .pt into the bucket and give its s3:// URI, give a local path, or leave weights empty "
            "to train from scratch.",
        )
    return path


def _download(candidate: Candidate, store: Store, key: str, work: Path) -> Path:
    try:
        return store.get_file(key, work / "base.pt")
    except ObjectMissing as error:
        raise InputError(
            f"candidate {candidate.name}: {store.uri(key)} does not exist",
            "Check the URI of `weights`, or train from scratch.",
        ) from error
