"""Settings: read from the environment, checked at once, handed on unchanged, never telling a secret."""

from __future__ import annotations

from pathlib import Path

import pytest

from haechi.components.shared.errors import SettingsError
from haechi.components.shared.settings import Settings

FULL = {
    "HAECHI_S3_ENDPOINT": "https://s3.example.org:9000",
    "HAECHI_S3_ACCESS_KEY": "key",
    "HAECHI_S3_SECRET_KEY": "s3cr3t",
    "HAECHI_S3_REGION": "eu-west-3",
    "HAECHI_BUCKET": "flywheel",
    "MLFLOW_TRACKING_URI": "http://mlflow:5000",
    "HAECHI_CACHE_DIR": "/var/cache/haechi",
    "HAECHI_WORKERS": "3",
    "HAECHI_THREADS": "2",
    "ROBOFLOW_API_KEY": "rf-s3cr3t",
    "HAECHI_GIT_CREDENTIALS": "/run/git",
    "HAECHI_ENDPOINT_CREDENTIALS": "/run/endpoint",
}


def test_to_env_is_the_inverse_of_from_env() -> None:
    assert Settings.from_env(FULL).to_env() == FULL
    assert Settings.from_env(Settings().to_env()) == Settings()


@pytest.mark.parametrize("env", [{}, dict.fromkeys(FULL, "")])
def test_unset_and_empty_variables_mean_the_defaults(env: dict[str, str]) -> None:
    settings = Settings.from_env(env)
    assert settings == Settings()
    assert (settings.bucket, settings.s3_region, settings.workers) == ("haechi", "us-east-1", 8)
    assert settings.cache_path is None
    assert Settings(cache_dir="/x").cache_path == Path("/x")


def test_the_environment_of_the_process_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAECHI_BUCKET", "from-the-process")
    assert Settings.from_env().bucket == "from-the-process"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HAECHI_S3_ENDPOINT", "minio:9000"),
        ("HAECHI_S3_ENDPOINT", "minio"),
        ("HAECHI_S3_ENDPOINT", "ftp://minio:9000"),
        ("HAECHI_S3_ENDPOINT", "http://"),
        ("HAECHI_S3_ENDPOINT", "http://:9000"),
        ("HAECHI_S3_ENDPOINT", "http://minio:port"),
        ("HAECHI_S3_ENDPOINT", "http://minio:99999"),
        ("HAECHI_S3_ENDPOINT", "http://minio:9000/bucket"),
        ("HAECHI_S3_ENDPOINT", "http://minio:9000?x=1"),
        ("HAECHI_S3_ENDPOINT", "http://[::1"),
        ("HAECHI_S3_ENDPOINT", "http://key:s3cr3t@minio:9000"),
        ("HAECHI_WORKERS", "0"),
        ("HAECHI_WORKERS", "many"),
        ("HAECHI_WORKERS", "1.5"),
        ("HAECHI_THREADS", "-1"),
    ],
)
def test_a_malformed_variable_is_named_with_a_remedy(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=name) as caught:
        Settings.from_env(FULL | {name: value})
    assert caught.value.remedy and "s3cr3t" not in str(caught.value)


@pytest.mark.parametrize("missing", ["HAECHI_S3_ACCESS_KEY", "HAECHI_S3_SECRET_KEY"])
def test_half_of_the_credentials_are_refused(missing: str) -> None:
    with pytest.raises(SettingsError, match="only one of"):
        Settings.from_env({name: value for name, value in FULL.items() if name != missing})


@pytest.mark.parametrize(
    "endpoint", ["http://127.0.0.1:8333", "https://s3.amazonaws.com", "http://[::1]:9000", "http://m/"]
)
def test_endpoints_in_use_are_accepted(endpoint: str) -> None:
    assert Settings(s3_endpoint=endpoint).s3_endpoint == endpoint


def test_secrets_are_never_printed() -> None:
    assert "s3cr3t" not in repr(Settings.from_env(FULL)) + str(Settings.from_env(FULL))
