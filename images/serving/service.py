"""The service: what both protocols share, from the admission of a request to its answer, and who watches it."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol, TypeVar

from haechi.components.shared.errors import AccessError, DeadlineError, HaechiError, OverloadError

from .engine import Engine, Models
from .inference import InferenceRequest, Prediction
from .pool import Pool
from .settings import ServingSettings
from .stages import Stages

__all__ = ["BODIES_HELD", "REQUEST_ID", "Access", "Call", "Observer", "Open", "Outcome", "Role", "Service"]

REQUEST_ID = "x-request-id"
BODIES_HELD = 4  # times the limit of one body: what all bodies and messages at hand may take
# Bytes of requests that are always taken, whatever else is held: a camera's picture beside somebody's large uploads.
_SMALL = 256 * 1024
_PROBED = ("/", "/metrics")
_PROBES = ("/ServerLive", "/ServerReady", "/ModelReady")

_Answer = TypeVar("_Answer")


class Role(StrEnum):
    """What a caller may do; `admin` may predict too."""

    PREDICT = "predict"
    ADMIN = "admin"


class Outcome(StrEnum):
    """How a call ended, as metrics and log name it."""

    OK = "ok"
    REFUSED = "refused"  # the request was wrong: 4xx
    DENIED = "denied"
    OVERLOAD = "overload"
    DEADLINE = "deadline"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass
class Call:
    """One call as its watchers see it; filled in on the way.

    Attributes:
        protocol: `v1`, `v2`, `grpc`, or `http` for what is no prediction.
        method: HTTP method, or empty.
        path: HTTP path, or the gRPC method.
        route: the pattern that the HTTP path fits, or empty.
        request_id: the caller's own, or one made up.
        camera: where the images come from, if the caller says so.
        sample: whether its images may be kept as samples; false where the caller says otherwise.
        traceparent, tracestate: the trace that it is part of (W3C), if the caller says so.
        caller: who calls, if that is known.
        model: the model's name as it is served; empty where that is not known.
        engine, request, predictions: what it was answered with; None until then, and where it is no prediction.
        stages: seconds by stage.
        error: why it failed.
        status: HTTP status or gRPC status code.
        bytes_in: of the body or message.
        held: bytes of it that have arrived and count against what the service holds.
        begun: time.monotonic() at its start.
        seconds: how long it took; 0 until it has ended.
    """

    protocol: str
    path: str
    method: str = ""
    route: str = ""
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    camera: str = ""
    sample: bool = True
    traceparent: str = ""
    tracestate: str = ""
    caller: str = ""
    model: str = ""
    engine: Engine | None = None
    request: InferenceRequest | None = None
    predictions: list[Prediction] | None = None
    stages: Stages = field(default_factory=Stages)
    error: BaseException | None = None
    status: int = 0
    bytes_in: int = 0
    held: int = 0
    begun: float = field(default_factory=time.monotonic)
    seconds: float = 0.0

    def identify(self, headers: Mapping[str, str]) -> None:
        """Take what HTTP headers or gRPC metadata (names in lower case) say of the call: its id, camera and trace."""
        # An id is written back only if it is one that we would have sent.
        if (asked := headers.get(REQUEST_ID, "")) and len(asked) <= 128 and asked.isprintable() and asked.isascii():
            self.request_id = asked
        self.camera = headers.get("x-haechi-camera", "")
        # Whatever it says: a misspelt `never` must not keep somebody's picture.
        self.sample = "x-haechi-sample" not in headers
        self.traceparent = headers.get("traceparent", "")
        self.tracestate = headers.get("tracestate", "")

    @property
    def probe(self) -> bool:
        """Whether a machine asks only how things are: health, readiness, metrics."""
        if self.protocol == "grpc":
            return self.path.startswith("/grpc.health.") or self.path.endswith(_PROBES)
        return self.path in _PROBED or self.path.startswith("/v2/health/") or self.path.endswith("/ready")

    @property
    def outcome(self) -> Outcome:
        """How it ended, told by its error or else by the status."""
        match self.error:
            case None if self.status < 400:
                return Outcome.OK
            case AccessError():
                return Outcome.DENIED
            case OverloadError():
                return Outcome.OVERLOAD
            case DeadlineError():
                return Outcome.DEADLINE
            case asyncio.CancelledError():
                return Outcome.CANCELLED
            case HaechiError(http_status=status) if status < 500:
                return Outcome.REFUSED
        return Outcome.REFUSED if 400 <= self.status < 500 else Outcome.ERROR


class Observer(Protocol):
    """Watches calls; runs on the event loop, so it must neither wait nor raise."""

    def started(self, call: Call) -> None:
        """A call has begun."""

    def finished(self, call: Call) -> None:
        """A call has ended; everything about it is known."""


class Access(Protocol):
    """Says who may do what."""

    async def check(self, headers: Mapping[str, str], role: Role) -> str:
        """The caller's name.

        Args:
            headers: HTTP headers or gRPC metadata, names in lower case.
            role: what the call needs.

        Raises:
            AccessError: unknown, or not allowed.
        """


class Open:
    """Access where a gateway or mesh has decided already: everyone may predict, nobody may administer."""

    async def check(self, headers: Mapping[str, str], role: Role) -> str:
        """Let predictions through."""
        if role is not Role.PREDICT:
            raise AccessError(
                "administration is switched off",
                "Set HAECHI_SERVING_API_KEYS or HAECHI_SERVING_OIDC_ISSUER.",
                known=True,
            )
        return ""


class Service:
    """One runtime: its models, its threads, who may call and who watches.

    Args:
        models: what is served.
        pool: where requests are worked on.
        timeout: seconds that a request may take.
        access: who may do what.
        observers: told of every call.
        max_held: bytes of bodies and messages, arriving, waiting and worked on, all calls together.
    """

    def __init__(
        self,
        models: Models,
        pool: Pool,
        timeout: float = ServingSettings.timeout,
        access: Access | None = None,
        observers: Sequence[Observer] = (),
        max_held: int = BODIES_HELD * ServingSettings.max_body,
    ) -> None:
        self.models = models
        self.pool = pool
        self.timeout = timeout
        self.access = access or Open()
        self.observers = tuple(observers)
        self._max_held = max_held
        self._held = 0

    @contextmanager
    def observed(self, call: Call) -> Iterator[None]:
        """Tell the observers of a call: around all that is done for it."""
        for observer in self.observers:
            observer.started(call)
        try:
            yield
        except BaseException as error:
            call.error = call.error or error
            raise
        finally:
            self._held -= call.held
            call.seconds = time.monotonic() - call.begun
            for observer in self.observers:
                observer.finished(call)
            _forget_frames(call.error)

    def hold(self, call: Call, size: int) -> None:
        """Count bytes of a call's body that have arrived, until the call ends.

        Raises:
            OverloadError: all calls together hold too many.
        """
        call.held += size
        self._held += size
        if self._held > self._max_held and call.held > _SMALL:
            raise OverloadError(f"the server holds {self._held} bytes of bodies", "Try again in a moment.")

    async def infer(
        self,
        call: Call,
        name: str,
        version: str,
        parse: Callable[[], InferenceRequest],
        render: Callable[[Engine, InferenceRequest, list[Prediction]], _Answer],
        seconds: float | None = None,
    ) -> _Answer:
        """Answer one prediction; parsing and rendering run in the pool too, since bodies can be large.

        Args:
            call: what watchers see; engine, request, predictions and stages are filled in.
            name, version: the model that is asked for; the version may be empty.
            parse: makes the request of the body.
            render: makes the answer.
            seconds: the caller's own time limit, where it is shorter than ours.

        Raises:
            NotFoundError, NotReadyError: as `Models.find`.
            OverloadError, DeadlineError: as `Pool.run`.
            InputError: as `parse`, and what `Engine.predict` says of the images.
        """
        # Looked up after the body is there, so that a swap in the meantime is seen.
        if self.models.known(name):
            call.model = name
        engine = call.engine = self.models.find(name, version)
        submitted = time.perf_counter()
        given_up = threading.Event()

        def work() -> _Answer:
            call.stages.add("queue", submitted)
            with call.stages.timed("decode"):
                request = parse()
            predictions = engine.predict(request, call.stages, given_up)
            with call.stages.timed("post"):
                answer = render(engine, request, predictions)
            call.request, call.predictions = request, predictions
            return answer

        try:
            return await self.pool.run(work, self.timeout if seconds is None else min(seconds, self.timeout))
        finally:
            given_up.set()


def _forget_frames(error: BaseException | None) -> None:
    """Let go of the frames that an error has passed, and with them of the body.

    They also hold the call, which holds the error: a ring, which only the garbage collector would find, after a dozen
    refused requests of 50 MB.
    """
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
