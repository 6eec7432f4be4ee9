"""The step `evaluate`: the ONNX model that will ship, on the frozen test, beside the champion; a verdict and a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..shared.dataset import SPLITS, ManifestRow, dataset_digest, read_rows
from ..shared.detections import Detections
from ..shared.errors import InputError, IntegrityError
from ..shared.files import atomic_folder, write_bytes, write_json
from ..shared.frame_cache import FrameCache
from ..shared.frames import fetch_frame
from ..shared.model_folder import ModelFolder, fetch_model, model_cache
from ..shared.progress import say
from ..shared.settings import Settings
from ..shared.storage import Store
from .frames import detect_all, test_frame
from .gate import Comparison, Judgement, compare, judge
from .parameters import Gate
from .pictures import draw, worst
from .report import DatasetFacts, Evaluation, render
from .score import BACKGROUND, ModelScore, TestFrame, confusion_matrix, remap, score_model

__all__ = ["EvaluateResult", "evaluate"]


@dataclass(frozen=True)
class EvaluateResult:
    """What `evaluate` found.

    Attributes:
        decision: `promote`, `refuse` or `not_enough_data`.
        reasons: sentences for a person.
        challenger, champion: versions; the latter empty where there is none.
        dataset_digest: of the dataset.
        checks: the gate's checks, JSON-plain.
        metrics: numbers for KFP's table; what has no value is left out.
        categories, matrix: the confusion matrix, truth in rows, background last.
    """

    decision: str
    reasons: tuple[str, ...]
    challenger: str
    champion: str
    dataset_digest: str
    checks: tuple[dict[str, Any], ...]
    metrics: dict[str, float]
    categories: tuple[str, ...]
    matrix: tuple[tuple[int, ...], ...]

    def metadata(self) -> dict[str, Any]:
        """The content of verdict.json, which is the artifact's metadata too."""
        return {
            "decision": self.decision,
            "reasons": list(self.reasons),
            "challenger": self.challenger,
            "champion": self.champion,
            "dataset_digest": self.dataset_digest,
            "checks": [dict(check) for check in self.checks],
        }


@dataclass(frozen=True)
class _Data:
    """The dataset as evaluate sees it."""

    classes: tuple[str, ...]
    digest: str
    rows: list[ManifestRow]
    test: list[ManifestRow]
    frames: list[TestFrame]


@dataclass(frozen=True)
class _Scored:
    """One model with what it found."""

    model: ModelFolder
    found: list[Detections]
    score: ModelScore
    limits: list[float]


def evaluate(
    onnx_model: Path,
    dataset: Path,
    name: str,
    champion: str,
    gate: Mapping[str, Any],
    verdict: Path,
    report: Path,
    settings: Settings,
) -> EvaluateResult:
    """Score the model on the test split beside the champion, decide, and write verdict and report.

    Nothing but `verdict` and `report` is written; the same input gives the same output.

    Args:
        onnx_model: the challenger's model folder.
        dataset: folder with `manifest.parquet` and `data.yaml`.
        name: model name; the champion lies at `models/<name>/<champion>/`.
        champion: version to beat; empty for none.
        gate: parameters of `Gate`.
        verdict: folder to write.
        report: HTML file to write.
        settings: the object store, cache and threads.

    Raises:
        InputError: a gate parameter that cannot be used, or a frame that cannot be decoded.
        IntegrityError: manifest, frame or model are not what their digests say.
        ModelError: the model folder or the champion's cannot be used.
        StorageError: the store cannot be reached or the disk is full.
    """
    asked = Gate.from_dict(gate)
    store = Store(settings)
    data = _read_dataset(dataset)
    asked.check_classes(data.classes)
    ours = ModelFolder.load(onnx_model)
    with model_cache(settings) as models:
        folders = [onnx_model]
        if champion and champion != ours.version:
            folders.append(fetch_model(store, store.uri(f"models/{name}/{champion}/"), models))
        scored = _score(folders, data, store, settings)
    challenger, rival = scored[0], scored[1] if len(scored) > 1 else None
    theirs = rival.score if rival else None
    comparison = compare(asked, challenger.score, theirs)
    judgement = judge(asked, challenger.score, theirs, comparison, ours.version, champion)
    result = _result(data, challenger, theirs, judgement, champion)
    page = _page(data, challenger, rival, comparison, asked, judgement, result, store, settings)
    write_bytes(report, page.encode())
    _write_verdict(verdict, result, challenger.score, theirs)
    say(f"{ours.name} {ours.version}: {judgement.decision}. {' '.join(judgement.reasons)}")
    return result


def _read_dataset(folder: Path) -> _Data:
    try:
        described = yaml.safe_load((folder / "data.yaml").read_text(encoding="utf-8"))
        names, digest = described["names"], str(described["digest"])
        classes = tuple(str(names[index]) for index in range(len(names)))
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise InputError(f"{folder}/data.yaml is not a dataset's ({error})", "Run the build step again.") from error
    rows = read_rows(folder / "manifest.parquet", ManifestRow)
    if dataset_digest(classes, rows) != digest:
        raise IntegrityError(
            f"{folder}/manifest.parquet is not the one that digest {digest[:12]} names", "Run the build step again."
        )
    test = sorted((row for row in rows if row.split == "test"), key=lambda row: row.sha256)
    frames = [
        replace(test_frame(row.key or row.sha256, row.group, row.covers, row.boxes, classes), camera=row.camera)
        for row in test
    ]
    return _Data(classes, digest, rows, test, frames)


def _score(folders: Sequence[Path], data: _Data, store: Store, settings: Settings) -> list[_Scored]:
    models = [ModelFolder.load(folder) for folder in folders]
    detectors = [
        (model.detector(folder, settings.threads), model.iou) for model, folder in zip(models, folders, strict=True)
    ]
    cache = FrameCache.open(settings.cache_path)
    every = detect_all(
        data.test,
        lambda row: fetch_frame(store, row, cache),
        lambda row: row.key or row.sha256,
        detectors,
        settings.workers,
    )
    scored = []
    for model, raw in zip(models, every, strict=True):
        found = [remap(item, model.classes, data.classes) for item in raw]
        limits = [model.thresholds.get(item, 1.0) for item in data.classes]
        score = score_model(data.frames, found, data.classes, model.classes, model.thresholds)
        scored.append(_Scored(model, found, score, limits))
    return scored


def _result(
    data: _Data, challenger: _Scored, champion: ModelScore | None, judgement: Judgement, version: str
) -> EvaluateResult:
    matrix = confusion_matrix(data.frames, challenger.found, data.classes, challenger.limits)
    return EvaluateResult(
        decision=judgement.decision,
        reasons=judgement.reasons,
        challenger=challenger.model.version,
        champion=version,
        dataset_digest=data.digest,
        checks=tuple(check.to_json() for check in judgement.checks),
        metrics=_metrics(challenger.score, champion, len(data.test)),
        categories=(*data.classes, BACKGROUND),
        matrix=tuple(tuple(int(value) for value in row) for row in matrix),
    )


def _metrics(score: ModelScore, champion: ModelScore | None, frames: int) -> dict[str, float]:
    names = {"test/mAP50-95": "map50_95", "test/mAP50": "map50", "test/precision": "precision", "test/recall": "recall"}
    values = {name: score.mean(key) for name, key in names.items()}
    values |= {f"test/mAP50-95/{name}": item.map50_95 for name, item in score.per_class.items()}
    if champion:
        values["champion/mAP50-95"] = champion.mean("map50_95")
        values["champion/mAP50"] = champion.mean("map50")
    return {"test/frames": float(frames)} | {name: value for name, value in values.items() if value is not None}


def _page(
    data: _Data,
    challenger: _Scored,
    champion: _Scored | None,
    comparison: Comparison,
    gate: Gate,
    judgement: Judgement,
    result: EvaluateResult,
    store: Store,
    settings: Settings,
) -> str:
    mistakes = worst(
        data.frames,
        challenger.found,
        champion.found if champion else None,
        data.classes,
        challenger.limits,
        champion.limits if champion else (),
    )
    cache = FrameCache.open(settings.cache_path)
    pictures = draw(
        mistakes,
        data.frames,
        challenger.found,
        data.classes,
        challenger.limits,
        lambda position: fetch_frame(store, data.test[position], cache),
    )
    counts = Counter(row.split for row in data.rows)
    facts = DatasetFacts(
        digest=data.digest,
        splits={split: counts[split] for split in SPLITS},
        groups=len({frame.group for frame in data.frames}),
        cameras=dict(Counter(frame.camera for frame in data.frames).most_common()),
        frames=len(data.frames),
    )
    return render(
        Evaluation(
            model=challenger.model,
            champion=champion.model if champion else None,
            dataset=facts,
            score=challenger.score,
            champion_score=champion.score if champion else None,
            comparison=comparison,
            gate=gate,
            judgement=judgement,
            confusion=np.asarray(result.matrix, dtype=np.int64),
            pictures=pictures,
        )
    )


def _write_verdict(folder: Path, result: EvaluateResult, score: ModelScore, champion: ModelScore | None) -> None:
    with atomic_folder(folder) as partial:
        scorecard = {"challenger": score.to_json(), "champion": champion.to_json() if champion else None}
        write_json(partial / "scorecard.json", scorecard)
        write_json(partial / "verdict.json", result.metadata())
