"""The tiny detectors give the boxes that their module promises, so that other tests may compute by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_models import COLOURS, cell_box, paint, shade, tiny_model_folder

from haechi.components.shared.detections import classes_of_graph, onnx_session
from haechi.components.shared.images import decode
from haechi.components.shared.model_folder import ModelFolder, check_golden

CLASSES = ["person", "package", "dog", "car", "smoke", "fire"]


def test_painted_cells_come_back_as_boxes_with_the_painted_score(tmp_path: Path) -> None:
    tiny_model_folder(tmp_path, CLASSES)
    model = ModelFolder.load(tmp_path)
    detector = model.detector(tmp_path, threads=1)
    data = paint({(2, 3): shade(0, 0.9), (5, 1): shade(3, 0.6), (9, 9): shade(5, 0.3)})
    (found,) = detector.detect([decode(data)], conf=0.1)
    assert [model.classes[i] for i in found.class_ids] == ["person", "car", "fire"]
    assert found.scores == pytest.approx([0.9, 0.6, 0.3], abs=0.005)
    np.testing.assert_allclose(found.boxes, [cell_box(2, 3), cell_box(5, 1), cell_box(9, 9)], atol=1e-3)


@pytest.mark.parametrize("index", range(len(COLOURS)))
@pytest.mark.parametrize("score", [0.2, 0.5, 0.95, 1.0])
def test_every_shade_scores_only_its_own_class(tmp_path: Path, index: int, score: float) -> None:
    detector = tiny_model_folder(tmp_path, CLASSES, golden=False).detector(tmp_path, threads=1)
    raw = detector.infer(
        np.asarray(shade(index, score), np.float32).reshape(1, 3, 1, 1).repeat(32, 2).repeat(32, 3) / 255
    )
    expected = np.zeros(len(CLASSES))
    expected[index] = score
    assert raw[0, 4:, 0] == pytest.approx(expected, abs=0.006)


def test_batches_of_other_shapes_and_padding_give_no_ghosts(tmp_path: Path) -> None:
    detector = tiny_model_folder(tmp_path, CLASSES).detector(tmp_path, threads=1)
    wide = decode(paint({(1, 1): shade(2)}, width=320, height=160))
    odd = np.zeros((100, 300, 3), np.uint8)
    found = detector.detect([wide, odd, wide], conf=0.05)
    assert [len(item) for item in found] == [1, 0, 1]
    np.testing.assert_allclose(found[2].boxes, [cell_box(1, 1)], atol=1e-3)


def test_shift_moves_every_box_and_makes_another_version(tmp_path: Path) -> None:
    straight = tiny_model_folder(tmp_path / "a", CLASSES)
    shifted = tiny_model_folder(tmp_path / "b", CLASSES, shift=8)
    (found,) = shifted.detector(tmp_path / "b", threads=1).detect([decode(paint({(2, 2): shade(0)}))])
    np.testing.assert_allclose(found.boxes, [(72, 64, 104, 96)], atol=1e-3)
    assert straight.version != shifted.version


def test_the_folder_proves_itself_by_its_golden_images(tmp_path: Path) -> None:
    model = tiny_model_folder(tmp_path, CLASSES[:2])
    agreement = check_golden(tmp_path, model.detector(tmp_path, threads=1))
    assert (agreement.ok, agreement.images, agreement.boxes) == (True, 2, 2)
    assert classes_of_graph(onnx_session(tmp_path / "model.onnx", 1)) == CLASSES[:2]
