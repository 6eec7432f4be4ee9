"""Ingest looks at every frame once, refuses the bad with a reason, and keeps the same frames however runs overlap or die."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import cv2
import numpy as np
import pytest
from ingest_world import CLASSES, encoded, frames_of, jpeg, kill_when, picture, yolo_set
from PIL import Image

from haechi.components.ingest.parameters import Quality
from haechi.components.ingest.pattern import EPOCH, PathPattern, Place
from haechi.components.ingest.quality import examine
from haechi.components.ingest.step import IngestResult, ingest
from haechi.components.shared.dataset import Frame, frame_key, label_exports
from haechi.components.shared.errors import InputError, NoDataError, StorageError
from haechi.components.shared.files import read_json, sha256_bytes
from haechi.components.shared.images import decode, encode_jpeg
from haechi.components.shared.settings import Settings
from haechi.components.shared.storage import Store


def relative(frames: Iterable[Frame]) -> list[tuple[str, str]]:
    """Keys without the bucket, so that runs in different buckets compare."""
    return [(frame.key.split("/", 3)[3], frame.sha256) for frame in frames]


@pytest.fixture
def new_store(s3_settings: Settings) -> Callable[[], Store]:
    def make() -> Store:
        store = Store(replace(s3_settings, bucket=f"test-{uuid.uuid4().hex[:12]}", workers=3))
        store.ensure_bucket()
        return store

    return make


def take(store: Store, out: Path, run: str = "run-1", part: int = 2000, **source: object) -> IngestResult:
    item = {"uri": f"s3://{store.bucket}/raw", "pattern": "{camera}/{name}.{_}", "name": "raw"} | source
    return ingest([item], [], CLASSES, {}, run, out, store.settings, store=store, part=part)


# --- path patterns -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "key", "expected"),
    [
        ("{camera}/{date}/{time}.jpg", "gate/20260301/081502.jpg", Place("gate", datetime(2026, 3, 1, 8, 15, 2, tzinfo=UTC))),
        ("{camera}/{date}/{_}.jpg", "gate/2026/03/01/a.jpg", Place("gate", datetime(2026, 3, 1, tzinfo=UTC))),
        ("{date}T{time}.{ms}_{camera}.png", "2026-03-01T08-15-02.250_c1.png",
         Place("c1", datetime(2026, 3, 1, 8, 15, 2, 250_000, tzinfo=UTC))),
        ("{year}/{month}/{day}/{hour}{minute}.jpg", "2026/03/01/0815.jpg", Place("", datetime(2026, 3, 1, 8, 15, tzinfo=UTC))),
        ("cam_{camera}_{offset_ms}ms.jpg", "cam_lobby_0001800ms.jpg", Place("lobby", EPOCH + timedelta(seconds=1.8))),
        ("{sequence}/{date}/{offset_ms}.jpg", "v7/20260301/1500.jpg",
         Place("", datetime(2026, 3, 1, 0, 0, 1, 500_000, tzinfo=UTC), "v7")),
        ("{camera}-{epoch}.jpg", "a-b-1700000000.jpg", Place("a-b", datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC))),
        ("{any}/{camera}.jpg", "x/y/z/c.jpg", Place("c")),
        ("{date:%d.%m.%Y} {time:%H.%M}.jpg", "01.03.2026 08.15.jpg", Place("", datetime(2026, 3, 1, 8, 15, tzinfo=UTC))),
        ("{camera}/{date}.jpg", "gate/20261301.jpg", None),
        ("{camera}/{date}.jpg", "gate/2026-0301.jpg", None),
        ("{camera}.jpg", "a/b.jpg", None),
        ("a+b/{camera}.jpg", "a+b/c.jpg", Place("c")),
    ],
)  # fmt: skip
def test_a_pattern_reads_camera_time_and_sequence(pattern: str, key: str, expected: Place | None) -> None:
    assert PathPattern(pattern).read(key) == expected


def test_times_in_keys_are_in_the_sources_zone_and_offsets_count_from_its_start() -> None:
    seoul = PathPattern("{date}{time}.jpg", zone=ZoneInfo("Asia/Seoul")).read("20260301081502.jpg")
    assert seoul is not None
    assert seoul.captured_at == datetime(2026, 2, 28, 23, 15, 2, tzinfo=UTC)
    start = datetime(2026, 3, 1, tzinfo=UTC)
    offset = PathPattern("{offset_ms}.jpg", start=start).read("90000.jpg")
    assert offset is not None
    assert offset.captured_at == start + timedelta(seconds=90)


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("{camara}.jpg", "{camara}"),
        ("{camera}/{camera}.jpg", "twice"),
        ("{camera.jpg", "brace"),
        ("{year}.jpg", "part of a date"),
        ("{date:%A}.jpg", "%A"),
        ("{camera:%Y}.jpg", "{camera}"),
    ],
)
def test_a_malformed_pattern_is_refused_by_name(pattern: str, named: str) -> None:
    with pytest.raises(InputError, match=named.replace("{", r"\{").replace("%", "%")):
        PathPattern(pattern)


# --- quality -------------------------------------------------------------------------------------------------------


def _huge_png() -> bytes:
    """A sound header of 20,000 x 20,000 pixels in a few hundred bytes."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" * 100_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def out_of_focus() -> np.ndarray:
    contrast = cv2.resize(np.where(picture(5) > 110, 250, 5).astype(np.uint8), (768, 576))
    return cv2.GaussianBlur(contrast, (0, 0), 15)


def bad_frames() -> dict[str, bytes]:
    still = [Image.fromarray(picture(seed)) for seed in (1, 2)]
    return {
        "empty": b"",
        "not_an_image": b"this is a log line, not a picture\n" * 40,
        "corrupt": jpeg(3)[:-900],
        "animated": encoded(still[0], "WEBP", save_all=True, append_images=still[1:]),
        "too_large": _huge_png(),
        "too_small": encode_jpeg(picture(4)[:40, :60]),
        "black": encode_jpeg(np.random.default_rng(0).integers(0, 6, (120, 160, 3)).astype(np.uint8)),
        "white": encode_jpeg(np.full((120, 160, 3), 252, np.uint8)),
        "blurred": encode_jpeg(out_of_focus()),
    }


@pytest.mark.parametrize("reason", list(bad_frames()))
def test_a_bad_frame_is_refused_with_its_reason(reason: str) -> None:
    found = examine(bad_frames()[reason], "raw/x.jpg", Quality())
    assert (found.reason, found.signature) == (reason, None)
    assert found.detail


@pytest.mark.parametrize("cut", [30, 400, 1500])
def test_a_jpeg_cut_anywhere_is_corrupt(cut: int) -> None:
    assert examine(jpeg(1)[:cut], "x.jpg", Quality()).reason == "corrupt"


def test_night_corridor_and_smoke_are_not_refused() -> None:
    noise = np.random.default_rng(1)
    night = np.clip(picture(1) * 0.15 + noise.normal(0, 3, (144, 192, 3)), 0, 255).astype(np.uint8)
    corridor = np.full((480, 640, 3), 150.0) + np.linspace(0, 60, 640)[None, :, None]
    corridor[100:400, 300:302] = 120
    corridor += noise.normal(0, 1, corridor.shape)
    for pixels in (night, corridor.astype(np.uint8)):
        assert examine(encode_jpeg(pixels, 85), "x.jpg", Quality()).reason == ""


def test_a_labelled_picture_is_only_refused_when_it_cannot_be_decoded() -> None:
    bad = bad_frames()
    refused = {reason for reason in bad if examine(bad[reason], "x", None).reason}
    assert refused == {"empty", "not_an_image", "corrupt", "animated", "too_large"}


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"sharp": 1}, "sharp"),
        ({"blur": "much"}, "quality.blur"),
        ({"black": 250}, "black"),
        ({"min_side": 0}, "min_side"),
    ],
)
def test_quality_limits_that_make_no_sense_are_refused_by_name(values: dict[str, object], named: str) -> None:
    with pytest.raises(InputError, match=named):
        Quality.parse(values)


def test_quality_limits_can_be_changed() -> None:
    assert Quality.parse({"min_side": 32.0}) == replace(Quality(), min_side=32)
    assert examine(bad_frames()["blurred"], "x", Quality.parse({"blur": 0})).reason == ""


# --- a run ---------------------------------------------------------------------------------------------------------


def test_a_run_keeps_good_frames_drops_duplicates_and_quarantines_the_rest(store: Store, tmp_path: Path) -> None:
    good = {"raw/gate/1.jpg": jpeg(1), "raw/gate/2.jpg": jpeg(2), "raw/hall/1.jpg": jpeg(3)}
    copies = {"raw/gate/1b.jpg": jpeg(1, 3), "raw/hall/2.jpg": jpeg(1)}  # nearly the same; the same bytes elsewhere
    bad = {f"raw/gate/bad-{reason}.jpg": data for reason, data in bad_frames().items()}
    for key, data in {**good, **copies, **bad}.items():
        store.put(key, data)
    result = take(store, tmp_path / "out")
    assert (result.seen, result.accepted, result.duplicates, result.quarantined) == (14, 3, 2, 9)
    assert result.reasons == dict.fromkeys(sorted(bad_frames()), 1)
    frames = frames_of(tmp_path / "out")
    assert [(f.key, f.camera, f.source, f.ext, f.width, f.height) for f in frames] == [
        (store.uri(key), key.split("/")[1], "raw", "jpg", 192, 144) for key in good
    ]
    for frame in frames:
        assert sha256_bytes(store.get(frame_key(frame.sha256, frame.ext))) == frame.sha256
    assert len(list(store.list("frames/"))) == 3
    for key, data in bad.items():
        record = store.get_json(f"quarantine/{sha256_bytes(data)}.json")
        assert (record["reason"], record["key"], record["size"]) == (key[13:-4], store.uri(key), len(data))
        assert record["detail"]
    assert store.get(f"quarantine/{sha256_bytes(jpeg(3)[:-900])}.jpg") == jpeg(3)[:-900]
    assert read_json(tmp_path / "out/ingest.json") == result.metadata()


class CountingStore(Store):
    """A store that notes the keys it reads, and can do something at the first read of one."""

    reads: list[str]
    hooks: dict[str, Callable[[], object]]

    def get(self, key: str, limit: int | None = None) -> bytes:
        self.reads.append(key)
        hook = self.hooks.pop(key, None)
        if hook:
            hook()
        return super().get(key, limit)


def counting(store: Store, hooks: dict[str, Callable[[], object]] | None = None) -> CountingStore:
    counted = CountingStore(store.settings)
    counted.reads, counted.hooks = [], hooks or {}
    return counted


def test_a_second_run_reads_only_what_is_new_or_changed(store: Store, tmp_path: Path) -> None:
    for number in range(5):
        store.put(f"raw/gate/{number}.jpg", jpeg(number))
    store.put("raw/gate/bad.jpg", b"no picture")
    take(store, tmp_path / "1")
    second = counting(store)
    result = take(second, tmp_path / "2", run="run-2")
    assert [key for key in second.reads if key.startswith("raw/")] == []
    assert (result.seen, result.accepted, result.pending) == (0, 0, 5)
    store.put("raw/gate/3.jpg", jpeg(33))
    store.put("raw/gate/7.jpg", jpeg(7))
    third = counting(store)
    result = take(third, tmp_path / "3", run="run-3")
    assert sorted(key for key in third.reads if key.startswith("raw/")) == ["raw/gate/3.jpg", "raw/gate/7.jpg"]
    assert (result.seen, result.accepted, result.pending) == (2, 2, 7)


def test_near_duplicates_of_another_camera_stay(store: Store, tmp_path: Path) -> None:
    store.put("raw/gate/1.jpg", jpeg(1))
    store.put("raw/hall/1.jpg", jpeg(1, 4))
    assert take(store, tmp_path / "out").accepted == 2
    assert take(store, tmp_path / "one", run="run-2", pattern="", camera="", name="again").accepted == 0


@pytest.mark.parametrize("late", [True, False], ids=["other run ends first", "other run ends last"])
def test_overlapping_runs_end_in_the_frames_of_one_run(
    new_store: Callable[[], Store], tmp_path: Path, late: bool
) -> None:
    """Run A sees 1, 2, 5; while it reads, 0 and 3 arrive and run B sees all. 0~1~2 are a chain: 0 and 2 differ."""
    first = {"1": jpeg(1, 12), "2": jpeg(1, 24), "5": jpeg(5)}
    arriving = {"0": jpeg(1), "3": jpeg(5, 5)}

    def fill(store: Store, frames: dict[str, bytes]) -> None:
        for name, data in frames.items():
            store.put(f"raw/gate/{name}.jpg", data)

    alone = new_store()
    fill(alone, first | arriving)
    take(alone, tmp_path / "alone")
    expected = relative(frames_of(tmp_path / "alone"))
    assert [key for key, _ in expected] == ["raw/gate/0.jpg", "raw/gate/2.jpg", "raw/gate/3.jpg"]

    shared = new_store()
    fill(shared, first)
    if late:

        def meanwhile() -> None:
            fill(shared, arriving)
            take(shared, tmp_path / "b", run="b")

        take(counting(shared, {"raw/gate/5.jpg": meanwhile}), tmp_path / "last", run="a")
    else:
        # The run that knows more is the outer one, so that it ends last; it has listed all when the other begins.
        fill(shared, arriving)
        take(
            counting(shared, {"raw/gate/5.jpg": lambda: take(shared, tmp_path / "a", run="a")}),
            tmp_path / "last",
            run="b",
        )
    assert relative(frames_of(tmp_path / "last")) == expected
    for _, sha256 in expected:
        assert shared.exists(frame_key(sha256, "jpg"))


def test_a_late_frame_with_an_earlier_key_gives_what_one_run_would_have_given(store: Store, tmp_path: Path) -> None:
    store.put("raw/gate/1.jpg", jpeg(1, 12))
    store.put("raw/gate/2.jpg", jpeg(1, 24))
    assert take(store, tmp_path / "1").accepted == 1
    store.put("raw/gate/0.jpg", jpeg(1))
    take(store, tmp_path / "2", run="run-2")
    frames = frames_of(tmp_path / "2")
    assert [frame.key[-5:] for frame in frames] == ["0.jpg", "2.jpg"]
    # 2.jpg was passed over as a duplicate of 1.jpg, and its bytes have been fetched since.
    assert all(store.exists(frame_key(frame.sha256, frame.ext)) for frame in frames)
    again = counting(store)
    take(again, tmp_path / "3", run="run-3")
    assert relative(frames_of(tmp_path / "3")) == relative(frames)
    assert not [key for key in again.reads if key.startswith("raw/")]


def test_a_frame_that_is_gone_before_it_could_be_kept_is_left_out(store: Store, tmp_path: Path) -> None:
    store.put("raw/gate/1.jpg", jpeg(1, 12))
    store.put("raw/gate/2.jpg", jpeg(1, 24))
    take(store, tmp_path / "1")
    store.remove("raw/gate/2.jpg")
    store.put("raw/gate/0.jpg", jpeg(1))
    take(store, tmp_path / "2", run="run-2")
    assert [frame.key[-5:] for frame in frames_of(tmp_path / "2")] == ["0.jpg"]


def raw_frames() -> dict[str, bytes]:
    frames = {f"raw/gate/{number:03}.jpg": jpeg(number // 3, 6 * (number % 3)) for number in range(48)}
    return frames | {"raw/gate/bad-1.jpg": b"", "raw/gate/bad-2.jpg": jpeg(9)[:2000]}


def test_a_run_killed_again_and_again_ends_like_one_never_killed(
    new_store: Callable[[], Store], tmp_path: Path
) -> None:
    whole, killed = new_store(), new_store()
    for store in (whole, killed):
        for key, data in raw_frames().items():
            store.put(key, data)
    expected = take(whole, tmp_path / "whole", part=7)
    for stored in np.random.default_rng(int(time.time())).integers(1, 16, 2):
        kill_when(killed, int(stored), "run-1", str(tmp_path / "killed"))
    result = take(killed, tmp_path / "killed", part=7)
    assert result == expected
    assert relative(frames_of(tmp_path / "killed")) == relative(frames_of(tmp_path / "whole"))
    objects = [{item.key for item in store.list("frames/")} for store in (whole, killed)]
    assert objects[0] == objects[1]


def test_another_run_after_a_kill_keeps_the_same_frames(new_store: Callable[[], Store], tmp_path: Path) -> None:
    whole, killed = new_store(), new_store()
    for store in (whole, killed):
        for key, data in raw_frames().items():
            store.put(key, data)
    take(whole, tmp_path / "whole")
    kill_when(killed, 9, "run-1", str(tmp_path / "killed"))
    take(killed, tmp_path / "killed", run="run-2")
    assert relative(frames_of(tmp_path / "killed")) == relative(frames_of(tmp_path / "whole"))


def test_an_import_killed_and_run_again_is_one_whole_export(new_store: Callable[[], Store], tmp_path: Path) -> None:
    folder = yolo_set(tmp_path / "set", count=40)
    whole, killed = new_store(), new_store()
    given = [{"uri": folder.as_uri(), "name": "set"}]
    expected = ingest([], given, CLASSES, {}, "run-1", tmp_path / "w", whole.settings)
    kill_when(killed, 11, "run-1", str(tmp_path / "k"), folder.as_uri())
    assert len(label_exports(killed)) in (0, 1)
    assert ingest([], given, CLASSES, {}, "run-1", tmp_path / "k", killed.settings) == expected
    assert len(label_exports(killed)) == 1


# --- camera and time from elsewhere --------------------------------------------------------------------------------


def test_object_metadata_and_exif_tell_what_the_key_does_not(store: Store, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0132] = "2026:03:01 17:00:00"
    store.put("raw/a.jpg", encoded(Image.fromarray(picture(1)), "JPEG", quality=95, exif=exif))
    told = {"camera": "dock", "captured-at": "2026-03-02T01:02:03.456789+09:00"}
    store.put("raw/b.jpg", jpeg(2), metadata={f"x-amz-meta-{name}": value for name, value in told.items()})
    take(store, tmp_path / "o", pattern="", object_metadata=True, camera="spare", timezone="Asia/Seoul")
    frames = frames_of(tmp_path / "o")
    assert [(frame.camera, frame.captured_at) for frame in frames] == [
        ("spare", datetime(2026, 3, 1, 8, 0, tzinfo=UTC)),
        ("dock", datetime(2026, 3, 1, 16, 2, 3, 456_000, tzinfo=UTC)),
    ]


def test_a_clock_that_stands_on_the_calendars_first_day_is_no_time_and_ends_no_run(
    store: Store, tmp_path: Path
) -> None:
    """East of Greenwich that midnight has no day in UTC."""
    exif = Image.Exif()
    exif[0x0132] = "0001:01:01 00:00:00"
    store.put("raw/a.jpg", encoded(Image.fromarray(picture(1)), "JPEG", quality=95, exif=exif))
    store.put("raw/b.jpg", jpeg(2), metadata={"x-amz-meta-captured-at": "9999-12-31T23:59:59-09:00"})
    take(store, tmp_path / "o", pattern="", object_metadata=True, camera="spare", timezone="Asia/Seoul")
    assert [frame.captured_at for frame in frames_of(tmp_path / "o")] == [None, None]


def test_a_folder_is_read_like_a_bucket_but_never_through_links_out_of_it(store: Store, tmp_path: Path) -> None:
    folder, outside = tmp_path / "a b", tmp_path / "outside"
    for path, seed in ((folder / "gate/1.jpg", 1), (folder / "gate/sub/2#.jpg", 2), (outside / "secret.jpg", 3)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(seed))
    (folder / "leak.jpg").symlink_to(outside / "secret.jpg")
    (folder / "leak").symlink_to(outside, target_is_directory=True)
    (folder / ".hidden.jpg").write_bytes(jpeg(4))
    source = {"uri": folder.as_uri(), "pattern": "{camera}/{any}.jpg"}
    result = ingest([source], [], CLASSES, {}, "1", tmp_path / "o", store.settings)
    assert (result.seen, result.accepted) == (2, 2)
    keys = [frame.key for frame in frames_of(tmp_path / "o")]
    assert keys == [(folder / "gate/1.jpg").as_uri(), (folder / "gate/sub/2#.jpg").as_uri()]
    assert ingest([source], [], CLASSES, {}, "2", tmp_path / "o", store.settings).seen == 0
    (folder / "gate/1.jpg").write_bytes(jpeg(8))
    assert ingest([source], [], CLASSES, {}, "3", tmp_path / "o", store.settings).accepted == 1


def test_a_file_beyond_the_byte_limit_is_recorded_without_being_read(store: Store, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/1.jpg").write_bytes(jpeg(1))
    with (tmp_path / "in/huge.jpg").open("wb") as file:
        file.truncate(65 * 2**20)
    result = ingest([{"uri": (tmp_path / "in").as_uri()}], [], CLASSES, {}, "1", tmp_path / "o", store.settings)
    assert result.reasons == {"too_large": 1}
    (record,) = [item.key for item in store.list("quarantine/")]
    assert json.loads(store.get(record))["size"] == 65 * 2**20


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ({"uri": "raw/"}, r"sources\[0\].uri"),
        ({"uri": "s3://{bucket}/raw", "patern": "x"}, "patern"),
        ({"uri": "s3://{bucket}/raw", "pattern": "{date}.jpg"}, "matches none of its 1 keys"),
        ({"uri": "s3://{bucket}/raw", "start": "noon"}, r"sources\[0\].start"),
        ({"uri": "s3://{bucket}/raw", "timezone": "Mars/Base"}, "Mars/Base"),
        ({"uri": "s3://{bucket}/raw", "name": "a/b"}, r"sources\[0\].name"),
        ({"uri": "file:///nowhere/at/all"}, "/nowhere/at/all"),
        ({"uri": "file://host/share"}, "file://host/share"),
    ],
)
def test_a_source_that_cannot_be_used_is_refused_by_name(
    store: Store, tmp_path: Path, source: dict[str, str], named: str
) -> None:
    store.put("raw/gate/1.jpg", jpeg(1))
    item = {**source, "uri": source["uri"].replace("{bucket}", store.bucket)}
    with pytest.raises(InputError, match=named):
        ingest([item], [], CLASSES, {}, "1", tmp_path / "o", store.settings)


def test_an_empty_prefix_is_named_and_a_prefix_with_nothing_new_is_fine(store: Store, tmp_path: Path) -> None:
    with pytest.raises(NoDataError, match=f"s3://{store.bucket}/raw"):
        take(store, tmp_path / "o")
    store.put("raw2/gate/1.jpg", jpeg(1))  # a neighbour whose name begins alike
    with pytest.raises(NoDataError):
        take(store, tmp_path / "o")
    store.put("raw/gate/1.jpg", jpeg(1))
    assert take(store, tmp_path / "o").accepted == 1
    assert take(store, tmp_path / "o", run="run-2").accepted == 0


def test_store_errors_name_the_bucket_the_endpoint_and_the_credentials(store: Store, tmp_path: Path) -> None:
    store.put("raw/gate/1.jpg", jpeg(1))
    cases: list[tuple[Settings, str, str]] = [
        (replace(store.settings, bucket="no-such-bucket"), "raw", "no-such-bucket"),
        (replace(store.settings, s3_endpoint="http://127.0.0.1:9"), "raw", "127.0.0.1:9"),
        (replace(store.settings, s3_secret_key="wrong"), "raw", "credentials|refuses"),
    ]
    for settings, prefix, named in cases:
        with pytest.raises(StorageError, match=named):
            ingest([{"uri": f"s3://{settings.bucket}/{prefix}"}], [], CLASSES, {}, "1", tmp_path / "o", settings)
    with pytest.raises(StorageError, match="other-bucket"):
        ingest([{"uri": "s3://other-bucket/raw"}], [], CLASSES, {}, "1", tmp_path / "o", store.settings)


@pytest.mark.parametrize(("run", "classes"), [("a/b", CLASSES), ("", CLASSES), ("1", ["fire", "fire"])])
def test_run_ids_and_classes_are_checked(store: Store, tmp_path: Path, run: str, classes: list[str]) -> None:
    with pytest.raises(InputError):
        ingest([], [], classes, {}, run, tmp_path / "o", store.settings)


def test_the_component_hands_everything_to_the_step(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kfp.dsl import Artifact

    from haechi.components.ingest.component import ingest as component

    store.put("raw/gate/1.jpg", jpeg(1))
    for name, value in store.settings.to_env().items():
        monkeypatch.setenv(name, value)
    frames = Artifact(uri=str(tmp_path / "frames"))
    component.python_func([{"uri": f"s3://{store.bucket}/raw"}], [], CLASSES, {}, "run-1", frames)
    assert frames.metadata["accepted"] == 1
    assert json.loads(json.dumps(frames.metadata)) == frames.metadata
    assert decode(store.get(frame_key(frames_of(tmp_path / "frames")[0].sha256, "jpg"))).shape == (144, 192, 3)


@pytest.mark.realdata
def test_a_real_camera_loses_no_frame_to_quality_and_most_to_duplicates(
    store: Store, tmp_path: Path, realdata: Path
) -> None:
    source = {"uri": (realdata / "cam_lobby").as_uri(), "pattern": "cam_{camera}_{offset_ms}ms.jpg"}
    result = ingest([source], [], CLASSES, {}, "1", tmp_path / "o", store.settings)
    assert (result.seen, result.quarantined) == (155, 0)
    assert 20 <= result.accepted <= 100
    frames = frames_of(tmp_path / "o")
    assert {frame.camera for frame in frames} == {"lobby"}
    moments = [frame.captured_at for frame in frames if frame.captured_at]
    assert moments == sorted(moments)
    assert len(moments) == result.pending == result.accepted


@pytest.mark.realdata
def test_smoke_that_fills_the_picture_is_not_taken_for_blur(realdata: Path) -> None:
    (path,) = (realdata / "fire_smoke/images/train").glob("img_910_*.jpg")
    assert examine(path.read_bytes(), path.name, Quality()).reason == ""
