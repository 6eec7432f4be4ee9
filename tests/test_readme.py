"""The READMEs' commands: each parses as the program would parse it, and names real targets, folders and parameters."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from haechi.components.shared.images import encode_jpeg
from haechi.pipelines import cli
from haechi.pipelines.parameters import run_parameters
from tests.serving_process import running
from tests.tiny_models import tiny_model_folder

ROOT = Path(__file__).resolve().parents[1]


def _commands(name: str) -> list[str]:
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", (ROOT / name).read_text(), re.S)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


READMES = ("README.md", "README.ko.md")
COMMANDS = [*_commands("README.md"), *_commands("docs/realdata.md")]


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("make ")])
def test_a_make_target_exists(line: str) -> None:
    target = shlex.split(line, comments=True)[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)


@pytest.mark.parametrize("line", [line for line in COMMANDS if "haechi " in line and "bin/" in line])
def test_a_haechi_command_parses_with_its_parameters(line: str) -> None:
    words = shlex.split(line, comments=True)
    arguments = cli.build_parser().parse_args(words[1:])
    if arguments.verb in ("run", "submit"):
        assert run_parameters(arguments.preset, arguments.set)["name"]


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("kubectl apply")])
def test_an_applied_folder_is_a_kustomization(line: str) -> None:
    words = shlex.split(line, comments=True)
    assert (ROOT / words[words.index("-k") + 1] / "kustomization.yaml").is_file()


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("curl ")])
def test_a_curl_command_is_answered(line: str, tmp_path: Path) -> None:
    tiny_model_folder(tmp_path / "model", ["smoke", "fire"], name="safety")
    (tmp_path / "porch.jpg").write_bytes(encode_jpeg(np.full((90, 160, 3), 200, dtype=np.uint8)))
    with running(tmp_path / "model") as server:
        words = shlex.split(line.replace(":8080/", f":{server.http}/"), comments=True)
        done = subprocess.run([*words, "--silent", "--fail"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["predictions"][0]["width"] == 160


@pytest.mark.parametrize("name", READMES)
def test_the_table_of_verbs_is_that_of_the_command_line(name: str) -> None:
    rows = re.findall(r"^\| (`[a-z`, ]+`) \| (.+) \|$", (ROOT / name).read_text(), re.M)
    listed = [verb for cell, _ in rows for verb in re.findall(r"`(\w+)`", cell)]
    assert listed == list(cli.VERBS)


@pytest.mark.parametrize("name", READMES)
def test_its_links_exist_and_lead_to_the_cluster_pages(name: str) -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)", (ROOT / name).read_text())
    assert [link for link in links if not (ROOT / link).is_file()] == []
    assert {f"docs/{page}.md" for page in ("cluster", "submitting", "deploying", "doctor", "runbooks")} <= set(links)


def test_no_command_is_left_untested() -> None:
    known = re.compile(r"make |\.venv/bin/haechi |kubectl apply |curl ")
    assert [line for line in COMMANDS if not known.match(line)] == []


def test_the_tree_names_what_exists() -> None:
    text = (ROOT / "README.md").read_text()
    for name in ("components", "pipelines", "images", "manifests", "docs", "tests"):
        assert f"{name}/" in text
        assert (ROOT / name).is_dir()
    for path in re.findall(r"`((?:components|pipelines|docs|manifests)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path
