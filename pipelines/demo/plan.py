"""What the demo does, in numbers: how much is drawn, how long is trained, what the gate asks for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from haechi.components.shared.errors import InputError

from .world import CLASSES, RAW_PATTERN

__all__ = ["NAME", "Plan"]

NAME = "safety"
# From low on: a young champion misses much, and what it overlooks would be learnt as background.
_BANDS = {"default": [0.1, 0.6]}

# A test of some forty frames: fewer boxes than a real gate asks for, and wider margins.
_GATE = {"min_boxes": 10, "min_groups": 5, "floors": {"default": 0.3}, "noninferiority": 0.05, "max_class_drop": 0.1}


@dataclass(frozen=True)
class Plan:
    """The demo's size. The defaults take less than six minutes on two cores.

    Attributes:
        seed: of the world, the splits and the trainings.
        labelled: images of the set that round 1 starts from.
        bursts, frames: of round 2's raw frames, a camera and a burst.
        epochs, warm_epochs: of the trainings from scratch in round 1, and from the champion in round 2.
        imgsz, batch: of every training.
        gate: what a model must show to be promoted.
    """

    seed: int = 7
    labelled: int = 180
    bursts: int = 14
    frames: int = 4
    epochs: int = 13
    warm_epochs: int = 5
    imgsz: int = 160
    batch: int = 8
    gate: dict[str, Any] = field(default_factory=lambda: dict(_GATE))

    def __post_init__(self) -> None:
        for name in ("labelled", "bursts", "frames", "epochs", "warm_epochs", "batch"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} of the demo is {getattr(self, name)}", "Give 1 or more.")

    def first_round(self, labelled: Path, target: str) -> dict[str, Any]:
        """Pipeline parameters of round 1: a labelled folder in, two networks from scratch."""
        imported = {"uri": labelled.as_uri(), "format": "yolo", "covers": list(CLASSES), "class_map": {}}
        candidates = [self._fresh("yolo11n"), self._fresh("yolov8n")]
        return {**self._common(target), "sources": [], "imports": [imported], "candidates": candidates}

    def second_round(self, bucket: str, target: str, champion: str) -> dict[str, Any]:
        """Pipeline parameters of round 2: the cameras' frames in, two trainings that go on from the champion.

        Without a champion (round 1 may honestly end without one) they start from scratch again.
        """
        source = {"uri": f"s3://{bucket}/raw/", "pattern": RAW_PATTERN}
        warm = [
            self._candidate("warm", model="champion", epochs=self.warm_epochs, lr0=0.001),
            self._candidate("warm-gentle", model="champion", epochs=self.warm_epochs, lr0=0.0004),
        ]
        fresh = [self._fresh("yolo11n"), self._fresh("yolov8n")]
        return {
            **self._common(target),
            "sources": [source],
            "imports": [],
            "candidates": warm if champion else fresh,
        }

    def _common(self, target: str) -> dict[str, Any]:
        return {
            "name": NAME,
            "classes": list(CLASSES),
            "bands": _BANDS,
            "review_limit": 500,
            "ratios": {"val": 0.15, "test": 0.2},
            "thresholds": {"default": 0.25},
            "gate": dict(self.gate),
            "target": target,
            "seed": self.seed,
            "device": "cpu",
        }

    def _fresh(self, model: str) -> dict[str, Any]:
        return self._candidate(model, model=model, epochs=self.epochs, lr0=0.002)

    def _candidate(self, name: str, **options: Any) -> dict[str, Any]:
        # A hundred pictures and a dozen epochs: every batch must be a step (the default gathers 64 pictures for one),
        # and mosaics, which make a large set richer, leave too few whole objects to learn from.
        steps = {"optimizer": "AdamW", "nbs": self.batch, "warmup_epochs": 1.0, "warmup_bias_lr": 0.0, "mosaic": 0.0}
        return {"name": name, **options, **steps, "imgsz": self.imgsz, "batch": self.batch, "patience": 0}
