"""How a model is brought into service: the parameter `rollout`, parsed once, with its defaults."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any
from urllib.parse import urlsplit

from haechi.components.shared.errors import InputError

__all__ = ["STRATEGIES", "Rollout"]

STRATEGIES = ("auto", "canary", "shadow", "rolling")
_LONGEST_BAKE = 7 * 86_400.0
_LONGEST_POLL = 60.0  # far less than a lease lasts without a sign of life


@dataclass(frozen=True)
class Rollout:
    """Steps and limits of a rollout on KServe.

    Attributes:
        strategy: `auto` takes a canary where the cluster can split traffic, else a shadow. `canary` refuses where it
            cannot. `shadow` proves the model in a service of its own and then replaces the pods. `rolling` only
            replaces the pods; nothing is asked of the new model.
        steps: percent of traffic for the canary, rising; after the last one it is promoted. Without any, a canary that
            gives the golden boxes is promoted at once: users have not tried it.
        bake: seconds at each step, up to a week.
        poll: seconds between two looks at the metrics, each with one frame to canary and stable; up to 60.
        min_requests: answers that the canary must have given before its errors or its latency are judged.
        max_errors: how much larger the canary's share of failed requests may be than the stable one's.
        max_latency: how many times the stable one's 95th percentile of latency the canary's may be.
        max_disagreement: share of the boxes on the golden images that only one of the two finds. 1 only reports it:
            without truth nobody knows which of the two is right, and the gate has compared them with truth.
        prometheus: URL of a Prometheus that scrapes the pods; empty to read the pods' own `/metrics`.
        address: how a predictor's Service is reached; {service} and {namespace} are filled in.

    Raises:
        InputError: a value that cannot be; the message names it.
    """

    strategy: str = "auto"
    steps: tuple[int, ...] = (10, 50, 100)
    bake: float = 300.0
    poll: float = 5.0
    min_requests: int = 20
    max_errors: float = 0.01
    max_latency: float = 2.0
    max_disagreement: float = 1.0
    prometheus: str = ""
    address: str = "http://{service}.{namespace}.svc"

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise InputError(f"rollout.strategy is {self.strategy!r}", f"Give one of {', '.join(STRATEGIES)}.")
        if any(not 0 < step <= 100 for step in self.steps) or list(self.steps) != sorted(set(self.steps)):
            raise InputError(f"rollout.steps is {list(self.steps)}", "Give rising percents from 1 to 100, as [10, 50].")
        for name, least in (("bake", 0.0), ("min_requests", 1), ("max_errors", 0.0), ("max_latency", 1.0)):
            if getattr(self, name) < least:
                raise InputError(f"rollout.{name} is {getattr(self, name)}", f"Give {least:g} or more.")
        if self.bake > _LONGEST_BAKE:
            raise InputError(
                f"rollout.bake is {self.bake:g}", f"Give seconds up to {_LONGEST_BAKE:.0f}, which is a week."
            )
        if not 0 < self.poll <= _LONGEST_POLL:
            raise InputError(f"rollout.poll is {self.poll:g}", f"Give seconds above 0 and up to {_LONGEST_POLL:g}.")
        if not 0 <= self.max_disagreement <= 1:
            raise InputError(f"rollout.max_disagreement is {self.max_disagreement}", "Give a share from 0 to 1.")
        if self.prometheus and not _is_url(self.prometheus):
            raise InputError(f"rollout.prometheus is {self.prometheus!r}, not a URL", "Write http://prometheus:9090.")
        _check_address(self.address)

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Rollout:
        """Read the parameter; what is not given keeps its default.

        Raises:
            InputError: an unknown key, or a value of another kind.
        """
        known = {item.name: item.default for item in fields(cls)}
        checked: dict[str, Any] = {}
        for key, value in values.items():
            if key not in known:
                raise InputError(f"rollout has no key {key!r}", f"Known: {', '.join(known)}.")
            checked[key] = _like(known[key], key, value)
        return cls(**checked)

    def url(self, namespace: str, service: str) -> str:
        """The address of a predictor's Service."""
        return self.address.format(service=service, namespace=namespace).rstrip("/")


def _like(default: Any, key: str, value: Any) -> Any:
    """The value as the default's kind; KFP hands over whole numbers as floats."""
    try:
        if isinstance(default, tuple) and isinstance(value, list | tuple):
            return tuple(_whole(item) for item in value)
        if isinstance(default, str) and isinstance(value, str):
            return value
        if isinstance(default, int | float) and _is_number(value):
            return float(value) if isinstance(default, float) else _whole(value)
    except ValueError:
        pass
    kind = "list of whole numbers" if isinstance(default, tuple) else type(default).__name__
    raise InputError(f"rollout.{key} is {value!r}", f"Give a {kind}, such as {default!r}.")


def _whole(value: Any) -> int:
    if not _is_number(value) or value % 1:
        raise ValueError(value)
    return int(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_address(address: str) -> None:
    try:
        filled = address.format(service="a", namespace="b")
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        filled = ""
    if not _is_url(filled) or "{service}" not in address:
        raise InputError(
            f"rollout.address is {address!r}", "Write a URL with {service}, as http://{service}.{namespace}.svc."
        )


def _is_url(text: str) -> bool:
    """Whether a request can be sent there; a line's end in it would begin a header of its own."""
    try:
        url = urlsplit(text)
        sound = url.scheme in ("http", "https") and bool(url.hostname) and (url.port or 1) > 0
        return sound and text.isprintable() and " " not in text
    except ValueError:
        return False
