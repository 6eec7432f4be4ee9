"""What canary and stable did while the canary had its share of traffic: requests, failures, latency; and a judgement."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import requests

from .bounded import ask
from .endpoint import Unanswered
from .rollout import Rollout

__all__ = ["Measured", "Pods", "Prometheus", "Source", "judge", "percentile", "read_metrics"]

_FAILED = ("error", "deadline", "overload")  # refused, denied and cancelled are the caller's
# What odd JSON raises where it is read as if it were none.
_ODD = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
_PREDICTIONS = ("v1", "v2", "grpc")
_Buckets = dict[float, float]


@dataclass(frozen=True)
class Measured:
    """What one side did.

    Attributes:
        answered: predictions that ended well.
        failed: those that the server could not answer.
        buckets: upper limit in seconds → predictions that took at most that long.
    """

    answered: float = 0.0
    failed: float = 0.0
    buckets: _Buckets = field(default_factory=dict)

    @property
    def requests(self) -> float:
        """Predictions that the server had to answer."""
        return self.answered + self.failed

    @property
    def failing(self) -> float:
        """The share that failed; 0 where nothing was asked."""
        return self.failed / self.requests if self.requests else 0.0

    def minus(self, former: Measured) -> Measured:
        """What happened since `former`."""
        buckets = {limit: number - former.buckets.get(limit, 0.0) for limit, number in self.buckets.items()}
        return Measured(self.answered - former.answered, self.failed - former.failed, buckets)

    def plus(self, other: Measured) -> Measured:
        """Both together."""
        limits = self.buckets.keys() | other.buckets.keys()
        buckets = {limit: self.buckets.get(limit, 0.0) + other.buckets.get(limit, 0.0) for limit in limits}
        return Measured(self.answered + other.answered, self.failed + other.failed, buckets)


class Source(Protocol):
    """Measures one side from its first look on."""

    def look(self) -> None:
        """Take a look; to be called every few seconds."""

    def total(self) -> Measured:
        """What happened between the first and the last look.

        Raises:
            Unanswered: nothing could be measured.
        """


class Pods:
    """The pods' own `/metrics` through their Service, which chooses another pod each time.

    Pods are told apart by the start of their process; each counts from the look that met it first.

    Args:
        scrape: gives the text of one pod's metrics.
    """

    def __init__(self, scrape: Callable[[], str]) -> None:
        self._scrape = scrape
        self._first: dict[float, Measured] = {}
        self._last: dict[float, Measured] = {}
        self._why = ""

    def look(self) -> None:
        """Read one pod; one that does not answer now is told by the probes."""
        try:
            process, measured = read_metrics(self._scrape())
        except Unanswered as error:
            self._why = error.problem
            return
        self._first.setdefault(process, measured)
        self._last[process] = measured

    def total(self) -> Measured:
        """All pods that were met."""
        if not self._last:
            raise Unanswered(
                f"no pod's /metrics could be read: {self._why}",
                "Look at what answers at that address, or set rollout.prometheus.",
            )
        total = Measured()
        for process, last in self._last.items():
            total = total.plus(last.minus(self._first[process]))
        return total


class Prometheus:
    """A Prometheus that scrapes the pods, with the labels `namespace` and `pod` that a PodMonitor gives.

    Args:
        url: of the server.
        namespace, deployment: whose pods.
        seconds: tells how long it has been since the beginning.
    """

    def __init__(self, url: str, namespace: str, deployment: str, seconds: Callable[[], float]) -> None:
        self._url, self._seconds = url.rstrip("/"), seconds
        self._pods = f'namespace="{namespace}",pod=~"{deployment}-[a-z0-9]+-[a-z0-9]+",protocol=~"v1|v2|grpc"'

    def look(self) -> None:
        """Nothing: Prometheus looks by itself."""

    def total(self) -> Measured:
        """What Prometheus saw since the beginning.

        Raises:
            Unanswered: it cannot be reached, refuses the query, or knows nothing of pods that were asked.
        """
        span = f"[{max(1, round(self._seconds()))}s]"
        outcomes = self._query(f"sum by (outcome) (increase(haechi_requests_total{{{self._pods}}}{span}))", "outcome")
        name = f"haechi_request_duration_seconds_bucket{{{self._pods}}}"
        buckets = self._query(f"sum by (le) (increase({name}{span}))", "le")
        if not outcomes:
            raise Unanswered(
                f"Prometheus at {self._url} knows no request of the pods {{{self._pods}}}, and we did ask them",
                "Apply the PodMonitor, let rollout.bake be some of its intervals, or leave rollout.prometheus empty.",
            )
        failed = sum(outcomes.get(name, 0.0) for name in _FAILED)
        return Measured(outcomes.get("ok", 0.0), failed, {float(limit): number for limit, number in buckets.items()})

    def _query(self, query: str, label: str) -> Mapping[str, float]:
        try:
            answer = ask("GET", f"{self._url}/api/v1/query", params={"query": query})
            if answer.status != 200:
                raise ValueError(f"{answer.status} {answer.reason}")
            rows = json.loads(answer.body)["data"]["result"]
            return {row["metric"].get(label, ""): _number(row["value"][1]) for row in rows}
        except (requests.RequestException, *_ODD) as error:
            raise Unanswered(
                f"Prometheus at {self._url} does not answer with numbers: {error}",
                "Check rollout.prometheus, or leave it empty.",
            ) from error


def read_metrics(text: str) -> tuple[float, Measured]:
    """The start of the process (seconds since 1970, 0 where it is not told) and its predictions, of one scrape.

    Raises:
        Unanswered: that is no page of ours.
    """
    try:
        return _read(text)
    except (ValueError, IndexError) as error:
        raise Unanswered(f"/metrics is not what Haechi's runtime writes ({error})") from error


def _read(text: str) -> tuple[float, Measured]:
    process, answered, failed = 0.0, 0.0, 0.0
    buckets: _Buckets = defaultdict(float)
    for line in text.splitlines():
        name, _, rest = line.partition("{")
        if line.startswith("process_start_time_seconds "):
            process = _number(line.split()[1])
        elif name in ("haechi_requests_total", "haechi_request_duration_seconds_bucket"):
            labels, _, value = rest.rpartition("}")
            entries = dict(part.split("=", 1) for part in labels.replace('"', "").split(",") if "=" in part)
            if entries.get("protocol") not in _PREDICTIONS:
                continue
            number = _number(value.split()[0])
            if "le" in entries:
                buckets[float(entries["le"])] += number
            elif entries.get("outcome") == "ok":
                answered += number
            elif entries.get("outcome") in _FAILED:
                failed += number
    if not process and not answered + failed:
        raise ValueError("it tells neither of a process nor of a prediction")
    return process, Measured(answered, failed, dict(buckets))


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text!r} is no number to count with")  # and every comparison with it is false
    return number


def percentile(buckets: _Buckets, share: float) -> float:
    """The latency that `share` of the predictions do not exceed, in seconds, evenly spread within a bucket."""
    total = buckets.get(float("inf"), 0.0)
    wanted, below, floor = share * total, 0.0, 0.0
    for limit, number in sorted(buckets.items()):
        if number >= wanted and number > below:
            top = limit if limit != float("inf") else floor
            return floor + (top - floor) * (wanted - below) / (number - below)
        below, floor = number, limit
    return 0.0


def judge(canary: Measured, stable: Measured, disagree: float, limits: Rollout) -> str:
    """Why the canary is worse than the stable one, or empty; too few requests are no reason."""
    if canary.requests >= limits.min_requests and canary.failing > stable.failing + limits.max_errors:
        return (
            f"{canary.failing:.1%} of the canary's {canary.requests:.0f} requests failed, {stable.failing:.1%} of the "
            f"stable model's {stable.requests:.0f} (rollout.max_errors is {limits.max_errors:g})"
        )
    enough = min(canary.buckets.get(float("inf"), 0.0), stable.buckets.get(float("inf"), 0.0)) >= limits.min_requests
    slow, usual = percentile(canary.buckets, 0.95), percentile(stable.buckets, 0.95)
    if enough and slow > usual * limits.max_latency:
        return (
            f"95 % of the canary's requests took up to {slow * 1000:.0f} ms, of the stable model's {usual * 1000:.0f} ms "
            f"(rollout.max_latency is {limits.max_latency:g})"
        )
    if disagree > limits.max_disagreement:
        return (
            f"{disagree:.1%} of the boxes on the golden images are found by only one of canary and stable "
            f"(rollout.max_disagreement is {limits.max_disagreement:g})"
        )
    return ""
