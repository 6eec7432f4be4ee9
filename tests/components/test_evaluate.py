"""Evaluate: AP is COCO's, the step scores what the labels speak of, and a verdict is whole or absent."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from haechi.components.evaluate.ap import average_precision, match_class, pr_curve
from haechi.components.evaluate.bootstrap import draw_groups
from haechi.components.evaluate.standalone import evaluate_model
from haechi.components.evaluate.step import EvaluateResult, evaluate
from haechi.components.shared.dataset import Box, ManifestRow, dataset_digest, frame_key, write_rows
from haechi.components.shared.errors import (
    HaechiError,
    InputError,
    IntegrityError,
    ModelError,
    NoDataError,
    StorageError,
)
from haechi.components.shared.files import sha256_bytes
from haechi.components.shared.settings import Settings
from haechi.components.shared.storage import Store
from tests.tiny_models import cell_box, paint, shade, tiny_model_folder, tiny_network

Found = list[tuple[np.ndarray, np.ndarray]]
CLASSES = ("fire", "smoke")
GATE = {"min_boxes": 2, "min_groups": 2, "draws": 100}


# AP ---------------------------------------------------------------------------------------------------------------


def boxes(*rows: Sequence[float]) -> np.ndarray:
    return np.asarray(rows, dtype=float).reshape(-1, 4)


def ap(found: Found, truth: list[np.ndarray]) -> np.ndarray:
    return average_precision(match_class(found, truth, range(len(truth)), len(truth)))[0]


A, B, FAR = (0, 0, 10, 10), (20, 0, 30, 10), (50, 50, 60, 60)


@pytest.mark.parametrize(
    ("found", "truth", "ap50"),
    [
        # Everything found.
        ([(boxes(A, B), np.array([0.9, 0.8]))], [boxes(A, B)], 1.0),
        # One of two found: precision 1 at the 51 recalls 0.00 … 0.50.
        ([(boxes(A, FAR), np.array([0.9, 0.8]))], [boxes(A, B)], 51 / 101),
        # A false one first: precisions 1/2 and 2/3 are made monotone, 2/3 everywhere.
        ([(boxes(FAR, A, B), np.array([0.9, 0.8, 0.7]))], [boxes(A, B)], 2 / 3),
        # A second detection of the same box is false, and scores below all true ones.
        ([(boxes(A, A), np.array([0.9, 0.8]))], [boxes(A)], 1.0),
        # Right place, other frame.
        ([(boxes(A), np.array([0.9])), (boxes(), np.array([]))], [boxes(), boxes(A)], 0.0),
        # Nothing found at all.
        ([(boxes(), np.array([]))], [boxes(A)], 0.0),
    ],
)
def test_ap_by_hand(found: Found, truth: list[np.ndarray], ap50: float) -> None:
    assert ap(found, truth)[0] == pytest.approx(ap50, abs=1e-12)


def test_a_box_of_iou_0_6_counts_up_to_that_threshold() -> None:
    # Shifted by 2.5 of 10: overlap 7.5 of 12.5.
    values = ap([(boxes((2.5, 0, 12.5, 10)), np.array([0.9]))], [boxes(A)])
    assert values.tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 0, 0]


def test_no_box_has_no_ap() -> None:
    assert np.isnan(ap([(boxes(A), np.array([0.9]))], [boxes()])).all()


def random_case(seed: int, frames: int) -> tuple[Found, list[np.ndarray]]:
    """Crowded frames with jittered detections, ties in score, and now and then more than 100 detections."""
    rng = np.random.default_rng(seed)
    found, truth = [], []
    for index in range(frames):
        corner, size = rng.uniform(0, 80, (rng.integers(0, 6), 2)), rng.uniform(5, 40, 2)
        wanted = np.concatenate([corner, corner + size], axis=1)
        count = int(rng.integers(101, 140) if index % 7 == 3 else rng.integers(0, 9))
        low = rng.uniform(0, 80, (count, 2))
        guess = np.concatenate([low, low + rng.uniform(5, 40, (count, 2))], axis=1)
        same = min(count, len(wanted))
        guess[:same] = wanted[:same] + rng.normal(0, 1.5, (same, 4))
        guess[:, 2:] = np.maximum(guess[:, 2:], guess[:, :2] + 1)
        found.append((guess, rng.random(count).round(1 if index % 3 == 0 else 9)))
        truth.append(wanted)
    return found, truth


def coco_precision(found: Found, truth: list[np.ndarray]) -> np.ndarray:
    """pycocotools' precision, (10, 101)."""
    marks, rows = [], []
    for index, ((guess, scores), wanted) in enumerate(zip(found, truth, strict=True)):
        for x1, y1, x2, y2 in wanted:
            marks.append(
                {
                    "id": len(marks) + 1,
                    "image_id": index,
                    "category_id": 1,
                    "iscrowd": 0,
                    "area": (x2 - x1) * (y2 - y1),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                }
            )
        rows += [[index, *box[:2], *(box[2:] - box[:2]), score, 1] for box, score in zip(guess, scores, strict=True)]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "images": [{"id": index} for index in range(len(truth))],
            "annotations": marks,
            "categories": [{"id": 1}],
        }
        coco.createIndex()
        judge = COCOeval(coco, coco.loadRes(np.asarray(rows)), "bbox")
        judge.evaluate()
        judge.accumulate()
    precision: np.ndarray = judge.eval["precision"][:, :, 0, 0, 2]
    return precision


@pytest.mark.parametrize("seed", range(12))
def test_ap_is_what_pycocotools_computes(seed: int) -> None:
    found, truth = random_case(seed, frames=3 + 4 * seed)
    expected = coco_precision(found, truth)
    matches = match_class(found, truth, [0] * len(truth), 1)
    assert average_precision(matches)[0] == pytest.approx(expected.mean(axis=1), abs=1e-6)
    assert pr_curve(matches).precision == pytest.approx(expected[0], abs=1e-6)
    assert pr_curve(matches, row=5).precision == pytest.approx(expected[5], abs=1e-6)


def test_a_weighted_score_is_the_score_of_the_literal_resample() -> None:
    found, truth = random_case(5, frames=24)
    # Ties between frames would be broken by their order, which a resample changes.
    found = [(guess, scores + np.arange(len(scores)) * 1e-9 + i * 1e-7) for i, (guess, scores) in enumerate(found)]
    groups = [index // 3 for index in range(24)]
    weights = draw_groups(8, 5, seed=3)
    values = average_precision(match_class(found, truth, groups, 8), weights)
    for row, counts in zip(values, weights, strict=True):
        drawn = [index for index in range(24) for _ in range(counts[groups[index]])]
        assert ap([found[i] for i in drawn], [truth[i] for i in drawn]) == pytest.approx(row, abs=1e-12)


def test_draws_are_whole_and_repeatable() -> None:
    weights = draw_groups(7, 50, seed=1)
    assert (weights.sum(axis=1) == 7).all()
    assert (weights == draw_groups(7, 50, seed=1)).all()
    assert (weights != draw_groups(7, 50, seed=2)).any()


# The step ---------------------------------------------------------------------------------------------------------

Cell = tuple[int, int]


def picture(objects: dict[Cell, tuple[str, float]], number: int, model: Sequence[str] = CLASSES) -> bytes:
    """A frame in which a tiny model of classes `model` finds `objects` (cell → class, score)."""
    cells = {cell: shade(list(model).index(name), score) for cell, (name, score) in objects.items()}
    return paint(cells, ground=(number % 5, number // 5 % 5, number // 25))


def box_at(cell: Cell, name: str) -> Box:
    x1, y1, x2, y2 = cell_box(*cell)
    return Box(name, x1, y1, x2, y2)


def frame(store: Store, data: bytes, truth: dict[Cell, str], number: int, **more: Any) -> ManifestRow:
    """Put a frame and return its row in the test split, a group of its own unless told otherwise."""
    sha = sha256_bytes(data)
    store.put(frame_key(sha, "png"), data)
    more = {"covers": CLASSES, "split": "test", "group": f"g{number}", "camera": "door"} | more
    found = tuple(box_at(cell, name) for cell, name in truth.items())
    return ManifestRow(sha, "png", 320, 320, f"s3://raw/{number}.png", "raw", boxes=found, **more)


def write_dataset(folder: Path, rows: Sequence[ManifestRow], classes: Sequence[str] = CLASSES) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "manifest.parquet", ManifestRow, rows)
    described = {"names": dict(enumerate(classes)), "digest": dataset_digest(classes, rows)}
    (folder / "data.yaml").write_text(yaml.safe_dump(described))
    return folder


def plain_rows(store: Store, count: int = 8) -> list[ManifestRow]:
    """Frames with one fire and one smoke each, both easily found."""
    return [
        frame(
            store,
            picture({(1, 1): ("fire", 0.9), (number % 4 + 3, 5): ("smoke", 0.8)}, number),
            {(1, 1): "fire", (number % 4 + 3, 5): "smoke"},
            number,
        )
        for number in range(count)
    ]


def run(
    tmp_path: Path,
    settings: Settings,
    rows: Sequence[ManifestRow],
    champion: str = "",
    gate: dict[str, Any] = GATE,
    model: Path | None = None,
    classes: Sequence[str] = CLASSES,
) -> tuple[EvaluateResult, dict[str, Any]]:
    if model is None:
        model = tmp_path / "model"
        tiny_model_folder(model, CLASSES)
    data = write_dataset(tmp_path / "dataset", rows, classes)
    out = tmp_path / "out"
    result = evaluate(model, data, "door", champion, gate, out / "verdict", out / "report.html", settings)
    return result, json.loads((out / "verdict" / "scorecard.json").read_text())


def put_champion(tmp_path: Path, store: Store, **options: Any) -> str:
    model = tiny_model_folder(tmp_path / "champion", CLASSES, **options)
    store.put_folder(f"models/door/{model.version}/", tmp_path / "champion", "model.json")
    return model.version


def test_a_perfect_model_scores_one_and_is_promoted(tmp_path: Path, store: Store, settings: Settings) -> None:
    result, card = run(tmp_path, settings, plain_rows(store))
    assert result.decision == "promote"
    perfect = {"map50_95": 1.0, "map50": 1.0, "precision": 1.0, "recall": 1.0}
    assert card == {
        "challenger": perfect | {"per_class": {name: perfect | {"boxes": 8, "frames": 8} for name in CLASSES}},
        "champion": None,
    }
    verdict = json.loads((tmp_path / "out/verdict/verdict.json").read_text())
    assert verdict == json.loads(json.dumps(result.metadata()))
    assert set(verdict) == {"decision", "reasons", "challenger", "champion", "dataset_digest", "checks"}
    assert verdict["champion"] == ""
    assert all({"name", "ok", "value", "limit"} <= set(check) for check in verdict["checks"])
    assert result.metrics["test/mAP50-95"] == result.metrics["test/mAP50-95/smoke"] == 1.0
    assert result.categories == ("fire", "smoke", "background")
    assert result.matrix == ((8, 0, 0), (0, 8, 0), (0, 0, 0))
    assert "Promote" in (tmp_path / "out/report.html").read_text()


def test_only_the_test_split_is_scored(tmp_path: Path, store: Store, settings: Settings) -> None:
    rows = plain_rows(store)
    # A training frame whose object is not even in the store.
    rows.append(replace(rows[0], sha256="f" * 64, split="train"))
    result, card = run(tmp_path, settings, rows)
    assert result.decision == "promote"
    assert card["challenger"]["per_class"]["fire"]["frames"] == 8


def test_a_miss_a_false_alarm_and_a_mix_up_are_counted(tmp_path: Path, store: Store, settings: Settings) -> None:
    rows = plain_rows(store, 4)
    rows.append(frame(store, picture({}, 10), {(2, 2): "fire"}, 10))
    rows.append(frame(store, picture({(6, 6): ("smoke", 0.7)}, 11), {}, 11))
    rows.append(frame(store, picture({(6, 6): ("smoke", 0.9)}, 12), {(6, 6): "fire"}, 12))
    # Reported only above the threshold of 0.5.
    rows.append(frame(store, picture({(3, 3): ("smoke", 0.3)}, 13), {}, 13))
    result, card = run(tmp_path, settings, rows)
    assert result.matrix == ((4, 1, 1), (0, 4, 0), (0, 1, 0))
    fire, smoke = (card["challenger"]["per_class"][name] for name in CLASSES)
    assert (fire["precision"], fire["recall"]) == (1.0, pytest.approx(4 / 6))
    assert (smoke["precision"], smoke["recall"]) == (pytest.approx(4 / 6), 1.0)
    assert fire["map50_95"] == pytest.approx(67 / 101)  # recalls 0.00 … 0.66
    # Of the four true smokes (0.8), one false alarm scores higher (0.9).
    assert smoke["map50_95"] == pytest.approx(4 / 5)


def test_a_class_is_judged_only_where_the_label_covers_it(tmp_path: Path, store: Store, settings: Settings) -> None:
    rows = plain_rows(store, 4)
    for number in range(10, 14):
        # Smoke is there, found, and no part of this source's labels.
        objects = {(1, 1): ("fire", 0.9), (5, 5): ("smoke", 0.95)}
        rows.append(frame(store, picture(objects, number), {(1, 1): "fire"}, number, covers=("fire",)))
    result, card = run(tmp_path, settings, rows)
    per_class = card["challenger"]["per_class"]
    assert (per_class["fire"]["frames"], per_class["smoke"]["frames"]) == (8, 4)
    assert per_class["smoke"]["map50_95"] == per_class["smoke"]["precision"] == 1.0
    assert result.matrix == ((8, 0, 0), (0, 4, 0), (0, 0, 0))


def test_classes_go_by_name_between_model_and_dataset(tmp_path: Path, store: Store, settings: Settings) -> None:
    names = ("person", "smoke", "fire")
    rows = [
        frame(
            store,
            picture({(1, 1): ("fire", 0.9), (4, 4): ("smoke", 0.8), (7, 7): ("person", 0.9)}, number, names),
            {(1, 1): "fire", (4, 4): "smoke"},
            number,
        )
        for number in range(4)
    ]
    tiny_model_folder(tmp_path / "other", names)
    result, card = run(tmp_path, settings, rows, model=tmp_path / "other")
    assert card["challenger"]["map50_95"] == 1.0
    assert result.categories == ("fire", "smoke", "background")


def test_a_better_challenger_replaces_the_champion(tmp_path: Path, store: Store, settings: Settings) -> None:
    version = put_champion(tmp_path, store, shift=8.0)
    result, card = run(tmp_path, settings, plain_rows(store), version)
    assert result.decision == "promote"
    # Boxes 8 of 32 px off have IoU 0.6 and count at 0.50, 0.55 and 0.60.
    assert card["champion"]["map50_95"] == pytest.approx(0.3)
    assert card["champion"]["map50"] == 1.0
    gain = next(check for check in result.checks if check["name"] == "gain")
    assert gain["value"] == pytest.approx(0.7)
    assert result.champion == version
    assert result.metrics["champion/mAP50-95"] == pytest.approx(0.3)


def test_a_worse_challenger_is_refused(tmp_path: Path, store: Store, settings: Settings) -> None:
    version = put_champion(tmp_path, store)
    tiny_model_folder(tmp_path / "shifted", CLASSES, shift=8.0)
    result, _ = run(tmp_path, settings, plain_rows(store), version, model=tmp_path / "shifted")
    assert result.decision == "refuse"
    assert any("changes by -0.700" in reason for reason in result.reasons)


def test_the_champion_itself_is_refused_without_being_fetched(tmp_path: Path, store: Store, settings: Settings) -> None:
    version = tiny_model_folder(tmp_path / "model", CLASSES).version
    result, card = run(tmp_path, settings, plain_rows(store), version)
    assert result.decision == "refuse"
    assert "is the champion already" in result.reasons[0]
    assert card["champion"] is None


def test_a_class_without_a_box_has_null_ap(tmp_path: Path, store: Store, settings: Settings) -> None:
    rows = [frame(store, picture({(1, 1): ("fire", 0.9)}, n), {(1, 1): "fire"}, n) for n in range(4)]
    result, card = run(tmp_path, settings, rows)
    assert result.decision == "not_enough_data"
    assert result.reasons[0] == "smoke has no boxes in the test; the gate asks for 2."
    assert card["challenger"]["per_class"]["smoke"] == {
        "map50_95": None,
        "map50": None,
        "precision": None,
        "recall": None,
        "boxes": 0,
        "frames": 4,
    }
    assert card["challenger"]["map50_95"] == 1.0
    assert "test/mAP50-95/smoke" not in result.metrics
    assert "No box in the test, so no AP: smoke." in (tmp_path / "out/report.html").read_text()


def test_an_empty_test_has_only_nulls(tmp_path: Path, store: Store, settings: Settings) -> None:
    rows = [replace(row, split="train") for row in plain_rows(store, 2)]
    result, card = run(tmp_path, settings, rows)
    assert result.decision == "not_enough_data"
    assert {card["challenger"][name] for name in ("map50_95", "map50", "precision", "recall")} == {None}
    assert result.metrics == {"test/frames": 0.0}
    assert sum(map(sum, result.matrix)) == 0
    assert (tmp_path / "out/report.html").stat().st_size > 1000


def test_the_same_input_gives_the_same_bytes_with_and_without_a_cache(
    tmp_path: Path, store: Store, settings: Settings
) -> None:
    version = put_champion(tmp_path, store, shift=4.0)
    seen = []
    for cache in ("", str(tmp_path / "cache"), str(tmp_path / "cache")):
        run(tmp_path, replace(settings, cache_dir=cache), plain_rows(store), version)
        seen.append([path.read_bytes() for path in sorted((tmp_path / "out").rglob("*")) if path.is_file()])
    assert seen[0] == seen[1] == seen[2]
    assert len(seen[0]) == 3


def test_a_damaged_cache_is_fetched_again(tmp_path: Path, store: Store, settings: Settings) -> None:
    rows = plain_rows(store, 4)
    cached = replace(settings, cache_dir=str(tmp_path / "cache"))
    run(tmp_path, cached, rows)
    damaged = tmp_path / "cache" / rows[0].sha256[:2] / f"{rows[0].sha256}.png"
    damaged.write_bytes(b"half a fra")
    result, _ = run(tmp_path, cached, rows)
    assert result.decision == "promote"
    assert sha256_bytes(damaged.read_bytes()) == rows[0].sha256


def test_bad_input_is_named_and_nothing_is_written(tmp_path: Path, store: Store, settings: Settings) -> None:
    rows = plain_rows(store, 3)
    text = b"this is no picture"
    store.put(frame_key(sha256_bytes(text), "png"), text)
    broken = replace(rows[0], sha256=sha256_bytes(text), key="s3://raw/broken.png")
    store.put(frame_key("a" * 64, "png"), b"other bytes")
    cases: list[tuple[type[HaechiError], str, list[ManifestRow], str, dict[str, Any]]] = [
        (InputError, "gate.min_box is no parameter", rows, "", {"min_box": 3}),
        (InputError, "'fyre', which is no class", rows, "", {"floors": {"fyre": 0.5}}),
        (ModelError, "models/door/0123456789ab/ is not a model folder", rows, "0123456789ab", GATE),
        (StorageError, "b{64}.png does not exist", [*rows, replace(rows[0], sha256="b" * 64)], "", GATE),
        (IntegrityError, "a{64}.png does not hold the bytes", [*rows, replace(rows[0], sha256="a" * 64)], "", GATE),
        (InputError, "s3://raw/broken.png: ", [*rows, broken], "", GATE),
        (IntegrityError, "the manifest has a frame", [*rows, replace(rows[0], ext="/../x")], "", GATE),
    ]
    for error, says, table, champion, gate in cases:
        with pytest.raises(error, match=says):
            run(tmp_path, settings, table, champion, gate)
        assert not (tmp_path / "out").exists()


def test_a_manifest_that_its_digest_does_not_name_is_refused(tmp_path: Path, store: Store, settings: Settings) -> None:
    rows = plain_rows(store, 3)
    data = write_dataset(tmp_path / "dataset", rows)
    write_rows(data / "manifest.parquet", ManifestRow, rows[:2])
    tiny_model_folder(tmp_path / "model", CLASSES)
    with pytest.raises(IntegrityError, match=r"manifest.parquet is not the one"):
        evaluate(tmp_path / "model", data, "door", "", {}, tmp_path / "v", tmp_path / "r.html", settings)
    (data / "data.yaml").write_text("names: [")
    with pytest.raises(InputError, match=r"data.yaml is not a dataset's"):
        evaluate(tmp_path / "model", data, "door", "", {}, tmp_path / "v", tmp_path / "r.html", settings)
    with pytest.raises(ModelError, match="is not a model folder"):
        write_dataset(data, rows)
        evaluate(tmp_path / "none", data, "door", "", {}, tmp_path / "v", tmp_path / "r.html", settings)


def test_killed_at_any_point_and_run_again_it_ends_the_same(tmp_path: Path, store: Store, settings: Settings) -> None:
    version = put_champion(tmp_path, store, shift=4.0)
    run(tmp_path, settings, plain_rows(store), version)
    calm = {path.name: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    program = (
        "import sys, json; from pathlib import Path; p = [Path(a) for a in sys.argv[1:5]];"
        "from haechi.components.evaluate.step import evaluate; from haechi.components.shared.settings import Settings;"
        "print('go', flush=True);"
        "evaluate(p[0], p[1], 'door', sys.argv[5], json.loads(sys.argv[6]), p[2], p[3], Settings.from_env())"
    )
    again = tmp_path / "again"
    command = [sys.executable, "-c", program, tmp_path / "model", tmp_path / "dataset", again / "verdict"]
    command += [again / "report.html", version, json.dumps(GATE)]
    environment = {**os.environ, "TMPDIR": str(tmp_path)} | replace(
        settings, cache_dir=str(tmp_path / "cache")
    ).to_env()

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [str(item) for item in command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )

    for delay in (0.05, 0.2, 0.4):
        with start() as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        if (again / "verdict").exists():
            assert sorted(path.name for path in (again / "verdict").iterdir()) == ["scorecard.json", "verdict.json"]
    with start() as process:
        assert process.wait() == 0
    assert {path.name: path.read_bytes() for path in again.rglob("*") if path.is_file()} == calm


def test_the_component_hands_kfp_its_metrics_matrix_and_verdict(
    tmp_path: Path, store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kfp import dsl

    from haechi.components.evaluate.component import evaluate as component

    for name, value in settings.to_env().items():
        monkeypatch.setenv(name, value)
    tiny_model_folder(tmp_path / "model", CLASSES)
    data = write_dataset(tmp_path / "dataset", plain_rows(store))

    def artifact(kind: type[Any], name: str) -> Any:
        return kind(name=name, uri=str(tmp_path / name), metadata={})

    scorecard, confusion = artifact(dsl.Metrics, "scorecard"), artifact(dsl.ClassificationMetrics, "confusion")
    verdict, report = artifact(dsl.Artifact, "verdict"), artifact(dsl.HTML, "report")
    decision = component.python_func(
        onnx_model=dsl.Model(uri=str(tmp_path / "model")),
        dataset=dsl.Dataset(uri=str(data)),
        name="door",
        champion="",
        gate={"min_boxes": 2.0, "min_groups": 2.0},
        scorecard=scorecard,
        confusion=confusion,
        report=report,
        verdict=verdict,
    )
    assert decision == "promote"
    assert scorecard.metadata["test/mAP50-95"] == 1.0
    matrix = confusion.metadata["confusionMatrix"]
    assert [item["displayName"] for item in matrix["annotationSpecs"]] == ["fire", "smoke", "background"]
    assert [row["row"] for row in matrix["rows"]] == [[8, 0, 0], [0, 8, 0], [0, 0, 0]]
    assert verdict.metadata["decision"] == "promote"
    assert json.loads(json.dumps(verdict.metadata)) == json.loads((tmp_path / "verdict/verdict.json").read_text())
    assert (tmp_path / "report").read_text().startswith("<!doctype html>")


# On its own --------------------------------------------------------------------------------------------------------


def yolo_set(folder: Path, names: Sequence[str] = CLASSES, split: str = "test") -> Path:
    """Four frames, one fire (class id by `names`) in each, smoke in two."""
    for number in range(4):
        objects = {(1, 1): ("fire", 0.9)} | ({(5, 5): ("smoke", 0.8)} if number < 2 else {})
        image, label = (
            folder / kind / split / f"{number}{end}" for kind, end in (("images", ".png"), ("labels", ".txt"))
        )
        for path in (image, label):
            path.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(picture(objects, number))
        lines = []
        for cell, (name, _) in objects.items():
            x1, y1, x2, y2 = (value / 320 for value in cell_box(*cell))
            lines.append(f"{list(names).index(name)} {(x1 + x2) / 2} {(y1 + y2) / 2} {x2 - x1} {y2 - y1}")
        label.write_text("\n".join(lines))
    (folder / "data.yaml").write_text(yaml.safe_dump({"path": ".", split: f"images/{split}", "names": list(names)}))
    return folder / "data.yaml"


def test_any_model_is_measured_on_a_yolo_set(tmp_path: Path) -> None:
    model = tiny_model_folder(tmp_path / "model", CLASSES)
    answer = evaluate_model(tmp_path / "model", yolo_set(tmp_path / "data", ("smoke", "fire")))
    assert (answer["map50_95"], answer["map50"], answer["precision"], answer["recall"]) == (1.0, 1.0, 1.0, 1.0)
    assert answer["per_class"]["fire"] == {
        "map50_95": 1.0,
        "map50": 1.0,
        "precision": 1.0,
        "recall": 1.0,
        "boxes": 4,
        "images": 4,
    }
    assert answer["images"] == 4
    assert answer["unmatched"] == []
    assert answer["model"]["version"] == model.version
    json.dumps(answer, allow_nan=False)


def test_classes_that_the_model_lacks_are_unmatched_and_null(tmp_path: Path) -> None:
    tiny_model_folder(tmp_path / "model", ["fire", "person"])
    answer = evaluate_model(tmp_path / "model", yolo_set(tmp_path / "data"))
    assert answer["unmatched"] == ["smoke"]
    assert answer["per_class"]["smoke"]["map50"] is None
    assert answer["per_class"]["smoke"]["boxes"] == 2
    assert answer["map50_95"] == answer["per_class"]["fire"]["map50_95"] == 1.0
    assert "person" not in answer["per_class"]


def test_a_bare_graph_is_measured_by_its_own_class_names(tmp_path: Path) -> None:
    import onnx

    onnx.save(tiny_network(CLASSES), tmp_path / "tiny.onnx")
    answer = evaluate_model(tmp_path / "tiny.onnx", yolo_set(tmp_path / "data", split="val"), "val", imgsz=320)
    assert answer["map50_95"] == 1.0
    assert answer["model"]["imgsz"] == 320
    nameless = tiny_network(CLASSES)
    del nameless.metadata_props[:]
    onnx.save(nameless, tmp_path / "nameless.onnx")
    with pytest.raises(ModelError, match="no class names"):
        evaluate_model(tmp_path / "nameless.onnx", tmp_path / "data", "val")


def test_bad_sets_and_models_are_named(tmp_path: Path) -> None:
    tiny_model_folder(tmp_path / "model", CLASSES)
    data = yolo_set(tmp_path / "data")
    for path, says in (("none", "is not a model folder"), ("no.onnx", "no model"), ("no.pt", "no checkpoint")):
        with pytest.raises(ModelError, match=says):
            evaluate_model(tmp_path / path, data)
    with pytest.raises(InputError, match="has no split 'val'"):
        evaluate_model(tmp_path / "model", data, "val")
    with pytest.raises(InputError, match="conf is 1"):
        evaluate_model(tmp_path / "model", data, conf=1)
    with pytest.raises(InputError, match="imgsz is 100"):
        evaluate_model(tmp_path / "model", data, imgsz=100)
    (tmp_path / "data/labels/test/1.txt").write_text("7 0.5 0.5 0.1 0.1")
    with pytest.raises(InputError, match=r"1.txt:1: class 7"):
        evaluate_model(tmp_path / "model", data)
    (tmp_path / "data/images/test/0.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"0.png: the file is empty"):
        evaluate_model(tmp_path / "model", data)
    for label in (tmp_path / "data/labels/test").iterdir():
        label.unlink()
    with pytest.raises(NoDataError, match="has a label file"):
        evaluate_model(tmp_path / "model", data)
    (tmp_path / "data/data.yaml").write_text("test: ../..\nnames: [fire]")
    with pytest.raises(InputError, match="leads outside"):
        evaluate_model(tmp_path / "model", data)


@pytest.mark.realdata
def test_a_checkpoint_scores_close_to_ultralytics_own_validation(realdata: Path) -> None:
    # Ultralytics 8.4.190 `val` of these weights on these 40 frames, restricted to these classes: 0.562 and 0.776.
    # It pads by half a stride more and keeps several classes an anchor; the README tells what each changes.
    answer = evaluate_model(realdata / "weights/yolo11n.pt", realdata / "entrance", "val")
    assert answer["map50_95"] == pytest.approx(0.5623, abs=0.03)
    assert answer["map50"] == pytest.approx(0.7761, abs=0.03)
    assert answer["per_class"]["dog"]["map50"] is None
    assert [answer["per_class"][name]["boxes"] for name in ("person", "car", "dog")] == [134, 12, 0]
    assert answer["unmatched"] == []
