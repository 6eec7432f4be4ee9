"""One owner at a time: a Lease says who may change an InferenceService, and expires where its holder was killed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

from haechi.components.shared.errors import DeployError, DeployRefused
from haechi.components.shared.progress import say

from .kubernetes_api import Away, InferenceServiceApi, Raced

__all__ = ["Busy", "Lease", "LeaseLost", "holder_of", "lease_name"]

_SILENT = 10.0  # terms for which a holder is believed to live without a sign of it
_STAMP = "%Y-%m-%dT%H:%M:%S.%fZ"


class Busy(DeployRefused):
    """Another deploy holds the service."""


class LeaseLost(DeployError):
    """Another deploy took the service over: whatever it does now, we must not touch it."""


class Lease:
    """The right to change one InferenceService, as the object Lease `haechi-<name>` of its namespace.

    While the block lasts a thread renews it, however long one piece of work takes; but not for a holder that hangs: one that
    has not called `renew` for ten times `seconds` is no longer renewed, and others may take the lease.

    Clocks that differ cost time, and nothing else: a lease that looks expired is watched for a moment before it is taken.

    Args:
        api: the service.
        holder: who we are, for others to read. The same holder that comes again (a step that was killed and is
            repeated under its run's id) takes its own lease at once.
        seconds: how long it stays valid without being renewed.
        take_over: take it from whoever holds it; they notice, and touch nothing more.

    Raises:
        Busy: on entering, somebody else holds it.
    """

    def __init__(self, api: InferenceServiceApi, holder: str, seconds: float = 60.0, take_over: bool = False) -> None:
        self._api, self.holder, self._seconds, self._take_over = api, holder, seconds, take_over
        self._name = lease_name(api.name)
        self._lease: dict[str, Any] = {}
        self._renewed = self._alive = 0.0
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._keeper = threading.Thread(target=self._keep, name=f"lease {self._name}", daemon=True)
        self._turn = 0  # tells us from another process that calls itself the same

    def __enter__(self) -> Self:
        for _ in range(3):
            found = self._api.lease(self._name)
            self._let_pass(found)
            spec = (found or {}).get("spec") or {}
            self._turn = int(spec.get("leaseTransitions") or 0) + 1
            lease = found or self._fresh()
            lease["spec"] = {**spec, "acquireTime": _now(), **self._spec()}
            try:
                self._lease = self._api.write_lease(lease)
            except Raced:
                continue  # somebody was faster: see who
            self._renewed = self._alive = time.monotonic()
            self._keeper.start()
            return self
        raise Busy(f"others take the lease {self._name} of namespace {self._api.namespace} all the time", "Run again.")

    def _let_pass(self, found: dict[str, Any] | None) -> None:
        """Raise where somebody else holds it, alive."""
        spec = (found or {}).get("spec") or {}
        other = str(spec.get("holderIdentity") or "")
        if not found or other in ("", self.holder) or self._take_over:
            return
        expired = not holder_of(found)
        if expired:
            # By our clock; the holder's may be another. One that lives writes again within a third of its time.
            time.sleep(_seconds_of(spec) * 0.4)
            again = self._api.lease(self._name) or {"metadata": {}}
            expired = again["metadata"].get("resourceVersion") == found["metadata"].get("resourceVersion")
        if not expired:
            raise Busy(
                f"{other} is deploying to {self._api.namespace}/{self._api.name} since {_text(found, 'acquireTime')}",
                f"Run again when that has ended; a lease of a killed one expires after {self._seconds:.0f} s. "
                "A person may take it from a living one: `haechi promote` or `haechi rollback` with --take-over.",
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._keeper.join()
        self._lease["spec"] = {**self._lease["spec"], "renewTime": _now(), "leaseDurationSeconds": 1}
        self._lease["spec"].pop("holderIdentity", None)
        try:
            self._api.write_lease(self._lease)
        except Raced:
            pass  # it is another's by now
        except DeployError as failure:
            say(f"the lease {self._name} could not be given back and expires by itself: {failure.problem}")

    def renew(self) -> None:
        """Say that we are alive; to be called often.

        Raises:
            LeaseLost: somebody else holds it now.
        """
        self._alive = time.monotonic()
        with self._lock:
            if self._due() > 0:
                return
            try:
                self._write()
            except Away:
                return  # as long as nobody takes it, it is ours

    def _due(self) -> float:
        """Seconds until the lease is to be renewed."""
        return self._renewed + self._seconds / 3 - time.monotonic()

    def _keep(self) -> None:
        """Renew while the holder lives."""
        while not self._ended.wait(max(self._due(), self._seconds / 30)):
            if time.monotonic() - self._alive > _SILENT * self._seconds:
                continue  # it may come to itself
            with self._lock:
                try:
                    if self._due() <= 0:
                        self._write()
                except LeaseLost:
                    return  # `renew` meets it too
                except DeployError:
                    continue  # a right that is missing, or a server that is away

    def _write(self) -> None:
        for _ in range(3):
            self._lease["spec"].update(self._spec())
            try:
                self._lease = self._api.write_lease(self._lease)
            except Raced:
                found = self._api.lease(self._name) or self._fresh()  # one that was deleted is nobody's
                spec = found.setdefault("spec", {})
                if spec.get("leaseTransitions", self._turn) != self._turn:
                    break
                if spec.get("holderIdentity", self.holder) != self.holder:
                    break
                self._lease = found
                continue
            self._renewed = time.monotonic()
            return
        raise LeaseLost(
            f"{holder_of(self._api.lease(self._name)) or 'somebody else'} took {self._api.namespace}/{self._api.name} over",
            "Look at what it made of it, with `haechi status`.",
        )

    def _fresh(self) -> dict[str, Any]:
        meta = {"name": self._name, "namespace": self._api.namespace, "labels": {"app.kubernetes.io/part-of": "haechi"}}
        return {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": meta}

    def _spec(self) -> dict[str, Any]:
        # Whole seconds of at least 1 are what the API takes.
        return {
            "holderIdentity": self.holder,
            "renewTime": _now(),
            "leaseDurationSeconds": max(1, round(self._seconds)),
            "leaseTransitions": self._turn,
        }


def lease_name(service: str) -> str:
    """The name of an InferenceService's Lease."""
    return f"haechi-{service}"


def holder_of(lease: dict[str, Any] | None, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> str:
    """Who holds a Lease, or empty where nobody does or where it has expired."""
    spec = (lease or {}).get("spec") or {}
    try:
        age = (now() - datetime.strptime(spec["renewTime"], _STAMP).replace(tzinfo=UTC)).total_seconds()
    except (KeyError, ValueError, TypeError):
        return ""  # somebody wrote into it; no holder of ours leaves it so
    return str(spec.get("holderIdentity") or "") if age <= _seconds_of(spec) else ""


def _seconds_of(spec: dict[str, Any]) -> float:
    seconds = spec.get("leaseDurationSeconds")
    return float(seconds) if isinstance(seconds, int) else 1.0


def _text(lease: dict[str, Any], field: str) -> str:
    return str((lease.get("spec") or {}).get(field) or "an unknown time").split(".")[0]


def _now() -> str:
    return datetime.now(UTC).strftime(_STAMP)
