"""The engine: one verified model, and a bounded pool of threads that runs it, so that the event loop never waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from haechi.components.shared.detections import Detections, Detector
from haechi.components.shared.errors import InputError, IntegrityError, ModelError, OverloadError
from haechi.components.shared.images import decode
from haechi.components.shared.model_folder import ModelFolder, check_golden

__all__ = ["Engine", "EngineOptions", "Models", "Prediction"]

_Result = TypeVar("_Result")

# The lowest limit at which the network's output is decoded; the thresholds of model.json then decide by class.
_FLOOR = 0.001
_CHUNK = 8  # images decoded at a time; what is held beyond that are encoded bytes


@dataclass(frozen=True)
class EngineOptions:
    """What an engine may use.

    Attributes:
        threads: compute threads of one run of the network; 0 lets onnxruntime choose.
        workers: requests worked on at the same time.
        queue: requests that may wait beyond those; one more is refused at once.
        max_pixels: larger images are refused from their header.
    """

    threads: int = 0
    workers: int = 2
    queue: int = 32
    max_pixels: int = 40_000_000

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise InputError(f"threads is {self.threads}", "Give 0 (automatic) or more.")
        if self.workers < 1 or self.queue < 0:
            raise InputError(f"workers is {self.workers} and queue {self.queue}", "Give at least 1 and 0.")


@dataclass(frozen=True)
class Prediction:
    """Detections in one image, above the model's threshold of each class, and the upright image's size in pixels."""

    detections: Detections
    width: int
    height: int


class Engine:
    """One model folder, opened and verified, ready to predict.

    Args:
        folder: the model folder.
        model: its description, digest already checked (`ModelFolder.load`).
        options: what it may use.

    Raises:
        ModelError, IntegrityError: the graph cannot be opened, or its golden images give other boxes.
    """

    def __init__(self, folder: Path, model: ModelFolder, options: EngineOptions) -> None:
        self.model = model
        self.options = options
        self._detector = model.detector(folder, options.threads)
        if model.golden:
            _verify(folder, model, self._detector)
        self._pool = ThreadPoolExecutor(options.workers, thread_name_prefix="engine")
        self._taken = 0

    async def submit(self, work: Callable[[], _Result]) -> _Result:
        """Run `work` in the pool.

        Raises:
            OverloadError: as many requests wait as may.
        """
        if self._taken >= self.options.workers + self.options.queue:
            raise OverloadError(f"the server holds {self._taken} requests already", "Try again in a moment.")
        # Counted until the thread is free again, also where the client has gone meanwhile.
        self._taken += 1
        loop = asyncio.get_running_loop()
        future = self._pool.submit(work)
        future.add_done_callback(lambda _: _on_loop(loop, self._release))
        return await asyncio.wrap_future(future)

    def predict(self, images: Sequence[bytes]) -> list[Prediction]:
        """Detect in encoded images; call it through `submit`.

        Raises:
            InputError: one cannot be decoded; its place is named where there are several.
        """
        limits = self.model.limits()
        conf = max(_FLOOR, min(limits))
        found: list[Prediction] = []
        for start in range(0, len(images), _CHUNK):
            prepared = []
            for place, data in enumerate(images[start : start + _CHUNK], start):
                try:
                    prepared.append(self._detector.prepare(decode(data, self.options.max_pixels)))
                except InputError as error:
                    where = f"image {place}: " if len(images) > 1 else ""
                    raise InputError(where + error.problem, error.remedy) from error
            results = self._detector.detect_prepared(prepared, conf=conf, iou=self.model.iou)
            found += [
                Prediction(result.above(limits), placed.width, placed.height)
                for result, (_, placed) in zip(results, prepared, strict=True)
            ]
        return found

    def close(self) -> None:
        """Let running work end and the threads go."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _release(self) -> None:
        self._taken -= 1


def _on_loop(loop: asyncio.AbstractEventLoop, work: Callable[[], None]) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(work)


def _verify(folder: Path, model: ModelFolder, detector: Detector) -> None:
    result = check_golden(folder, detector)
    if result.images != model.golden:
        raise IntegrityError(
            f"{folder} has {result.images} golden images, model.json says {model.golden}", "Fetch the folder again."
        )
    if not result.ok:
        raise ModelError(
            f"{folder}: the golden images give other boxes here ({result.unmatched} unmatched, corners up to "
            f"{result.max_box_px:.2f} px and scores up to {result.max_score:.4f} off)",
            "Do not serve it: export it again, or look for another onnxruntime than it was exported with.",
        )


class Models:
    """The models that this process serves, by name; `None` stands for one that is still loading."""

    def __init__(self) -> None:
        self._engines: dict[str, Engine | None] = {}

    def announce(self, name: str) -> None:
        """Make a name known before its engine is there."""
        self._engines.setdefault(name, None)

    def put(self, engine: Engine) -> Engine | None:
        """Serve `engine` from now on; the one that it replaces, which its caller closes."""
        former = self._engines.get(engine.model.name)
        self._engines[engine.model.name] = engine
        return former

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
        """Whether every model may be asked."""
        return bool(self._engines) and all(engine is not None for engine in self._engines.values())

    def close(self) -> None:
        """Close all engines."""
        for engine in self._engines.values():
            if engine is not None:
                engine.close()
