"""A pipeline whose trainings keep frames in a volume: what kfp itself would compile, a version of its own, by a switch."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp import compiler, dsl, kubernetes
from kfp_stand_in import KfpStandIn

from haechi.components.shared.errors import InputError
from haechi.pipelines.cache_claim import MOUNT, with_claim
from haechi.pipelines.cli import main
from haechi.pipelines.compiling import COMPILED, dangling_references

Documents = list[dict[str, Any]]


@pytest.fixture(scope="module")
def plain() -> Documents:
    return list(yaml.safe_load_all((COMPILED / "training.yaml").read_text()))


def of_step(documents: Documents, step: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A step's container and its pod's settings."""
    pods = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    return documents[0]["deploymentSpec"]["executors"][f"exec-{step}"]["container"], pods[f"exec-{step}"]


@dsl.component(base_image="haechi/train:0.1.0", install_kfp_package=False)
def train(name: str) -> None:
    """A step of the name."""


@dsl.pipeline(name="small")
def small(name: str = "safety") -> None:
    """Mounts a claim in kfp's own words."""
    task = train(name=name)
    kubernetes.mount_pvc(task, "frames", MOUNT)
    task.set_env_variable("HAECHI_CACHE_DIR", MOUNT)


def test_trainings_and_evaluations_mount_the_claim_as_kfp_would_write_it(plain: Documents, tmp_path: Path) -> None:
    compiler.Compiler().compile(small, str(tmp_path / "small.yaml"))
    container, pod = of_step(list(yaml.safe_load_all((tmp_path / "small.yaml").read_text())), "train")
    made = with_claim(plain, "frames")
    for step in ("train", "evaluate"):
        assert of_step(made, step)[0]["env"] == container["env"]
        assert of_step(made, step)[1]["pvcMount"] == pod["pvcMount"]
    assert dangling_references(made) == []


def test_nothing_else_changes_and_what_ships_has_no_volume(plain: Documents) -> None:
    made = with_claim(plain, "frames")
    for step in ("train", "evaluate"):
        container, pod = of_step(made, step)
        del container["env"], pod["pvcMount"]
    assert made == plain
    assert "pvcMount" not in json.dumps(plain)


@pytest.mark.parametrize("claim", ["", "Frames", "-a", "a.b", "a/b", "a" * 64, "tmp", "shm"])
def test_a_claim_that_cannot_be_mounted_is_refused(claim: str, plain: Documents) -> None:
    with pytest.raises(InputError, match="--cache-claim"):
        with_claim(plain, claim)


def test_a_submit_with_a_claim_is_a_version_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with KfpStandIn() as api:
        words = ["submit", "--host", api.host, "--json"]
        for more in ([], ["--cache-claim", "frames"], ["--cache-claim", "frames"], ["--cache-claim", "other"]):
            assert main([*words, *more]) == 0
        assert main([*words, "--cache-claim", "no.such"]) == 2
        assert len(api.runs) == 4
        assert [row["uploaded"] for row in parse_all(capsys.readouterr().out)] == [True, True, False, True]
        mounts = ["pvcMount" in json.dumps(row["spec"]) for row in api.versions]
        assert mounts == [False, True, True]


def parse_all(text: str) -> list[Any]:
    """JSON documents that follow one another."""
    decoder, found = json.JSONDecoder(), []
    while text.strip():
        value, end = decoder.raw_decode(text.lstrip())
        found.append(value)
        text = text.lstrip()[end:]
    return found


def test_objects_with_a_claim_have_names_of_their_own(tmp_path: Path) -> None:
    assert main(["compile", "--out", str(tmp_path), "--cache-claim", "frames"]) == 0
    names = [
        yaml.safe_load((folder / "pipelineversion.yaml").read_text())["metadata"]["name"]
        for folder in (COMPILED, tmp_path)
    ]
    assert names[1] == f"{names[0]}-frames"
    assert main(["compile", "--out", str(tmp_path), "--check", "--cache-claim", "frames"]) == 0
    assert main(["compile", "--out", str(tmp_path), "--check"]) == 1


def test_without_the_cache_a_run_trains_anew() -> None:
    with KfpStandIn() as api:
        for more in ([], ["--no-cache"], ["--no-cache", "--every", "1d"]):
            assert main(["submit", "--host", api.host, *more]) == 0
        sent = [row["runtime_config"]["parameters"] for row in (*api.runs, *api.recurring)]
        assert sent == [{}, {"retrain": True}, {"retrain": True}]
