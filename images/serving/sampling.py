"""Which images become samples, and with what probability: the statistics of the sampler, without any I/O.

Every image is drawn twice, independently: as `random` with the same probability as every other image, and as
`uncertain` where a detection lies near its limit. A camera's quota thins both by one factor that depends only on what
was kept of that camera before and on the time. So each decision's probability is known when it is made and never 0,
and what is weighted by its inverse is unbiased whatever the past was (docs/sampling.md has estimators and sources).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .inference import Prediction

__all__ = ["MARGIN", "Decision", "Design", "Quota", "decide", "near_limit"]

MARGIN = 0.1  # a score nearer to its class's limit than this is uncertain

# The level of a quota rises by one a sample and sinks by half of the quota an hour. Up to an eighth nothing is thinned;
# from there to one half the rate falls to a millionth. So any hour sees at most half (sunk) + half (risen) of the quota.
_SINKS = 1 / 2
_FREE = 1 / 8
_HALVINGS = 20 / (1 / 2 - _FREE)
_LEAST = 2.0**-30  # never 0: what cannot be kept cannot be estimated


@dataclass(frozen=True)
class Design:
    """The rates that somebody chose.

    Attributes:
        share: probability of every image to be kept as `random`, before thinning.
        uncertain: probability of an uncertain image to be kept as `uncertain`, before thinning.
        hourly: samples an hour and camera; 0 for any number.
    """

    share: float
    uncertain: float
    hourly: int


@dataclass(frozen=True)
class Decision:
    """One image that was drawn.

    Attributes:
        reasons: `random`, `uncertain` or both; empty where the quota's thinning took it out again.
        random, uncertain: probabilities, given all that was decided before, of being kept for either reason.
        thinning: the factor that both hold.
    """

    reasons: tuple[str, ...]
    random: float
    uncertain: float
    thinning: float

    @property
    def probability(self) -> float:
        """Of being kept at all: the two draws are independent."""
        return self.random + self.uncertain - self.random * self.uncertain


class Quota:
    """How full the quota of one camera is.

    Args:
        hourly: samples an hour; 0 for any number.
        now: seconds of a clock that never goes back.
    """

    def __init__(self, hourly: int, now: float) -> None:
        self._hourly = hourly
        self._level = 0.0
        self._at = now

    def thinning(self, now: float) -> float:
        """The factor, above 0 and up to 1, by which the rates are lowered at this time."""
        if not self._hourly:
            return 1.0
        self._level = max(0.0, self._level - (now - self._at) * _SINKS * self._hourly / 3600)
        self._at = now
        over = self._level / self._hourly - _FREE
        return 1.0 if over <= 0 else max(_LEAST, 2.0 ** (-_HALVINGS * over))

    def take(self) -> None:
        """One was kept."""
        self._level += 1

    def idle(self, now: float) -> bool:
        """Whether forgetting it would change nothing."""
        return self.thinning(now) == 1.0 and self._level == 0


def decide(
    design: Design, quota: Quota, is_uncertain: Callable[[], bool], now: float, draw: Callable[[], float]
) -> Decision | None:
    """Decide about one image.

    Args:
        design: the rates.
        quota: of its camera; grows by what is kept.
        is_uncertain: asked only of images that are drawn.
        now: time on the quota's clock.
        draw: a number from 0 up to 1, evenly distributed and independent of all others.

    Returns:
        None where it was not drawn.
    """
    first, second = draw(), draw()
    if first >= design.share and second >= design.uncertain:
        return None
    uncertain = design.uncertain > 0 and is_uncertain()
    if first >= design.share and not uncertain:
        return None
    thinning = quota.thinning(now)
    random_chance, uncertain_chance = design.share * thinning, design.uncertain * thinning if uncertain else 0.0
    reasons = ("random",) * (first < random_chance) + ("uncertain",) * (second < uncertain_chance)
    if reasons:
        quota.take()
    return Decision(reasons, random_chance, uncertain_chance, thinning)


def near_limit(prediction: Prediction, limits: Sequence[float], margin: float = MARGIN) -> bool:
    """Whether a detection's score lies near its class's limit, on either side.

    Args:
        prediction: of one image.
        limits: those of the model, by class; what a request chose for itself does not move them.
        margin: how near.
    """
    return any(
        abs(score - limits[index]) < margin
        for found in (prediction.detections, prediction.below)
        if found is not None
        for score, index in zip(found.scores.tolist(), found.class_ids.tolist(), strict=True)
    )
