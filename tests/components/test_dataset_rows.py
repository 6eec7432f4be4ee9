"""Rows, their parquet files, labels exports and the dataset's digest: what is written is what is read, and known by it."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from haechi.components.shared.dataset import (
    Box,
    Frame,
    LabelledFrame,
    ManifestRow,
    dataset_digest,
    exported_frames,
    frame_key,
    label_exports,
    latest_dataset,
    read_export,
    read_rows,
    table_bytes,
    write_export,
    write_rows,
)
from haechi.components.shared.errors import IntegrityError
from haechi.components.shared.storage import Store

NOON = datetime(2026, 3, 4, 12, 0, 0, 123_000, tzinfo=UTC)
FIRE = Box("fire", 1.5, 2.25, 30.125, 40.0, 0.875, "machine", "0123456789ab", "")
SMOKE = Box("smoke", 0.0, 0.0, 64.0, 48.0, 1.0, "review", "kim", "0123456789ab")
ROW = ManifestRow(
    sha256="a" * 64,
    ext="jpg",
    width=64,
    height=48,
    key="s3://haechi/raw/cam1/한국.jpg",
    source="plant",
    camera="cam1",
    captured_at=NOON,
    sequence="video-7",
    phash=(1 << 64) - 1,
    thumb=bytes(range(256)),
    boxes=(FIRE, SMOKE),
    covers=("smoke", "fire"),
    origin="review",
    decision="reviewed",
    actor="kim",
    split_hint="valid",
    labelled_at=NOON + timedelta(hours=1),
    split="val",
    group="cam1/2026-03-04",
    export_id="review-0123456789ab",
)
BARE = ManifestRow("b" * 64, "png", 1, 1, "file:///x.png", "s")


def down_to(kind: type[Any], row: ManifestRow) -> Any:
    return kind(**{item.name: getattr(row, item.name) for item in fields(kind)})


@pytest.mark.parametrize("kind", [Frame, LabelledFrame, ManifestRow])
def test_rows_come_back_as_they_went(kind: type[Any], tmp_path: Path) -> None:
    rows = [down_to(kind, row) for row in (ROW, BARE)]
    write_rows(tmp_path / "deep" / "rows.parquet", kind, rows)
    back = read_rows(tmp_path / "deep" / "rows.parquet", kind)
    assert back == rows
    assert read_rows(table_bytes(kind, rows), kind) == rows
    assert read_rows(table_bytes(kind, []), kind) == []
    assert back[0].captured_at.utcoffset() == timedelta(0)


def test_the_same_rows_give_the_same_bytes() -> None:
    assert table_bytes(ManifestRow, [ROW, BARE]) == table_bytes(ManifestRow, iter([ROW, BARE]))


def test_times_of_another_zone_are_the_same_moment() -> None:
    seoul = replace(ROW, captured_at=NOON.astimezone(timezone(timedelta(hours=9))))
    (back,) = read_rows(table_bytes(ManifestRow, [seoul]), ManifestRow)
    assert back.captured_at == NOON


def test_a_table_of_more_columns_can_be_read_as_one_of_less() -> None:
    assert read_rows(table_bytes(ManifestRow, [ROW]), Frame) == [down_to(Frame, ROW)]


def test_a_table_of_less_columns_is_never_read_as_one_of_more() -> None:
    """Or frames would pass for labels without boxes, and be learnt from as background."""
    with pytest.raises(IntegrityError, match=r"not a table of LabelledFrame rows \(no column actor, boxes, covers"):
        read_rows(table_bytes(Frame, [down_to(Frame, ROW)]), LabelledFrame)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: b"",
        lambda data: b"PAR1",
        lambda data: b"text",
        lambda data: data[:-9],
        lambda data: data[: len(data) // 2],
    ],
)
def test_what_is_no_table_is_an_integrity_error(spoil: Callable[[bytes], bytes], tmp_path: Path) -> None:
    data = spoil(table_bytes(Frame, [down_to(Frame, ROW)]))
    with pytest.raises(IntegrityError, match="not a table of Frame rows"):
        read_rows(data, Frame)
    (tmp_path / "frames.parquet").write_bytes(data)
    with pytest.raises(IntegrityError, match=r"frames\.parquet"):
        read_rows(tmp_path / "frames.parquet", Frame)


def test_damage_in_the_middle_is_an_integrity_error_or_harmless() -> None:
    data = bytearray(table_bytes(ManifestRow, [replace(ROW, sha256=f"{number:064x}") for number in range(50)]))
    dice = random.Random(1)
    for _ in range(100):
        spoilt = bytearray(data)
        spoilt[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        try:
            read_rows(bytes(spoilt), ManifestRow)
        except IntegrityError:
            continue


def test_a_missing_file_and_a_column_of_another_type_are_named(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match=r"absent\.parquet"):
        read_rows(tmp_path / "absent.parquet", Frame)
    table = pq.read_table(pa.BufferReader(table_bytes(Frame, [down_to(Frame, ROW)])))
    table = table.set_column(table.schema.get_field_index("width"), "width", pa.array(["wide"]))
    pq.write_table(table, tmp_path / "odd.parquet")
    with pytest.raises(IntegrityError, match=r"odd\.parquet"):
        read_rows(tmp_path / "odd.parquet", Frame)


def test_keys_spread_over_folders() -> None:
    assert frame_key("ab" + "0" * 62, "jpg") == f"frames/ab/ab{'0' * 62}.jpg"


# The digest ------------------------------------------------------------------------------------------------------


def by_hand(classes: list[str], rows: list[ManifestRow]) -> str:
    """The definition written out once more, for three rows: root = H(H(leaf0, leaf1), leaf2)."""

    def compact(value: Any) -> bytes:
        return json.dumps(value, separators=(",", ":")).encode()

    def leaf(row: ManifestRow) -> bytes:
        boxes = sorted(
            [b.class_name, f"{b.x1:.3f}", f"{b.y1:.3f}", f"{b.x2:.3f}", f"{b.y2:.3f}", b.origin, b.actor, b.parent]
            for b in row.boxes
        )
        content = [row.sha256, sorted(row.covers), boxes, row.origin, row.decision, row.actor, row.group, row.split]
        return hashlib.sha256(b"\x00" + compact(content)).digest()

    first, second, third = (leaf(row) for row in sorted(rows, key=lambda row: row.sha256))
    pair = hashlib.sha256(b"\x01" + first + second).digest()
    root = hashlib.sha256(b"\x01" + pair + third).digest()
    return hashlib.sha256(compact(["haechi-dataset", 1, classes, root.hex()])).hexdigest()


THREE = [ROW, BARE, replace(BARE, sha256="c" * 64, split="test", group="g")]
CLASSES = ["smoke", "fire"]


def test_the_digest_is_what_the_definition_says_and_stays_it() -> None:
    """The recorded value holds for good: another one here means that every dataset on earth changes its name."""
    assert dataset_digest(CLASSES, THREE) == by_hand(CLASSES, THREE)
    assert dataset_digest(CLASSES, THREE) == "b7ae2693744e681fa7db471f68cd84354ad408fcc80633b6858fc1012b220551"
    assert dataset_digest([], []) == "d5c4e5e0493ff7379879708a8d1cf766e42df62b3a16bf7fb5a605e20a67227a"


def test_the_digest_knows_no_order_of_rows_boxes_or_covers() -> None:
    digest = dataset_digest(CLASSES, THREE)
    assert dataset_digest(CLASSES, reversed(THREE)) == digest
    turned = replace(ROW, boxes=ROW.boxes[::-1], covers=ROW.covers[::-1])
    assert dataset_digest(CLASSES, [turned, *THREE[1:]]) == digest
    twice = [ROW, replace(ROW, group="other")]
    assert dataset_digest(CLASSES, twice) == dataset_digest(CLASSES, twice[::-1])


@pytest.mark.parametrize(
    "change",
    [
        {"sha256": "d" * 64},
        {"split": "train"},
        {"group": "elsewhere"},
        {"boxes": ()},
        {"boxes": (FIRE,)},
        {"boxes": (FIRE, SMOKE, SMOKE)},
        {"boxes": (replace(FIRE, class_name="smoke"), SMOKE)},
        {"boxes": (replace(FIRE, x1=1.501), SMOKE)},
        {"boxes": (replace(FIRE, y2=40.001), SMOKE)},
        {"boxes": (replace(FIRE, origin="review"), SMOKE)},
        {"boxes": (replace(FIRE, actor="lee"), SMOKE)},
        {"boxes": (replace(FIRE, parent="x"), SMOKE)},
        {"covers": ("fire",)},
        {"covers": ()},
        {"origin": "import"},
        {"decision": "accepted"},
        {"actor": "lee"},
    ],
    ids=str,
)
def test_the_digest_changes_with_what_is_learnt_and_with_who_said_so(change: dict[str, Any]) -> None:
    assert dataset_digest(CLASSES, [replace(ROW, **change), *THREE[1:]]) != dataset_digest(CLASSES, THREE)


def test_the_digest_changes_with_classes_their_order_and_the_frames() -> None:
    digest = dataset_digest(CLASSES, THREE)
    assert len({digest, dataset_digest(CLASSES[::-1], THREE), dataset_digest(["smoke"], THREE)}) == 3
    assert dataset_digest(CLASSES, THREE[:2]) != digest
    # An odd node is promoted, not doubled: the same row twice is not the row once (CVE-2012-2459).
    assert dataset_digest(CLASSES, [*THREE, THREE[2]]) != digest


@pytest.mark.parametrize(
    "change",
    [
        {"key": "s3://elsewhere/x.jpg"},
        {"split_hint": "test"},
        {"labelled_at": NOON},
        {"export_id": "import-000000000000"},
        {"phash": 0},
        {"boxes": (replace(FIRE, x1=1.5004), SMOKE)},
        {"boxes": (FIRE, replace(SMOKE, x1=-0.0, y1=-0.0001))},
    ],
    ids=str,
)
def test_the_digest_does_not_change_with_what_is_not_learnt_from(change: dict[str, Any]) -> None:
    assert dataset_digest(CLASSES, [replace(ROW, **change), *THREE[1:]]) == dataset_digest(CLASSES, THREE)


# Labels exports --------------------------------------------------------------------------------------------------


def labels(*names: str) -> list[LabelledFrame]:
    return [replace(down_to(LabelledFrame, ROW), sha256=name * 64, labelled_at=None) for name in names]


def test_an_export_written_again_is_the_same_export(store: Store) -> None:
    first = write_export(store, "review", labels("a", "b"), {"reviewer": "kim"}, NOON)
    again = write_export(store, "review", labels("b", "a"), {"reviewer": "lee"}, NOON + timedelta(days=1))
    assert again == first and first.export_id.startswith("review-") and len(first.export_id) == len("review-") + 12
    assert first.info == {"frames": 2, "reviewer": "kim"}
    assert label_exports(store) == [first]
    assert [row.labelled_at for row in read_export(store, first)] == [NOON, NOON]


def test_another_label_or_kind_is_another_export(store: Store) -> None:
    base = labels("a")
    other = [replace(base[0], boxes=(FIRE,))]
    ids = {
        write_export(store, kind, rows, {}, NOON).export_id
        for kind, rows in (("review", base), ("machine", base), ("review", other))
    }
    assert len(ids) == len(label_exports(store)) == 3


def test_exports_come_oldest_first(store: Store) -> None:
    late = write_export(store, "machine", labels("a"), {}, NOON + timedelta(hours=2))
    early = write_export(store, "machine", labels("b"), {}, NOON)
    assert label_exports(store) == [early, late]
    assert [row.sha256[0] for row in exported_frames(store)] == ["b", "a"]


def test_an_export_without_its_marker_does_not_exist_and_can_be_finished(store: Store) -> None:
    """As a writer leaves it that is killed between the two objects."""
    export = write_export(store, "machine", labels("a"), {}, NOON)
    store.remove(f"labels/{export.export_id}/export.json")
    assert label_exports(store) == []
    assert write_export(store, "machine", labels("a"), {}, NOON).export_id == export.export_id
    assert label_exports(store) == [export]


def test_the_newest_complete_dataset_of_a_name_is_found(store: Store) -> None:
    assert latest_dataset(store, "safety") == ""
    store.put("datasets/safety/1111/manifest.parquet", b"x")
    assert latest_dataset(store, "safety") == "", "a dataset without stats.json is not complete"
    store.put("datasets/safety/1111/stats.json", b"{}")
    store.put("datasets/safety-2/2222/stats.json", b"{}")
    assert latest_dataset(store, "safety") == "1111"
