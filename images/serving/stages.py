"""Stages: how long each part of one request took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["STAGES", "Stages"]

# Waiting for a thread, decode with letterbox, the network (with the wait for a batch), decoding of its output.
STAGES = ("queue", "decode", "infer", "post")


class Stages:
    """Seconds by stage; one thread writes it at a time.

    Attributes:
        seconds: the sum of each stage.
        spans: every single stretch: stage, begin and end by `time.perf_counter`.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.spans: list[tuple[str, float, float]] = []

    def add(self, stage: str, begun: float) -> None:
        """Add to a stage what has begun then, by `time.perf_counter`, and ends now."""
        ended = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + ended - begun
        self.spans.append((stage, begun, ended))

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add what the block takes to a stage."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, begun)
