"""Drawn boxes: around the object, labelled inside the picture, visible on any background."""

from __future__ import annotations

import numpy as np
import pytest

from haechi.components.shared.drawing import PALETTE, draw_boxes


@pytest.mark.parametrize("ground", [(0, 0, 0), (255, 255, 255), *PALETTE])
def test_a_box_stands_out_from_any_background(ground: tuple[int, int, int]) -> None:
    plain = np.full((240, 320, 3), ground, dtype=np.uint8)
    drawn = draw_boxes(plain, [("fire 0.91", (100, 80, 200, 160))])
    assert drawn.shape == plain.shape and (plain == ground).all(), "the given picture is not drawn upon"
    for row, column in ((120, 100), (120, 200), (160, 150)):
        edge = drawn[row - 3 : row + 4, column - 3 : column + 4].astype(int)
        assert np.abs(edge - ground).max() > 80
    assert (drawn[100:140, 120:180] == ground).all(), "the object itself is not covered"


@pytest.mark.parametrize(
    "box",
    [(0, 0, 50, 50), (300, 0, 320, 20), (0, 200, 30, 240), (-20, -20, 400, 400), (310, 230, 319, 239), (5, 5, 5, 5)],
)
def test_labels_stay_inside_the_picture(box: tuple[int, int, int, int]) -> None:
    plain = np.full((240, 320, 3), 128, dtype=np.uint8)
    drawn = draw_boxes(plain, [("person_down 0.55", box)], colour=(255, 0, 255))
    strip = (drawn == (255, 0, 255)).all(axis=2).any(axis=1)
    assert strip.sum() >= 10, "the filled strip behind the text is to be seen"


def test_a_class_keeps_its_colour_whatever_its_score() -> None:
    plain = np.zeros((240, 320, 3), dtype=np.uint8)
    first, second = (draw_boxes(plain, [(text, (50, 100, 150, 200))])[200, 60] for text in ("dog 0.30", "dog 0.95"))
    assert (first == second).all()


@pytest.mark.parametrize("text", ["dog", "", "해치 0.50", "a" * 300])
def test_any_text_can_be_drawn(text: str) -> None:
    assert draw_boxes(np.zeros((48, 64, 3), dtype=np.uint8), [(text, (1, 1, 20, 20))]).shape == (48, 64, 3)
