"""The engine: what one request may choose for itself, and what it sees beside the answer."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from haechi.components.shared.detections import MAX_CANDIDATES, Detections, Detector, Head, Letterbox
from haechi.components.shared.errors import DeadlineError, InputError
from haechi.components.shared.images import decode
from haechi.components.shared.model_folder import ModelFolder
from haechi.serving.engine import Engine, Models, with_near_misses
from haechi.serving.inference import MAX_DET, InferenceRequest, Parameters
from haechi.serving.pool import Pool
from haechi.serving.service import Call, Service
from haechi.serving.settings import ServingSettings
from tests.tiny_models import cell_box, paint, shade

SCENE = paint({(2, 3): shade(0, 0.9), (5, 5): shade(1, 0.6), (7, 7): shade(0, 0.45), (8, 1): shade(1, 0.3)})


def engine(folder: Path, **chosen: object) -> Engine:
    return Engine(folder, ModelFolder.load(folder), ServingSettings(**chosen))  # type: ignore[arg-type]


def found(engine: Engine, parameters: Parameters) -> list[tuple[int, float]]:
    (prediction,) = engine.predict(InferenceRequest((SCENE,), parameters))
    rows = prediction.detections
    return [(int(index), float(score)) for index, score in zip(rows.class_ids, rows.scores, strict=True)]


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        (Parameters(), [(0, 0.9), (1, 0.6)]),
        (Parameters(conf=0.2), [(0, 0.9), (1, 0.6), (0, 0.45), (1, 0.3)]),
        (Parameters(conf=0.7), [(0, 0.9)]),
        (Parameters(conf=0.2, max_det=1), [(0, 0.9)]),
        (Parameters(conf=0.2, classes=("dog",)), [(1, 0.6), (1, 0.3)]),
        (Parameters(conf=0.2, classes=("1",), max_det=1), [(1, 0.6)]),
        (Parameters(classes=("person", "dog")), [(0, 0.9), (1, 0.6)]),
    ],
)
def test_a_request_chooses_limits_classes_and_number(
    folder: Path, parameters: Parameters, expected: list[tuple[int, float]]
) -> None:
    rounded = [(index, pytest.approx(score, abs=0.02)) for index, score in expected]
    assert found(engine(folder), parameters) == rounded


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"conf": 0}, "`conf` is 0"),
        ({"conf": 1.1}, "`conf` is 1.1"),
        ({"conf": "nan"}, "`conf` is 'nan'"),
        ({"conf": True}, "`conf` is 'True'"),
        ({"iou": 0}, "`iou` is 0"),
        ({"iou": [1]}, "`iou` is"),
        ({"max_det": 0}, "`max_det` is 0"),
        ({"max_det": 2.5}, "`max_det` is 2.5"),
        ({"max_det": 10**400}, "`max_det` is"),
        ({"max_det": 301}, "`max_det` is 301"),
        ({"classes": 7}, "`classes` is '7'"),
        ({"classes": [None]}, "`classes` is"),
    ],
)
def test_parameters_out_of_range_are_named(values: dict[str, object], match: str) -> None:
    with pytest.raises(InputError, match=match):
        Parameters.read(values)


def test_an_unknown_class_is_named_with_those_there_are(folder: Path) -> None:
    with pytest.raises(InputError, match=r"names cat\. The model knows person, dog"):
        found(engine(folder), Parameters(classes=("person", "cat")))


@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_tensors_give_the_boxes_of_the_encoded_image(folder: Path, kind: str) -> None:
    pixels = decode(SCENE)
    tensor = pixels if kind == "uint8" else np.ascontiguousarray((pixels / np.float32(255)).transpose(2, 0, 1))
    (prediction,) = engine(folder).predict(InferenceRequest((tensor,)))
    assert prediction.detections.boxes.tolist() == [list(cell_box(2, 3)), list(cell_box(5, 5))]
    assert (prediction.width, prediction.height) == (320, 320)


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.1, 1.5, 255.0])
def test_tensors_that_are_no_pixels_are_refused(folder: Path, value: float) -> None:
    tensor = np.zeros((3, 64, 64), dtype=np.float32)
    tensor[1, 5, 5] = value
    with pytest.raises(InputError, match="not all from 0 to 1"):
        engine(folder).predict(InferenceRequest((tensor,)))


def test_the_place_of_a_bad_image_is_named_among_several(folder: Path) -> None:
    with pytest.raises(InputError, match="image 9: "):
        engine(folder).predict(InferenceRequest((*[SCENE] * 9, SCENE[:50], SCENE)))


def test_a_class_that_is_named_a_million_times_is_kept_once() -> None:
    assert Parameters.read({"classes": ["dog", "1"] * 500_000}).classes == ("dog", "1")


def test_work_that_nobody_waits_for_ends_before_its_next_image(folder: Path) -> None:
    over = threading.Event()
    over.set()
    with pytest.raises(DeadlineError, match="nobody waits"):
        engine(folder).predict(InferenceRequest((SCENE,)), given_up=over)

    async def story() -> float:
        models, pool = Models(), Pool(1, 0)
        models.put("tiny", engine(folder))
        service = Service(models, pool, timeout=0.2)
        large = paint({}, 6000, 6000)  # 64 of them take 20 s
        with pytest.raises(DeadlineError):
            await service.infer(
                Call("v2", "/"), "tiny", "", lambda: InferenceRequest((large,) * 64), lambda *answer: answer
            )
        begun = time.monotonic()
        pool.close()  # waits for what runs
        return time.monotonic() - begun

    assert asyncio.run(story()) < 5


def test_near_misses_are_seen_where_uncertain_samples_are_wanted_and_change_no_answer(folder: Path) -> None:
    plain, curious = engine(folder), engine(folder, sample_uncertain=0.5)
    (without,), (with_them,) = (item.predict(InferenceRequest((SCENE,))) for item in (plain, curious))
    assert without.below is None and with_them.below is not None
    assert with_them.detections.to_list(["person", "dog"]) == without.detections.to_list(["person", "dog"])
    # 0.45 lies less than 0.1 under the limit 0.5, and 0.3 does not.
    assert with_them.below.boxes.tolist() == [list(cell_box(7, 7))]


class Counting(Detector):
    """Counts its decodes; its network is never run."""

    def __init__(self, kind: str, classes: int) -> None:
        head = Head(kind, False, 64, 64, 0, "images")
        super().__init__(lambda batch: batch, head, [str(index) for index in range(classes)], 64)
        self.decodes = 0

    def decode(self, *arguments: Any) -> Detections:
        self.decodes += 1
        return super().decode(*arguments)


def raw_output(random: np.random.Generator, kind: str, classes: int, boxes: int) -> NDArray[np.float32]:
    """What a network says of `boxes` places, many of them near each other, with scores that are often equal."""
    centres = random.choice([8, 9, 10, 24, 40, 56], (2, boxes)) + random.random((2, boxes)) * random.choice([0, 1, 9])
    sizes = random.choice([2, 6, 12], (2, boxes))
    scores = random.integers(0, 101, (classes, boxes)) / 100
    if kind == "dense":
        raw = np.concatenate([centres, sizes, scores])
        raw[:4, random.random(boxes) < 0.02] = np.nan
        return raw.astype(np.float32)
    corners = [centres - sizes / 2, centres + sizes / 2]
    # An end-to-end head may name a class that is none.
    ids = random.integers(0, classes + 1, (1, boxes))
    return np.concatenate([*corners, scores[:1], ids]).T.astype(np.float32)


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(["dense", "end2end"]),
    boxes=st.sampled_from([0, 1, 7, 40, 600, 2000]),
    limits=st.lists(st.sampled_from([0.001, 0.05, 0.3, 0.55, 0.9, np.inf]), min_size=1, max_size=4),
    iou=st.sampled_from([0.1, 0.45, 0.7, 1.0]),
    max_det=st.sampled_from([1, 2, 30, 300]),
    margin=st.sampled_from([0.1, 0.3]),
)
def test_near_misses_change_no_bit_of_an_answer(
    seed: int, kind: str, boxes: int, limits: list[float], iou: float, max_det: int, margin: float
) -> None:
    raw = raw_output(np.random.default_rng(seed), kind, len(limits), boxes)
    placed = Letterbox(0.3, 3, 0, 200, 210)
    lower = [max(0.001, limit - margin) for limit in limits]
    detector = Counting(kind, len(limits))
    answer, missed = with_near_misses(detector, raw, placed, limits, lower, iou, max_det)
    all_of_them = detector.decode(raw, placed, lower, iou, MAX_DET)
    assert detector.decodes == (3 if len(all_of_them) == MAX_DET else 2)
    for told, wanted in (
        (answer, detector.decode(raw, placed, limits, iou, max_det)),
        (missed, all_of_them.below(limits)),
    ):
        assert told.boxes.tobytes() == wanted.boxes.tobytes() and told.boxes.shape == wanted.boxes.shape
        assert told.scores.tobytes() == wanted.scores.tobytes() and told.boxes.dtype == wanted.boxes.dtype
        assert told.class_ids.tolist() == wanted.class_ids.tolist()


def test_where_candidates_were_cut_off_the_answer_is_decoded_by_itself() -> None:
    """30,000 boxes of one class just below its limit stand before the one of the other class that reaches its own."""
    raw = np.zeros((6, MAX_CANDIDATES + 1), dtype=np.float32)
    raw[:4], raw[4], raw[4:, -1] = 10, 0.85, (0, 0.4)
    placed, limits = Letterbox(1, 0, 0, 64, 64), [0.9, 0.3]
    answer, _ = with_near_misses(Counting("dense", 2), raw, placed, limits, [0.8, 0.2], 0.5, 300)
    assert answer.class_ids.tolist() == [1]


@pytest.mark.parametrize(("batch", "expected"), [(1, 1), (4, 4)])
def test_batching_is_what_the_setting_says(folder: Path, batch: int, expected: int) -> None:
    sizes: list[int] = []
    made = Engine(folder, ModelFolder.load(folder), ServingSettings(batch=batch), sizes.append)
    assert made.batch == expected
    assert len(made.predict(InferenceRequest((SCENE, SCENE, paint({}, 640, 320))))) == 3
    assert sorted(sizes) == [1, 2], "images of one shape share a run"


def test_models_are_told_of_each_engine_before_it_serves(folder: Path) -> None:
    told: list[tuple[Engine, Engine | None]] = []
    models = Models(on_put=lambda item: told.append((item, models.get("x"))))
    models.announce("x")
    made = engine(folder)
    models.put("x", made)
    assert told == [(made, None)] and models.find("x") is made
