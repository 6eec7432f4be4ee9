"""The first parity check: does the exported graph give the checkpoint's boxes, and which pictures can prove it again?

Suppression is a choice: where two boxes of equal score overlap by just its limit, rounding in the seventh digit decides
which one stays. A picture on which the two networks agree number by number but not box by box is therefore no fault of
the export, and no golden image either, since another processor could choose otherwise again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..shared.detections import Detector, to_tensor
from ..shared.errors import ModelError
from ..shared.images import decode
from ..shared.model_folder import GOLDEN_CONF, GoldenImage
from ..shared.parity import Agreement, Tolerance, agree, compare
from .golden import Picture

__all__ = ["SPARE", "Comparison", "Proof", "prove"]

SPARE = 2  # pictures to compare for each golden image wanted, since some may be ambiguous or empty
_GOLDEN_IOU = 0.7  # the suppression that golden boxes are taken with, whatever the service uses
_RAW_SCORE, _RAW_PX = 0.002, 0.2


@dataclass(frozen=True)
class Comparison:
    """One picture seen by both networks.

    Attributes:
        image: the picture with the graph's boxes.
        agreement: of the boxes.
        raw_score: largest difference of any class score, before suppression.
        raw_px: largest difference of any box that counts, before suppression, in pixels of the input.
    """

    image: GoldenImage
    agreement: Agreement
    raw_score: float
    raw_px: float

    @property
    def verdict(self) -> str:
        """`same`, `different`, or `ambiguous`: only the suppression chose otherwise."""
        if self.agreement.ok and self.raw_score <= Tolerance().score:
            return "same"
        return "ambiguous" if self.raw_score <= _RAW_SCORE and self.raw_px <= _RAW_PX else "different"


@dataclass(frozen=True)
class Proof:
    """All comparisons of an export."""

    comparisons: tuple[Comparison, ...]

    @property
    def ok(self) -> bool | None:
        """Whether no picture differs; None where there was none."""
        return all(item.verdict != "different" for item in self.comparisons) if self.comparisons else None

    def golden(self, count: int) -> list[GoldenImage]:
        """Up to `count` pictures on which both agree box by box, those with boxes first: an empty one proves little."""
        agreed = [item.image for item in self.comparisons if item.verdict == "same"]
        return sorted(agreed, key=lambda image: len(image.expected) == 0)[:count]

    def to_dict(self) -> dict[str, Any]:
        """What `parity.json` holds: the sum over the pictures that are not ambiguous, and a row for each picture."""
        clear = [item for item in self.comparisons if item.verdict != "ambiguous"]
        rows = [
            {
                "image": item.image.name,
                **asdict(item.agreement),
                "verdict": item.verdict,
                "max_raw_score": _plain(item.raw_score),
                "max_raw_px": _plain(item.raw_px),
            }
            for item in self.comparisons
        ]
        total = asdict(agree([item.agreement for item in clear])) | {"ok": self.ok}
        settings = {"conf": GOLDEN_CONF, "iou": _GOLDEN_IOU, "tolerance": asdict(Tolerance())}
        return total | {"ambiguous": len(rows) - len(clear)} | settings | {"rows": rows}

    def require(self) -> None:
        """Raise a ModelError that names the worst picture unless all is well."""
        bad = [item for item in self.comparisons if item.verdict == "different"]
        if not bad:
            return
        worst = max(bad, key=lambda item: (item.raw_score, item.agreement.unmatched, item.agreement.max_box_px))
        told = worst.agreement
        raise ModelError(
            f"the ONNX graph does not give the checkpoint's boxes: worst on {worst.image.name} ({told.unmatched} boxes "
            f"without a partner, corners off by {told.max_box_px:.2f} px, scores by {told.max_score:.4f}, raw scores by "
            f"{worst.raw_score:.4f})",
            "Report the checkpoint and the versions of torch, onnx and onnxruntime; do not deploy it.",
        )


def prove(reference: Detector, exported: Detector, pictures: Sequence[Picture], wanted: int) -> Proof:
    """Compare both networks on pictures until `wanted` of them agree and have boxes, or all are compared.

    Args:
        reference: the checkpoint.
        exported: the graph.
        pictures: in order of preference.
        wanted: number of golden images.
    """
    done: list[Comparison] = []
    for picture in pictures:
        if sum(item.verdict == "same" and len(item.image.expected) > 0 for item in done) >= wanted:
            break
        done.append(_compare(reference, exported, picture))
    return Proof(tuple(done))


def _compare(reference: Detector, exported: Detector, picture: Picture) -> Comparison:
    pixels = decode(picture.data)
    expected, found = (
        detector.detect([pixels], conf=GOLDEN_CONF, iou=_GOLDEN_IOU)[0] for detector in (reference, exported)
    )
    agreement = compare(expected, found, GOLDEN_CONF, Tolerance(), max(pixels.shape[:2]))
    batch = to_tensor([exported.prepare(pixels)[0]])
    raw = _raw_difference(reference.infer(batch)[0], exported.infer(batch)[0], exported.head.kind)
    return Comparison(GoldenImage(picture.name, picture.data, found), agreement, *raw)


def _raw_difference(expected: NDArray[Any], found: NDArray[Any], kind: str) -> tuple[float, float]:
    """Largest difference of scores and of boxes, `dense` (4 + classes, anchors).

    Rows of an end-to-end head are already chosen and come in no fixed order: there the boxes alone must do.
    """
    if kind != "dense":
        return 0.0, math.inf
    if expected.shape != found.shape:
        return math.inf, math.inf
    gap = np.abs(expected - found)
    counts = np.maximum(expected[4:], found[4:]).max(axis=0) >= GOLDEN_CONF
    return float(gap[4:].max(initial=0.0)), float(gap[:4, counts].max(initial=0.0))


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
