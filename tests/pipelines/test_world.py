"""The synthetic camera world: the same every time, true to its boxes, and as hard on ingest as it claims."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from haechi.components.ingest.parameters import Quality
from haechi.components.ingest.pattern import PathPattern
from haechi.components.ingest.quality import examine
from haechi.components.shared.errors import InputError
from haechi.components.shared.files import sha256_file
from haechi.components.shared.images import NearDuplicates, decode
from haechi.components.shared.yolo_format import label_path, read_data_yaml, read_labels, split_images
from haechi.pipelines.demo.scenes import HEIGHT, WIDTH, Scene, Thing, paint
from haechi.pipelines.demo.world import CAMERAS, CLASSES, RAW_PATTERN, RawFrame, draw_labelled, draw_raw


@pytest.fixture(scope="module")
def raw() -> list[RawFrame]:
    return list(draw_raw(seed=7, bursts=8, frames=4))


def test_the_same_seed_gives_the_same_bytes_and_another_day_gives_others(raw: list[RawFrame]) -> None:
    assert list(draw_raw(seed=7, bursts=8, frames=4)) == raw
    tomorrow = list(draw_raw(seed=7, day=1, bursts=8, frames=4))
    assert not {frame.key for frame in tomorrow} & {frame.key for frame in raw}
    pictures = {frame.data for frame in raw if frame.boxes is not None}
    assert not {frame.data for frame in tomorrow} & pictures


def test_keys_tell_camera_and_time_in_order(raw: list[RawFrame]) -> None:
    pattern = PathPattern(RAW_PATTERN)
    for camera in CAMERAS:
        places = [pattern.read(frame.key.removeprefix("raw/")) for frame in raw if f"raw/{camera}/" in frame.key]
        moments = [place.captured_at for place in places if place and place.captured_at]
        assert len(moments) == len(places) == 8 * 4 + 4
        assert all(place and place.camera == camera for place in places)
        assert moments == sorted(set(moments))
    assert len({frame.key for frame in raw}) == len(raw)


def test_bursts_last_seconds_and_lie_minutes_apart(raw: list[RawFrame]) -> None:
    pattern = PathPattern(RAW_PATTERN)
    for one, other in itertools.pairwise(raw):
        before, after = (pattern.read(frame.key.removeprefix("raw/")) for frame in (one, other))
        assert before and after and before.captured_at and after.captured_at
        if before.camera == after.camera and one.boxes is not None and other.boxes is not None:
            gap = (after.captured_at - before.captured_at).total_seconds()
            assert 0.49 <= gap <= 1.01 if one.burst == other.burst else gap > 60


def test_what_ingest_refuses_is_just_what_is_broken(raw: list[RawFrame]) -> None:
    reasons = Counter()
    for frame in raw:
        found = examine(frame.data, frame.key, Quality())
        assert bool(found.reason) == (frame.boxes is None), (frame.key, found.reason)
        reasons[found.reason] += 1
    assert reasons == {"": 160, "corrupt": 5, "empty": 5, "not_an_image": 5, "black": 5}


@pytest.mark.parametrize("seed", [7, 8])
@pytest.mark.parametrize(("bits", "levels"), [(8, 16), (10, 24)], ids=["as ingest", "as build"])
def test_near_duplicates_are_bursts_and_nothing_else(seed: int, bits: int, levels: int) -> None:
    index, owner = NearDuplicates(bits, levels), []
    for frame in draw_raw(seed, bursts=6, frames=3):
        if frame.boxes is None:
            continue
        look = examine(frame.data, frame.key, None).signature
        assert look is not None
        near = {owner[item] for item in index.find(look)}
        assert near <= {frame.burst}, "two bursts must not merge"
        if not near:
            index.add(look)
            owner.append(frame.burst)
    kept = Counter(Counter(owner).values())
    assert set(kept) <= {1, 2}, "one or two of each burst are kept"
    assert sum(kept.values()) == 6 * len(CAMERAS)


def test_every_class_appears_by_day_and_night_and_some_scenes_are_empty(raw: list[RawFrame]) -> None:
    seen = {(box.class_name, "_00" in f.key or "_01" in f.key or "_02" in f.key) for f in raw for box in f.boxes or ()}
    assert seen == {(name, night) for name in CLASSES for night in (True, False)}
    empty = {frame.burst for frame in raw if frame.boxes == ()}
    assert len(empty) == 6


def test_a_box_is_where_the_picture_changes() -> None:
    # Sensor noise is the same in both pictures; only a flame also lights what is around it.
    for kind, least in {"smoke": 25, "fire": 90, "person_down": 15}.items():
        thing = (
            Thing(kind, 150, 150, 84, 34, seed=3) if kind == "person_down" else Thing(kind, 150, 150, 60, 66, seed=3)
        )
        bare, none = paint(Scene(CAMERAS[0], False, (), seed=5), 0)
        shown, (box,) = paint(Scene(CAMERAS[0], False, (thing,), seed=5), 0)
        change = np.abs(shown.astype(int) - bare.astype(int)).max(axis=2) > least
        rows, columns = np.flatnonzero(change.any(axis=1)), np.flatnonzero(change.any(axis=0))
        assert none == ()
        assert box.class_name == kind
        changed = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        assert np.abs(np.subtract(changed, (box.x1, box.y1, box.x2, box.y2))).max() <= 12, kind


def test_the_labelled_set_is_a_yolo_folder_with_boxes_inside_the_pictures(tmp_path: Path) -> None:
    folder = draw_labelled(tmp_path / "set", seed=3, count=20)
    data = read_data_yaml(folder)
    images = split_images(data, "train")
    assert data.names == CLASSES
    assert len(images) == 20
    assert {path.name.rpartition("_")[0] for path in images} == set(CAMERAS)
    boxes = [read_labels(label_path(path), data.names, WIDTH, HEIGHT) for path in images]
    assert sum(not found for found in boxes) == 2
    assert {box.class_name for found in boxes for box in found} == set(CLASSES)
    assert decode(images[0].read_bytes()).shape == (HEIGHT, WIDTH, 3)
    again = draw_labelled(tmp_path / "again", seed=3, count=20)
    assert [sha256_file(path) for path in images] == [
        sha256_file(path) for path in split_images(read_data_yaml(again), "train")
    ]


@pytest.mark.parametrize("call", [lambda: list(draw_raw(1, bursts=0)), lambda: draw_labelled(Path("x"), 1, 0)])
def test_nothing_to_draw_is_refused(call: object) -> None:
    assert callable(call)
    with pytest.raises(InputError, match="Draw at least one"):
        call()
