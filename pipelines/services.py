"""The embedded services of one machine: an object store and MLflow, for one block, or to stay until `down`.

They end with the process that started them, unless `up` started them to stay.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from haechi.components.shared.errors import InputError, StorageError
from haechi.components.shared.files import read_json, write_json
from haechi.components.shared.progress import say
from haechi.components.shared.settings import Settings

from .processes import ProcessId, ServiceError, stop_pair
from .servers import GRACE, ObjectStoreService, Server, TrackingService, answers

__all__ = ["FolderLock", "ObjectStoreService", "Services", "TrackingService", "down", "running", "services", "up"]

_STATE = "services.json"


@dataclass(frozen=True)
class Services:
    """Running services of one work folder.

    Attributes:
        workdir: their folder.
        store: settings of the object store.
        tracking_uri: of MLflow.
    """

    workdir: Path
    store: Settings
    tracking_uri: str

    def settings(self) -> Settings:
        """Settings for every step: store, tracking, and a frame cache in the work folder."""
        return replace(self.store, mlflow_tracking_uri=self.tracking_uri, cache_dir=str(self.workdir / "cache"))


def up(workdir: Path) -> Services:
    """Start both services to stay after this process; where they already run, just tell.

    Raises:
        ServiceError: one did not come up; then none is left running.
    """
    workdir = _folder(workdir)
    with _only_one(workdir):
        found = running(workdir)
        if found:
            return found
        _stop_recorded(workdir)
        with contextlib.ExitStack() as stack:
            store, tracking = ObjectStoreService(workdir, detached=True), TrackingService(workdir, detached=True)
            _start_together(stack, store, tracking)
            write_json(workdir / _STATE, {server.name: server.state() for server in (store, tracking)})
            # Recorded first, kept then: killed in between, this process leaves nothing that `down` would not know of.
            store.keep()
            tracking.keep()
            stack.pop_all()
        return Services(workdir, store.settings(), tracking.uri)


def down(workdir: Path) -> bool:
    """Stop the services that `up` started in `workdir`; whether any was running.

    A recorded process is only stopped when pid and start time agree, so that a foreign process is never hit.
    """
    workdir = _folder(workdir)
    with _only_one(workdir):
        return _stop_recorded(workdir)


def running(workdir: Path) -> Services | None:
    """The services that `up` left running in `workdir`, if both are alive and answer; else None."""
    workdir = Path(workdir).resolve()
    state = _recorded(workdir)
    if not state or not all(ProcessId(**entry["child"]).alive() for entry in state.values()):
        return None
    store, tracking = ObjectStoreService(workdir), TrackingService(workdir)
    store.port, tracking.port = state["seaweedfs"]["port"], state["mlflow"]["port"]
    if not (answers(store.port) and tracking.ready()):
        return None
    return Services(workdir, store.settings(), tracking.uri)


@contextlib.contextmanager
def services(workdir: Path) -> Iterator[Services]:
    """The services of `workdir`: those that run there already, else new ones that end with the block.

    Raises:
        ServiceError: one did not come up, or another process is using this folder.
    """
    workdir = _folder(workdir)
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(_only_one(workdir))
        found = running(workdir)
        if found:
            lock.release()
            yield found
            return
        _stop_recorded(workdir)
        store, tracking = ObjectStoreService(workdir), TrackingService(workdir)
        _start_together(stack, store, tracking)
        yield Services(workdir, store.settings(), tracking.uri)


def _start_together(stack: contextlib.ExitStack, *members: Server) -> None:
    """Start services side by side, since each mostly waits; all are stopped when the stack unwinds."""
    started = time.monotonic()
    for member in members:
        stack.callback(member.stop)
    with ThreadPoolExecutor(len(members)) as pool:
        for future in [pool.submit(member.start) for member in members]:
            future.result()
    say(f"{' and '.join(member.name for member in members)} are up after {time.monotonic() - started:.0f} s")


class FolderLock:
    """An exclusive lock on a file of a work folder, which the system lets go when its holder dies.

    Raises:
        ServiceError: another process holds it.
        StorageError: the file cannot be made or opened.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file = path.open("a")
        except OSError as error:
            raise StorageError(
                f"cannot use {path}: {error.strerror}",
                "Name a folder that this user can write to with --workdir.",
            ) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise ServiceError(
                f"another process is using {path.parent}",
                "Wait for it to end, or choose another folder with --workdir.",
            ) from error

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def release(self) -> None:
        """Let go; again is harmless."""
        self._file.close()


def _only_one(workdir: Path) -> FolderLock:
    return FolderLock(workdir / ".services.lock")


def _folder(workdir: Path) -> Path:
    workdir = Path(workdir).resolve()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{workdir} cannot be made ({error.strerror})", "Choose another folder with --workdir."
        ) from error
    return workdir


def _recorded(workdir: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = read_json(workdir / _STATE)
    except FileNotFoundError:
        return {}
    except (OSError, json.JSONDecodeError) as error:
        raise ServiceError(
            f"{workdir / _STATE} cannot be read ({error})", "Delete it, and stop what still runs by hand."
        ) from error
    return state


def _stop_recorded(workdir: Path) -> bool:
    state = _recorded(workdir)
    pairs = [(ProcessId(**entry["guard"]), ProcessId(**entry["child"])) for entry in state.values()]
    alive = any(child.alive() for _, child in pairs)
    for guard, _ in pairs:
        guard.send(signal.SIGTERM)
    for guard, child in pairs:
        stop_pair(guard, child, GRACE)
    (workdir / _STATE).unlink(missing_ok=True)
    return alive
