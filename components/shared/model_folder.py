"""A model folder: everything that one exported model is, in one immutable place.

    model.onnx  model.json  checkpoint.pt  parity.json  golden/  report.html

The folder is the artifact `onnx_model`, the object prefix `models/<name>/<version>/`, what KServe mounts at
/mnt/models, and what a teacher is. `<version>` is the first 12 hex digits of the ONNX file's SHA-256.
"""

from __future__ import annotations

import fcntl
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import numpy as np

from .detections import Detections, Detector
from .errors import InputError, IntegrityError, ModelError, SettingsError
from .files import atomic_folder, read_json, sha256_file, write_bytes, write_json
from .frame_cache import usable_folder
from .images import decode
from .model_address import check_address
from .parity import Agreement, Tolerance, agree, compare
from .settings import Settings

if TYPE_CHECKING:  # the serving image has no S3 client: KServe mounts the folder there
    from .storage import Store

__all__ = [
    "GOLDEN_CONF",
    "GoldenImage",
    "ModelFolder",
    "check_golden",
    "fetch_model",
    "from_rows",
    "model_cache",
    "read_golden",
    "write_golden",
]

FORMAT_VERSION = 1
GOLDEN_CONF = 0.1  # low enough that a weak first model has golden boxes too
_IOU = 0.7
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_MAX_IMGSZ = 16_384
_KINDS: dict[Any, tuple[str, ...]] = {
    str: ("name", "version", "onnx_sha256", "checkpoint_sha256", "dataset_digest", "run_id", "created_at", "licence"),
    int: ("imgsz", "stride", "golden", "format_version"),
    (int, float): ("iou",),
    dict: ("thresholds", "training", "metrics"),
}


@dataclass(frozen=True)
class GoldenImage:
    """One golden image: its encoded bytes, its file name in `golden/`, and the boxes that the ONNX model gave."""

    name: str
    data: bytes
    expected: Detections


@dataclass(frozen=True)
class ModelFolder:
    """The description in `model.json`.

    Attributes:
        name: registered model's name, kebab-case.
        version: first 12 hex digits of `onnx_sha256`.
        classes: ordered class names; the network's class indices.
        imgsz, stride: input size (longer side) and stride.
        thresholds: confidence at which each class is reported in service.
        iou: of the non-maximum suppression.
        onnx_sha256, checkpoint_sha256: digests of the two files; the latter empty where there is no checkpoint.
        golden: number of golden images; 0 means that nothing proves the folder, and `haechi serve` wants
            `--allow-unverified`.
        dataset_digest: what it was trained on, or empty.
        run_id: MLflow run, or empty.
        created_at: ISO 8601, UTC.
        training: the candidate's settings.
        metrics: validation metrics, such as `val/mAP50-95`.
        licence: of the weights.
        format_version: of this description.
    """

    name: str
    version: str
    classes: tuple[str, ...]
    imgsz: int
    stride: int
    thresholds: dict[str, float]
    iou: float
    onnx_sha256: str
    checkpoint_sha256: str = ""
    golden: int = 0
    dataset_digest: str = ""
    run_id: str = ""
    created_at: str = ""
    training: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    licence: str = "AGPL-3.0 (Ultralytics)"
    format_version: int = FORMAT_VERSION

    def write(self, folder: Path) -> None:
        """Write `model.json` into the folder."""
        write_json(folder / "model.json", asdict(self))

    @classmethod
    def load(cls, folder: Path, verify: bool = True) -> ModelFolder:
        """Read a model folder's description and check the graph's digest.

        Raises:
            ModelError: no such folder, no or another `model.json`.
            IntegrityError: `model.onnx` is not the file that was described.
        """
        try:
            entry = read_json(folder / "model.json")
            entry["classes"] = tuple(entry["classes"])
            model = cls(**entry)
            model._check()
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise ModelError(
                f"{folder} is not a model folder: model.json cannot be read ({error})",
                "Make one with `haechi export --checkpoint best.pt --out DIR`.",
            ) from error
        if model.format_version != FORMAT_VERSION:
            raise ModelError(
                f"{folder}/model.json has format_version {model.format_version}", f"This Haechi reads {FORMAT_VERSION}."
            )
        if not (folder / "model.onnx").is_file():
            raise ModelError(f"{folder} has no model.onnx", "Copy the whole folder, or export again.")
        if verify and sha256_file(folder / "model.onnx") != model.onnx_sha256:
            raise IntegrityError(
                f"{folder}/model.onnx is not the file that model.json describes", "Fetch the folder again."
            )
        return model

    def _check(self) -> None:
        """Raise a ValueError that names the field which is of another kind or contradicts another."""
        for kind, names in _KINDS.items():
            for field_name in names:
                value = getattr(self, field_name)
                if not isinstance(value, kind) or isinstance(value, bool):
                    raise ValueError(f"{field_name} is of another kind: {str(value)[:80]!r}")
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"name {self.name[:80]!r} is not kebab-case")
        if not 0 < self.stride <= self.imgsz <= _MAX_IMGSZ or self.imgsz % self.stride:
            raise ValueError(f"imgsz {self.imgsz} is no multiple of stride {self.stride} up to {_MAX_IMGSZ}")
        if not 0 < self.iou <= 1:
            raise ValueError(f"iou {self.iou} is not above 0 and up to 1")
        if self.golden < 0:
            raise ValueError(f"golden is {self.golden}")
        if not all(isinstance(name, str) for name in self.classes):
            raise ValueError("classes are not all names")
        "".join(self.classes).encode()  # a lone surrogate, which JSON can spell, is an error of this kind
        if not self.classes or len(set(self.classes)) != len(self.classes):
            raise ValueError(f"classes {list(self.classes)} are none or not distinct")
        wrong = [name for name in self.classes if not 0 <= self.thresholds.get(name, -1) <= 1]
        if wrong:
            raise ValueError(f"thresholds has no value from 0 to 1 for {', '.join(wrong)}")
        if self.version != self.onnx_sha256[:12]:
            raise ValueError(f"version {self.version} is not the beginning of onnx_sha256")

    def detector(self, folder: Path, threads: int = 0) -> Detector:
        """Open the graph as a detector."""
        return Detector.from_onnx(folder / "model.onnx", self.classes, self.imgsz, self.stride, threads)

    def limits(self) -> list[float]:
        """The reporting thresholds in class order."""
        return [self.thresholds[name] for name in self.classes]


def write_golden(folder: Path, images: list[GoldenImage], classes: tuple[str, ...]) -> None:
    """Write `golden/<name>` and `golden/golden.json` into a model folder."""
    for image in images:
        write_bytes(folder / "golden" / image.name, image.data)
    rows = [{"file": image.name, "boxes": image.expected.to_list(classes)} for image in images]
    write_json(folder / "golden" / "golden.json", {"conf": GOLDEN_CONF, "iou": _IOU, "images": rows})


def read_golden(folder: Path) -> list[GoldenImage]:
    """The golden images of a model folder; empty where it has none.

    Raises:
        IntegrityError: an image is missing, or golden.json is not such a list.
    """
    path = folder / "golden" / "golden.json"
    if not path.is_file():
        return []
    try:
        return [
            GoldenImage(row["file"], (folder / "golden" / Path(row["file"]).name).read_bytes(), from_rows(row["boxes"]))
            for row in read_json(path)["images"]
        ]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise IntegrityError(
            f"the golden images of {folder} cannot be read ({error})", "Fetch the folder again."
        ) from error


def from_rows(rows: list[dict[str, Any]]) -> Detections:
    """The inverse of `Detections.to_list`."""
    return Detections(
        np.asarray([row["box"] for row in rows], dtype=np.float32).reshape(-1, 4),
        np.asarray([row["score"] for row in rows], dtype=np.float32),
        np.asarray([row["class_id"] for row in rows], dtype=np.int64),
    )


def check_golden(folder: Path, detector: Detector, tolerance: Tolerance | None = None) -> Agreement:
    """Run the golden images through `detector` and compare with the golden boxes.

    Returns:
        The agreement; `ok` is False where there is no golden image.

    Raises:
        IntegrityError: the golden images cannot be read.
    """
    results = []
    for image in read_golden(folder):
        try:
            pixels = decode(image.data)
        except InputError as error:
            raise IntegrityError(
                f"golden image {image.name} of {folder}: {error.problem}", "Fetch the folder again."
            ) from error
        found = detector.detect([pixels], conf=GOLDEN_CONF, iou=_IOU)[0]
        results.append(compare(image.expected, found, GOLDEN_CONF, tolerance or Tolerance(), max(pixels.shape[:2])))
    return agree(results)


def fetch_model(store: Store | None, uri: str, cache: Path) -> Path:
    """A local, verified model folder for `uri`.

    Args:
        store: where `s3://` folders are fetched from (any bucket of that service); may be None for local folders.
        uri: a plain path, `file:///...` or `s3://<bucket>/models/<name>/<version>/`. A local folder is used in place.
        cache: fetched folders go to `<cache>/<bucket>/<prefix>`, whole or not at all, and are used again when their
            digests still hold. Several processes may share it.

    Raises:
        InputError: `uri` is a checkpoint or a bare graph, or of another scheme.
        ModelError: no model folder is there.
        IntegrityError: a file is not the one that `model.json` describes.
    """
    check_address(uri)
    scheme = urlsplit(uri).scheme
    if scheme == "s3":
        return _fetch_from_store(store, uri, cache)
    folder = Path(unquote(urlsplit(uri).path)) if scheme == "file" else Path(uri)
    _verify(folder)
    return folder


def _verify(folder: Path) -> ModelFolder:
    model = ModelFolder.load(folder)
    checkpoint = folder / "checkpoint.pt"
    if model.checkpoint_sha256 and checkpoint.is_file() and sha256_file(checkpoint) != model.checkpoint_sha256:
        raise IntegrityError(f"{checkpoint} is not the file that model.json describes", "Fetch the folder again.")
    return model


def _fetch_from_store(store: Store | None, uri: str, cache: Path) -> Path:
    from .storage import parse_s3_uri

    if store is None:
        raise SettingsError(f"{uri} needs an object store", "Set HAECHI_S3_ENDPOINT, or give a local folder.")
    bucket, key = parse_s3_uri(uri)
    prefix = key.strip("/")
    if not prefix or any(part in ("", ".", "..") for part in prefix.split("/")):
        raise InputError(f"{uri!r} is not a model folder's address", "Write s3://<bucket>/models/<name>/<version>/.")
    source = store.for_bucket(bucket)  # refuses what is no bucket's name, before that is made a path of
    target = cache / bucket / prefix
    with _locked(target):
        try:
            _verify(target)
            return target
        except (ModelError, IntegrityError):
            pass  # not fetched yet, or damaged on this disk: fetch it (again)
        if not source.exists(f"{prefix}/model.json"):
            raise ModelError(
                f"{uri} is not a model folder: it has no model.json", "Check the bucket, name and version."
            )
        with atomic_folder(target) as partial:
            source.get_folder(f"{prefix}/", partial)
            try:
                _verify(partial)
            except IntegrityError as error:
                raise IntegrityError(
                    f"{uri} holds a file that its model.json does not describe ({error.problem})",
                    "Deploy or export that model again; the stored folder is damaged.",
                ) from error
    return target


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Hold `target` against other processes; the kernel lets go when the holder dies."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".{target.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def model_cache(settings: Settings) -> Iterator[Path]:
    """The folder for fetched models: in the cache where there is one, else a scratch folder that goes at the end."""
    cache = usable_folder(settings.cache_path)
    if cache:
        yield cache / "models"
        return
    with tempfile.TemporaryDirectory(prefix="haechi-models-") as folder:
        yield Path(folder)
