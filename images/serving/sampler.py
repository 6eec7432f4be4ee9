"""The sampler: an observer that keeps a small part of what was served, for audits and for the next training.

After an answer it decides image by image (sampling.py) on the event loop, in microseconds, and hands what is kept to
a thread (sample_writer.py) through a queue that is bounded in items and bytes. A store that is slow or away costs
samples, which are counted, and never a request.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial

import numpy as np

from haechi.components.shared.errors import InputError, SettingsError
from haechi.components.shared.files import check_name, sha256_bytes
from haechi.components.shared.model_folder import ModelFolder
from haechi.components.shared.settings import Settings

from .inference import Image, InferenceRequest
from .sample_counts import Counts, Row
from .sample_record import Origin, Sample
from .sample_writer import SampleWriter
from .sampling import Design, Quota, decide, near_limit
from .service import Call, Outcome
from .settings import ServingSettings

__all__ = ["OTHERS", "UNNAMED", "Sampler", "camera_folder", "open_sampler"]

# No camera's own folder begins with an underscore.
UNNAMED = "_unnamed"
OTHERS = "_others"
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MAX_CAMERAS = 256
_TIDY_SECONDS = 60.0


def open_sampler(
    settings: ServingSettings, count: Callable[[str, str], None] = lambda model, outcome: None
) -> Sampler | None:
    """A sampler that writes to the bucket of `HAECHI_S3_*`; None where no images are to be kept.

    Args:
        settings: share, quota and the name under `predictions/`.
        count: told of every sample's model and outcome, for metrics; called in any thread.

    Raises:
        SettingsError: samples are wanted, but there is no object store, or the name cannot be one.
    """
    if not settings.sample_share and not settings.sample_uncertain:
        return None
    if settings.sample_service:
        try:
            check_name(settings.sample_service)
        except InputError as error:
            raise SettingsError(f"HAECHI_SERVING_SAMPLE_SERVICE: {error.problem}", error.remedy) from None
    # The S3 client is loaded only where it is used.
    from haechi.components.shared.storage import Store

    counts = Counts(count)
    writer = SampleWriter(Store(Settings.from_env()), counts)
    design = Design(settings.sample_share, settings.sample_uncertain, settings.sample_hourly)
    return Sampler(design, writer, settings.sample_service)


class Sampler:
    """Decides which images of answered calls are kept.

    Args:
        design: the rates.
        writer: takes what is kept.
        service: name under `predictions/`; empty takes the name under which each model is served.
        draw: numbers from 0 up to 1, evenly distributed.
    """

    def __init__(
        self, design: Design, writer: SampleWriter, service: str = "", draw: Callable[[], float] | None = None
    ) -> None:
        self._design = design
        self._writer = writer
        self._service = service
        self._draw = draw or random.Random().random
        self._quotas: dict[str, Quota] = {}
        self._tidied = 0.0

    def started(self, call: Call) -> None:
        """Nothing to do before the answer is known."""

    def finished(self, call: Call) -> None:
        """Decide about the images of a call that was answered with predictions."""
        engine, request, predictions = call.engine, call.request, call.predictions
        if engine is None or request is None or predictions is None or call.outcome is not Outcome.OK:
            return
        now, clock = time.monotonic(), time.time()
        served = call.model or engine.model.name
        service = self._service or camera_folder(served)
        camera, quota = self._quota(service, camera_folder(call.camera), now)
        row = Row(service, int(clock // 3600), camera, served, engine.model.version)
        counts, number = self._writer.counts, len(request.images)
        if not call.sample:
            counts.add(row, "opted_out", number)
            return
        seen = counts.add(row, "seen", number) - number
        limits = engine.model.limits() if self._design.uncertain else []
        origin: Origin | None = None
        for place, (image, prediction) in enumerate(zip(request.images, predictions, strict=True)):
            decision = decide(self._design, quota, partial(near_limit, prediction, limits), now, self._draw)
            if decision is None:
                continue
            if not decision.reasons:
                counts.add(row, "dropped_quota")
                continue
            origin = origin or self._origin(call, row, engine.model, request, clock)
            self._writer.offer(Sample(origin, place, image, _held(image), prediction, decision, seen + place + 1))

    def close(self) -> None:
        """Write what waits, for a few seconds at most; blocks, so call it in a thread, after the last call."""
        self._writer.close()

    def _origin(self, call: Call, row: Row, model: ModelFolder, request: InferenceRequest, clock: float) -> Origin:
        return Origin(
            row,
            model,
            request.parameters,
            self._design,
            datetime.fromtimestamp(clock, UTC),
            call.request_id,
            call.protocol,
            call.camera[:256],
            len(request.images),
        )

    def _quota(self, service: str, camera: str, now: float) -> tuple[str, Quota]:
        """The folder and quota of a camera; those beyond a bounded number share one."""
        key = f"{service}/{camera}"
        quota = self._quotas.get(key)
        if quota is None and len(self._quotas) >= _MAX_CAMERAS:
            self._tidy(now)
            if len(self._quotas) >= _MAX_CAMERAS:
                camera = OTHERS
                key = f"{service}/{camera}"
                quota = self._quotas.get(key)
        if quota is None:
            quota = self._quotas[key] = Quota(self._design.hourly, now)
        return camera, quota

    def _tidy(self, now: float) -> None:
        """Forget cameras whose quota is as if they had never been seen; not more often than each minute."""
        if now - self._tidied < _TIDY_SECONDS:
            return
        self._tidied = now
        self._quotas = {key: quota for key, quota in self._quotas.items() if not quota.idle(now)}


def camera_folder(name: str) -> str:
    """A name that is safe in an object's key: its own where it is plain, else with a digest that keeps it apart."""
    if not name:
        return UNNAMED
    if _PLAIN.fullmatch(name):
        return name
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name[:256]).strip("-._")[:48]
    return f"{plain}{'-' if plain else ''}{sha256_bytes(name.encode(errors='replace'))[:8]}"


def _held(image: Image) -> int:
    """Bytes that stay in memory as long as the image does: a view holds the whole body that it looks at."""
    base: object = image
    while isinstance(base, np.ndarray) and base.base is not None:
        base = base.base
    return base.nbytes if isinstance(base, np.ndarray | memoryview) else len(base)  # type: ignore[arg-type]
