"""Detections: letterbox, the network's raw output, non-maximum suppression, boxes in source pixels.

The very same code runs in label, export (parity), evaluate and the serving runtime; a stretch resize or a BGR input
in one of them is the classic silent bug that this module exists to make impossible.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from .errors import InputError, ModelError

__all__ = [
    "Detections",
    "Detector",
    "Head",
    "Letterbox",
    "box_iou",
    "classes_of_graph",
    "decode_output",
    "letterbox",
    "onnx_session",
    "read_head",
    "to_tensor",
]

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]

PADDING = 114  # the grey that YOLO networks are trained with around the picture
MAX_CANDIDATES = 30_000
_BLOCK = 256  # boxes that suppression looks at together
_BATCH = 8  # images in one run of the network, which bounds its memory


@dataclass(frozen=True)
class Detections:
    """What a detector found in one image.

    Attributes:
        boxes: float32 (n, 4), corners x1, y1, x2, y2 in pixels of the source image, clipped to it.
        scores: float32 (n,), 0 to 1, falling.
        class_ids: int64 (n,), index into the model's classes.
    """

    boxes: Floats
    scores: Floats
    class_ids: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.scores)

    def above(self, conf: float | Sequence[float]) -> Detections:
        """Those of at least `conf`, one value or one a class."""
        return self._where(self._reaches(conf))

    def below(self, conf: float | Sequence[float]) -> Detections:
        """Those of less than `conf`, one value or one a class."""
        return self._where(~self._reaches(conf))

    def _reaches(self, conf: float | Sequence[float]) -> NDArray[np.bool_]:
        limit = np.asarray(conf, dtype=np.float32)
        enough: NDArray[np.bool_] = self.scores >= (limit if limit.ndim == 0 else limit[self.class_ids])
        return enough

    def _where(self, keep: NDArray[np.bool_]) -> Detections:
        return Detections(self.boxes[keep], self.scores[keep], self.class_ids[keep])

    def to_list(self, classes: Sequence[str]) -> list[dict[str, Any]]:
        """Plain rows `{"class", "class_id", "score", "box": [x1, y1, x2, y2]}` for JSON."""
        return [
            {
                "class": classes[int(index)],
                "class_id": int(index),
                "score": round(float(score), 5),
                "box": [round(float(value), 2) for value in box],
            }
            for box, score, index in zip(self.boxes, self.scores, self.class_ids, strict=True)
        ]


@dataclass(frozen=True)
class Letterbox:
    """How a source image was laid into the network's input: `input = source * gain + (left, top)`."""

    gain: float
    left: int
    top: int
    width: int
    height: int


@dataclass(frozen=True)
class Head:
    """What the graph says of its input and output.

    Attributes:
        kind: `dense` for (batch, 4 + classes, anchors), YOLOv8/11 style, wants NMS; `end2end` for
            (batch, n, 6) rows of x1, y1, x2, y2, score, class, NMS-free.
        dynamic: whether height and width of the input are free.
        height, width: the fixed input size, or 0 where dynamic.
        batch: the fixed batch size, or 0 where dynamic.
        input_name: name of the input tensor.
    """

    kind: str
    dynamic: bool
    height: int
    width: int
    batch: int
    input_name: str


def letterbox(pixels: Pixels, imgsz: int, stride: int, rectangle: bool) -> tuple[Pixels, Letterbox]:
    """Scale an image into the network's input without stretching, and pad it with grey.

    The rounding follows Ultralytics' LetterBox, which is what the networks saw in training.

    Args:
        pixels: RGB uint8 (height, width, 3).
        imgsz: the longer side of the input.
        stride: sides are multiples of it.
        rectangle: pad to the smallest such rectangle; else to the full square.

    Returns:
        RGB uint8 (padded height, padded width, 3) and how to go back.
    """
    height, width = pixels.shape[:2]
    gain = min(imgsz / height, imgsz / width)
    inner_w, inner_h = max(1, round(width * gain)), max(1, round(height * gain))
    spare_w, spare_h = imgsz - inner_w, imgsz - inner_h
    if rectangle:
        spare_w, spare_h = spare_w % stride, spare_h % stride
    left, top = round(spare_w / 2 - 0.1), round(spare_h / 2 - 0.1)
    if (inner_w, inner_h) != (width, height):
        pixels = np.asarray(cv2.resize(pixels, (inner_w, inner_h), interpolation=cv2.INTER_LINEAR), dtype=np.uint8)
    canvas = np.full((inner_h + spare_h, inner_w + spare_w, 3), PADDING, dtype=np.uint8)
    canvas[top : top + inner_h, left : left + inner_w] = pixels
    return canvas, Letterbox(gain, left, top, width, height)


def to_tensor(canvases: Sequence[Pixels]) -> Floats:
    """Stack canvases of one size into float32 (n, 3, height, width), RGB, 0 to 1."""
    height, width = canvases[0].shape[:2]
    scaled = np.empty((len(canvases), 3, height, width), dtype=np.float32)
    for planes, canvas in zip(scaled, canvases, strict=True):
        # Planes first: multiplying with a stride of three bytes takes half as long again.
        for plane, channel in zip(planes, cv2.split(canvas), strict=True):
            np.multiply(channel, np.float32(1 / 255), out=plane, dtype=np.float32)
    return scaled


def box_iou(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    """Intersection over union of every box of `a` (n, 4) with every box of `b` (m, 4): (n, m)."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    overlap = np.clip(high - low, 0, None).prod(axis=2)
    area_a = (a[:, 2] - a[:, 0]) * (a[:, 3] - a[:, 1])
    area_b = (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])
    union = area_a[:, None] + area_b[None] - overlap
    iou: NDArray[Any] = np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0)
    return iou


def non_maximum_suppression(
    boxes: Floats, scores: Floats, class_ids: NDArray[np.int64], iou: float, max_det: int
) -> NDArray[np.intp]:
    """Greedy suppression within each class (Felzenszwalb et al. 2010); indices kept, best first, at most `max_det`.

    Works through the boxes block by block and stops when `max_det` are kept, which at a low confidence limit is
    long before the last of them.
    """
    order = np.argsort(-scores, kind="stable")[:MAX_CANDIDATES]
    kept: NDArray[np.intp] = np.empty(0, dtype=np.intp)
    for start in range(0, len(order), _BLOCK):
        block = order[start : start + _BLOCK]
        block = block[~_overlapping(boxes, class_ids, block, kept, iou).any(axis=1)]
        rival = _overlapping(boxes, class_ids, block, block, iou)
        alive = np.ones(len(block), dtype=bool)
        for index in range(len(block)):
            if alive[index]:
                alive[index + 1 :] &= ~rival[index, index + 1 :]
        kept = np.concatenate([kept, block[alive]])[:max_det]
        if len(kept) == max_det:
            break
    return kept


def _overlapping(
    boxes: Floats, class_ids: NDArray[np.int64], a: NDArray[np.intp], b: NDArray[np.intp], iou: float
) -> NDArray[np.bool_]:
    """Which of the boxes `a` and `b` (indices) are of one class and overlap more than `iou`: (len(a), len(b))."""
    # float64, since the limit rounded to float32 would suppress other boxes than torchvision does.
    over = box_iou(boxes[a], boxes[b]) > np.float64(iou)
    both: NDArray[np.bool_] = over & (class_ids[a][:, None] == class_ids[b][None])
    return both


def decode_output(
    raw: Floats, kind: str, placed: Letterbox, conf: float | Sequence[float], iou: float, max_det: int
) -> Detections:
    """Turn one image's raw network output into detections in source pixels.

    Args:
        raw: `dense` (4 + classes, anchors) with centre x, y, width, height; or `end2end` (n, 6).
        kind: as in Head.
        placed: the letterbox of that image.
        conf: drop what scores lower, one limit or one a class.
        iou: boxes of one class that overlap more are one (dense heads only).
        max_det: keep at most this many.
    """
    limits = np.asarray(conf, dtype=np.float32)
    if kind == "dense":
        scores = raw[4:].max(axis=0)
        # A broken network's NaN is no box.
        chosen = np.flatnonzero((scores >= limits.min()) & np.isfinite(raw[:4]).all(axis=0))
        class_ids = raw[4:, chosen].argmax(axis=0).astype(np.int64)
        if limits.ndim:
            enough = scores[chosen] >= limits[class_ids]
            chosen, class_ids = chosen[enough], class_ids[enough]
        scores = scores[chosen]
        centre, half = raw[:2, chosen].T, raw[2:4, chosen].T / 2
        boxes = np.concatenate([centre - half, centre + half], axis=1)
        kept = non_maximum_suppression(boxes, scores, class_ids, iou, max_det)
    else:
        raw = raw[np.isfinite(raw).all(axis=1)]
        boxes, scores, class_ids = raw[:, :4], raw[:, 4], raw[:, 5].round().astype(np.int64)
        if limits.ndim:  # a class that the model does not have reaches no limit
            known = (class_ids >= 0) & (class_ids < len(limits))
            limits = np.where(known, limits[np.where(known, class_ids, 0)], np.inf)
        chosen = np.flatnonzero(scores >= limits)
        kept = chosen[np.argsort(-scores[chosen], kind="stable")][:max_det]
    boxes, scores, class_ids = boxes[kept], scores[kept], class_ids[kept]
    boxes = (boxes - np.array([placed.left, placed.top] * 2, dtype=np.float32)) / np.float32(placed.gain)
    boxes = np.clip(boxes, 0, np.array([placed.width, placed.height] * 2, dtype=np.float32))
    return Detections(boxes.astype(np.float32), scores.astype(np.float32), class_ids)


def onnx_session(
    graph: Path | bytes, threads: int = 0, providers: Sequence[Any] = ("CPUExecutionProvider",)
) -> ort.InferenceSession:
    """Open an ONNX file, or the bytes of one.

    Raises:
        ModelError: missing or not a graph that onnxruntime accepts.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        source = graph if isinstance(graph, bytes) else str(graph)
        return ort.InferenceSession(source, options, providers=list(providers))
    # onnxruntime raises a class of its own for each kind of broken graph.
    except Exception as error:
        name = "the graph" if isinstance(graph, bytes) else str(graph)
        raise ModelError(
            f"{name} cannot be opened as an ONNX model ({error})", "Export it again with `haechi export`."
        ) from error


def read_head(session: ort.InferenceSession, classes: int) -> Head:
    """Read input and output layout from the graph; nothing is assumed of the family of the network.

    Raises:
        ModelError: an input that is not float32 (batch, 3, height, width), or an output that is neither
            (batch, 4 + classes, anchors) nor (batch, n, 6).
    """
    entry, out = session.get_inputs()[0], session.get_outputs()[0]
    if entry.type != "tensor(float)" or len(entry.shape) != 4 or entry.shape[1] not in (3, None, "channels"):
        raise ModelError(
            f"the model's input is {entry.type} of shape {entry.shape}, not float32 (batch, 3, height, width)",
            "Export it with `haechi export`, without half precision.",
        )
    batch, _, height, width = [size if isinstance(size, int) else 0 for size in entry.shape]
    shape = list(out.shape)
    if len(shape) == 3 and shape[1] == 4 + classes:
        kind = "dense"
    elif len(shape) == 3 and shape[2] == 6:
        kind = "end2end"
    else:
        raise ModelError(
            f"the model's output has shape {shape}, neither (batch, {4 + classes}, anchors) nor (batch, n, 6)",
            f"Check that it is a detector of {classes} classes, exported with `haechi export`.",
        )
    return Head(kind, height == 0 or width == 0, height, width, batch, entry.name)


class Detector:
    """A network with its pre- and post-processing: RGB images in, Detections out.

    Args:
        run: maps float32 (n, 3, h, w) to the raw output (n, …); an ONNX session or a torch module behind it.
        head: layout of input and output.
        classes: ordered class names.
        imgsz: the longer side of the input; ignored where the graph fixes it.
        stride: of the network, 32 for all YOLO detectors here.
        run_above: like `run`, told a score below which nobody will look: anchors where no class reaches it may come
            back without a box, as NaN. None where the network cannot save anything by that.
    """

    def __init__(
        self,
        run: Callable[[Floats], Floats],
        head: Head,
        classes: Sequence[str],
        imgsz: int,
        stride: int = 32,
        run_above: Callable[[Floats, float], Floats] | None = None,
    ) -> None:
        if imgsz < stride or imgsz % stride:
            raise InputError(f"imgsz is {imgsz}", f"Give a multiple of the network's stride {stride}.")
        if head.height != head.width:
            raise ModelError(
                f"the graph's input is {head.height}x{head.width}", "Export with a square or dynamic input."
            )
        self._run = run
        self._run_above = run_above
        self.head = head
        self.classes = tuple(classes)
        self.imgsz = imgsz if head.dynamic else head.height
        self.stride = stride

    @classmethod
    def from_onnx(cls, path: Path, classes: Sequence[str], imgsz: int, stride: int = 32, threads: int = 0) -> Detector:
        """Open an ONNX file as a detector."""
        session = onnx_session(path, threads)
        head = read_head(session, len(classes))
        return cls(lambda batch: session.run(None, {head.input_name: batch})[0], head, classes, imgsz, stride)

    def prepare(self, pixels: Pixels) -> tuple[Pixels, Letterbox]:
        """Letterbox one RGB image for this network."""
        return letterbox(pixels, self.imgsz, self.stride, rectangle=self.head.dynamic)

    @property
    def joinable(self) -> bool:
        """Whether images of several callers may share a run: it takes any number, and does the same for each."""
        return self.head.batch == 0 and self._run_above is None

    def through(self, wrap: Callable[[Callable[[Floats], Floats]], Callable[[Floats], Floats]]) -> Detector:
        """The same detector, whose network is run through `wrap`; for `joinable` ones."""
        return Detector(wrap(self._run), self.head, self.classes, self.imgsz, self.stride)

    def infer(self, batch: Floats, floor: float = 0.0) -> Floats:
        """The raw network, float32 (n, 3, h, w) to (n, …); a graph of fixed batch is fed in such portions, the
        last one filled up with zeros. What scores below `floor` may have no box (NaN)."""
        if self._run_above is not None:
            return self._run_above(batch, floor)
        size = self.head.batch
        if size in (0, len(batch)):
            return self._run(batch)
        spare = -len(batch) % size
        filled = np.concatenate([batch, np.zeros((spare, *batch.shape[1:]), dtype=np.float32)]) if spare else batch
        parts = [self._run(filled[i : i + size]) for i in range(0, len(filled), size)]
        return np.concatenate(parts)[: len(batch)]

    def detect(
        self, images: Sequence[Pixels], conf: float = 0.25, iou: float = 0.7, max_det: int = 300
    ) -> list[Detections]:
        """Detect in RGB images of any sizes; those whose letterboxes agree in shape share a batch."""
        return self.detect_prepared([self.prepare(image) for image in images], conf, iou, max_det)

    def detect_prepared(
        self, prepared: Sequence[tuple[Pixels, Letterbox]], conf: float = 0.25, iou: float = 0.7, max_det: int = 300
    ) -> list[Detections]:
        """Detect in what `prepare` made, so that threads can decode and letterbox while the network works."""
        raws = self.infer_prepared(prepared, conf)
        return [self.decode(raw, placed, conf, iou, max_det) for raw, (_, placed) in zip(raws, prepared, strict=True)]

    def decode(
        self, raw: Floats, placed: Letterbox, conf: float | Sequence[float], iou: float, max_det: int
    ) -> Detections:
        """`decode_output` for this network's head."""
        return decode_output(raw, self.head.kind, placed, conf, iou, max_det)

    def infer_prepared(self, prepared: Sequence[tuple[Pixels, Letterbox]], floor: float = 0.0) -> list[Floats]:
        """The raw output for each image of what `prepare` made; those of one shape share runs of the network.

        Args:
            prepared: any number of images.
            floor: the least score that any of them will be decoded at; boxes of what scores lower may be missing.
        """
        found: list[Floats | None] = [None] * len(prepared)
        shapes = sorted({canvas.shape for canvas, _ in prepared})
        for shape in shapes:
            same = [index for index, (canvas, _) in enumerate(prepared) if canvas.shape == shape]
            for members in (same[start : start + _BATCH] for start in range(0, len(same), _BATCH)):
                raw = self.infer(to_tensor([prepared[index][0] for index in members]), floor)
                for row, index in enumerate(members):
                    found[index] = raw[row]
        return [item for item in found if item is not None]


def classes_of_graph(session: ort.InferenceSession) -> list[str]:
    """Class names from the metadata that Ultralytics writes into the graph; empty where there are none.

    Raises:
        ModelError: there are some, but they cannot be read.
    """
    names = session.get_modelmeta().custom_metadata_map.get("names", "")
    if not names:
        return []
    try:
        table = ast.literal_eval(names)
        ordered = table if isinstance(table, list) else [table[key] for key in sorted(table, key=int)]
    except (ValueError, SyntaxError, TypeError, RecursionError) as error:
        raise ModelError(
            f"the graph's metadata `names` is not a table of class names ({error})", "Export it with `haechi export`."
        ) from error
    return [str(name) for name in ordered]
