"""The promotion gate: promote, refuse, or say that the test holds too little to tell.

A challenger must have enough labelled boxes and groups to be judged at all, reach its floors, and against a champion
show on the same resampled groups that it is better on the whole and no worse in any class. The burden of proof lies
with the challenger, and `min_gain` is never negative, so that small losses cannot add up from round to round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .bootstrap import Interval, draw_groups, interval, mean_over, resample
from .parameters import Gate
from .score import ModelScore

__all__ = ["Check", "Comparison", "Judgement", "compare", "judge"]


@dataclass(frozen=True)
class Check:
    """One thing that was asked: `value` against `limit`, with the interval where there is one."""

    name: str
    ok: bool
    value: float | str | None
    limit: float | str
    sentence: str
    interval: Interval | None = None

    def to_json(self) -> dict[str, Any]:
        """The entry of verdict.json."""
        entry = asdict(self)
        entry["interval"] = [self.interval.low, self.interval.high] if self.interval else []
        return entry


@dataclass(frozen=True)
class Comparison:
    """Intervals of both models and of their difference; keys are class names, and empty for the mean over classes.

    Attributes:
        challenger, champion: intervals of AP50-95.
        gains: challenger's AP50-95 less the champion's, over what both know: the value and its interval.
        shared: classes that have an AP in both.
    """

    challenger: dict[str, Interval]
    champion: dict[str, Interval]
    gains: dict[str, tuple[float, Interval]]
    shared: tuple[str, ...]


@dataclass(frozen=True)
class Judgement:
    """The decision, why, and all that was checked."""

    decision: str
    reasons: tuple[str, ...]
    checks: tuple[Check, ...]


def compare(gate: Gate, challenger: ModelScore, champion: ModelScore | None) -> Comparison:
    """Resample the test's groups and hold both models against each other on the same draws."""
    groups = len(challenger.matches[0].boxes) if challenger.matches else 0
    weights = draw_groups(groups, gate.draws, gate.seed)
    names = challenger.classes
    ours = resample(challenger, weights).map50_95
    scored = [index for index, name in enumerate(names) if challenger.per_class[name].map50_95 is not None]
    if champion is None:
        return Comparison(_intervals(gate, names, ours, scored), {}, {}, ())
    theirs = resample(champion, weights).map50_95
    others = [index for index, name in enumerate(names) if champion.per_class[name].map50_95 is not None]
    both = [index for index in scored if index in others]
    shared = tuple(names[index] for index in both)
    changes = _intervals(gate, names, ours - theirs, both)
    gains = {name: (_gain(challenger, champion, name, shared), bounds) for name, bounds in changes.items()}
    return Comparison(_intervals(gate, names, ours, scored), _intervals(gate, names, theirs, others), gains, shared)


def _gain(challenger: ModelScore, champion: ModelScore, name: str, shared: Sequence[str]) -> float:
    over = [name] if name else shared
    pairs = [(challenger.per_class[item].map50_95, champion.per_class[item].map50_95) for item in over]
    return sum((ours or 0.0) - (theirs or 0.0) for ours, theirs in pairs) / len(pairs)


def _intervals(gate: Gate, names: Sequence[str], values: Any, columns: Sequence[int]) -> dict[str, Interval]:
    every = {"": interval(mean_over(values, columns), gate.confidence)} if columns else {}
    every |= {names[index]: interval(values[:, index], gate.confidence) for index in columns}
    return {name: bounds for name, bounds in every.items() if bounds}


def judge(
    gate: Gate,
    challenger: ModelScore,
    champion: ModelScore | None,
    comparison: Comparison,
    challenger_version: str,
    champion_version: str,
) -> Judgement:
    """Decide.

    `refuse` if it is the champion already; else `not_enough_data` where a class has too few boxes or groups; else
    `refuse` where another check failed; else `promote`. Every check is listed, whatever decided.
    """
    data = _data_checks(gate, challenger)
    merit = _floor_checks(gate, challenger)
    if champion is not None:
        merit += _champion_checks(gate, champion, comparison)
    if champion_version and champion_version == challenger_version:
        same = Check(
            "another_version",
            False,
            challenger_version,
            champion_version,
            f"Version {challenger_version} is the champion already: there is nothing to promote.",
        )
        return Judgement("refuse", (same.sentence,), (same, *data, *_floor_checks(gate, challenger)))
    checks = (*data, *merit)
    lacking = [check.sentence for check in data if not check.ok]
    failed = [check.sentence for check in merit if not check.ok]
    if lacking:
        return Judgement("not_enough_data", tuple(lacking), checks)
    if failed:
        return Judgement("refuse", tuple(failed), checks)
    return Judgement("promote", tuple(_praise(gate, challenger, champion, comparison, champion_version)), checks)


def _data_checks(gate: Gate, score: ModelScore) -> list[Check]:
    checks = []
    for name, item in score.per_class.items():
        boxes, groups = _count(item.boxes, "box", "boxes"), _count(item.groups, "group", "groups")
        checks.append(
            Check(
                f"boxes/{name}",
                item.boxes >= gate.min_boxes,
                item.boxes,
                gate.min_boxes,
                f"{name} has {boxes} in the test; the gate asks for {gate.min_boxes}.",
            )
        )
        checks.append(
            Check(
                f"groups/{name}",
                item.groups >= gate.min_groups,
                item.groups,
                gate.min_groups,
                f"The test's boxes of {name} come from {groups}; the gate asks for {gate.min_groups}.",
            )
        )
    if not checks:
        checks.append(Check("classes", False, 0, 1, "The dataset has no class, so there is nothing to judge."))
    return checks


def _floor_checks(gate: Gate, score: ModelScore) -> list[Check]:
    checks = []
    for name, item in score.per_class.items():
        if not item.known:
            checks.append(Check(f"knows/{name}", False, "no", "yes", f"The model does not have the class {name}."))
        floor = gate.floor(name)
        if floor is not None and item.known:
            value = "unknown" if item.map50 is None else f"{item.map50:.3f}"
            ok = item.map50 is not None and item.map50 >= floor
            relation = "reaches" if ok else "is below"
            sentence = f"AP50 of {name} is {value}, which {relation} its floor of {floor:.3f}."
            checks.append(Check(f"floor/{name}", ok, item.map50, floor, sentence))
    return checks


def _champion_checks(gate: Gate, champion: ModelScore, comparison: Comparison) -> list[Check]:
    if "" not in comparison.gains:
        return []
    gain, bounds = comparison.gains[""]
    told = _told(gate, bounds)
    checks = [
        Check(
            "gain",
            gain >= gate.min_gain,
            gain,
            gate.min_gain,
            f"mAP50-95 changes by {gain:+.3f} ({told}) against the champion; the gate asks for {gate.min_gain:+.3f}.",
            bounds,
        ),
        Check(
            "noninferiority",
            bounds.low >= -gate.noninferiority,
            bounds.low,
            -gate.noninferiority,
            f"A loss of more than {gate.noninferiority:.3f} mAP50-95 is "
            f"{'' if bounds.low >= -gate.noninferiority else 'not '}ruled out: the change is {gain:+.3f} ({told}).",
            bounds,
        ),
    ]
    for name in comparison.shared:
        change, bounds = comparison.gains[name]
        ok = change >= -gate.max_class_drop
        sentence = (
            f"AP50-95 of {name} changes by {change:+.3f} ({_told(gate, bounds)}); "
            f"a loss of up to {gate.max_class_drop:.3f} is allowed."
        )
        checks.append(Check(f"class_drop/{name}", ok, change, -gate.max_class_drop, sentence, bounds))
    return checks


def _praise(
    gate: Gate, challenger: ModelScore, champion: ModelScore | None, comparison: Comparison, champion_version: str
) -> list[str]:
    bounds = comparison.challenger.get("")
    told = f" ({gate.confidence:.0%} interval {bounds.low:.3f} to {bounds.high:.3f})" if bounds else ""
    frames = max(item.frames for item in challenger.per_class.values())
    floors = "every class reaches its floor" if gate.floors else "no floor is set"
    reasons = [
        f"mAP50-95 is {challenger.mean('map50_95'):.3f}{told} on up to {frames} test frames a class, and {floors}."
    ]
    if champion is None:
        return [*reasons, "There is no champion to compare with."]
    if "" not in comparison.gains:
        return [*reasons, f"The champion {champion_version} knows none of these classes, so nothing can be compared."]
    gain, change = comparison.gains[""]
    return [
        *reasons,
        f"Against the champion {champion_version} mAP50-95 changes by {gain:+.3f} ({_told(gate, change)}), and no "
        f"class loses more than {gate.max_class_drop:.3f}.",
    ]


def _told(gate: Gate, bounds: Interval) -> str:
    return f"{gate.confidence:.0%} interval {bounds.low:+.3f} to {bounds.high:+.3f}"


def _count(number: int, one: str, many: str) -> str:
    return f"{number or 'no'} {one if number == 1 else many}"
