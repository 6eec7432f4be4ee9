"""A dense detector that works out boxes only around the cells where some class scores enough.

The class scores of all anchors come from the trunk. The box branch of a level, a few convolutions on its features,
then runs on the smallest rectangle that holds the cells in question and what their results depend on; at the usual
thresholds that is a few per cent of the picture. The boxes are those of the whole network but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["SelectiveNetwork"]

Floats = NDArray[np.float32]
_CELL = np.float32(0.5)  # from a cell's corner to its centre, an anchor


class SelectiveNetwork:
    """The parts of a network (`graph.Parts`), opened.

    Args:
        trunk: image float32 (n, 3, h, w) to class scores (n, classes, anchors) and each level's features.
        branches: features (1, channels, h, w) of a level to its distances (1, 4 * bins, h, w), with the margin of
            cells that a result depends on.
        bins: of the distribution that each distance is the mean of.
    """

    def __init__(
        self,
        trunk: Callable[[Floats], Sequence[Floats]],
        branches: Sequence[tuple[Callable[[Floats], Floats], int]],
        bins: int,
    ) -> None:
        self._trunk = trunk
        self._branches = tuple(branches)
        self._bins = np.arange(bins, dtype=np.float32)

    def __call__(self, batch: Floats, floor: float = 0.0) -> Floats:
        """The raw `dense` output (n, 4 + classes, anchors); anchors that score below `floor` have NaN for a box."""
        scores, *features = self._trunk(batch)
        images, classes, anchors = scores.shape
        raw = np.empty((images, 4 + classes, anchors), dtype=np.float32)
        raw[:, :4] = np.nan
        raw[:, 4:] = scores
        wanted = scores.max(axis=1) >= np.float32(floor)
        start = 0
        for (branch, margin), level in zip(self._branches, features, strict=True):
            rows, columns = level.shape[2:]
            stop = start + rows * columns
            stride = np.float32(batch.shape[2] / rows)
            for image in range(images):
                chosen = np.flatnonzero(wanted[image, start:stop])
                if len(chosen):
                    y, x = np.divmod(chosen, columns)
                    distances = self._distances(branch, margin, level[image : image + 1], y, x)
                    raw[image, :4, start + chosen] = _boxes(distances, y, x) * stride
            start = stop
        return raw

    def _distances(
        self,
        branch: Callable[[Floats], Floats],
        margin: int,
        level: Floats,
        y: NDArray[np.intp],
        x: NDArray[np.intp],
    ) -> Floats:
        """Cells from the anchors (y, x) to the left, top, right and bottom of their boxes, (anchors, 4)."""
        # Where the rectangle ends inside the picture, results are right from `margin` cells inwards; where it ends
        # with the picture, its padding is the picture's.
        top, left = max(0, int(y.min()) - margin), max(0, int(x.min()) - margin)
        crop = level[:, :, top : int(y.max()) + margin + 1, left : int(x.max()) + margin + 1]
        logits: Floats = branch(np.ascontiguousarray(crop))[0][:, y - top, x - left].T
        bins = len(self._bins)
        if bins == 1:
            return logits
        logits = logits.reshape(-1, 4, bins)
        weights = np.exp(logits - logits.max(axis=2, keepdims=True))
        mean: Floats = (weights @ self._bins) / weights.sum(axis=2)
        return mean


def _boxes(distances: Floats, y: NDArray[np.intp], x: NDArray[np.intp]) -> Floats:
    """Centre x, y, width and height in cells, (anchors, 4)."""
    centres = np.stack([x, y], axis=1).astype(np.float32) + _CELL
    low, high = centres - distances[:, :2], centres + distances[:, 2:]
    return np.concatenate([(low + high) / 2, high - low], axis=1)
