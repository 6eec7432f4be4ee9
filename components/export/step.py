"""Export the best candidate as a model folder, and prove that its ONNX graph gives the checkpoint's boxes."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..shared.dataset import ManifestRow, read_rows
from ..shared.detections import Detector
from ..shared.errors import InputError, IntegrityError, TrainError
from ..shared.files import atomic_folder, check_name, read_json, sha256_file, write_json
from ..shared.model_folder import ModelFolder, write_golden
from ..shared.progress import say
from ..shared.settings import Settings
from ..shared.storage import Store
from ..shared.yolo import tame
from .golden import Picture, choose_rows, from_data, from_files, from_store
from .graph import Checkpoint, torch_detector, write_onnx
from .parameters import check_golden_images, check_iou, spread_thresholds
from .proof import SPARE, prove

__all__ = ["ExportResult", "export", "export_checkpoint"]


@dataclass(frozen=True)
class ExportResult:
    """What was exported.

    Attributes:
        name, version: of the model folder.
        classes: ordered class names.
        map50_95: of the chosen candidate on val.
        candidate: its name.
        dataset_digest: what it was trained on.
        parity_ok: whether the graph gave the checkpoint's boxes; None where there was no image to compare on.
    """

    name: str
    version: str
    classes: tuple[str, ...]
    map50_95: float
    candidate: str
    dataset_digest: str
    parity_ok: bool | None

    def metadata(self) -> dict[str, Any]:
        """JSON-plain values for the artifact; what is not known is left out."""
        plain = asdict(self) | {"classes": list(self.classes)}
        return {key: value for key, value in plain.items() if value is not None}


@dataclass(frozen=True)
class _Origin:
    """What `model.json` tells of the training."""

    dataset_digest: str = ""
    run_id: str = ""
    training: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


def export(
    checkpoints: Sequence[Path],
    dataset: Path | None,
    name: str,
    thresholds: Mapping[str, float],
    iou: float,
    golden_images: int,
    out: Path,
    settings: Settings,
) -> ExportResult:
    """Export the candidate with the best val mAP50-95 (ties: the first by name) to a model folder.

    Args:
        checkpoints: folders of `checkpoint` artifacts.
        dataset: folder of the dataset artifact, whose val frames become golden images; None for no golden images.
        name: registered model's name, kebab-case.
        thresholds: confidence per class in service, `default` for the others.
        iou: of the suppression in service.
        golden_images: how many, at least 0.
        out: the model folder, written whole.
        settings: of the object store that holds the frames.

    Raises:
        TrainError: no candidate trained.
        InputError: thresholds, iou, name or golden_images that cannot be.
        IntegrityError: a checkpoint folder without its files.
        ModelError: the network cannot be exported, or its graph gives other boxes than the checkpoint.
    """
    check_golden_images(golden_images)
    check_iou(iou)
    folder, best = _best(checkpoints)
    pictures: list[Picture] = []
    if dataset is not None and golden_images > 0:
        rows = choose_rows(read_rows(dataset / "manifest.parquet", ManifestRow), SPARE * golden_images)
        pictures = from_store(Store(settings), rows) if rows else []
    origin = _Origin(
        best["dataset_digest"],
        best["run_id"],
        best["candidate"],
        {"val/mAP50-95": best["map50_95"], "val/mAP50": best["map50"]},
    )
    source, size = folder / "checkpoint.pt", int(best["imgsz"])
    model, parity_ok = _write(
        source, out, name, pictures, golden_images, size, thresholds, iou, origin, settings.threads
    )
    return ExportResult(
        name, model.version, model.classes, best["map50_95"], best["name"], best["dataset_digest"], parity_ok
    )


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    name: str,
    images: Sequence[Path] | None = None,
    data: Path | None = None,
    imgsz: int = 0,
    thresholds: Mapping[str, float] | None = None,
    iou: float = 0.7,
    golden_images: int = 8,
    threads: int = 0,
) -> ModelFolder:
    """Export any Ultralytics detection checkpoint to a model folder.

    Args:
        checkpoint: the .pt file, loaded weights-only.
        out: the model folder, written whole.
        name: the model's name, kebab-case.
        images: golden images come from these files or folders.
        data: or from the val (else test) split of this data.yaml. With neither, the folder has no golden image and
            says so.
        imgsz: input size; 0 for the one that it was trained with.
        thresholds: confidence per class, `default` for the others; 0.25 by default.
        iou: of the suppression in service.
        golden_images: how many, at least 0.
        threads: for torch; 0 for all processors.

    Raises:
        InputError: a parameter or image that cannot be used.
        ModelError: not a detection checkpoint, or its graph gives other boxes.
    """
    if images and data:
        raise InputError("both images and a data.yaml are given", "Give one of --images and --data.")
    check_golden_images(golden_images)
    check_iou(iou)
    wanted = SPARE * golden_images
    pictures = from_files(images, wanted) if images else from_data(data, wanted) if data else []
    limits = {"default": 0.25} if thresholds is None else thresholds
    return _write(checkpoint, out, name, pictures, golden_images, imgsz, limits, iou, _Origin(), threads)[0]


def _best(checkpoints: Sequence[Path]) -> tuple[Path, dict[str, Any]]:
    """The folder and `train.json` of the best candidate."""
    told: list[tuple[Path, dict[str, Any]]] = []
    for folder in checkpoints:
        try:
            told.append((folder, read_json(folder / "train.json")))
        except (OSError, ValueError) as error:
            raise IntegrityError(
                f"{folder}/train.json cannot be read ({error})", "Run the train step again."
            ) from error
    trained = [(folder, entry) for folder, entry in told if entry["status"] == "ok"]
    if not trained:
        reasons = "; ".join(f"{entry['name']}: {entry['reason']}" for _, entry in told) or "there are none"
        raise TrainError(f"no candidate trained ({reasons})", "Correct the candidates and run again.")
    for folder, entry in sorted(trained, key=lambda item: str(item[1]["name"])):
        say(f"candidate {entry['name']}: val mAP50-95 {entry['map50_95']:.3f}")
        if not (folder / "checkpoint.pt").is_file():
            raise IntegrityError(f"{folder} has no checkpoint.pt", "Run the train step again.")
    return min(trained, key=lambda item: (-item[1]["map50_95"], str(item[1]["name"])))


def _write(
    source: Path,
    out: Path,
    name: str,
    pictures: Sequence[Picture],
    golden_images: int,
    imgsz: int,
    thresholds: Mapping[str, Any],
    iou: float,
    origin: _Origin,
    threads: int,
) -> tuple[ModelFolder, bool | None]:
    check_name(name)
    tame(threads)
    checkpoint = Checkpoint(source)
    limits = spread_thresholds(thresholds, checkpoint.classes)
    size = checkpoint.input_size(imgsz)
    with atomic_folder(out) as folder:
        shutil.copyfile(source, folder / "checkpoint.pt")
        write_onnx(checkpoint, folder / "model.onnx", size)
        digest = sha256_file(folder / "model.onnx")
        detector = Detector.from_onnx(folder / "model.onnx", checkpoint.classes, size, checkpoint.stride, threads)
        proof = prove(torch_detector(checkpoint, folder / "model.onnx", size), detector, pictures, golden_images)
        write_json(folder / "parity.json", proof.to_dict())
        proof.require()
        golden = proof.golden(golden_images)
        write_golden(folder, golden, checkpoint.classes)
        model = ModelFolder(
            name=name,
            version=digest[:12],
            classes=checkpoint.classes,
            imgsz=size,
            stride=checkpoint.stride,
            thresholds=limits,
            iou=iou,
            onnx_sha256=digest,
            checkpoint_sha256=sha256_file(folder / "checkpoint.pt"),
            golden=len(golden),
            dataset_digest=origin.dataset_digest,
            run_id=origin.run_id,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            training=origin.training,
            metrics=origin.metrics,
        )
        model.write(folder)
    say(f"exported {name} {model.version}: {len(golden)} golden images, parity {_word(proof.ok)}")
    if golden and not any(len(image.expected) for image in golden):
        say(f"the model finds nothing on any of the {len(golden)} golden images: parity proves little on them")
    return model, proof.ok


def _word(parity_ok: bool | None) -> str:
    return "not checked, for want of images" if parity_ok is None else "holds"
