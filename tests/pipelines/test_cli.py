"""The `haechi` command: every verb explains itself, reports as JSON where it reports, and exits honestly."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from haechi.components.shared import errors
from haechi.pipelines import local_run, processes, submitting  # noqa: F401 - each adds its own error
from haechi.pipelines.cli import VERBS, main

HAECHI = Path(sys.executable).with_name("haechi")
WANTED = ["demo", "up", "down", "run", "compile", "submit", "export", "serve", "predict", "review", "evaluate"]
WANTED += ["doctor"]
WANTED += ["promote", "rollback", "status", "reconcile"]


def test_the_verbs_are_the_documented_ones() -> None:
    assert sorted(VERBS) == sorted(WANTED)


@pytest.mark.parametrize("verb", WANTED)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    assert f"usage: haechi {verb}" in capsys.readouterr().out


@pytest.mark.parametrize("verb", [name for name, verb in VERBS.items() if verb.reports])
def test_a_reporting_verb_offers_json(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        (["run", "--preset", "factory"], 2, "entrance, safety"),
        (["run", "--preset", "safety", "--set", "sead=1"], 2, "Did you mean 'seed'"),
        (["export", "--checkpoint", "nowhere.pt", "--out", "x"], 7, "nowhere.pt"),
        (["serve", "--model", "nowhere"], 7, "nowhere"),
        (["predict", "--model", "nowhere", "a.jpg"], 7, "nowhere"),
        (["evaluate", "--model", "nowhere", "--data", "nowhere.yaml"], 2, "nowhere.yaml"),
        (["submit", "--host", "kubeflow"], 2, "--host"),
        (["status", "safety", "--target", "git:x"], 2, "git:"),
        (["promote", "safety", "abc", "--rollout", "stps=[]"], 2, "rollout has no key 'stps'"),
        (["reconcile", "safety"], 2, "'safety' is not NAME=TARGET"),
    ],
)
def test_an_error_names_the_thing_and_has_its_exit_code(
    words: list[str],
    code: int,
    named: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == code
    captured = capsys.readouterr()
    assert named in captured.err
    assert captured.err.startswith(f"haechi {words[0]}: ")
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_kinds_of_error_are_told_apart_by_their_exit_code() -> None:
    kinds = [*errors.HaechiError.__subclasses__(), errors.HaechiError]
    ours = {kind for kind in kinds if kind.__module__.startswith("haechi.")} - {errors.SettingsError}
    assert len({kind.exit_code for kind in ours}) == len(ours)


def test_a_word_that_is_no_verb_is_a_usage_error() -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fly"])
    assert stop.value.code == 2


def test_help_starts_without_the_heavy_packages() -> None:
    probe = "import sys, haechi.pipelines.cli; print(sorted({'torch', 'mlflow', 'kfp', 'cv2', 'pyarrow'} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_compile_writes_where_it_is_told_and_checks_the_committed_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compile", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"training.yaml", "pipeline.yaml", "pipelineversion.yaml"}
    assert main(["compile", "--check"]) == 0
    assert main(["compile", "--check", "--out", str(tmp_path)]) == 0
    (tmp_path / "training.yaml").unlink()
    assert main(["compile", "--check", "--out", str(tmp_path)]) == 1
    assert "training.yaml" in capsys.readouterr().err


@pytest.mark.slow
def test_up_then_review_list_then_down(tmp_path: Path) -> None:
    def haechi(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(HAECHI), *words], capture_output=True, text=True, timeout=120)

    up = haechi("up", "--workdir", str(tmp_path), "--json")
    try:
        assert up.returncode == 0, up.stderr
        report = json.loads(up.stdout)
        assert set(json.loads(Path(report["credentials"]).read_text())) == {"access_key", "secret_key"}
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", report["s3_endpoint"])
        listed = haechi("review", "list", "--workdir", str(tmp_path), "--json")
        assert (listed.returncode, json.loads(listed.stdout)) == (0, [])
        answer = haechi("review", "answer", "abc123", "--reviewer", "kim", "--empty", "--workdir", str(tmp_path))
        assert answer.returncode == 2
        assert "abc123" in answer.stderr
    finally:
        started = time.monotonic()
        assert haechi("down", "--workdir", str(tmp_path)).returncode == 0
        assert time.monotonic() - started < 30
    again = haechi("down", "--workdir", str(tmp_path))
    assert (again.returncode, again.stdout) == (0, f"nothing was running in {tmp_path}\n")
