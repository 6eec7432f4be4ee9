"""Files and folders that are whole or absent, whatever happens in between."""

from __future__ import annotations

import hashlib
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from haechi.components.shared.errors import StorageError
from haechi.components.shared.files import (
    atomic_folder,
    read_json,
    sha256_bytes,
    sha256_file,
    write_bytes,
    write_json,
)

FULL = Path("/dev/full")  # every write there fails as on a full disk


def test_hashes_agree_with_the_known_answer(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert sha256_bytes(b"abc") == sha256_bytes(memoryview(b"abc")) == sha256_file(tmp_path / "a") == known
    assert sha256_bytes(b"") == hashlib.sha256().hexdigest()


def test_a_written_file_is_readable_by_others_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "file.bin"
    write_bytes(target, b"one")
    write_bytes(target, b"two")
    assert target.read_bytes() == b"two" and stat.S_IMODE(target.stat().st_mode) == 0o644
    assert [path.name for path in target.parent.iterdir()] == ["file.bin"]


def test_json_is_readable_and_has_no_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"이름": "해치", "n": [1, 2.5, None]})
    assert read_json(tmp_path / "a.json") == {"이름": "해치", "n": [1, 2.5, None]}
    assert "해치" in (tmp_path / "a.json").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", float("nan"))
    assert read_json(tmp_path / "a.json")["n"] == [1, 2.5, None], "the old file is still there"


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"cannot write .*file/below"):
        write_bytes(tmp_path / "file" / "below", b"x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match="folder"):
        write_bytes(tmp_path / "folder", b"x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"], "no temporary file is left"


def _limited(tmp_path: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process whose files may not grow beyond 64 KiB, which fails as a full disk does: by an OSError."""
    prelude = (
        "import resource, signal, sys\nfrom pathlib import Path\n"
        "from haechi.components.shared.files import *\nfrom haechi.components.shared.errors import StorageError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
        f"root = Path({str(tmp_path)!r})\n"
    )
    return subprocess.run([sys.executable, "-c", prelude + code], capture_output=True, text=True)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"old")
    code = (
        "try: write_bytes(root / 'model.onnx', bytes(10**6))\n"
        "except StorageError as error: print(error); sys.exit(error.exit_code)\n"
    )
    done = _limited(tmp_path, code)
    assert done.returncode == StorageError.exit_code, done.stderr
    assert "model.onnx" in done.stdout and "Free disk space" in done.stdout
    assert (tmp_path / "model.onnx").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_a_full_disk_leaves_the_old_folder(tmp_path: Path) -> None:
    old = tmp_path / "data"
    old.mkdir()
    (old / "a").write_text("old")
    code = (
        "try:\n"
        "    with atomic_folder(root / 'data') as folder:\n"
        "        (folder / 'a').write_text('new')\n"
        "        (folder / 'b').write_bytes(bytes(10**6))\n"
        "except StorageError as error: print(error); sys.exit(error.exit_code)\n"
    )
    done = _limited(tmp_path, code)
    assert done.returncode == StorageError.exit_code, done.stderr
    assert "data" in done.stdout
    assert (old / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_full_device_is_told_with_its_reason() -> None:
    if not FULL.exists():
        pytest.skip("no /dev/full here")
    with pytest.raises(OSError, match="No space left"):
        FULL.write_bytes(b"x")


def test_a_folder_appears_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    for text in ("one", "two"):
        with atomic_folder(target) as folder:
            (folder / text).write_text(text)
            assert not (target / text).exists(), "not to be seen before the block ends"
        assert [path.name for path in target.iterdir()] == [text]
        assert stat.S_IMODE(target.stat().st_mode) == 0o755
        assert [path.name for path in target.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), StorageError("mine")])
def test_any_error_in_the_block_leaves_what_was_and_comes_out(tmp_path: Path, error: BaseException) -> None:
    with atomic_folder(tmp_path / "model") as folder:
        (folder / "a").write_text("old")
    with pytest.raises(type(error)) as caught, atomic_folder(tmp_path / "model") as folder:
        (folder / "a").write_text("new")
        raise error
    assert caught.value is error
    assert (tmp_path / "model" / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_name_with_wildcards_removes_no_neighbour(tmp_path: Path) -> None:
    neighbour = tmp_path / ".a.partial-1"
    neighbour.mkdir()
    with atomic_folder(tmp_path / "[a]*"):
        pass
    assert neighbour.exists()


def test_a_symlink_in_the_place_is_replaced_and_its_target_kept(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "keep").write_text("x")
    (tmp_path / "model").symlink_to(tmp_path / "real")
    with atomic_folder(tmp_path / "model") as folder:
        (folder / "a").write_text("new")
    assert not (tmp_path / "model").is_symlink() and (tmp_path / "model" / "a").exists()
    assert (tmp_path / "real" / "keep").exists()


_KILLED = """
import sys, time
from pathlib import Path
from haechi.components.shared import files
root, where = Path(sys.argv[1]), sys.argv[2]
def stop():
    print("here", flush=True); time.sleep(60)
if where == "between":
    replace = Path.replace
    def slow(self, target):
        done = replace(self, target)
        if str(target).endswith(".former"): stop()
        return done
    Path.replace = slow
if where == "before discarding":
    files._discard = lambda path: stop()
with files.atomic_folder(root / "model") as folder:
    (folder / "a").write_text("new")
    if where == "in the block": stop()
"""


@pytest.mark.parametrize(
    ("where", "after_kill", "after_next"),
    [("in the block", "old", "old"), ("between", None, "old"), ("before discarding", "new", "new")],
)
def test_a_kill_at_any_point_loses_nothing(tmp_path: Path, where: str, after_kill: str | None, after_next: str) -> None:
    with atomic_folder(tmp_path / "model") as folder:
        (folder / "a").write_text("old")
    process = subprocess.Popen([sys.executable, "-c", _KILLED, str(tmp_path), where], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "here\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    kept = tmp_path / "model" / "a"
    assert (kept.read_text() if kept.exists() else None) == after_kill
    # The next writer finds things as they were, even where it fails itself.
    with pytest.raises(ValueError, match="gives up"), atomic_folder(tmp_path / "model"):
        raise ValueError("gives up")
    assert kept.read_text() == after_next
    with atomic_folder(tmp_path / "model") as folder:
        (folder / "a").write_text("newest")
    assert kept.read_text() == "newest"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_writer_killed_at_random_moments_never_leaves_half(tmp_path: Path) -> None:
    """Readers see the old folder or a new one, each with both of its files, or (for an instant) none."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom haechi.components.shared.files import atomic_folder\n"
        "print('go', flush=True)\n"
        "for number in range(10**6):\n"
        "    with atomic_folder(Path(sys.argv[1]) / 'model') as folder:\n"
        "        (folder / 'a').write_text(str(number)); (folder / 'b').write_text(str(number))\n"
    )
    for delay in (0.01, 0.05, 0.11):
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "go\n"
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        with pytest.raises(ValueError, match="stop"), atomic_folder(tmp_path / "model"):
            raise ValueError("stop")
        model = tmp_path / "model"
        if model.exists():
            assert (model / "a").read_text() == (model / "b").read_text() != ""
