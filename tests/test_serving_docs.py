"""docs/serving.md and the runtime's README: what they show runs against a real process and gives what they say."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from haechi.components.shared.images import decode, encode_jpeg
from haechi.pipelines import cli
from haechi.serving.command import add_arguments
from haechi.serving.settings import ServingSettings
from tests.serving_process import Running, running
from tests.tiny_models import paint, shade, tiny_model_folder

ROOT = Path(__file__).resolve().parents[1]
DOCS = (ROOT / "docs" / "serving.md").read_text()
README = (ROOT / "images" / "serving" / "README.md").read_text()
# Each block with what follows it as its output.
BLOCKS = re.findall(r"```(sh|python)\n(.*?)```\n(?:```text\n(.*?)```)?", DOCS, re.S)
ASKING = [block for block in BLOCKS if "127.0.0.1" in block[1]]
STARTING = [block[1] for block in BLOCKS if "127.0.0.1" not in block[1]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("served")
    tiny_model_folder(folder, ["smoke", "fire", "person_down"])
    with running(folder, "--name", "safety", stdout=subprocess.DEVNULL) as process:
        yield process


def found(name: str) -> str | None:
    """A program, also where Go installs it."""
    return shutil.which(name) or shutil.which(name, path=str(Path.home() / "go" / "bin"))


@pytest.mark.parametrize(("language", "code", "output"), ASKING, ids=range(len(ASKING)))
def test_an_example_gives_what_it_says(server: Running, tmp_path: Path, language: str, code: str, output: str) -> None:
    program = code.split()[0]
    if language == "sh" and program != "printf" and found(program) is None:
        pytest.skip(f"there is no {program} (go install github.com/fullstorydev/grpcurl/cmd/grpcurl@latest)")
    scene = paint({(2, 3): shade(0, 0.92), (5, 5): shade(1, 0.72)}, 640, 640, 64)
    (tmp_path / "frame.jpg").write_bytes(encode_jpeg(decode(scene), 95))
    code = code.replace("8080", str(server.http)).replace("8081", str(server.grpc))
    command = ["bash", "-euo", "pipefail", "-c", code] if language == "sh" else [sys.executable, "-c", code]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], str(Path.home() / "go" / "bin")])
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=120, env={**os.environ, "PATH": path}
    )
    assert done.returncode == 0, done.stderr
    assert output, "the example says nothing of what it gives"
    # Three dots stand for what differs from run to run, or is left out.
    wanted = ".*".join(map(re.escape, output.rstrip("\n").split("…")))
    assert re.fullmatch(wanted, done.stdout.rstrip("\n"), re.S), done.stdout


def test_every_client_has_its_example() -> None:
    told = "\n".join(code for _, code, _ in ASKING)
    for client in ("curl ", "httpx", "tritonclient.http", "tritonclient.grpc", "kserve", "grpcurl "):
        assert client in told
    assert len(ASKING) == 11


@pytest.mark.parametrize("block", STARTING)
def test_commands_that_start_it_parse_and_name_what_exists(block: str) -> None:
    for line in block.splitlines():
        words = shlex.split(line, comments=True)
        if words[0] == "haechi":
            assert cli.build_parser().parse_args(words[1:]).verb == "serve"
        elif words[0] == "podman":
            parser = cli.argparse.ArgumentParser()
            add_arguments(parser)
            image = next(place for place, word in enumerate(words) if word.startswith("haechi/serving:"))
            assert parser.parse_args(words[image + 1 :]).name == "safety"
        else:
            assert words[:2] == ["kubectl", "apply"]
            assert (ROOT / words[words.index("-k") + 1] / "kustomization.yaml").is_file()


def test_the_inference_service_names_our_runtime() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", DOCS, re.S)
    model = yaml.safe_load(block)["spec"]["predictor"]["model"]
    runtime = yaml.safe_load((ROOT / "manifests/base/serving/servingruntime.yaml").read_text())
    assert model["runtime"] == runtime["metadata"]["name"]
    assert model["modelFormat"]["name"] in [form["name"] for form in runtime["spec"]["supportedModelFormats"]]
    protocols = runtime["spec"]["protocolVersions"]
    assert model["protocolVersion"] in protocols


def test_the_table_of_settings_is_that_of_the_program() -> None:
    rows = re.findall(r"^\| `((?:HAECHI_SERVING|OTEL)_\w+)` \| (?:`([^`]*)`)? ?\|", DOCS, re.M)
    program = [
        (entry.metadata.get("env", f"HAECHI_SERVING_{entry.name.upper()}"), str(entry.default))
        for entry in fields(ServingSettings)
    ]
    assert rows == program


@pytest.mark.parametrize("text", [DOCS, README], ids=["docs/serving.md", "images/serving/README.md"])
def test_links_lead_somewhere(text: str) -> None:
    folder = ROOT / ("docs" if text is DOCS else "images/serving")
    links = re.findall(r"\]\(([^)#]+)(#[^)]*)?\)", text)
    assert links
    for target, anchor in links:
        assert (folder / target).is_file(), target
        headings = re.findall(r"^#+ (.*)$", (folder / target).read_text(), re.M)
        assert not anchor or anchor[1:] in [heading.lower().replace(" ", "-") for heading in headings], anchor


def test_the_readme_names_every_file() -> None:
    named = re.findall(r"^    ([\w.]+)\s", README, re.M)
    there = sorted(
        path.name for path in (ROOT / "images/serving").iterdir() if path.is_file() and path.name != "README.md"
    )
    assert sorted(named) == there
