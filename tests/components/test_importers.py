"""Labelled sets of every format become one labels export, by class name and in pixels, or an error that names the line."""

from __future__ import annotations

import json
import re
import stat
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from ingest_world import CLASSES, encoded, jpeg, picture, yolo_set
from PIL import Image

from haechi.components.ingest import archive
from haechi.components.ingest.examples import sequence_of, split_hint
from haechi.components.ingest.roboflow import download
from haechi.components.ingest.step import IngestResult, ingest
from haechi.components.shared.dataset import LabelledFrame, frame_key, label_exports, read_export
from haechi.components.shared.errors import HaechiError, InputError, NoDataError, SettingsError, StorageError
from haechi.components.shared.storage import Store


def bring(
    store: Store, out: Path, uri: str, run: str = "run-1", classes: list[str] | None = None, **item: object
) -> IngestResult:
    return ingest([], [{"uri": uri, **item}], classes or CLASSES, {}, run, out, store.settings, store=store)


def exported(store: Store) -> dict[str, LabelledFrame]:
    """File name to labelled frame, of all exports."""
    return {Path(row.key).name: row for export in label_exports(store) for row in read_export(store, export)}


def shapes(row: LabelledFrame) -> list[tuple[str, float, float, float, float]]:
    return [(b.class_name, *(round(v, 6) for v in (b.x1, b.y1, b.x2, b.y2))) for b in row.boxes]


# --- formats -------------------------------------------------------------------------------------------------------


def coco_set(folder: Path) -> Path:
    """Two pictures: one with a fire and a crowd, one that holds nothing."""
    (folder / "valid").mkdir(parents=True)
    (folder / "valid/a.jpg").write_bytes(jpeg(1))
    (folder / "valid/b.jpg").write_bytes(jpeg(2))
    content = {
        "images": [{"id": 7, "file_name": "a.jpg", "width": 192, "height": 144}, {"id": 8, "file_name": "b.jpg"}],
        "categories": [{"id": 3, "name": "fire"}, {"id": 9, "name": "tree"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 3, "bbox": [10, 20, 30, 40.5], "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 3, "bbox": [0, 0, 99, 99], "iscrowd": 1},
            {"id": 3, "image_id": 7, "category_id": 9, "bbox": [0, 0, 50, 50]},
        ],
    }
    (folder / "valid/_annotations.coco.json").write_text(json.dumps(content))
    return folder


def voc_xml(name: str = "a.jpg", box: tuple[object, ...] = (11, 21, 40, 60), size: tuple[int, int] = (192, 144)) -> str:
    corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return (
        f"<annotation><filename>{name}</filename><size><width>{size[0]}</width><height>{size[1]}</height></size>"
        f"<object><name>fire</name><bndbox>{corners}</bndbox></object></annotation>"
    )


def voc_set(folder: Path, xml: str = "") -> Path:
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    (folder / "JPEGImages/a.jpg").write_bytes(jpeg(1))
    (folder / "Annotations/a.xml").write_text(xml or voc_xml())
    (folder / "ImageSets/Main/val.txt").write_text("a\n")
    return folder


def test_a_yolo_set_becomes_frames_and_one_export(store: Store, tmp_path: Path) -> None:
    folder = yolo_set(tmp_path / "fires")
    result = bring(store, tmp_path / "o", folder.as_uri())
    assert (result.imported, result.pending, result.seen) == (4, 0, 0)
    (export,) = label_exports(store)
    assert result.exports == (export.export_id,)
    assert (export.kind, export.info["source"], export.info["boxes"]) == ("import", folder.as_uri(), 4)
    rows = exported(store)
    assert shapes(rows["img_000.jpg"]) == [("smoke", 72, 36, 120, 108)]
    assert shapes(rows["img_003.jpg"]) == [("fire", 72, 36, 120, 108)]
    row = rows["img_003.jpg"]
    assert (row.split_hint, row.covers, row.source, row.origin, row.decision) == (
        "val", ("smoke", "fire"), "fires", "import", "imported",
    )  # fmt: skip
    assert row.key == (folder / "images/val/img_003.jpg").as_uri()
    assert {box.actor for box in row.boxes} == {folder.as_uri()}
    assert all(store.exists(frame_key(row.sha256, row.ext)) for row in rows.values())


def test_coco_boxes_are_corners_and_listed_pictures_without_boxes_are_background(store: Store, tmp_path: Path) -> None:
    bring(store, tmp_path / "o", coco_set(tmp_path / "c").as_uri())
    rows = exported(store)
    assert shapes(rows["a.jpg"]) == [("fire", 10, 20, 40, 60.5)]
    assert shapes(rows["b.jpg"]) == []
    assert {(row.covers, row.split_hint) for row in rows.values()} == {(("fire",), "val")}
    (export,) = label_exports(store)
    assert export.info["dropped_boxes"] == {"tree": 1}
    assert export.info["notes"] == {"crowd regions": 1}


def test_voc_counts_pixels_from_one(store: Store, tmp_path: Path) -> None:
    bring(store, tmp_path / "o", voc_set(tmp_path / "v").as_uri())
    row = exported(store)["a.jpg"]
    assert shapes(row) == [("fire", 10, 20, 40, 60)]
    assert row.split_hint == "val"


def test_labels_speak_of_the_upright_picture(store: Store, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    folder = yolo_set(tmp_path / "y", count=1)
    turned = encoded(Image.fromarray(picture(1)), "JPEG", quality=95, exif=exif)
    (folder / "images/train/img_000.jpg").write_bytes(turned)
    (folder / "labels/train/img_000.txt").write_text("1 0.5 0.25 0.5 0.5\n")
    (folder / "data.yaml").write_text("train: images/train\nnames: {0: smoke, 1: fire}\n")
    bring(store, tmp_path / "o", folder.as_uri())
    row = exported(store)["img_000.jpg"]
    assert (row.width, row.height, shapes(row)) == (144, 192, [("fire", 36, 0, 108, 96)])
    voc = voc_set(tmp_path / "v")
    (voc / "JPEGImages/a.jpg").write_bytes(turned)
    with pytest.raises(InputError, match=r"Annotations/a.xml: says 192x144, .*144x192.*EXIF"):
        bring(store, tmp_path / "o", voc.as_uri())


def test_classes_map_by_name_and_only_what_is_covered_is_claimed(store: Store, tmp_path: Path) -> None:
    folder = yolo_set(tmp_path / "y", names="[Flame, person]")
    bring(
        store, tmp_path / "o", folder.as_uri(), classes=["person", "smoke", "fire"],
        class_map={"Flame": "fire"}, covers=["fire"],
    )  # fmt: skip
    rows = exported(store)
    assert [shapes(rows[name])[0][0] for name in ("img_000.jpg", "img_001.jpg")] == ["fire", "person"]
    assert {row.covers for row in rows.values()} == {("fire",)}


def test_a_class_left_out_leaves_its_boxes_but_not_its_pictures(store: Store, tmp_path: Path) -> None:
    bring(store, tmp_path / "o", yolo_set(tmp_path / "y").as_uri(), class_map={"smoke": ""})
    rows = exported(store)
    assert len(rows) == 4
    assert shapes(rows["img_000.jpg"]) == []
    assert rows["img_000.jpg"].covers == ("fire",)


@pytest.mark.parametrize("layout", ["zip", "wrapped zip", "s3 folder", "s3 zip"])
def test_archives_and_buckets_give_what_the_folder_gives(store: Store, tmp_path: Path, layout: str) -> None:
    folder = yolo_set(tmp_path / "set")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    uri = f"s3://{store.bucket}/sets/fires"
    if layout == "s3 folder":
        for path in files:
            store.put(f"sets/fires/{path.relative_to(folder).as_posix()}", path.read_bytes())
    else:
        packed = tmp_path / "fires.zip"
        with zipfile.ZipFile(packed, "w") as file:
            for path in files:
                file.write(path, ("top/" if layout == "wrapped zip" else "") + path.relative_to(folder).as_posix())
        uri = packed.as_uri()
        if layout == "s3 zip":
            store.put("sets/fires.zip", packed.read_bytes())
            uri = f"s3://{store.bucket}/sets/fires.zip"
    assert bring(store, tmp_path / "out/o", uri, name="fires").imported == 4
    row = exported(store)["img_001.jpg"]
    assert shapes(row) == [("fire", 72, 36, 120, 108)]
    assert row.key.startswith(uri)
    assert row.key.endswith("images/train/img_001.jpg")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["o"], "nothing unpacked is left behind"


@pytest.mark.parametrize(
    "text",
    [
        "path: .\ntrain: images/train\nval: images/val\nnames: [smoke, fire]\n",
        "train: ../images/train\nval: ../images/val\nnames: [smoke, fire]\n",  # as Roboflow writes it
        "train: [images/train]\nval: val.txt\nnames:\n  0: smoke\n  1: fire\n",
        "path: {folder}\ntrain: images/train\nval: images/val\ntest: images/test\nnames: [smoke, fire]\n",
    ],
)
def test_data_yaml_is_read_against_its_own_folder(store: Store, tmp_path: Path, text: str) -> None:
    folder = yolo_set(tmp_path / "y")
    (folder / "val.txt").write_text("./images/val/img_003.jpg\n")
    (folder / "data.yaml").write_text(text.replace("{folder}", str(folder)))
    assert bring(store, tmp_path / "o", folder.as_uri()).imported == 4


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("7 0.5 0.5 0.1 0.1", "class 7"),
        ("1 nan 0.5 0.1 0.1", "NaN"),
        ("1 0.5 0.5 1.5 0.1", "outside"),
        ("1 0.5 0.5 0 0.1", "no area"),
        ("1 0.5 0.5 0.1", "3 numbers"),
        ("fire 0.5 0.5 0.1 0.1", "not numbers"),
    ],
)
def test_a_wrong_label_line_refuses_the_import_or_quarantines_the_picture(
    store: Store, tmp_path: Path, line: str, named: str
) -> None:
    folder = yolo_set(tmp_path / "y")
    (folder / "labels/train/img_001.txt").write_text(f"0 0.5 0.5 0.1 0.1\n{line}\n")
    with pytest.raises(InputError, match=rf"labels/train/img_001.txt:2.*{named}.*on_error"):
        bring(store, tmp_path / "o", folder.as_uri())
    assert not list(store.list("frames/")) + list(store.list("labels/")) + list(store.list("quarantine/"))
    result = bring(store, tmp_path / "o", folder.as_uri(), on_error="quarantine")
    assert (result.imported, result.quarantined, result.reasons) == (3, 1, {"bad_label": 1})
    (record,) = [item.key for item in store.list("quarantine/") if item.key.endswith(".json")]
    assert store.get_json(record)["detail"].startswith("labels/train/img_001.txt:2")


def test_many_wrong_labels_are_counted_and_the_first_ten_named(store: Store, tmp_path: Path) -> None:
    folder = yolo_set(tmp_path / "y", count=14)
    for path in (folder / "labels").rglob("*.txt"):
        path.write_text("5 0.5 0.5 0.1 0.1\n")
    with pytest.raises(InputError, match="14 labels cannot be used") as caught:
        bring(store, tmp_path / "o", folder.as_uri())
    assert caught.value.problem.count("img_") == 10
    assert "and 4 more" in caught.value.problem


def _coco(change: Callable[[dict], object]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        file = coco_set(folder) / "valid/_annotations.coco.json"
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))
        return folder

    return make


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (_coco(lambda c: c["annotations"][0].update(bbox=[10, 10, 0, 5])), "annotation 1: the box has no area"),
        (_coco(lambda c: c["annotations"][0].update(bbox=[10, 10, float("nan"), 5])), "annotation 1: .*NaN"),
        (_coco(lambda c: c["annotations"][0].update(bbox=[150, 10, 90, 5])), "annotation 1: the box is outside the 192x144"),
        (_coco(lambda c: c["annotations"][0].update(bbox=[1, 2, 3])), "annotation 1: .*bbox"),
        (_coco(lambda c: c["annotations"][0].update(category_id=77)), "category_id 77"),
        (_coco(lambda c: c["annotations"][0].update(image_id=77)), "image_id 77"),
        (_coco(lambda c: c["annotations"][0].update(image_id=[1])), r"image_id \[1\] is not listed"),
        (_coco(lambda c: c["annotations"][0].update(category_id=float("inf"))), "annotation 1: category_id"),
        (_coco(lambda c: c["images"][0].update(width=float("inf"))), "images or categories are malformed"),
        (_coco(lambda c: c["images"][0].update(file_name="a\0.jpg")), "no usable path"),
        (_coco(lambda c: c["images"][0].update(file_name="a" * 5000)), "no usable path .*too long"),
        (_coco(lambda c: c["images"][0].update(file_name="../../secret.jpg")), "secret.jpg.* leads outside"),
        (_coco(lambda c: c["images"][0].update(file_name="/etc/secret.jpg")), "secret.jpg.* leads outside"),
        (_coco(lambda c: c["images"][0].update(file_name="gone.jpg")), "image gone.jpg"),
        (_coco(lambda c: c["images"][0].update(width=100)), "says 100x144"),
        (_coco(lambda c: c.pop("categories")), "no YOLO, COCO or VOC set"),
        (lambda f: voc_set(f, voc_xml(box=(50, 20, 40, 60))), "Annotations/a.xml object 1: the box has no area"),
        (lambda f: voc_set(f, voc_xml(box=("x", 20, 40, 60))), "Annotations/a.xml object 1: bndbox"),
        (lambda f: voc_set(f, voc_xml(box=(5, 5, 400, 60))), "Annotations/a.xml object 1: the box is outside"),
        (lambda f: voc_set(f, voc_xml(name="../../../secret.jpg")), "secret.jpg.* leads outside"),
        (lambda f: voc_set(f, "<annotation><object>"), "Annotations/a.xml is not XML"),
        (lambda f: voc_set(f, '<!DOCTYPE a [<!ENTITY b "c">]><annotation/>'), "Annotations/a.xml has a DTD"),
        (lambda f: voc_set(f, "<svg/>"), "begins with <svg>"),
    ],
)  # fmt: skip
def test_a_wrong_coco_or_voc_label_is_refused_by_name(
    store: Store, tmp_path: Path, make: Callable[[Path], Path], named: str
) -> None:
    (tmp_path / "secret.jpg").write_bytes(jpeg(9))
    with pytest.raises(InputError, match=named):
        bring(store, tmp_path / "o", make(tmp_path / "set").as_uri())
    assert not list(store.list("labels/"))


@pytest.mark.parametrize(
    "text",
    [
        "path: ../other\ntrain: images/train\nnames: [smoke]\n",
        "path: /etc\ntrain: images/train\nnames: [smoke]\n",
        "train: ../../other/images\nnames: [smoke]\n",
        "train: list.txt\nnames: [smoke]\n",
    ],
)
def test_data_yaml_that_leads_outside_its_folder_is_refused(store: Store, tmp_path: Path, text: str) -> None:
    folder = yolo_set(tmp_path / "y")
    yolo_set(tmp_path / "other")
    (folder / "list.txt").write_text("../other/images/train/img_000.jpg\n")
    (folder / "data.yaml").write_text(text)
    with pytest.raises(InputError, match="leads outside"):
        bring(store, tmp_path / "o", folder.as_uri())


def test_a_linked_label_outside_the_folder_is_refused(store: Store, tmp_path: Path) -> None:
    folder = yolo_set(tmp_path / "y")
    (tmp_path / "secret.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    (folder / "labels/train/img_000.txt").unlink()
    (folder / "labels/train/img_000.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(InputError, match=r"img_000.txt leads outside"):
        bring(store, tmp_path / "o", folder.as_uri())


@pytest.mark.parametrize(
    ("item", "named"),
    [
        ({"coverz": ["fire"]}, "coverz"),
        ({"covers": ["flood"]}, "flood"),
        ({"covers": "fire"}, r"imports\[0\]: covers"),
        ({"class_map": ["smoke"]}, r"imports\[0\]: .*class_map"),
        ({"class_map": {"smoke": "flood"}}, "flood"),
        ({"class_map": {"smokee": "smoke"}}, "smokee"),
        ({"format": "tfrecord"}, "tfrecord"),
        ({"on_error": "ignore"}, "on_error"),
        ({"unlabelled": "maybe"}, "unlabelled"),
        ({"sequence_pattern": "("}, "sequence_pattern"),
        ({"classes": ["dog"]}, "smoke, fire"),
        ({"uri": "ftp://host/set"}, r"imports\[0\].uri"),
        ({"uri": "file:///nowhere/set"}, "/nowhere/set"),
        ({"uri": "file:///nowhere/set.zip"}, "/nowhere/set.zip"),
        ({"uri": "roboflow://workspace/project"}, "workspace/project/version"),
    ],
)
def test_an_import_that_cannot_be_used_is_refused_by_name(
    store: Store, tmp_path: Path, item: dict[str, object], named: str
) -> None:
    given = {"uri": yolo_set(tmp_path / "y").as_uri()} | item
    with pytest.raises(HaechiError, match=named):
        bring(store, tmp_path / "o", str(given.pop("uri")), **given)


def test_empty_places_are_named(store: Store, tmp_path: Path) -> None:
    with pytest.raises(NoDataError, match=f"s3://{store.bucket}/sets/none"):
        bring(store, tmp_path / "o", f"s3://{store.bucket}/sets/none")
    with pytest.raises(InputError, match=r"sets/none.zip does not exist"):
        bring(store, tmp_path / "o", f"s3://{store.bucket}/sets/none.zip")
    folder = yolo_set(tmp_path / "y", count=1)
    (folder / "data.yaml").write_text("train: images/train\nnames: [smoke]\n")
    (folder / "images/train/img_000.jpg").write_bytes(b"no picture")
    with pytest.raises(NoDataError, match="no usable labelled image"):
        bring(store, tmp_path / "o", folder.as_uri())


# --- zips ----------------------------------------------------------------------------------------------------------


def _zip(path: Path, *entries: tuple[str, bytes], link: bool = False) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in entries:
            info = zipfile.ZipInfo("placeholder")
            info.filename = name  # as given: the constructor mends what a hostile archive would not
            info.compress_type = zipfile.ZIP_DEFLATED
            if link:
                info.external_attr = (stat.S_IFLNK | 0o777) << 16
            file.writestr(info, data)
    return path


@pytest.mark.parametrize(
    ("entries", "link", "named"),
    [
        ([("../evil.txt", b"x")], False, "leads outside"),
        ([("a/../../evil.txt", b"x")], False, "leads outside"),
        ([("/tmp/evil.txt", b"x")], False, "not a relative path"),
        ([("C:/evil.txt", b"x")], False, "not a relative path"),
        ([("a\\evil.txt", b"x")], False, "backslashes"),
        ([("link", b"/etc/passwd")], True, "link"),
        ([("A.txt", b"x"), ("a.txt", b"y")], False, "twice"),
        ([("a", b"x"), ("a/b", b"y")], False, "'a' is both a file and a folder"),
        ([("a/b/c", b"x"), ("a", b"y")], False, "'a' is both a file and a folder"),
        ([("n" * 300, b"x")], False, "too long a name"),
        ([("d/" * 600 + "x", b"x")], False, "too long a name"),
        ([("zeros.bin", bytes(80 * 2**20))], False, "bomb"),
    ],
)
def test_a_hostile_zip_is_refused_before_anything_is_written(
    store: Store, tmp_path: Path, entries: list[tuple[str, bytes]], link: bool, named: str
) -> None:
    packed = _zip(tmp_path / "x.zip", *entries, link=link)
    with pytest.raises(InputError, match=named):
        bring(store, tmp_path / "out/o", packed.as_uri())
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["o", "out", "x.zip"]


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_zip_is_refused_wherever_the_damage_is(tmp_path: Path, method: int) -> None:
    with zipfile.ZipFile(tmp_path / "whole.zip", "w", method) as file:
        file.writestr("a.txt", b"".join(b"%d " % number for number in range(2000)))
    whole = (tmp_path / "whole.zip").read_bytes()
    for place in range(30, len(whole) - 100, 97):
        (tmp_path / "x.zip").write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        (tmp_path / f"o{place}").mkdir()
        with pytest.raises(InputError, match=r"x.zip"):
            archive.extract(tmp_path / "x.zip", tmp_path / f"o{place}", "x.zip")


def test_a_zip_that_lies_of_its_sizes_writes_no_more_than_it_says(tmp_path: Path) -> None:
    packed = _zip(tmp_path / "x.zip", ("zeros.bin", bytes(2**20)))
    data = bytearray(packed.read_bytes())
    size = data.rfind(b"PK\x01\x02") + 24
    data[size : size + 4] = (10).to_bytes(4, "little")
    packed.write_bytes(data)
    (tmp_path / "o").mkdir()
    with pytest.raises(InputError, match=r"not a sound zip"):
        archive.extract(packed, tmp_path / "o", "x.zip")
    assert (tmp_path / "o/zeros.bin").stat().st_size <= 10


def test_an_encrypted_zip_is_refused_by_name(tmp_path: Path) -> None:
    packed = _zip(tmp_path / "x.zip", ("a.txt", b"x"))
    data = bytearray(packed.read_bytes())
    data[data.rfind(b"PK\x01\x02") + 8] |= 1
    packed.write_bytes(data)
    with pytest.raises(InputError, match=r"'a.txt' is encrypted"):
        archive.extract(packed, tmp_path, "x.zip")


def test_a_zip_with_too_many_entries_or_none_at_all_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_ENTRIES", 2)
    packed = _zip(tmp_path / "x.zip", ("a", b""), ("b", b""), ("c", b""))
    with pytest.raises(InputError, match="3 entries"):
        archive.extract(packed, tmp_path, "x.zip")
    packed.write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(InputError, match=r"x.zip is not a sound zip"):
        archive.extract(packed, tmp_path, "x.zip")


# --- again, twice, without labels ----------------------------------------------------------------------------------


def test_importing_the_same_again_writes_and_reads_nothing(store: Store, tmp_path: Path) -> None:
    folder = yolo_set(tmp_path / "y")
    first = bring(store, tmp_path / "1", folder.as_uri())
    before = [(item.key, item.modified) for item in store.list("")]
    again = bring(store, tmp_path / "2", folder.as_uri(), run="run-2")
    assert [(item.key, item.modified) for item in store.list("")] == before
    assert (again.imported, again.exports) == (0, first.exports)
    assert bring(store, tmp_path / "3", folder.as_uri()) == first, "the same run repeated tells the same"
    (folder / "labels/train/img_000.txt").touch()
    assert bring(store, tmp_path / "4", folder.as_uri(), run="run-4").exports == first.exports
    (folder / "labels/train/img_000.txt").write_text("")
    assert bring(store, tmp_path / "5", folder.as_uri(), run="run-5").exports != first.exports


def test_identical_pictures_are_one_frame_and_contradictions_are_told(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = yolo_set(tmp_path / "y")
    for name, seed in (("img_000", 100), ("img_001", 101)):
        (folder / f"images/val/{name}.jpg").write_bytes(jpeg(seed))
    (folder / "labels/val/img_000.txt").write_text("0 0.5 0.5 0.25 0.5\n")
    (folder / "labels/val/img_001.txt").write_text("0 0.2 0.2 0.1 0.1\n")
    assert bring(store, tmp_path / "o", folder.as_uri()).imported == 4
    (export,) = label_exports(store)
    assert export.info["notes"] == {"identical images merged": 2, "identical images with other boxes, first kept": 1}
    assert "img_001.jpg is the same picture" in capsys.readouterr().err
    (kept,) = [row for row in read_export(store, export) if row.key.endswith("train/img_001.jpg")]
    assert shapes(kept) == [("fire", 72, 36, 120, 108)]


@pytest.mark.parametrize(("choice", "imported"), [("skip", 3), ("background", 4)])
def test_a_picture_without_a_label_file_is_background_only_if_said_so(
    store: Store, tmp_path: Path, choice: str, imported: int
) -> None:
    folder = yolo_set(tmp_path / "y")
    (folder / "labels/train/img_000.txt").unlink()
    (folder / "labels/train/img_001.txt").write_text("")
    assert bring(store, tmp_path / "o", folder.as_uri(), unlabelled=choice).imported == imported
    rows = exported(store)
    assert shapes(rows["img_001.jpg"]) == []
    assert ("img_000.jpg" in rows) == (choice == "background")


def test_a_set_without_any_label_file_is_refused(store: Store, tmp_path: Path) -> None:
    folder = yolo_set(tmp_path / "y")
    (folder / "labels").rename(folder / "annotations")
    with pytest.raises(InputError, match=r"none of 4 images has a label file.*labels/train/img_000.txt"):
        bring(store, tmp_path / "o", folder.as_uri(), unlabelled="background")


def test_a_dark_small_picture_with_a_label_is_kept_and_a_broken_one_quarantined(store: Store, tmp_path: Path) -> None:
    folder = yolo_set(tmp_path / "y")
    (folder / "images/train/img_000.jpg").write_bytes(encoded(Image.new("RGB", (40, 40)), "JPEG"))
    (folder / "images/train/img_001.jpg").write_bytes(jpeg(1)[:1200])
    result = bring(store, tmp_path / "o", folder.as_uri())
    assert (result.imported, result.reasons) == (3, {"corrupt": 1})


def test_raw_copies_of_labelled_frames_wait_for_no_label(store: Store, tmp_path: Path) -> None:
    store.put("raw/gate/1.jpg", jpeg(100))
    store.put("raw/gate/2.jpg", jpeg(5))
    sources = [{"uri": f"s3://{store.bucket}/raw"}]
    imports = [{"uri": yolo_set(tmp_path / "y").as_uri()}]
    result = ingest(sources, imports, CLASSES, {}, "1", tmp_path / "o", store.settings)
    assert (result.imported, result.accepted, result.duplicates, result.pending) == (4, 1, 1, 1)
    # The other order: raw first, labelled later.
    other = Store(replace(store.settings, bucket=store.bucket + "-2"))
    other.ensure_bucket()
    for key in ("raw/gate/1.jpg", "raw/gate/2.jpg"):
        other.put(key, store.get(key))
    sources = [{"uri": f"s3://{other.bucket}/raw"}]
    assert ingest(sources, [], CLASSES, {}, "1", tmp_path / "o", other.settings).pending == 2
    assert ingest(sources, imports, CLASSES, {}, "2", tmp_path / "o", other.settings).pending == 1


# --- names and videos ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fire1_mp4-24_jpg.rf.5a09c11c9facf23a9413ca63bc2a6085.jpg", "fire1_mp4"),
        ("pexels-alan-w-8365993_mp4-7_jpg.rf.06db4e72abee6d5ae4dac4d213fdd7b5.jpg", "pexels-alan-w-8365993_mp4"),
        ("cam02_000123.png", "cam02"),
        ("video7-3.jpg", "video7"),
        ("img_1002_jpg.rf.ab.jpg", ""),
        ("000000000025.jpg", ""),
        ("fall001.jpg", ""),
        ("rgb_0974.jpg", ""),
        ("camel_12.jpg", ""),
        ("fire1_mp4.jpg", ""),
    ],
)
def test_a_video_is_known_by_a_word_that_says_so(name: str, expected: str) -> None:
    assert sequence_of(name, None) == expected


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("rgb_0974.jpg", r"^(rgb)_", "rgb"),
        ("img_1.jpg", r"^(rgb)_", ""),
        ("walk-3-0001.jpg", r"^walk-\d+", "walk-3"),
        ("fire1_mp4-24_jpg.rf.5a.jpg", r"(?!)", ""),
    ],
)
def test_a_sequence_pattern_overrides_it(name: str, pattern: str, expected: str) -> None:
    assert sequence_of(name, re.compile(pattern)) == expected


def test_another_sequence_pattern_is_another_export(store: Store, tmp_path: Path) -> None:
    folder = yolo_set(tmp_path / "y")
    bring(store, tmp_path / "o", folder.as_uri())
    bring(store, tmp_path / "o", folder.as_uri(), run="2", sequence_pattern="^img")
    newest = label_exports(store)[-1]
    assert {row.sequence for row in read_export(store, newest)} == {"y/img"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("annotations/instances_val2017.json", "val"), ("valid/_annotations.coco.json", "val"), ("a/trainer.json", "")],
)
def test_split_names_are_known_as_words(text: str, expected: str) -> None:
    assert split_hint(text) == expected


# --- Roboflow: the one place where a fake stands for someone else's service (no network, no key) ---------------------


class FakeRoboflow:
    """Behaves as the SDK's chain of calls does, and writes a set where `download` is told to."""

    calls: list[object] = []  # noqa: RUF012

    def __init__(self, api_key: str) -> None:
        if api_key == "wrong":
            raise RuntimeError("401 for key wrong")
        self.calls.append(api_key)

    def workspace(self, name: str) -> FakeRoboflow:
        self.calls.append(name)
        return self

    project = version = workspace

    def download(self, model_format: str, location: str, overwrite: bool) -> None:
        print("downloading")
        self.calls.append((model_format, overwrite))
        yolo_set(Path(location))


def test_a_roboflow_version_is_downloaded_by_the_sdk(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import roboflow

    monkeypatch.setattr(roboflow, "Roboflow", FakeRoboflow)
    monkeypatch.setattr(FakeRoboflow, "calls", [])
    settings = replace(store.settings, roboflow_api_key="k")
    given = [{"uri": "roboflow://acme/fires/8"}]
    result = ingest([], given, CLASSES, {}, "1", tmp_path / "out/o", settings)
    assert result.imported == 4
    assert FakeRoboflow.calls == ["k", "acme", "fires", 8, ("yolov8", True)]
    assert exported(store)["img_000.jpg"].key == "roboflow://acme/fires/8/images/train/img_000.jpg"
    assert capsys.readouterr().out == ""
    assert ingest([], given, CLASSES, {}, "2", tmp_path / "out/o", settings).imported == 0
    assert len(FakeRoboflow.calls) == 5, "a version never changes, so it is not downloaded twice"


def test_roboflow_errors_name_the_project_and_hide_the_key(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="ROBOFLOW_API_KEY"):
        download("roboflow://acme/fires/8", "auto", tmp_path, "")
    with pytest.raises(StorageError, match=r"roboflow://acme/fires/8.*401") as caught:
        download("roboflow://acme/fires/8", "auto", tmp_path, "wrong", sdk=FakeRoboflow)
    assert "wrong" not in str(caught.value)


# --- real sets -----------------------------------------------------------------------------------------------------


@pytest.mark.realdata
@pytest.mark.parametrize(("name", "frames", "boxes"), [("person_down", 125, 127), ("entrance", 80, 275)])
def test_real_sets_are_imported_whole(
    store: Store, tmp_path: Path, realdata: Path, name: str, frames: int, boxes: int
) -> None:
    classes = ["person_down", "person", "car", "dog"]
    assert bring(store, tmp_path / "o", (realdata / name).as_uri(), classes=classes).imported == frames
    (export,) = label_exports(store)
    assert (export.info["boxes"], export.info["dropped_boxes"]) == (boxes, {})
