"""Fetching a model folder: local and stored addresses, digests, and a cache that several processes share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import tiny_model_folder

from haechi.components.shared.errors import HaechiError, InputError, IntegrityError, ModelError, SettingsError
from haechi.components.shared.model_folder import ModelFolder, fetch_model, read_golden
from haechi.components.shared.storage import Store

PREFIX = "models/tiny/1/"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model_folder(tmp_path / "a model", ["person"], checkpoint=b"weights")
    return tmp_path / "a model"


@pytest.fixture
def uri(store: Store, folder: Path) -> str:
    """Address of the same folder in the store."""
    store.put_folder(PREFIX, folder, "model.json")
    return store.uri(PREFIX)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_local_folders_are_used_in_place(folder: Path, tmp_path: Path) -> None:
    for address in (str(folder), folder.as_uri()):
        assert fetch_model(None, address, tmp_path / "cache") == folder
    assert not (tmp_path / "cache").exists()


def test_a_stored_folder_is_fetched_whole_and_then_kept(store: Store, uri: str, folder: Path, tmp_path: Path) -> None:
    first = fetch_model(store, uri, tmp_path / "cache")
    assert files(first) == files(folder)
    for item in list(store.list(PREFIX)):
        store.remove(item.key)
    assert fetch_model(store, uri.rstrip("/"), tmp_path / "cache") == first


@pytest.mark.parametrize("name", ["model.onnx", "model.json", "checkpoint.pt"])
def test_a_damaged_copy_in_the_cache_is_fetched_again(
    store: Store, uri: str, folder: Path, tmp_path: Path, name: str
) -> None:
    kept = fetch_model(store, uri, tmp_path / "cache")
    (kept / name).write_bytes(b"damaged")
    assert files(fetch_model(store, uri, tmp_path / "cache")) == files(folder)


@pytest.mark.parametrize("name", ["model.onnx", "checkpoint.pt"])
def test_a_damaged_stored_folder_is_refused_and_not_kept(store: Store, uri: str, tmp_path: Path, name: str) -> None:
    store.put(PREFIX + name, b"damaged")
    with pytest.raises(IntegrityError, match=uri):
        fetch_model(store, uri, tmp_path / "cache")
    assert not (tmp_path / "cache" / store.bucket / "models" / "tiny" / "1").exists()


def test_a_folder_of_another_bucket_is_found(store: Store, folder: Path, tmp_path: Path) -> None:
    other = store.for_bucket(f"{store.bucket}-other")
    other.ensure_bucket()
    other.put_folder(PREFIX, folder, "model.json")
    fetched = fetch_model(store, other.uri(PREFIX), tmp_path / "cache")
    assert ModelFolder.load(fetched).classes == ("person",)


@pytest.mark.parametrize(
    ("address", "error", "named"),
    [
        ("", InputError, "empty"),
        ("best.pt", InputError, "haechi export --checkpoint best.pt"),
        ("s3://bucket/best.pt", InputError, "haechi export"),
        ("model/model.onnx", InputError, "model/model.onnx"),
        ("https://example.org/model", InputError, "https://example.org/model"),
        ("/no/such/folder", ModelError, "/no/such/folder"),
        ("s3://{bucket}/models/tiny/none/", ModelError, "models/tiny/none"),
        ("s3://{bucket}/", InputError, "s3://"),
        ("s3://{bucket}/models/../../x/", InputError, "models/../../x"),
        ("s3://../models/x/", InputError, "'..' is no bucket name"),
    ],
)
def test_unusable_addresses_are_named(
    store: Store, tmp_path: Path, address: str, error: type[HaechiError], named: str
) -> None:
    with pytest.raises(error) as caught:
        fetch_model(store, address.format(bucket=store.bucket), tmp_path / "cache")
    assert named in str(caught.value)
    assert caught.value.remedy
    assert not (tmp_path / "models").exists(), "nothing is written beside the cache"


def test_a_stored_folder_without_a_store_is_a_missing_setting(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="HAECHI_S3_ENDPOINT"):
        fetch_model(None, "s3://bucket/models/tiny/1/", tmp_path)


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ({"name": "../../x"}, "name '../../x'"),
        ({"name": 3}, "name is of another kind"),
        ({"imgsz": 32_000_000}, "imgsz 32000000"),
        ({"imgsz": "320"}, "imgsz is of another kind"),
        ({"imgsz": 100}, "imgsz 100"),
        ({"stride": 0}, "stride 0"),
        ({"iou": "x"}, "iou is of another kind"),
        ({"iou": float("nan")}, "iou nan"),
        ({"golden": -1}, "golden is -1"),
        ({"classes": [1]}, "classes are not all names"),
        ({"thresholds": [1]}, "thresholds is of another kind"),
        ({"thresholds": {"person": "x"}}, "not supported"),
        ({"version": "0" * 12}, "version 000000000000"),
    ],
)
def test_a_description_that_cannot_be_is_named(folder: Path, entry: dict[str, object], named: str) -> None:
    file = folder / "model.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entry))
    with pytest.raises(ModelError) as caught:
        ModelFolder.load(folder)
    assert named in str(caught.value)


@pytest.mark.parametrize("text", ["[" * 100_000, "\0", "[]", '{"name":' + "9" * 5000 + "}"])
def test_a_description_that_is_none_is_named(folder: Path, text: str) -> None:
    (folder / "model.json").write_text(text)
    with pytest.raises(ModelError, match="is not a model folder"):
        ModelFolder.load(folder)


@pytest.mark.parametrize("name", ["../../model.json", "/etc/hostname", "..", "", "a\0b", "x" * 999])
def test_golden_images_are_read_from_their_own_folder_only(folder: Path, name: str) -> None:
    file = folder / "golden" / "golden.json"
    told = json.loads(file.read_text())
    told["images"][0]["file"] = name
    file.write_text(json.dumps(told))
    with pytest.raises(IntegrityError, match=r"golden images of .* cannot be read"):
        read_golden(folder)


@pytest.mark.parametrize("boxes", ["abc", 3, [{"box": [1, 2, 3], "score": 1, "class_id": 0}], [{"class_id": 10**30}]])
def test_golden_boxes_that_are_none_are_named(folder: Path, boxes: object) -> None:
    file = folder / "golden" / "golden.json"
    told = json.loads(file.read_text())
    if isinstance(boxes, list):
        boxes = [{"box": [1, 2, 3, 4], "score": 1} | box for box in boxes]
    told["images"][0]["boxes"] = boxes
    file.write_text(json.dumps(told))
    with pytest.raises(IntegrityError, match=r"golden images of .* cannot be read"):
        read_golden(folder)
