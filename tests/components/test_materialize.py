"""materialize: a whole folder or none, verified bytes, a shared cache, and a full disk told as such."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from haechi.components.shared.dataset import SPLITS, Box, ManifestRow, frame_key, write_rows
from haechi.components.shared.errors import InputError, IntegrityError, StorageError
from haechi.components.shared.files import sha256_bytes
from haechi.components.shared.images import decode, encode_jpeg
from haechi.components.shared.materialize import label_lines, materialize
from haechi.components.shared.settings import Settings
from haechi.components.shared.storage import Store

CLASSES = ("smoke", "fire")


def add(store: Store, number: int, split: str, data: bytes = b"", **fields: Any) -> ManifestRow:
    """Put a real 64x48 JPEG (or `data`) into the store; its manifest row."""
    if not data:
        pixels = np.random.default_rng(number).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        data = encode_jpeg(pixels)
    sha256 = sha256_bytes(data)
    store.put(frame_key(sha256, "jpg"), data)
    defaults: dict[str, Any] = {"boxes": (Box("fire", 16, 12, 48, 36),), "covers": CLASSES}
    return ManifestRow(sha256, "jpg", 64, 48, f"file:///{number}.jpg", "src", split=split, **(defaults | fields))


@pytest.fixture
def rows(store: Store) -> list[ManifestRow]:
    splits = ["train"] * 6 + ["val", "test"]
    return [add(store, number, split) for number, split in enumerate(splits)]


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def test_lays_out_images_labels_covers_and_data_yaml(store: Store, rows: list[ManifestRow], tmp_path: Path) -> None:
    rows.append(add(store, 99, "val", covers=("smoke",), boxes=()))
    write_rows(tmp_path / "manifest.parquet", ManifestRow, rows)
    result = materialize(tmp_path / "manifest.parquet", CLASSES, tmp_path / "data", store)
    assert (result.fetched, result.cached, result.kept) == (9, 0, 0)
    assert result.frames == {"train": 6, "val": 2, "test": 1}
    described = yaml.safe_load(result.data_yaml.read_text())
    assert described == {
        "path": str(tmp_path / "data"),
        **{split: f"images/{split}" for split in SPLITS},
        "names": {0: "smoke", 1: "fire"},
    }
    for item in rows:
        image = tmp_path / "data" / "images" / item.split / f"{item.sha256}.jpg"
        assert sha256_bytes(image.read_bytes()) == item.sha256
        assert decode(image.read_bytes()).shape == (48, 64, 3)
        label = (tmp_path / "data" / "labels" / item.split / f"{item.sha256}.txt").read_text()
        assert label == ("1 0.500000 0.500000 0.500000 0.500000\n" if item.boxes else "")
    covers = json.loads(result.covers.read_text())
    assert covers[f"images/val/{rows[-1].sha256}.jpg"] == ["smoke"]
    assert covers[f"images/val/{rows[6].sha256}.jpg"] == ["smoke", "fire"]


def test_class_numbers_follow_the_order_of_classes_and_others_are_left_out() -> None:
    boxes = (Box("fire", 0, 0, 32, 48), Box("dog", 0, 0, 1, 1), Box("smoke", 32, 0, 64, 24))
    item = ManifestRow("a" * 64, "jpg", 64, 48, "k", "s", boxes=boxes)
    assert label_lines(item, ("smoke", "fire")).decode().splitlines() == [
        "1 0.250000 0.500000 0.500000 1.000000",
        "0 0.750000 0.250000 0.500000 0.500000",
    ]
    assert label_lines(item, ("fire",)) == b"0 0.250000 0.500000 0.500000 1.000000\n"


def test_a_split_without_frames_is_a_valid_empty_folder(store: Store, tmp_path: Path) -> None:
    materialize([add(store, 1, "train")], CLASSES, tmp_path / "data", store)
    for kind in ("images", "labels"):
        assert [len(list((tmp_path / "data" / kind / split).iterdir())) for split in SPLITS] == [1, 0, 0]


def test_only_the_splits_asked_for_are_written(store: Store, rows: list[ManifestRow], tmp_path: Path) -> None:
    result = materialize(rows, CLASSES, tmp_path / "data", store, splits=("test",))
    assert result.frames == {"test": 1}
    assert "train" not in yaml.safe_load(result.data_yaml.read_text())
    assert sorted(path.name for path in (tmp_path / "data" / "images").iterdir()) == ["test"]


def test_a_second_call_keeps_what_is_right_and_mends_what_is_not(
    store: Store, rows: list[ManifestRow], tmp_path: Path
) -> None:
    materialize(rows, CLASSES, tmp_path / "data", store)
    before = tree(tmp_path / "data")
    image = tmp_path / "data" / "images" / "train" / f"{rows[0].sha256}.jpg"
    image.write_bytes(image.read_bytes()[:100])
    (tmp_path / "data" / "labels" / "train.cache").write_bytes(b"what a trainer leaves")
    (tmp_path / "data" / "images" / "train" / "stray.jpg").write_bytes(b"of another dataset")
    (tmp_path / "data" / "labels" / "train" / f"{rows[1].sha256}.txt").write_text("")
    result = materialize(rows, CLASSES, tmp_path / "data", store)
    assert (result.fetched, result.kept) == (1, 7)
    assert tree(tmp_path / "data") == before


def test_another_dataset_in_the_same_folder_leaves_nothing_of_the_first(
    store: Store, rows: list[ManifestRow], tmp_path: Path
) -> None:
    materialize(rows, CLASSES, tmp_path / "data", store)
    materialize(rows[:3], CLASSES, tmp_path / "data", store)
    materialize(rows[:3], CLASSES, tmp_path / "fresh", store)
    first, fresh = tree(tmp_path / "data"), tree(tmp_path / "fresh")
    assert {name: data for name, data in first.items() if name != "data.yaml"} == {
        name: data for name, data in fresh.items() if name != "data.yaml"
    }


def test_a_folder_with_other_files_is_refused(store: Store, rows: list[ManifestRow], tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "mine.jpg").write_bytes(b"precious")
    with pytest.raises(InputError, match=str(tmp_path)):
        materialize(rows, CLASSES, tmp_path, store)
    assert (tmp_path / "images" / "mine.jpg").read_bytes() == b"precious"


class TestCache:
    def test_is_filled_once_and_then_linked(self, store: Store, rows: list[ManifestRow], tmp_path: Path) -> None:
        first = materialize(rows, CLASSES, tmp_path / "a", store, cache=tmp_path / "cache")
        second = materialize(rows, CLASSES, tmp_path / "b", store, cache=tmp_path / "cache")
        assert (first.fetched, second.fetched, second.cached) == (8, 0, 8)
        name = f"{rows[0].sha256}.jpg"
        assert (tmp_path / "b" / "images" / "train" / name).samefile(tmp_path / "cache" / name[:2] / name)

    def test_a_damaged_entry_is_fetched_again(self, store: Store, rows: list[ManifestRow], tmp_path: Path) -> None:
        materialize(rows, CLASSES, tmp_path / "a", store, cache=tmp_path / "cache")
        entry = tmp_path / "cache" / rows[0].sha256[:2] / f"{rows[0].sha256}.jpg"
        entry.write_bytes(b"a trainer repaired this picture in place")
        result = materialize(rows, CLASSES, tmp_path / "b", store, cache=tmp_path / "cache")
        assert (result.fetched, result.cached) == (1, 7)
        assert sha256_bytes(entry.read_bytes()) == rows[0].sha256

    def test_on_another_disk_is_copied(self, store: Store, rows: list[ManifestRow], tmp_path: Path) -> None:
        shm = Path("/dev/shm")
        if not shm.is_dir() or shm.stat().st_dev == tmp_path.stat().st_dev or not os.access(shm, os.W_OK):
            pytest.skip("there is no second disk at /dev/shm")
        cache = shm / f"haechi-{os.getpid()}-{tmp_path.name}"
        try:
            materialize(rows, CLASSES, tmp_path / "a", store, cache=cache)
            result = materialize(rows, CLASSES, tmp_path / "b", store, cache=cache)
            assert result.cached == 8
        finally:
            shutil.rmtree(cache, ignore_errors=True)

    def test_that_cannot_be_made_is_done_without_and_told(
        self, store: Store, rows: list[ManifestRow], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "file").write_bytes(b"")
        result = materialize(rows, CLASSES, tmp_path / "a", store, cache=tmp_path / "file")
        assert (result.fetched, result.cached) == (8, 0)
        assert f"HAECHI_CACHE_DIR {tmp_path / 'file'} cannot be written" in capsys.readouterr().err

    def test_on_a_small_disk_takes_what_there_is_room_for_and_never_fills_it(
        self, store: Store, tiny_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        rows = [add(store, n, "train", data=os.urandom(100_000)) for n in range(14)]
        results = [materialize(rows, CLASSES, tmp_path / name, store, cache=tiny_disk / "cache") for name in "ab"]
        assert results[0].fetched == 14
        # What was used in this run is not put away for the rest of it, so the next one finds a part and not nothing.
        assert 4 <= results[1].cached <= 9
        disk = shutil.disk_usage(tiny_disk)
        assert disk.free >= disk.total // 10
        assert "takes no more frames" in capsys.readouterr().err

    def test_puts_away_what_nobody_used_for_longest(
        self, store: Store, settings: Settings, tiny_disk: Path, tmp_path: Path
    ) -> None:
        cache = tiny_disk / "cache"
        alone = Store(replace(settings, workers=1))  # several at a time make room for all of them, so for more
        rows = [add(store, n, "train", data=os.urandom(100_000)) for n in range(12)]
        old, used, new = rows[:4], rows[4:8], rows[8:]
        for name, some in (("a", old), ("b", used)):
            materialize(some, CLASSES, tmp_path / name, alone, cache=cache)
        for row in old:
            os.utime(cache / row.sha256[:2] / f"{row.sha256}.jpg", (0, 0))
        materialize(new, CLASSES, tmp_path / "c", alone, cache=cache)
        kept = {path.stem for path in cache.rglob("*.jpg")}
        assert kept >= {row.sha256 for row in (*used, *new)}
        assert not kept & {row.sha256 for row in old}

    def test_is_shared_by_processes_at_once_and_by_those_that_are_killed(
        self, store: Store, settings: Settings, tmp_path: Path
    ) -> None:
        rows = [add(store, n, "train", data=os.urandom(200_000)) for n in range(60)]
        write_rows(tmp_path / "manifest.parquet", ManifestRow, rows)
        shared = replace(settings, cache_dir=str(tmp_path / "cache"))
        several = [start(shared, tmp_path / "manifest.parquet", tmp_path / f"p{n}") for n in range(3)]
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("cache/*/[!.]*")):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        several[0].kill()
        for process in several:
            process.communicate()
        assert [process.returncode for process in several] == [-9, 0, 0]
        whole = [path for path in tmp_path.glob("cache/*/[!.]*") if sha256_bytes(path.read_bytes()) == path.stem]
        assert len(whole) == 60
        assert materialize(rows, CLASSES, tmp_path / "last", store, cache=tmp_path / "cache").cached == 60


class TestIntegrity:
    def test_wrong_bytes_are_named_and_nothing_looks_whole(
        self, store: Store, rows: list[ManifestRow], tmp_path: Path
    ) -> None:
        key = frame_key(rows[3].sha256, "jpg")
        store.put(key, b"other bytes")
        for cache in (None, tmp_path / "cache"):
            with pytest.raises(IntegrityError, match=key):
                materialize(rows, CLASSES, tmp_path / "data", store, cache=cache)
            assert not (tmp_path / "data" / "data.yaml").exists()
        assert not list((tmp_path / "data").rglob(f"{rows[3].sha256}.jpg"))

    def test_a_folder_that_was_whole_no_longer_looks_so_when_a_later_call_fails(
        self, store: Store, rows: list[ManifestRow], tmp_path: Path
    ) -> None:
        result = materialize(rows, CLASSES, tmp_path / "data", store)
        store.put(frame_key(rows[3].sha256, "jpg"), b"other bytes")
        (tmp_path / "data" / "images" / "train" / f"{rows[3].sha256}.jpg").unlink()
        with pytest.raises(IntegrityError):
            materialize(rows, CLASSES, tmp_path / "data", store)
        assert not result.data_yaml.exists()

    def test_a_missing_frame_is_named_before_anything_is_fetched(
        self, store: Store, rows: list[ManifestRow], tmp_path: Path
    ) -> None:
        key = frame_key(rows[3].sha256, "jpg")
        store.remove(key)
        with pytest.raises(StorageError, match=key):
            materialize(rows, CLASSES, tmp_path / "data", store)
        assert not list((tmp_path / "data").rglob("*.jpg"))

    @pytest.mark.parametrize("changes", [{"sha256": "../../etc/passwd"}, {"ext": "../x"}, {"width": 0}])
    def test_a_row_that_cannot_be_is_refused(
        self, store: Store, rows: list[ManifestRow], tmp_path: Path, changes: dict[str, Any]
    ) -> None:
        with pytest.raises(IntegrityError, match="manifest"):
            materialize([ManifestRow(**(vars(rows[0]) | changes))], CLASSES, tmp_path / "data", store)
        with pytest.raises(IntegrityError, match="twice"):
            materialize([rows[0], rows[0]], CLASSES, tmp_path / "data", store)

    def test_an_unknown_split_is_refused(self, store: Store, rows: list[ManifestRow], tmp_path: Path) -> None:
        with pytest.raises(InputError, match="valid"):
            materialize(rows, CLASSES, tmp_path / "data", store, splits=("valid",))


PROGRAM = """
import resource, sys
from pathlib import Path
from haechi.components.shared.errors import HaechiError
from haechi.components.shared.materialize import materialize
from haechi.components.shared.settings import Settings
from haechi.components.shared.storage import Store
manifest, dest, limit = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    settings = Settings.from_env()
    materialize(manifest, ("smoke", "fire"), dest, Store(settings), settings.cache_path)
except HaechiError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def start(settings: Settings, manifest: Path, dest: Path, limit: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, str(manifest), str(dest), str(limit)]
    return subprocess.Popen(command, env={**os.environ, **settings.to_env()}, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB, where we may mount one."""
    mount = tmp_path / "disk"
    mount.mkdir()
    made = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)], capture_output=True, check=False
    )
    if not made or made.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


class TestFullDisk:
    def test_too_small_a_disk_is_told_before_the_first_byte(self, store: Store, tiny_disk: Path) -> None:
        rows = [add(store, n, "train", data=os.urandom(300_000)) for n in range(5)]
        with pytest.raises(StorageError, match=rf"{tiny_disk}.*needs 1\.\d MiB.*free"):
            materialize(rows, CLASSES, tiny_disk / "data", store)
        assert not list(tiny_disk.rglob("*.jpg"))

    def test_a_disk_that_fills_up_meanwhile_is_told_and_a_later_call_goes_on(
        self, store: Store, tiny_disk: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rows = [add(store, n, "train", data=os.urandom(200_000)) for n in range(4)]
        get, hog, alone = store.get, tiny_disk / "hog", threading.Lock()

        def get_while_another_writes(key: str, limit: int | None = None) -> bytes:
            # What another program does between our look at the free space and our write.
            with alone:
                if not hog.exists():
                    hog.write_bytes(b"x" * 500_000)
            return get(key, limit)

        monkeypatch.setattr(store, "get", get_while_another_writes)
        with pytest.raises(StorageError, match=rf"disk is full.*{tiny_disk}/data.*0\.\d MiB"):
            materialize(rows, CLASSES, tiny_disk / "data", store)
        assert not (tiny_disk / "data" / "data.yaml").exists()
        assert all(sha256_bytes(path.read_bytes()) == path.stem for path in tiny_disk.rglob("*.jpg"))
        monkeypatch.undo()
        hog.unlink()
        result = materialize(rows, CLASSES, tiny_disk / "data", store)
        assert result.kept + result.fetched == 4
        assert result.kept >= 1

    def test_a_write_that_the_system_cuts_short_is_told(
        self, store: Store, settings: Settings, rows: list[ManifestRow], tmp_path: Path
    ) -> None:
        write_rows(
            tmp_path / "manifest.parquet", ManifestRow, [*rows, add(store, 100, "train", data=os.urandom(50_000))]
        )
        with start(settings, tmp_path / "manifest.parquet", tmp_path / "data", limit=20_000) as process:
            _, said = process.communicate()
        assert process.returncode == 1
        assert "StorageError: the disk is full" in said and str(tmp_path / "data") in said
        assert not (tmp_path / "data" / "data.yaml").exists()
        assert not list((tmp_path / "data").rglob(".*.jpg.*")), "no half-written file stays"


def test_killed_midway_nothing_looks_whole_and_the_next_call_finishes(
    store: Store, settings: Settings, tmp_path: Path
) -> None:
    rows = [add(store, number, ("train", "val", "test")[number % 3]) for number in range(150)]
    write_rows(tmp_path / "manifest.parquet", ManifestRow, rows)
    calm = materialize(rows, CLASSES, tmp_path / "calm", store)
    data = tmp_path / "data"
    with start(settings, tmp_path / "manifest.parquet", data) as process:
        while process.poll() is None and len(list(data.glob("images/*/*.jpg"))) < 20:
            pass
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (data / "data.yaml").exists()
    (data / "images" / "train" / ".half.jpg.abc").write_bytes(b"what a write in progress leaves")
    result = materialize(rows, CLASSES, data, store)
    assert result.kept >= 20
    whole, again = tree(tmp_path / "calm"), tree(data)
    assert whole.pop("data.yaml").replace(b"calm", b"data") == again.pop("data.yaml")
    assert whole == again
    assert calm.frames == result.frames
