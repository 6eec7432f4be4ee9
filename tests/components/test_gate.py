"""The gate promotes what is shown to be better, refuses the rest, and says when the test holds too little."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pytest

from haechi.components.evaluate.gate import Judgement, compare, judge
from haechi.components.evaluate.parameters import Gate
from haechi.components.evaluate.score import ModelScore, TestFrame, score_model
from haechi.components.shared.detections import Detections
from haechi.components.shared.errors import InputError

CLASSES = ("fire", "smoke")
GATE = Gate(min_boxes=5, min_groups=3, draws=200)


def make_frames(groups: int, per_group: int = 2, classes: tuple[str, ...] = CLASSES) -> list[TestFrame]:
    """Frames with one box of each class, two frames a group."""
    boxes = np.asarray([[100.0 * i, 0.0, 100.0 * i + 50, 50.0] for i in range(len(classes))])
    return [
        TestFrame(f"{group}-{index}", f"g{group}", np.ones(len(classes), bool), boxes, np.arange(len(classes)))
        for group in range(groups)
        for index in range(per_group)
    ]


def score(
    frames: list[TestFrame],
    found: list[list[bool]] | bool,
    classes: tuple[str, ...] = CLASSES,
    known: tuple[str, ...] | None = None,
) -> ModelScore:
    """A model that finds class c in frame i exactly where `found[i][c]`."""
    rows = []
    for index, frame in enumerate(frames):
        hits = [found] * len(classes) if isinstance(found, bool) else found[index]
        ids = np.asarray([i for i, hit in enumerate(hits) if hit], dtype=np.int64)
        rows.append(Detections(frame.boxes[ids].astype(np.float32), np.full(len(ids), 0.9, np.float32), ids))
    return score_model(frames, rows, classes, known or classes, dict.fromkeys(classes, 0.5))


def decide(
    gate: Gate, challenger: ModelScore, champion: ModelScore | None = None, versions: tuple[str, str] = ("new", "old")
) -> Judgement:
    return judge(
        gate,
        challenger,
        champion,
        compare(gate, challenger, champion),
        versions[0],
        versions[1] if champion or versions[0] == versions[1] else "",
    )


def some(frames: list[TestFrame], fire: float, smoke: float) -> list[list[bool]]:
    """The first share of the frames is found, class by class."""
    n = len(frames)
    return [[index < fire * n, index < smoke * n] for index in range(n)]


def test_a_first_model_that_reaches_its_floors_is_promoted() -> None:
    frames = make_frames(10)
    judged = decide(Gate(min_boxes=5, min_groups=3, floors={"default": 0.5}), score(frames, True))
    assert judged.decision == "promote"
    assert "mAP50-95 is 1.000" in judged.reasons[0]
    assert "no champion" in judged.reasons[1]
    assert {check.name for check in judged.checks if check.ok} == {
        f"{kind}/{name}" for kind in ("boxes", "groups", "floor") for name in CLASSES
    }


def test_a_missed_floor_refuses_and_names_class_value_and_floor() -> None:
    frames = make_frames(10)
    gate = Gate(min_boxes=5, min_groups=3, floors={"default": 0.3, "fire": 0.8})
    judged = decide(gate, score(frames, some(frames, 0.5, 0.5)))
    assert judged.decision == "refuse"
    assert judged.reasons == ("AP50 of fire is 0.505, which is below its floor of 0.800.",)


@pytest.mark.parametrize(
    ("gate", "says"),
    [
        (Gate(min_boxes=21, min_groups=1), "fire has 20 boxes in the test; the gate asks for 21."),
        (Gate(min_boxes=1, min_groups=11), "The test's boxes of fire come from 10 groups; the gate asks for 11."),
    ],
)
def test_too_few_boxes_or_groups_is_no_decision(gate: Gate, says: str) -> None:
    judged = decide(gate, score(make_frames(10), True))
    assert judged.decision == "not_enough_data"
    assert says in judged.reasons


def test_a_class_without_a_box_is_no_decision_even_where_another_fails_its_floor() -> None:
    frames = [TestFrame(f.name, f.group, f.covers, f.boxes[:1], f.class_ids[:1]) for f in make_frames(10)]
    judged = decide(Gate(min_boxes=5, min_groups=3, floors={"default": 0.5}), score(frames, [[False, False]] * 20))
    assert judged.decision == "not_enough_data"
    assert judged.reasons[0] == "smoke has no boxes in the test; the gate asks for 5."


def test_no_frame_and_no_class_are_no_decision() -> None:
    assert decide(GATE, score([], True)).decision == "not_enough_data"
    assert decide(GATE, score(make_frames(5, classes=()), True, ())).decision == "not_enough_data"


def test_a_better_model_replaces_the_champion_and_the_reason_has_its_interval() -> None:
    frames = make_frames(20)
    judged = decide(GATE, score(frames, some(frames, 0.9, 0.9)), score(frames, some(frames, 0.6, 0.6)))
    assert judged.decision == "promote"
    assert "Against the champion old mAP50-95 changes by +0.297 (95% interval" in judged.reasons[1]
    gain = next(check for check in judged.checks if check.name == "gain")
    assert gain.interval is not None
    assert gain.interval.low < float(gain.value or 0) < gain.interval.high


def test_a_worse_model_is_refused() -> None:
    frames = make_frames(20)
    judged = decide(GATE, score(frames, some(frames, 0.6, 0.6)), score(frames, some(frames, 0.9, 0.9)))
    assert judged.decision == "refuse"
    assert {check.name for check in judged.checks if not check.ok} == {
        "gain",
        "noninferiority",
        "class_drop/fire",
        "class_drop/smoke",
    }


def test_an_equal_model_passes_unless_a_gain_is_asked_for() -> None:
    frames = make_frames(20)
    same = score(frames, some(frames, 0.8, 0.8))
    assert decide(GATE, same, same).decision == "promote"
    judged = decide(Gate(min_boxes=5, min_groups=3, min_gain=0.01), same, same)
    assert judged.decision == "refuse"
    assert "the gate asks for +0.010" in judged.reasons[0]


def test_a_gain_overall_does_not_hide_a_loss_in_one_class() -> None:
    frames = make_frames(20)
    judged = decide(GATE, score(frames, some(frames, 0.8, 1.0)), score(frames, some(frames, 0.95, 0.4)))
    assert judged.decision == "refuse"
    assert len(judged.reasons) == 1
    assert judged.reasons[0].startswith("AP50-95 of fire changes by -0.1")


def test_a_gain_from_one_lucky_group_is_not_enough() -> None:
    # 30 frames of one video improve, while 1 frame in each of 12 other groups gets worse: more boxes right, worse model.
    frames = make_frames(12, per_group=1) + [
        TestFrame(f"video-{i}", "video", f.covers, f.boxes, f.class_ids) for i, f in enumerate(make_frames(30, 1))
    ]
    old = [[True, True]] * 12 + [[False, False]] * 30
    new = [[index >= 2, index >= 2] for index in range(12)] + [[True, True]] * 30
    judged = decide(Gate(min_boxes=5, min_groups=3), score(frames, new), score(frames, old))
    assert judged.decision == "refuse"
    (reason,) = judged.reasons
    assert reason.startswith("A loss of more than 0.020 mAP50-95 is not ruled out: the change is +0.6")


def test_the_champion_itself_is_refused() -> None:
    judged = decide(GATE, score(make_frames(10), True), None, ("same", "same"))
    assert judged.decision == "refuse"
    assert judged.reasons == ("Version same is the champion already: there is nothing to promote.",)


def test_classes_that_one_side_lacks() -> None:
    frames = make_frames(10)
    both, only_fire = score(frames, True), score(frames, True, known=("fire",))
    grown = decide(GATE, both, only_fire)
    assert grown.decision == "promote"
    assert [check.name for check in grown.checks if check.name.startswith("class_drop")] == ["class_drop/fire"]
    shrunk = decide(GATE, only_fire, both)
    assert shrunk.decision == "refuse"
    assert shrunk.reasons == ("The model does not have the class smoke.",)
    foreign = decide(GATE, both, score(frames, True, known=("person",)))
    assert "knows none of these classes" in foreign.reasons[1]


def test_the_seed_decides_and_nothing_else() -> None:
    frames = make_frames(15)
    ours, theirs = score(frames, some(frames, 0.8, 0.7)), score(frames, some(frames, 0.7, 0.8))
    plain = [json.dumps([check.to_json() for check in decide(GATE, ours, theirs).checks]) for _ in range(2)]
    assert plain[0] == plain[1]
    other = decide(Gate(min_boxes=5, min_groups=3, draws=200, seed=1), ours, theirs)
    assert json.dumps([check.to_json() for check in other.checks]) != plain[0]


def test_models_that_are_truly_worse_are_seldom_promoted() -> None:
    # Each group is found or missed as a whole, as videos are; the challenger's chance is 0.15 lower.
    generator = np.random.default_rng(7)
    frames = make_frames(40, per_group=3)
    gate = Gate(min_boxes=5, min_groups=3, draws=200)
    promoted = 0
    for _ in range(40):
        outcome = []
        for chance in (0.70, 0.85):
            groups = generator.random((40, 2)) < chance
            outcome.append(score(frames, [list(map(bool, groups[index // 3])) for index in range(len(frames))]))
        promoted += decide(gate, *outcome).decision == "promote"
    assert promoted <= 2


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"min_box": 3}, "gate.min_box is no parameter"),
        ({"min_boxes": 0}, "gate.min_boxes is 0"),
        ({"min_boxes": 2.5}, "not a whole number"),
        ({"min_boxes": "20"}, "not a number"),
        ({"min_boxes": True}, "not a number"),
        ({"min_gain": -0.01}, "gate.min_gain is -0.01"),
        ({"min_gain": float("nan")}, "gate.min_gain is nan"),
        ({"confidence": 1.0}, "gate.confidence is 1.0"),
        ({"draws": 5}, "gate.draws is 5"),
        ({"draws": float("inf")}, "not a whole number"),
        ({"floors": 0.3}, "gate.floors is 0.3"),
        ({"floors": {"fire": 30}}, "gate.floors.fire is 30"),
    ],
)
def test_a_bad_parameter_is_named(entry: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        Gate.from_dict(entry)


def test_numbers_may_come_as_floats() -> None:
    gate = Gate.from_dict({"min_boxes": 7.0, "draws": 500.0, "seed": 3.0, "floors": {"default": 0}})
    assert gate == Gate(min_boxes=7, draws=500, seed=3, floors={"default": 0.0})
    assert isinstance(gate.min_boxes, int)


def test_a_floor_for_a_class_that_is_not_there_is_named() -> None:
    with pytest.raises(InputError, match="names 'fyre', which is no class"):
        Gate(floors={"fyre": 0.3}).check_classes(CLASSES)


def test_a_thousand_draws_on_500_frames_and_3_classes_take_seconds() -> None:
    generator = np.random.default_rng(0)
    classes = ("a", "b", "c")
    frames = make_frames(100, per_group=5, classes=classes)
    found = []
    for frame in frames:
        noise = generator.uniform(0, 600, (60, 2)).astype(np.float32)
        boxes = np.concatenate([frame.boxes + generator.normal(0, 4, (3, 4)), np.c_[noise, noise + 50]])
        ids = np.concatenate([frame.class_ids, generator.integers(0, 3, 60)])
        found.append(Detections(boxes.astype(np.float32), generator.random(63).astype(np.float32), ids))
    scored = score_model(frames, found, classes, classes, dict.fromkeys(classes, 0.5))
    start = time.process_time()
    comparison = compare(Gate(), scored, scored)
    assert time.process_time() - start < 20
    assert comparison.gains[""][1].low == comparison.gains[""][1].high == 0
