"""The engine: one verified model that turns requests into predictions, and the register of those that are served."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from haechi.components.shared.detections import MAX_CANDIDATES, Detections, Detector, Letterbox
from haechi.components.shared.errors import DeadlineError, InputError, NotFoundError, NotReadyError
from haechi.components.shared.images import decode
from haechi.components.shared.model_folder import ModelFolder

from .backends import open_backend
from .batching import Batcher, batching_gain
from .inference import MAX_DET, MIN_CONF, Image, InferenceRequest, Parameters, Prediction
from .openers import Backend
from .sampling import MARGIN
from .settings import ServingSettings
from .stages import Stages

__all__ = ["Engine", "Models", "with_near_misses"]

Floats = NDArray[np.float32]

_CHUNK = 8  # images decoded at a time, and in one run at most; what is held beyond that are encoded bytes
_BATCH = 8
_WORTHWHILE = 1.2  # times faster by fours than one by one: less is not worth the wait
_MOST_WORKERS = 32


class Engine:
    """One model folder, opened and verified, ready to predict in any number of threads.

    Args:
        folder: the model folder.
        model: its description, digest already checked (`ModelFolder.load`).
        settings: what it may use.
        observe: told the number of images of each run of the network, in a worker's thread.

    Attributes:
        model: its description.
        backend: how the network is run, and why so.
        batch: images that one run takes from several requests; 1 where each request runs alone.
        workers: requests that may be worked on at the same time to keep the machine busy.

    Raises:
        ModelError, IntegrityError: the graph cannot be opened, or its golden images give other boxes.
    """

    def __init__(
        self,
        folder: Path,
        model: ModelFolder,
        settings: ServingSettings,
        observe: Callable[[int], None] | None = None,
    ) -> None:
        self.model = model
        self.backend = open_backend(folder, model, settings.backend)
        self.batch = _batch(self.backend, settings.batch)
        self._max_pixels = settings.max_pixels
        # What just missed its limit is looked for only where somebody asks for it.
        self._margin = MARGIN if settings.sample_uncertain else 0.0
        self._observe = observe or (lambda size: None)
        self._detector = self.backend.detector
        if self.batch > 1:
            self._detector = self._detector.through(
                lambda run: Batcher(run, self.batch, settings.batch_wait / 1000, self.backend.streams, self._observe)
            )
        # While one batch runs, the next one gathers.
        gathering = 2 * self.batch if self.batch > 1 else 0
        self.workers = settings.workers or min(_MOST_WORKERS, max(self.backend.streams, gathering))

    def predict(
        self, request: InferenceRequest, stages: Stages | None = None, given_up: threading.Event | None = None
    ) -> list[Prediction]:
        """Detect in the images of a request; blocks, so call it in a thread.

        Args:
            request: the images, and what it chooses for itself.
            stages: told how long each part takes.
            given_up: set once nobody waits for the answer any more; looked at before each image.

        Raises:
            DeadlineError: it was set.
            InputError: an image cannot be decoded (its place is named where there are several), or a class is unknown.
        """
        stages = Stages() if stages is None else stages
        given_up = given_up or threading.Event()
        wanted = request.parameters
        limits = _limits(self.model, wanted)
        lower = [max(MIN_CONF, limit - self._margin) for limit in limits]
        iou = self.model.iou if wanted.iou is None else wanted.iou
        found: list[Prediction] = []
        for start in range(0, len(request.images), _CHUNK):
            with stages.timed("decode"):
                prepared = [
                    self._prepare(image, place if len(request.images) > 1 else -1, given_up)
                    for place, image in enumerate(request.images[start : start + _CHUNK], start)
                ]
            with stages.timed("infer"):
                raws = self._detector.infer_prepared(prepared, min(lower))
            if self.batch == 1:  # the batcher tells of its own runs
                for size in Counter(canvas.shape for canvas, _ in prepared).values():
                    self._observe(size)
            with stages.timed("post"):
                for raw, (_, placed) in zip(raws, prepared, strict=True):
                    detections, below = (
                        with_near_misses(self._detector, raw, placed, limits, lower, iou, wanted.max_det)
                        if self._margin
                        else (self._detector.decode(raw, placed, limits, iou, wanted.max_det), None)
                    )
                    found.append(Prediction(detections, placed.width, placed.height, below))
        return found

    def _prepare(self, image: Image, place: int, given_up: threading.Event) -> tuple[NDArray[np.uint8], Letterbox]:
        if given_up.is_set():
            raise DeadlineError("nobody waits for the answer any more", "Send fewer images, or allow more time.")
        try:
            return self._detector.prepare(_pixels(image, self._max_pixels))
        except InputError as error:
            where = f"image {place}: " if place >= 0 else ""
            raise InputError(where + error.problem, error.remedy) from error


def with_near_misses(
    detector: Detector,
    raw: Floats,
    placed: Letterbox,
    limits: Sequence[float],
    lower: Sequence[float],
    iou: float,
    max_det: int,
) -> tuple[Detections, Detections]:
    """The very answer that `detector.decode` gives at `limits`, and what lies between `lower` and those.

    Args:
        detector, raw, placed: the network, what it said of an image, and that one's letterbox.
        limits, lower: least scores by class; `lower` nowhere above `limits`.
        iou, max_det: of the answer.
    """
    found = detector.decode(raw, placed, lower, iou, MAX_DET)
    missed = found.below(limits)
    if len(found) == MAX_DET or raw.shape[-1] > MAX_CANDIDATES:
        # Something may have been cut off that the limits of its class let in.
        return detector.decode(raw, placed, limits, iou, max_det), missed
    # Weaker boxes suppress no stronger ones, so those that reach the limits are the same without them.
    reached = found.above(limits)
    return Detections(reached.boxes[:max_det], reached.scores[:max_det], reached.class_ids[:max_det]), missed


def _pixels(image: Image, max_pixels: int) -> NDArray[np.uint8]:
    """RGB uint8 (height, width, 3)."""
    if isinstance(image, bytes):
        return decode(image, max_pixels)
    height, width = image.shape[:2] if image.dtype == np.uint8 else image.shape[1:]
    if height * width > max_pixels:
        raise InputError(f"the image is {width}x{height}, more than {max_pixels} pixels", "Scale it down.")
    if image.dtype == np.uint8:
        return image.astype(np.uint8, copy=False)
    # NaN fails both comparisons.
    if not (image.min() >= 0 and image.max() <= 1):
        raise InputError("the tensor's values are not all from 0 to 1", "Divide pixels by 255; NaN is no pixel.")
    # Back to the bytes they were made of: one way through the letterbox, whatever a client sends.
    scaled = image * np.float32(255)
    planes = np.rint(scaled, out=scaled).astype(np.uint8)
    return np.asarray(cv2.merge(list(planes)), dtype=np.uint8)  # half the time of a transposed copy


def _limits(model: ModelFolder, wanted: Parameters) -> Sequence[float]:
    """The least score to report, a class; infinity for classes that were not asked for."""
    limits = [max(MIN_CONF, limit if wanted.conf is None else wanted.conf) for limit in model.limits()]
    chosen = wanted.class_ids(model.classes)
    return [limit if not chosen or index in chosen else np.inf for index, limit in enumerate(limits)]


def _batch(backend: Backend, wanted: int) -> int:
    """Images of several requests in one run: what the setting says, or by a measurement where it is 0."""
    detector = backend.detector
    if not detector.joinable or wanted == 1:
        return 1
    if wanted:
        return wanted
    side = detector.imgsz
    gain = batching_gain(detector.infer, np.zeros((1, 3, side, side), dtype=np.float32))
    return _BATCH if gain >= _WORTHWHILE else 1


class Models:
    """The models that this process serves, by name; `None` stands for one that is still loading.

    Args:
        on_put: told of each engine before it is asked anything.
    """

    def __init__(self, on_put: Callable[[Engine], None] | None = None) -> None:
        self._engines: dict[str, Engine | None] = {}
        self.leaving = False  # the process is about to end
        self._on_put = on_put or (lambda engine: None)

    def announce(self, name: str) -> None:
        """Make a name known before its engine is there."""
        self._engines.setdefault(name, None)

    def put(self, name: str, engine: Engine) -> None:
        """Serve `engine` under `name` from now on; requests that the former one has begun end with it."""
        self._on_put(engine)
        self._engines[name] = engine

    def names(self) -> list[str]:
        """Names of all models, sorted."""
        return sorted(self._engines)

    def known(self, name: str) -> bool:
        """Whether there is such a model, ready or not."""
        return name in self._engines

    def get(self, name: str) -> Engine | None:
        """The engine, or None where it is not ready."""
        return self._engines.get(name)

    @property
    def ready(self) -> bool:
        """Whether every model may be asked, and the process stays."""
        return not self.leaving and bool(self._engines) and all(self._engines.values())

    def find(self, name: str, version: str = "") -> Engine:
        """The engine of a model that may be asked.

        Args:
            name: of the model.
            version: the version that the caller wants; empty for whichever is served.

        Raises:
            NotFoundError: no such model, or another version.
            NotReadyError: it is still loading.
        """
        if name not in self._engines:
            raise NotFoundError(f"there is no model {name[:80]!r} here", f"Ask for {', '.join(self.names())}.")
        engine = self._engines[name]
        if engine is None:
            raise NotReadyError(f"model {name} is still loading", "Try again in a moment.")
        if version and version != engine.model.version:
            raise NotFoundError(
                f"model {name} has no version {version[:80]!r} here", f"Version {engine.model.version} is served."
            )
        return engine
