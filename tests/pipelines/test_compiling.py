"""The compiled pipeline: equal to the source, free of dangling references, valid as Kubernetes objects."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from haechi.pipelines.compiling import COMPILED, compile_all, dangling_references, differences

SCHEMAS = Path(__file__).resolve().parents[3] / "shared" / "crds"


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compiled")
    compile_all(folder)
    return folder


@pytest.fixture
def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((COMPILED / "training.yaml").read_text()))


def test_the_committed_files_are_what_the_source_compiles_to(fresh: Path) -> None:
    assert differences(COMPILED, fresh) == []


def test_a_changed_committed_file_is_found(fresh: Path, tmp_path: Path) -> None:
    for path in fresh.glob("*.yaml"):
        (tmp_path / path.name).write_text(path.read_text().replace("mAP50-95", "luck"))
    (tmp_path / "pipeline.yaml").unlink()
    text = (tmp_path / "training.yaml").read_text()
    (tmp_path / "training.yaml").write_text(text.replace("seed: 0", "seed: 1").replace("haechi/train", "other/train"))
    assert set(differences(tmp_path, fresh)) >= {"pipeline.yaml", "training.yaml"}


def test_the_same_source_compiles_to_the_same_bytes_in_every_process(fresh: Path, tmp_path: Path) -> None:
    folders = [tmp_path / seed for seed in ("0", "1", "2")]
    compiles = [
        subprocess.Popen(
            [sys.executable, "-m", "haechi.pipelines.cli", "compile", "--out", str(folder)],
            env={**os.environ, "PYTHONHASHSEED": folder.name},
            stdout=subprocess.DEVNULL,
        )
        for folder in folders
    ]
    assert [process.wait() for process in compiles] == [0, 0, 0]
    for path in fresh.iterdir():
        assert {(folder / path.name).read_text() for folder in folders} == {path.read_text()}, path.name


@pytest.mark.parametrize("path", sorted(COMPILED.glob("*.yaml")), ids=lambda path: path.name)
def test_no_compiled_file_has_a_dangling_reference(path: Path) -> None:
    loaded = list(yaml.safe_load_all(path.read_text()))
    if "pipelineSpec" in loaded[0].get("spec", {}):
        loaded = [loaded[0]["spec"]["pipelineSpec"], loaded[0]["spec"].get("platformSpec", {})]
    if "root" in loaded[0]:
        assert dangling_references(loaded) == []


def _loop(spec: dict[str, Any]) -> dict[str, Any]:
    return next(entry for name, entry in spec["components"].items() if name.startswith("comp-for-loop"))


def test_the_lint_finds_an_input_that_the_loop_does_not_get(documents: list[dict[str, Any]]) -> None:
    broken = copy.deepcopy(documents)
    del _loop(broken[0])["inputDefinitions"]["parameters"]["pipelinechannel--gpu_type"]
    assert any("pipelinechannel--gpu_type" in problem for problem in dangling_references(broken))


def test_the_lint_finds_a_placeholder_that_the_task_does_not_pass(documents: list[dict[str, Any]]) -> None:
    broken = copy.deepcopy(documents)
    del _loop(broken[0])["dag"]["tasks"]["train"]["inputs"]["parameters"]["pipelinechannel--gpu_count"]
    assert any("executor" in problem and "gpu_count" in problem for problem in dangling_references(broken))


def test_the_lint_finds_a_selector_that_the_parent_lacks(documents: list[dict[str, Any]]) -> None:
    broken = copy.deepcopy(documents)
    del _loop(broken[0])["inputDefinitions"]["parameters"]["pipelinechannel--node_selector"]
    assert any("platform" in problem and "node_selector" in problem for problem in dangling_references(broken))


def test_the_dashboard_describes_every_parameter(documents: list[dict[str, Any]]) -> None:
    for name, entry in documents[0]["root"]["inputDefinitions"]["parameters"].items():
        assert entry.get("description"), name


def test_gpu_settings_can_be_given_at_submit_time(documents: list[dict[str, Any]]) -> None:
    executor = documents[0]["deploymentSpec"]["executors"]["exec-train"]["container"]
    assert "gpu_type" in json.dumps(executor["resources"]["accelerator"])
    assert "gpu_count" in json.dumps(executor["resources"]["accelerator"])
    assert "train_image" in executor["image"]
    platform = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]["exec-train"]
    assert platform["nodeSelector"]["nodeSelectorJson"]["componentInputParameter"].endswith("node_selector")
    assert platform["tolerations"][0]["tolerationJson"]["componentInputParameter"].endswith("tolerations")
    assert {"mountPath": "/dev/shm", "medium": "Memory", "volumeName": "shm"} in platform["emptyDirMounts"]


def test_every_pod_runs_as_a_numeric_user_and_reads_its_settings(documents: list[dict[str, Any]]) -> None:
    executors = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert set(executors) == set(documents[0]["deploymentSpec"]["executors"])
    for executor in executors.values():
        assert executor["securityContext"]["runAsNonRoot"] is True
        assert int(executor["securityContext"]["runAsUser"]) > 0
        assert executor["secretAsEnv"][0]["secretNameParameter"]["componentInputParameter"].endswith("s3_secret")
        assert executor["configMapAsEnv"]


@pytest.mark.parametrize(
    ("name", "schema"),
    [("pipeline.yaml", "Pipeline"), ("pipelineversion.yaml", "PipelineVersion")],
)
def test_the_objects_fit_the_custom_resource_schemas(name: str, schema: str) -> None:
    path = SCHEMAS / f"pipelines.kubeflow.org_v2beta1_{schema}.json"
    if not path.is_file():
        pytest.skip(f"the schema is not present at {path}")
    jsonschema.validate(yaml.safe_load((COMPILED / name).read_text()), json.loads(path.read_text()))


def test_argo_cd_makes_the_pipeline_before_its_versions() -> None:
    waves = [
        int(yaml.safe_load((COMPILED / name).read_text())["metadata"].get("annotations", {}).get(key, 0))
        for key in ["argocd.argoproj.io/sync-wave"]
        for name in ("pipeline.yaml", "pipelineversion.yaml")
    ]
    assert waves[0] < waves[1]
