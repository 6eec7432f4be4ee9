"""The embedded services: they come up, keep what they were given, and never stay behind or hit a stranger."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from haechi.components.shared.errors import StorageError
from haechi.components.shared.storage import Store
from haechi.pipelines.processes import GuardedProcess, ProcessId, ServiceError
from haechi.pipelines.servers import Server, free_ports
from haechi.pipelines.services import ObjectStoreService, TrackingService, down, running, services, up


def processes_of(workdir: Path) -> list[str]:
    """Command lines of living processes that name the folder or work in it."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            place = (entry / "cwd").readlink()
        except OSError:
            continue
        named = str(workdir) in line or place.is_relative_to(workdir)
        if named and int(entry.name) != os.getpid():
            found.append(f"{entry.name} {line}")
    return found


def wait_until_none(workdir: Path, seconds: float) -> list[str]:
    deadline = time.monotonic() + seconds
    while (left := processes_of(workdir)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that is none of ours."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def test_objects_survive_a_stop_that_ends_in_sigkill_and_a_start_on_other_ports(tmp_path: Path) -> None:
    with ObjectStoreService(tmp_path) as first:
        store = Store(first.settings())
        store.ensure_bucket()
        for number in range(50):
            store.put(f"frames/{number:02}", bytes([number]) * 20_000)
        port = first.port
    assert processes_of(tmp_path) == []
    with ObjectStoreService(tmp_path) as second:
        store = Store(second.settings())
        assert second.port != port
        assert [item.key for item in store.list("frames/")] == [f"frames/{number:02}" for number in range(50)]
        assert all(store.get(f"frames/{number:02}") == bytes([number]) * 20_000 for number in range(50))
        store.put("frames/later", b"1")
        assert store.get("frames/later") == b"1"


def test_two_stores_run_side_by_side_and_share_nothing(tmp_path: Path) -> None:
    with ObjectStoreService(tmp_path / "a") as a, ObjectStoreService(tmp_path / "b") as b:
        left, right = Store(a.settings()), Store(b.settings())
        assert a.port != b.port
        left.put("only/left", b"1")
        assert not right.exists("only/left")
        wrong = replace(a.settings(), s3_secret_key=b.settings().s3_secret_key)
        with pytest.raises(StorageError, match="refuses our credentials"):
            Store(wrong).get("only/left")
        with pytest.raises(StorageError, match="refuses our credentials"):
            Store(replace(a.settings(), s3_access_key="", s3_secret_key="")).get("only/left")


def test_credentials_are_random_kept_and_private(tmp_path: Path) -> None:
    one, other = ObjectStoreService(tmp_path / "a"), ObjectStoreService(tmp_path / "b")
    for service in (one, other):
        service.workdir.mkdir()
    keys = one.settings()
    assert one.settings() == keys
    assert keys.s3_secret_key != other.settings().s3_secret_key
    assert stat.S_IMODE((tmp_path / "a" / "credentials.json").stat().st_mode) == 0o600


def test_mlflow_keeps_an_experiment_over_a_restart_and_leaves_no_worker(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    with TrackingService(tmp_path) as service:
        number = MlflowClient(service.uri).create_experiment("kept")
    assert processes_of(tmp_path) == []
    with TrackingService(tmp_path) as service:
        found = MlflowClient(service.uri).get_experiment_by_name("kept")
        assert found is not None and found.experiment_id == number


def test_a_folder_may_have_any_name_and_nothing_is_written_beside_it(tmp_path: Path) -> None:
    workdir = tmp_path / "a b,c é%20#x?y=1&[z]'\"" / ("long" * 60)
    with services(workdir) as used:
        Store(used.settings()).put("frames/a", b"1")
        assert Store(used.settings()).get("frames/a") == b"1"
        assert (workdir / "mlflow/mlflow.db").is_file()
        assert any((workdir / "seaweedfs").iterdir())
    assert [path.name for path in tmp_path.iterdir()] == [workdir.parent.name]
    assert [path.name for path in workdir.parent.iterdir()] == [workdir.name]
    assert processes_of(tmp_path) == []


def test_a_lock_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / ".services.lock").mkdir()
    with pytest.raises(StorageError, match=r"cannot use .*services.lock"), services(tmp_path):
        pass


def test_up_stays_after_its_process_and_down_ends_it(tmp_path: Path) -> None:
    script = f"from pathlib import Path; from haechi.pipelines.services import up; up(Path({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=180)
    found = running(tmp_path)
    assert found is not None
    assert up(tmp_path) == found, "a second up tells of the same services"
    with services(tmp_path) as used:
        assert used == found, "a run uses what is up"
        Store(used.settings()).check()
    assert running(tmp_path) is not None, "and leaves it up"
    assert used.settings().cache_dir == str(tmp_path / "cache")
    assert used.settings().mlflow_tracking_uri == found.tracking_uri
    assert down(tmp_path) is True
    assert wait_until_none(tmp_path, 5) == []
    assert running(tmp_path) is None
    assert down(tmp_path) is False


def test_sigkill_of_the_owner_leaves_no_process_behind(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from haechi.pipelines.services import services\n"
        f"with services(Path({str(tmp_path)!r})):\n    print('up', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "up\n"
        assert len(processes_of(tmp_path)) >= 4, "two servers and their guards name the folder"
        with pytest.raises(ServiceError, match="another process is using"), services(tmp_path):
            pass
        owner.send_signal(signal.SIGKILL)
    assert wait_until_none(tmp_path, 15) == []


def test_down_never_ends_a_stranger_that_reused_the_pid(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    stranger = {"pid": sleeper.pid, "started": "another-boot:1"}
    entry = {"port": 1, "guard": stranger, "child": stranger}
    (tmp_path / "services.json").write_text(json.dumps({"seaweedfs": entry, "mlflow": entry}))
    assert running(tmp_path) is None
    assert down(tmp_path) is False
    time.sleep(0.2)
    assert sleeper.poll() is None
    assert not (tmp_path / "services.json").exists()


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "services.json").write_text("{")
    with pytest.raises(ServiceError, match=r"services\.json cannot be read"):
        down(tmp_path)


def test_a_service_that_does_not_come_up_shows_the_end_of_its_log(tmp_path: Path) -> None:
    class Broken(Server):
        name = "broken"

        def _prepare(self) -> tuple[list[str], dict[str, str], list[str]]:
            return ["/bin/sh", "-c", "echo no space left; exit 3"], dict(os.environ), []

        def ready(self) -> bool:
            return False

    with pytest.raises(ServiceError, match=r"broken did not come up(.|\n)*no space left"):
        Broken(tmp_path).start()


@pytest.mark.parametrize(
    ("script", "status"),
    [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 143)],
    ids=["well", "failed", "killed"],
)
def test_the_guard_hands_on_how_its_child_ended(tmp_path: Path, script: str, status: int) -> None:
    process = GuardedProcess(["/bin/sh", "-c", script], tmp_path / "log", dict(os.environ))
    assert process.wait(10) == status
    assert not process.alive()


def test_the_guard_ends_grandchildren_that_left_the_group(tmp_path: Path) -> None:
    """A grandchild in a session of its own, and one that ignores SIGTERM: both end with the child."""
    mark = tmp_path / "here"
    script = (
        f"setsid sleep 60 {mark} 2>/dev/null & setsid sh -c 'sleep 61; : {mark}' & trap '' TERM; sleep 62; : {mark}"
    )
    process = GuardedProcess(["/bin/sh", "-c", script], tmp_path / "log", dict(os.environ), grace=0.3)
    deadline = time.monotonic() + 5
    while len(processes_of(mark)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(processes_of(mark)) >= 2
    process.stop()
    assert processes_of(mark) == []


def test_the_guard_removes_what_it_was_told(tmp_path: Path) -> None:
    left = tmp_path / "socket"
    left.touch()
    process = GuardedProcess(["/bin/true"], tmp_path / "log", dict(os.environ), remove=[str(left)])
    assert process.wait(10) == 0
    assert not left.exists()


def test_a_file_in_the_working_directory_is_no_module_of_a_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "http.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    process = GuardedProcess([sys.executable, "-m", "urllib.request"], tmp_path / "log", dict(os.environ))
    assert process.wait(30) == 0


def test_a_process_is_known_by_pid_and_start(sleeper: subprocess.Popen[bytes]) -> None:
    identity = ProcessId.of(sleeper.pid)
    assert identity.alive()
    assert not replace(identity, started=identity.started + "1").alive()
    sleeper.kill()
    assert identity.wait_gone(5), "a zombie counts as gone"
    assert not ProcessId.of(2**22 + 1).alive()


def test_free_ports_differ_and_have_free_partners() -> None:
    ports = free_ports(8, also=10_000)
    assert len(set(ports)) == 8
    assert all(11_000 <= port < 21_000 for port in ports)
