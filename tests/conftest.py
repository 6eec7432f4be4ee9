"""Fixtures: a real SeaweedFS S3 server, MLflow server and browser, fresh buckets, and the real data where it is present."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from haechi.components.shared.settings import Settings
from haechi.components.shared.storage import Store

CHROMIUM = Path("/usr/bin/chromium")
SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def s3_settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """Settings of a SeaweedFS server that runs for the whole session."""
    from haechi.pipelines.services import ObjectStoreService

    with ObjectStoreService(tmp_path_factory.mktemp("seaweedfs")) as service:
        yield service.settings()


@pytest.fixture(scope="session")
def mlflow_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URI of an MLflow server on SQLite that runs for the whole session."""
    from haechi.pipelines.services import TrackingService

    with TrackingService(tmp_path_factory.mktemp("mlflow")) as service:
        yield service.uri


@pytest.fixture
def settings(s3_settings: Settings) -> Settings:
    """Settings with a bucket of the test's own."""
    from dataclasses import replace

    return replace(s3_settings, bucket=f"test-{uuid.uuid4().hex[:12]}")


@pytest.fixture
def store(settings: Settings) -> Store:
    """A store on the test's own, existing bucket."""
    store = Store(settings)
    store.ensure_bucket()
    return store


@pytest.fixture(scope="session")
def realdata() -> Path:
    """The folder of real frames and weights, or a skip with the reason."""
    path = SHARED / "data"
    if not path.is_dir():
        pytest.skip(f"real frames are not present at {path}")
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium, the system's own."""
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not installed (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=str(CHROMIUM), args=arguments)
        yield chromium
        chromium.close()
