"""How sure a score is: resampling whole groups of the test, both models on the same resamples.

Frames of one group (a video, a burst) resemble each other, so groups are drawn, not frames: the paired cluster
bootstrap with percentile intervals (Efron & Tibshirani 1993, chapters 8 and 13).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .ap import average_precision
from .score import ModelScore

__all__ = ["Interval", "Resampled", "draw_groups", "interval", "mean_over", "resample"]


@dataclass(frozen=True)
class Interval:
    """Lower and upper bound."""

    low: float
    high: float


@dataclass(frozen=True)
class Resampled:
    """A model's AP in every draw.

    Attributes:
        map50_95, map50: (draws, classes); NaN where a draw holds no box of the class, or the class has no AP at all.
    """

    map50_95: NDArray[np.float64]
    map50: NDArray[np.float64]


def draw_groups(groups: int, draws: int, seed: int) -> NDArray[np.int32]:
    """int32 (draws, groups): how often each group is drawn, each row adding up to `groups`."""
    if not groups:
        return np.zeros((draws, 0), dtype=np.int32)
    generator = np.random.default_rng(seed)
    return generator.multinomial(groups, np.full(groups, 1 / groups), size=draws).astype(np.int32)


def resample(score: ModelScore, weights: NDArray[np.int32]) -> Resampled:
    """Score every draw of `draw_groups` anew."""
    columns = []
    for name, matches in zip(score.classes, score.matches, strict=True):
        if score.per_class[name].map50 is None:
            columns.append(np.full((len(weights), 2), np.nan))
            continue
        values = average_precision(matches, weights)
        columns.append(np.stack([values.mean(axis=1), values[:, 0]], axis=1))
    table = np.stack(columns, axis=1) if columns else np.empty((len(weights), 0, 2))
    return Resampled(table[:, :, 0], table[:, :, 1])


def mean_over(values: NDArray[np.float64], columns: Sequence[int]) -> NDArray[np.float64]:
    """Mean over some classes in each draw, leaving out what a draw does not hold; NaN where it holds none."""
    chosen = values[:, list(columns)]
    present = ~np.isnan(chosen)
    count = present.sum(axis=1)
    total = np.where(present, chosen, 0.0).sum(axis=1)
    mean: NDArray[np.float64] = np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)
    return mean


def interval(values: NDArray[np.float64], confidence: float) -> Interval | None:
    """Two-sided percentile interval; None where no draw has a value."""
    present = values[~np.isnan(values)]
    if not len(present):
        return None
    tail = (1 - confidence) / 2
    low, high = np.quantile(present, [tail, 1 - tail])
    return Interval(float(low), float(high))
