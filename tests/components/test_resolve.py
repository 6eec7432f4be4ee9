"""resolve: pins the champion and the previous dataset, and tells at the start what is not there."""

from __future__ import annotations

import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from haechi.components.resolve.step import Resolved, resolve
from haechi.components.shared.errors import (
    HaechiError,
    InputError,
    IntegrityError,
    StorageError,
    TrackingError,
)
from haechi.components.shared.settings import Settings
from haechi.components.shared.storage import Store
from haechi.components.shared.tracking import Tracker

VERSION = "0123456789ab"


@pytest.fixture
def tracked(settings: Settings, store: Store, mlflow_uri: str) -> Settings:
    """Settings with a bucket of the test's own, and MLflow."""
    return replace(settings, mlflow_tracking_uri=mlflow_uri)


@pytest.fixture
def name() -> str:
    """A model name that no other test uses."""
    return f"gate-{uuid.uuid4().hex[:8]}"


def make_champion(settings: Settings, name: str, version: str = VERSION) -> None:
    tracker = Tracker(settings)
    registered = tracker.register(name, version, f"s3://{settings.bucket}/models/{name}/{version}/", "", {})
    tracker.set_alias(name, "champion", registered.number)


def test_a_first_run_has_neither_champion_nor_dataset(tracked: Settings, name: str) -> None:
    assert resolve(name, tracked) == Resolved("", "")


def test_the_champion_and_the_newest_complete_dataset_are_pinned(tracked: Settings, store: Store, name: str) -> None:
    make_champion(tracked, name)
    store.put_json(f"models/{name}/{VERSION}/model.json", {})
    store.put_json(f"datasets/{name}/{'a' * 64}/stats.json", {})
    store.put(f"datasets/{name}/{'f' * 64}/manifest.parquet", b"half a dataset: no stats.json yet")
    store.put_json(f"datasets/{name}-other/{'e' * 64}/stats.json", {})
    assert resolve(name, tracked) == Resolved(VERSION, "a" * 64)


def test_a_champion_without_its_folder_in_the_store_is_an_error(tracked: Settings, name: str) -> None:
    make_champion(tracked, name)
    with pytest.raises(
        IntegrityError, match=f"names {VERSION}, but s3://.*/models/{name}/{VERSION}/model.json does not"
    ):
        resolve(name, tracked)


def test_a_champion_that_was_registered_by_hand_is_an_error(tracked: Settings, name: str) -> None:
    tracker = Tracker(tracked)
    tracker.register(name, VERSION, "s3://elsewhere/model/", "", {})
    client = tracker._client
    client.delete_model_version_tag(name, "1", "haechi.version")
    tracker.set_alias(name, "champion", 1)
    with pytest.raises(IntegrityError, match=r"MLflow's version 1, which has no tag haechi\.version"):
        resolve(name, tracked)


@pytest.mark.parametrize(
    ("change", "name", "error", "message"),
    [
        ({"bucket": "not-there"}, "gate", StorageError, "bucket 'not-there' does not exist"),
        ({"s3_secret_key": "wrong"}, "gate", StorageError, "refuses our credentials"),
        ({"s3_endpoint": "http://127.0.0.1:9"}, "gate", StorageError, "cannot reach the object store"),
        ({"mlflow_tracking_uri": ""}, "gate", TrackingError, "MLFLOW_TRACKING_URI is not set"),
        ({}, "gate'--", InputError, "Give kebab-case"),
    ],
)
def test_what_is_wrong_is_told_at_the_start(
    tracked: Settings, change: dict[str, str], name: str, error: type[HaechiError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        resolve(name, replace(tracked, **change))
    assert caught.value.remedy


def test_the_component_compiles_with_both_outputs(tmp_path: Path) -> None:
    from haechi.components.resolve.component import resolve as component

    outputs = component.component_spec.outputs
    assert sorted(outputs) == ["champion", "previous_dataset"]
    assert component.component_spec.implementation.container.image == "haechi/steps:0.1.0"
