"""The statistics of the sampler: estimates are unbiased whatever the quota does, and the quota holds."""

from __future__ import annotations

import bisect
import random
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from haechi.components.shared.detections import Detections
from haechi.serving.inference import Prediction
from haechi.serving.sampling import Design, Quota, decide, near_limit


@dataclass(frozen=True)
class Seen:
    at: float
    uncertain: bool
    found: int
    right: int
    missed: int


def an_hour(number: int, seed: int) -> list[Seen]:
    """A camera's hour that punishes every shortcut: bursts, misses that grow late, errors where it is uncertain."""
    rng = random.Random(seed)
    times = sorted(rng.choice((300.0, 1500.0, 3300.0)) + rng.uniform(0, 290) for _ in range(number))
    hour = []
    for at in times:
        uncertain = rng.random() < 0.15
        found = rng.choice((0, 0, 0, 1, 2)) + uncertain
        right = sum(rng.random() < (0.6 if uncertain else 0.95) for _ in range(found))
        missed = sum(rng.random() < (0.4 if at > 3000 else 0.05) for _ in range(2))
        hour.append(Seen(at, uncertain, found, right, missed))
    return hour


QUANTITIES = {
    "images": lambda seen: 1,
    "empty": lambda seen: seen.found == 0,
    "found": lambda seen: seen.found,
    "right": lambda seen: seen.right,
    "missed": lambda seen: seen.missed,
}


@pytest.mark.parametrize(
    "design",
    [
        Design(share=0.1, uncertain=0.0, hourly=0),
        Design(share=0.1, uncertain=0.5, hourly=0),
        Design(share=0.5, uncertain=0.0, hourly=160),  # four to six times what the quota lets through
        Design(share=0.3, uncertain=0.9, hourly=160),
    ],
)
def test_totals_weighted_by_the_recorded_probability_are_unbiased(design: Design) -> None:
    hour = an_hour(1500, seed=7)
    draw = random.Random(11).random
    totals: dict[str, list[float]] = {name: [] for name in QUANTITIES}
    variances: list[float] = []
    for _ in range(400):
        quota = Quota(design.hourly, 0.0)
        weighted = dict.fromkeys(QUANTITIES, 0.0)
        variance = 0.0
        for seen in hour:
            decision = decide(design, quota, lambda seen=seen: seen.uncertain, seen.at, draw)
            if decision and decision.reasons:
                chance = decision.probability
                for name, value in QUANTITIES.items():
                    weighted[name] += value(seen) / chance
                variance += seen.missed**2 * (1 - chance) / chance**2
        for name in QUANTITIES:
            totals[name].append(weighted[name])
        variances.append(variance)
    for name, value in QUANTITIES.items():
        truth = sum(value(seen) for seen in hour)
        error = statistics.stdev(totals[name]) / len(totals[name]) ** 0.5
        assert error < 0.02 * truth, "too rough to show a bias"
        assert abs(statistics.mean(totals[name]) - truth) < 4 * error, name
    # The variance estimator that goes with it, of one total.
    assert statistics.mean(variances) == pytest.approx(statistics.variance(totals["missed"]), rel=0.3)


def test_precision_and_miss_rate_come_out_of_the_uniform_part_and_of_all_samples_alike() -> None:
    design = Design(share=0.2, uncertain=0.8, hourly=300)
    hour = an_hour(1500, seed=3)
    draw = random.Random(5).random
    estimates: dict[str, list[float]] = {"all": [], "random": []}
    for _ in range(300):
        quota = Quota(design.hourly, 0.0)
        sums = {name: [0.0, 0.0] for name in estimates}
        for seen in hour:
            decision = decide(design, quota, lambda seen=seen: seen.uncertain, seen.at, draw)
            if not decision or not decision.reasons:
                continue
            chances = {"all": decision.probability}
            if "random" in decision.reasons:
                chances["random"] = decision.random
            for name, chance in chances.items():
                sums[name][0] += seen.right / chance
                sums[name][1] += seen.found / chance
        for name, (right, found) in sums.items():
            estimates[name].append(right / found)
    truth = sum(seen.right for seen in hour) / sum(seen.found for seen in hour)
    for values in estimates.values():
        assert statistics.mean(values) == pytest.approx(truth, abs=0.01)
    # Uncertain images are where the errors are, so they add to what is known.
    assert statistics.stdev(estimates["all"]) < 0.8 * statistics.stdev(estimates["random"])


@pytest.mark.parametrize(("rate", "share"), [(30.0, 1.0), (30.0, 0.05), (2.0, 1.0)])
@pytest.mark.parametrize("hourly", [60, 200])
def test_no_hour_sees_more_than_its_quota_and_a_busy_camera_gets_half_of_it(
    rate: float, share: float, hourly: int
) -> None:
    design, quota, draw = Design(share, 0.0, hourly), Quota(hourly, 0.0), random.Random(1).random
    hours = 3
    kept = []
    for number in range(int(rate * 3600 * hours)):
        decision = decide(design, quota, bool, number / rate, draw)
        if decision and decision.reasons:
            kept.append(number / rate)
    assert max(bisect.bisect_left(kept, at + 3600) - place for place, at in enumerate(kept)) <= hourly
    assert len(kept) > 0.45 * hourly * hours
    # Spread over the time, not only its beginning.
    assert all(sum(at // 3600 == hour for at in kept) > 0.35 * hourly for hour in range(hours))


def test_a_quiet_camera_is_never_thinned() -> None:
    design, quota, draw = Design(1.0, 0.0, 60), Quota(60, 0.0), random.Random(1).random
    decisions = [decide(design, quota, bool, 125.0 * number, draw) for number in range(100)]
    assert [decision.probability for decision in decisions if decision] == [1.0] * 100


def test_a_full_quota_lowers_the_probability_but_never_to_zero() -> None:
    quota = Quota(10, 0.0)
    factors = []
    for _ in range(50):
        factors.append(quota.thinning(0.0))
        quota.take()
    assert factors[0] == 1.0 and min(factors) > 0
    assert factors == sorted(factors, reverse=True) and factors[10] < 1e-6
    assert quota.thinning(3600 * 24) == 1.0 and quota.idle(3600 * 24)


def test_who_was_drawn_but_thinned_is_told_from_who_was_not_drawn() -> None:
    full = Quota(1, 0.0)
    full.take()
    decision = decide(Design(1.0, 0.0, 1), full, bool, 0.0, lambda: 0.5)
    assert decision is not None and decision.reasons == () and 0 < decision.probability < 1e-4
    assert decide(Design(0.4, 0.0, 1), full, bool, 0.0, lambda: 0.5) is None


@pytest.mark.parametrize(
    ("draws", "uncertain", "reasons", "probability"),
    [
        ((0.1, 0.9), False, ("random",), 0.2),
        ((0.1, 0.9), True, ("random",), 0.2 + 0.5 - 0.1),
        ((0.9, 0.1), True, ("uncertain",), 0.2 + 0.5 - 0.1),
        ((0.1, 0.1), True, ("random", "uncertain"), 0.2 + 0.5 - 0.1),
        ((0.9, 0.1), False, None, 0.0),
        ((0.9, 0.9), True, None, 0.0),
    ],
)
def test_reasons_and_probability(
    draws: tuple[float, float], uncertain: bool, reasons: tuple[str, ...] | None, probability: float
) -> None:
    source = iter(draws)
    decision = decide(Design(0.2, 0.5, 0), Quota(0, 0.0), lambda: uncertain, 0.0, lambda: next(source))
    if reasons is None:
        assert decision is None
    else:
        assert decision is not None and decision.reasons == reasons
        assert decision.probability == pytest.approx(probability)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [((), False), ((0.55,), True), ((0.9, 0.55), True), ((0.9,), False), ((0.45,), True), ((0.3,), False)],
)
def test_uncertain_is_what_lies_near_its_classs_limit_on_either_side(scores: tuple[float, ...], expected: bool) -> None:
    count = len(scores)
    found = Detections(np.zeros((count, 4), np.float32), np.asarray(scores, np.float32), np.ones(count, dtype=np.int64))
    assert near_limit(Prediction(found, 10, 10), [0.9, 0.5]) is expected
    nothing = found.above(2.0)
    assert near_limit(Prediction(nothing, 10, 10, below=found), [0.9, 0.5]) is expected


def test_the_estimator_of_the_documentation_covers_the_truth_as_often_as_it_says() -> None:
    page = (Path(__file__).parents[2] / "docs/sampling.md").read_text()
    scope: dict[str, Any] = {}
    exec(page.split("```python\n")[1].split("```")[0], scope)
    assert scope["rate"]([(1, 2, 0.5), (2, 2, 1.0)]) == pytest.approx((2 / 3, 1.96 * (2 * (1 / 18) ** 2) ** 0.5))

    design, hour, draw = Design(share=0.3, uncertain=0.9, hourly=200), an_hour(1500, seed=9), random.Random(2).random
    truth = sum(seen.right for seen in hour) / sum(seen.found for seen in hour)
    covered = 0
    for _ in range(300):
        quota, samples = Quota(design.hourly, 0.0), []
        for seen in hour:
            decision = decide(design, quota, lambda seen=seen: seen.uncertain, seen.at, draw)
            if decision and decision.reasons:
                samples.append((seen.right, seen.found, decision.probability))
        value, half = scope["rate"](samples)
        covered += abs(value - truth) <= half
    # Fewer than 95 in 100: weights differ, and the linearisation knows only what was drawn.
    assert 0.88 < covered / 300 < 0.99
