"""Kubernetes YAML in the repository: parses, fits Kubernetes' own schemas, and kustomizations name existing files."""

from __future__ import annotations

from pathlib import Path

import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("manifests", "pipelines/compiled")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.yaml"))
BUILT_IN = ("v1", "apps/v1", "rbac.authorization.k8s.io/v1", "networking.k8s.io/v1", "policy/v1", "batch/v1")


def _documents(path: Path) -> list[dict[str, object]]:
    return [entry for entry in yaml.safe_load_all(path.read_text()) if entry]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_manifest_parses_and_a_kustomization_names_existing_files(path: Path) -> None:
    documents = _documents(path)
    assert documents
    for entry in documents:
        if entry.get("kind") == "Kustomization":
            names = entry.get("resources", [])
            assert isinstance(names, list)
            for name in names:
                assert (path.parent / name).exists(), f"{path} names {name}"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "manifests").rglob("*.yaml")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_a_built_in_object_fits_its_schema_and_carries_the_recommended_labels(path: Path) -> None:
    for entry in _documents(path):
        if entry["apiVersion"] in BUILT_IN:
            kubernetes_validate.validate(entry, "1.34", strict=True)
            labels = entry["metadata"]["labels"]  # type: ignore[index]
            assert {"app.kubernetes.io/name", "app.kubernetes.io/part-of"} <= set(labels)


def test_one_object_a_file_named_after_its_kind() -> None:
    for path in (ROOT / "manifests").rglob("*.yaml"):
        documents = _documents(path)
        assert len(documents) == 1
        assert path.stem.split("-")[0] == str(documents[0]["kind"]).lower()


def test_there_is_a_kustomization_for_the_compiled_pipeline() -> None:
    entry = yaml.safe_load((ROOT / "pipelines/compiled/kustomization.yaml").read_text())
    assert set(entry["resources"]) == {"pipeline.yaml", "pipelineversion.yaml"}
