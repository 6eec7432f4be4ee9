"""Parity: what counts as the same boxes, and the model folder that proves itself with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from haechi.components.shared.detections import Detections
from haechi.components.shared.errors import IntegrityError, ModelError
from haechi.components.shared.files import read_json, write_json
from haechi.components.shared.model_folder import ModelFolder, check_golden, from_rows, read_golden
from haechi.components.shared.parity import Agreement, Tolerance, agree, compare
from tests.tiny_models import tiny_model_folder

Row = tuple[int, float, list[float]]
A: Row = (0, 0.9, [10, 10, 50, 50])
B: Row = (1, 0.6, [100, 100, 200, 180])


def found(*rows: Row) -> Detections:
    return from_rows([{"class_id": index, "score": score, "box": box} for index, score, box in rows])


def moved(row: Row, by: float = 0.0, score: float = 0.0, index: int | None = None) -> Row:
    return (row[0] if index is None else index, row[1] + score, [row[2][0] + by, *row[2][1:]])


@pytest.mark.parametrize(
    ("expected", "got", "ok", "boxes", "unmatched"),
    [
        ([A, B], [A, B], True, 2, 0),
        ([A, B], [B, A], True, 2, 0),
        ([], [], True, 0, 0),
        ([A], [moved(A, by=0.9)], True, 1, 0),
        ([A], [moved(A, by=1.1)], False, 1, 0),
        ([A], [moved(A, score=0.009)], True, 1, 0),
        ([A], [moved(A, score=-0.02)], False, 1, 0),
        ([A, B], [A], False, 1, 1),
        ([A], [A, B], False, 1, 1),
        ([A], [moved(A, index=1)], False, 0, 2),
        ([A], [moved(A, by=500)], False, 0, 2),
        ([], [A], False, 0, 1),
        # Close to the confidence limit of 0.1 a box may be missing on one side, clear of it not.
        ([A, (1, 0.115, B[2])], [A], True, 1, 0),
        ([A, (1, 0.125, B[2])], [A], False, 1, 1),
        # Two of one class on one spot are two.
        ([A, A], [A], False, 1, 1),
        ([A, moved(A, by=3)], [moved(A, by=3), A], True, 2, 0),
    ],
)
def test_what_counts_as_the_same(expected: list[Row], got: list[Row], ok: bool, boxes: int, unmatched: int) -> None:
    result = compare(found(*expected), found(*got), 0.1, Tolerance(), 640)
    assert (result.ok, result.boxes, result.unmatched) == (ok, boxes, unmatched)
    back = compare(found(*got), found(*expected), 0.1, Tolerance(), 640)
    assert (back.ok, back.boxes, back.unmatched) == (ok, boxes, unmatched), "neither side is the judge"


def test_the_largest_differences_are_told() -> None:
    result = compare(found(A, B), found(moved(A, by=0.5, score=0.004), moved(B, by=-0.25)), 0.1, Tolerance(), 640)
    assert (result.max_box_px, round(result.max_score, 4)) == (0.5, 0.004)


@pytest.mark.parametrize(("longest", "ok"), [(320, False), (640, False), (1280, True), (3840, True)])
def test_large_images_may_differ_by_more_source_pixels(longest: int, ok: bool) -> None:
    assert compare(found(A), found(moved(A, by=1.5)), 0.1, Tolerance(), longest).ok is ok


def test_boxes_that_are_not_numbers_are_never_the_same() -> None:
    assert not compare(found(A), found((0, 0.9, [np.nan] * 4)), 0.1, Tolerance(), 640).ok


def test_agreement_of_several_images_is_that_of_the_worst() -> None:
    good, bad = Agreement(1, 3, 0, 0.2, 0.001, True), Agreement(1, 2, 1, 4.0, 0.2, False)
    assert agree([good, good]) == Agreement(2, 6, 0, 0.2, 0.001, True)
    assert agree([good, bad]) == Agreement(2, 5, 1, 4.0, 0.2, False)
    assert agree([]) == Agreement(0, 0, 0, 0.0, 0.0, False), "nothing compared proves nothing"


def test_a_folder_proves_itself_with_its_golden_images(tmp_path: Path) -> None:
    model = tiny_model_folder(tmp_path, ["person", "dog"])
    assert ModelFolder.load(tmp_path) == model
    result = check_golden(tmp_path, model.detector(tmp_path, threads=1))
    assert (result.ok, result.images, result.boxes) == (True, 2, 2)


def test_another_network_does_not_pass_with_these_golden_images(tmp_path: Path) -> None:
    tiny_model_folder(tmp_path / "a", ["person", "dog"])
    shifted = tiny_model_folder(tmp_path / "b", ["person", "dog"], shift=8)
    assert not check_golden(tmp_path / "a", shifted.detector(tmp_path / "b", threads=1)).ok


def test_a_folder_without_golden_images_proves_nothing(tmp_path: Path) -> None:
    model = tiny_model_folder(tmp_path, ["person"], golden=False)
    assert read_golden(tmp_path) == [] and not check_golden(tmp_path, model.detector(tmp_path, threads=1)).ok


def _json(**change: Any) -> Callable[[Path], None]:
    return lambda folder: write_json(folder / "model.json", read_json(folder / "model.json") | change)


def _without(key: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        entry = read_json(folder / "model.json")
        del entry[key]
        write_json(folder / "model.json", entry)

    return spoil


def _text(former: str, now: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "model.json"
        path.write_text(path.read_text().replace(former, now))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda folder: (folder / "model.json").unlink(), "model.json cannot be read"),
        (lambda folder: (folder / "model.json").write_bytes(b"\xff\x00"), "model.json cannot be read"),
        (lambda folder: (folder / "model.json").write_text("[]"), "model.json cannot be read"),
        (_without("classes"), "classes"),
        (_without("imgsz"), "imgsz"),
        (_json(classes=[]), "classes"),
        (_json(classes=["person", "person"]), "not distinct"),
        (_text('"dog"', r'"\ud800"'), "surrogates not allowed"),
        (_json(thresholds={"person": 0.5}), "thresholds has no value from 0 to 1 for dog"),
        (_json(thresholds={"person": 0.5, "dog": 1.5}), "for dog"),
        (_json(version="0" * 12), "version 000000000000"),
        (_json(format_version=99), "format_version 99"),
        (_json(invented=1), "invented"),
        (lambda folder: (folder / "model.onnx").unlink(), "has no model.onnx"),
    ],
)
def test_a_description_that_cannot_be_is_refused(tmp_path: Path, spoil: Callable[[Path], None], match: str) -> None:
    tiny_model_folder(tmp_path, ["person", "dog"])
    spoil(tmp_path)
    with pytest.raises(ModelError, match=match):
        ModelFolder.load(tmp_path)


def test_another_graph_than_described_is_refused(tmp_path: Path) -> None:
    tiny_model_folder(tmp_path, ["person"])
    (tmp_path / "model.onnx").write_bytes(b"another")
    with pytest.raises(IntegrityError, match="not the file"):
        ModelFolder.load(tmp_path)
    assert ModelFolder.load(tmp_path, verify=False).classes == ("person",)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "golden" / "empty.png").unlink(),
        lambda folder: (folder / "golden" / "empty.png").write_bytes(b"x"),
        lambda folder: (folder / "golden" / "golden.json").write_text("{"),
        lambda folder: write_json(folder / "golden" / "golden.json", {"images": [{"file": "empty.png"}]}),
        lambda folder: write_json(folder / "golden" / "golden.json", []),
    ],
)
def test_damaged_golden_images_are_told(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    model = tiny_model_folder(tmp_path, ["person"])
    spoil(tmp_path)
    with pytest.raises(IntegrityError, match="golden"):
        check_golden(tmp_path, model.detector(tmp_path, threads=1))


def test_golden_images_are_read_from_their_own_folder_only(tmp_path: Path) -> None:
    tiny_model_folder(tmp_path, ["person"])
    (tmp_path / "secret").write_bytes(b"not yours")
    golden = read_json(tmp_path / "golden" / "golden.json")
    golden["images"][0]["file"] = "../secret"
    write_json(tmp_path / "golden" / "golden.json", golden)
    with pytest.raises(IntegrityError):
        read_golden(tmp_path)


def test_limits_are_in_class_order(tmp_path: Path) -> None:
    model = tiny_model_folder(tmp_path, ["person", "dog"])
    assert replace(model, thresholds={"dog": 0.3, "person": 0.7}).limits() == [0.7, 0.3]
