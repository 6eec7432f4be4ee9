"""Partial labels, honestly: a class that a frame's label does not cover is unknown there, never a negative.

Three places would otherwise take "no box" for "not there": the classification loss, the validation metrics by which
the best epoch is chosen, and a mosaic that lays a fire picture beside one that nobody searched for fire.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from ultralytics.data.augment import BaseMixTransform, Compose, Mosaic
from ultralytics.data.dataset import YOLODataset
from ultralytics.models.yolo.detect.val import DetectionValidator
from ultralytics.utils.loss import E2ELoss, v8DetectionLoss

from ..shared.errors import IntegrityError
from ..shared.images import read_header
from ..shared.storage import ordered_map

__all__ = ["CoverageDataset", "CoverageLoss", "CoverageValidator", "coverage_criterion", "read_covers"]

_PRIMED = 16
_READERS = 8


def read_covers(path: Path, classes: Sequence[str]) -> dict[str, torch.Tensor]:
    """Read `covers.json` of a materialised dataset.

    Args:
        path: maps an image's path, relative to that file's folder, to the class names that its label covers.
        classes: ordered class names.

    Returns:
        Absolute image path → bool (classes,).
    """
    root = path.parent
    return {
        str(root / name): torch.tensor([item in covered for item in classes])
        for name, covered in json.loads(path.read_text(encoding="utf-8")).items()
    }


class CoverageDataset(YOLODataset):
    """A YOLO dataset whose samples carry `covers`, bool (classes,), and whose mixtures stay within one coverage.

    A mixture takes its partners from pictures with the very same coverage, recently read ones as Ultralytics does, and
    what it covers is the intersection of its parts. `begin_epoch` forgets what was read, so that an epoch depends on
    its seed alone and not on the epochs before.

    Args:
        covers: from `read_covers`.
    """

    buffer: list[int]

    def __init__(self, *args: Any, covers: dict[str, torch.Tensor], **kwargs: Any) -> None:
        self._covers = covers
        self._recent: list[int] = []
        self._known: torch.Tensor | None = None
        self._group = ""
        super().__init__(*args, **kwargs)
        missing = [name for name in self.im_files if name not in covers]
        if missing:
            raise IntegrityError(f"covers.json says nothing of {missing[0]}", "Materialise the dataset again.")

    def get_labels(self) -> list[dict[str, Any]]:
        """Labels and sizes of the materialised pictures.

        Ultralytics' own scan keeps a cache file and rewrites JPEGs that it finds odd in place, through the hard links
        into the shared cache of frames, whose names are their digests.
        """
        return list(ordered_map(_read_label, list(zip(self.im_files, self.get_label_files(), strict=True)), _READERS))

    @property
    def partial(self) -> bool:
        """Whether any label leaves a class uncovered."""
        return not all(bool(self._covers[name].all()) for name in self.im_files)

    def begin_epoch(self) -> None:
        """Forget the recently read pictures and read a few anew, so that the first mosaics are mixed too."""
        if self.cache != "ram":
            for index in self.buffer:
                self.ims[index] = self.im_hw0[index] = self.im_hw[index] = None
        self.buffer.clear()
        self._recent.clear()
        if self.augment:
            for index in random.sample(range(self.ni), min(_PRIMED, self.ni)):
                self._touch(index)
                self.load_image(index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        self._known, self._group = None, self._coverage(index)
        sample: dict[str, Any] = super().__getitem__(index)
        sample["covers"] = self._known
        return sample

    def get_image_and_label(self, index: int) -> dict[str, Any]:
        """One picture with its label; every part of a mixture comes through here."""
        covers = self._covers[self.im_files[index]]
        self._known = covers if self._known is None else self._known & covers
        self._touch(index)
        label: dict[str, Any] = super().get_image_and_label(index)
        return label

    def build_transforms(self, hyp: Any) -> Compose:
        """The usual augmentations, with partners of mixtures chosen by `_partners`."""
        transforms = super().build_transforms(hyp)
        for mixer in _mixers(transforms):
            mixer.get_indexes = partial(self._partners, mixer.n - 1 if isinstance(mixer, Mosaic) else 1)
        return transforms

    def _touch(self, index: int) -> None:
        # The same rule as BaseDataset.load_image, which knows no coverage and keeps no list when pictures are cached.
        if self.augment and index not in self._recent:
            self._recent.append(index)
            if 1 < len(self._recent) >= self.max_buffer_length:
                self._recent.pop(0)

    def _coverage(self, index: int) -> str:
        return str(self._covers[self.im_files[index]].tolist())

    def _partners(self, count: int) -> list[int]:
        same = [index for index in self._recent if self._coverage(index) == self._group]
        # The list may just have dropped everything of a rare coverage: then any picture, and the intersection holds.
        return random.choices(same or self._recent or range(self.ni), k=count)


def _read_label(files: tuple[str, str]) -> dict[str, Any]:
    """One entry as YOLODataset keeps it: shape (height, width), cls (n, 1), bboxes (n, 4) as fractions cx, cy, w, h."""
    image, label = map(Path, files)
    header = read_header(image.read_bytes())
    rows = [[float(value) for value in line.split()] for line in label.read_text(encoding="ascii").splitlines()]
    table = np.asarray(rows, dtype=np.float32).reshape(-1, 5)
    return {
        "im_file": str(image),
        "shape": (header.height, header.width),
        "cls": table[:, :1],
        "bboxes": table[:, 1:],
        "segments": [],
        "keypoints": None,
        "normalized": True,
        "bbox_format": "xywh",
    }


def _mixers(transform: Any) -> Iterator[BaseMixTransform]:
    if isinstance(transform, Compose):
        for item in transform.transforms:
            yield from _mixers(item)
    elif isinstance(transform, BaseMixTransform):
        yield transform
        yield from _mixers(transform.pre_transform)


class CoverageValidator(DetectionValidator):
    """Validation that drops predictions of classes which the picture's label does not cover."""

    def update_metrics(self, preds: list[dict[str, torch.Tensor]], batch: dict[str, Any]) -> None:
        """Count predictions and boxes of one batch."""
        kept = []
        for pred, covers in zip(preds, batch["covers"], strict=True):
            known = covers.to(pred["cls"].device)[pred["cls"].long()]
            kept.append({key: value[known] for key, value in pred.items()})
        super().update_metrics(kept, batch)


class _MaskedBCE(nn.Module):
    """Binary cross entropy over (batch, anchors, classes) that is zero for negatives of uncovered classes."""

    def __init__(self) -> None:
        super().__init__()
        self.covers: torch.Tensor | None = None  # (batch, classes), set before each use

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        loss = nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
        if self.covers is None:
            return loss
        return loss * (self.covers[:, None, :] | (target > 0))


class CoverageLoss(v8DetectionLoss):
    """Ultralytics' detection loss, silent on what a label does not cover."""

    def __init__(self, model: nn.Module, tal_topk: int = 10, tal_topk2: int | None = None) -> None:
        super().__init__(model, tal_topk, tal_topk2)
        self.bce = _MaskedBCE()

    def get_assigned_targets_and_loss(self, preds: Any, batch: dict[str, Any], **kwargs: Any) -> Any:
        """As in the base class, for a batch that carries `covers`."""
        self.bce.covers = torch.stack(tuple(batch["covers"])).to(preds["scores"].device)
        return super().get_assigned_targets_and_loss(preds, batch, **kwargs)


def coverage_criterion(model: Any) -> CoverageLoss | E2ELoss:
    """The criterion that fits the model's head: YOLO26 has a second, one-to-one branch."""
    if getattr(model.model[-1], "one2one_cv2", None) is not None:
        return E2ELoss(model, CoverageLoss)
    return CoverageLoss(model)
