"""The sample writer: a thread that puts samples and counts into the bucket, and gives up rather than hold on to much.

    predictions/<service>/dt=YYYY-MM-DD/<camera>/<HHMMSS>-<ms>-<id>.<ext>    the image, as it came
    predictions/<service>/dt=YYYY-MM-DD/<camera>/<HHMMSS>-<ms>-<id>.json     what was said of it; written after it
    predictions/<service>/dt=YYYY-MM-DD/_counts/<process>-<number>.json      what became of all images meanwhile

A name is made once, so that a write that is repeated writes the same object. docs/sampling.md tells how to read them.
"""

from __future__ import annotations

import socket
import threading
import time
import uuid
from collections import defaultdict, deque
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from haechi.components.shared.errors import StorageError
from haechi.components.shared.progress import say

from .sample_counts import Counts
from .sample_record import FORMAT_VERSION, Sample, compact_json, encoded, record

if TYPE_CHECKING:  # the S3 client is loaded only where samples are kept
    from haechi.components.shared.storage import Store

__all__ = ["SampleWriter"]

MAX_ITEMS = 256
MAX_HELD = 32 * 2**20
_ATTEMPTS = 6
_COUNTS_SECONDS = 300.0
_FLUSH_SECONDS = 5.0
_LAST_SECONDS = 3.0  # after those, for the sample at hand and the counts: without them the others say little
_TYPES = {"jpg": "image/jpeg", "png": "image/png", "bmp": "image/bmp", "webp": "image/webp", "tif": "image/tiff"}


class SampleWriter:
    """Writes samples in a thread of its own.

    Args:
        store: the bucket.
        counts: where outcomes are counted; written to the bucket too.
        max_items, max_held: samples, and bytes of memory, that may wait.
        backoff: seconds until a failed write is repeated; doubles with each further failure up to `longest`.
        every: seconds between counts objects.
    """

    def __init__(
        self,
        store: Store,
        counts: Counts,
        *,
        max_items: int = MAX_ITEMS,
        max_held: int = MAX_HELD,
        backoff: float = 0.5,
        longest: float = 8.0,
        every: float = _COUNTS_SECONDS,
    ) -> None:
        self.counts = counts
        self._store = store
        self._max_items, self._max_held = max_items, max_held
        self._backoff, self._longest = backoff, longest
        self._every = every
        self._pod = socket.gethostname()
        self._process = uuid.uuid4().hex[:8]
        self._numbers = 0
        self._queue: deque[Sample] = deque()
        self._held = 0
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._deadline = float("inf")
        self._failures = 0
        self._begun = datetime.now(UTC)
        self._frozen: deque[tuple[str, bytes]] = deque()
        # A daemon: a store that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name="samples", daemon=True)
        self._thread.start()

    def offer(self, sample: Sample) -> None:
        """Take a sample if there is room; never waits."""
        with self._changed:
            room = len(self._queue) < self._max_items and self._held + sample.held <= self._max_held
            if room:
                self._queue.append(sample)
                self._held += sample.held
                self._changed.notify()
        self.counts.add(sample.origin.row, "kept")
        if not room:
            self.counts.add(sample.origin.row, "dropped_queue")

    def close(self, seconds: float = _FLUSH_SECONDS) -> None:
        """Write what waits and the counts, for so many seconds at most; what is left then is dropped."""
        self._deadline = time.monotonic() + seconds
        self._closing.set()
        with self._changed:
            self._changed.notify()
        self._thread.join(seconds + _LAST_SECONDS)
        if self._thread.is_alive():
            say(f"samples: the store does not answer, {len(self._queue)} are lost")

    def _work(self) -> None:
        counted = time.monotonic()
        while True:
            sample = self._next(counted + self._every)
            if sample is not None:
                self.counts.add(sample.origin.row, self._write(sample))
                with self._changed:
                    self._held -= sample.held
            ended = sample is None and self._closing.is_set()
            if ended or time.monotonic() >= counted + self._every:
                self._write_counts()
                counted = time.monotonic()
            if ended:
                return

    def _next(self, until: float) -> Sample | None:
        """The next sample; None where counts are due before one comes, or none is left at the end."""
        with self._changed:
            while not self._queue and not self._closing.is_set() and (wait := until - time.monotonic()) > 0:
                self._changed.wait(wait)
            return self._queue.popleft() if self._queue else None

    def _write(self, sample: Sample) -> str:
        """Write image and record; what became of them, as Counts names it."""
        if time.monotonic() > self._deadline:
            return "dropped_exit"
        row, moment = sample.origin.row, sample.origin.moment
        number, self._numbers = self._numbers, self._numbers + 1
        clock = f"{moment:%H%M%S}-{moment.microsecond // 1000:03}"
        stem = f"{_day(row.service, f'{moment:%Y-%m-%d}')}/{row.camera}/{clock}-{self._process}-{number:06}"
        try:
            image, extension = encoded(sample.image)
            told = record(sample, f"{stem}.{extension}", image, self._pod, self._process)
        # One image that cannot be written must not end the thread.
        except Exception as error:
            say(f"samples: one cannot be written ({error!r})")
            return "dropped_error"
        # The image first: who finds a record finds its image.
        stored = self._put(f"{stem}.{extension}", image, _TYPES[extension])
        stored = stored and self._put(f"{stem}.json", told, "application/json")
        return "stored" if stored else "dropped_store"

    def _put(self, key: str, data: bytes, content_type: str) -> bool:
        """Write one object; False where the store did not take it after some attempts, or the time is over."""
        for _ in range(_ATTEMPTS):
            try:
                self._store.put(key, data, content_type)
            except StorageError as error:
                if not self._failures:
                    say(f"samples: {error} They wait or are dropped until then; requests are answered as before.")
                self._failures += 1
                delay = min(self._longest, self._backoff * 2 ** min(self._failures - 1, 10))
                # While the process ends it does not wait for a store that is away.
                if self._closing.wait(delay):
                    return False
                continue
            if self._failures:
                say("samples: the store takes them again")
            self._failures = 0
            return True
        return False

    def _write_counts(self) -> None:
        """Write what was frozen before and then what has come since; what fails keeps its name and content."""
        if self._flush_frozen():
            self._freeze()
            self._flush_frozen()

    def _flush_frozen(self) -> bool:
        while self._frozen and self._put(*self._frozen[0], "application/json"):
            self._frozen.popleft()
        return not self._frozen

    def _freeze(self) -> None:
        """Make objects of all counts, each of one service and day."""
        begun, self._begun = self._begun, datetime.now(UTC)
        days: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
        for row, counter in sorted(self.counts.take().items()):
            hour = datetime.fromtimestamp(row.hour * 3600, UTC)
            key = {"hour": hour.isoformat(), "camera_folder": row.camera, "model": row.model, "version": row.version}
            days[row.service, f"{hour:%Y-%m-%d}"].append(key | counter)
        for (service, day), rows in days.items():
            content = {
                "format_version": FORMAT_VERSION,
                "service": service,
                "pod": self._pod,
                "process": self._process,
                "from": begun.isoformat(timespec="milliseconds"),
                "to": self._begun.isoformat(timespec="milliseconds"),
                "rows": rows,
            }
            number, self._numbers = self._numbers, self._numbers + 1
            self._frozen.append(
                (f"{_day(service, day)}/_counts/{self._process}-{number:06}.json", compact_json(content))
            )


def _day(service: str, day: str) -> str:
    return f"predictions/{service}/dt={day}"
