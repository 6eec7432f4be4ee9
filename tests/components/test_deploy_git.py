"""deploy to `git:`: real git, real bare repositories, and a real HTTP server that asks for a password."""

from __future__ import annotations

import base64
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from git_servers import PASSWORD, git_over_http
from tiny_models import tiny_model_folder

from haechi.components.deploy import git_target
from haechi.components.deploy.git_target import commit, named_version
from haechi.components.shared.errors import DeployError, HaechiError, InputError
from haechi.components.shared.model_folder import ModelFolder

PATH = "entrance/service.yaml"
NOWHERE = Path("/nonexistent")
EVIDENCE = {"Verdict": "promote", "Reasons": "two\nlines\n\nSigned-off-by: nobody", "Deployed-by": "run 7"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    folder = tmp_path_factory.mktemp("model")
    return tiny_model_folder(folder, ["person"], name="entrance", dataset_digest="d" * 64)


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A bare repository with one commit on `main`."""
    repository = tmp_path / "bare.git"
    git("init", "--quiet", "--bare", "--initial-branch=main", str(repository))
    push(repository, tmp_path / "first", {"README.md": "models"})
    return repository


def git(*arguments: str, folder: Path | None = None) -> str:
    who = ["-c", "user.name=someone", "-c", "user.email=someone@localhost"]
    where = ["-C", str(folder)] if folder else []
    done = subprocess.run(["git", *who, *where, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def push(repository: Path, work: Path, files: dict[str, str]) -> None:
    """Somebody else's commit."""
    git("clone", "--quiet", str(repository), str(work))
    for name, text in files.items():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text(text)
    git("add", ".", folder=work)
    git("commit", "--quiet", "-m", "theirs", folder=work)
    git("push", "--quiet", "origin", "HEAD:main", folder=work)


def shown(repository: Path, path: str = PATH) -> Any:
    return yaml.safe_load(git("show", f"main:{path}", folder=repository))


def place(model: ModelFolder) -> str:
    return f"s3://haechi/models/{model.name}/{model.version}"


def deploy(repository: Path | str, model: ModelFolder, credentials: Path = NOWHERE, path: str = PATH) -> str:
    return commit(str(repository), "main", path, model, place(model), EVIDENCE, credentials)


def test_a_commit_names_the_model_and_its_evidence(bare: Path, model: ModelFolder) -> None:
    done = deploy(bare, model)
    found = shown(bare)
    assert found["kind"] == "InferenceService"
    assert found["metadata"]["name"] == "entrance"
    assert "namespace" not in found["metadata"]
    assert found["spec"]["predictor"]["model"]["storageUri"] == place(model)
    assert git("rev-parse", "main", folder=bare).strip() == done
    message = git("log", "-1", "--format=%B", "main", folder=bare).splitlines()
    assert message[0] == f"Serve entrance {model.version}"
    assert f"ONNX-SHA256: {model.onnx_sha256}" in message
    assert {f"Dataset: {'d' * 64}", "Verdict: promote", "Deployed-by: run 7"} <= set(message)
    assert "Reasons: two lines Signed-off-by: nobody" in message, "a reason cannot forge a line"
    assert named_version(str(bare), "main", PATH, NOWHERE) == model.version


def test_deploying_again_makes_no_commit(bare: Path, model: ModelFolder) -> None:
    assert deploy(bare, model) == deploy(bare, model)
    assert git("rev-list", "--count", "main", folder=bare).strip() == "2"


def test_what_others_wrote_stays(bare: Path, model: ModelFolder, tmp_path: Path) -> None:
    theirs = {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": "door", "namespace": "models", "labels": {"team": "a"}},
        "spec": {"predictor": {"minReplicas": 3, "model": {"storageUri": "s3://old", "resources": {"limits": {}}}}},
    }
    push(bare, tmp_path / "theirs", {PATH: yaml.safe_dump(theirs)})
    deploy(bare, model)
    found = shown(bare)
    assert (found["metadata"]["name"], found["metadata"]["namespace"]) == ("door", "models")
    assert found["metadata"]["labels"]["team"] == "a"
    assert found["spec"]["predictor"]["minReplicas"] == 3
    assert found["spec"]["predictor"]["model"]["resources"] == {"limits": {}}
    assert found["spec"]["predictor"]["model"]["storageUri"] == place(model)


def test_a_push_that_was_overtaken_is_made_again_on_top(
    bare: Path, model: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, overtaken, most = git_target._Git.push, [], [2]

    def slow(self: Any, branch: str) -> bool:
        if len(overtaken) < most[0]:
            overtaken.append(branch)
            push(bare, tmp_path / f"faster-{len(overtaken)}", {f"file-{len(overtaken)}": "theirs"})
        return real(self, branch)

    monkeypatch.setattr(git_target._Git, "push", slow)
    deploy(bare, model)
    assert git("log", "--format=%s", "main", folder=bare).splitlines() == [
        f"Serve entrance {model.version}",
        "theirs",
        "theirs",
        "theirs",
    ]
    most[0] = 99
    monkeypatch.setattr(git_target, "_TRIES", 2)
    git("update-ref", "refs/heads/main", "main~1", folder=bare)
    with pytest.raises(DeployError, match=r"others pushed to .* 2 times"):
        deploy(bare, model)


def two_documents(bare: Path, tmp_path: Path) -> None:
    push(bare, tmp_path / "x", {PATH: "kind: InferenceService\n---\nkind: Secret\n"})


def another_kind(bare: Path, tmp_path: Path) -> None:
    push(bare, tmp_path / "x", {PATH: "kind: Deployment\nmetadata: {name: a}\n"})


def a_symlink(bare: Path, tmp_path: Path) -> None:
    git("clone", "--quiet", str(bare), str(tmp_path / "x"))
    (tmp_path / "x/entrance").mkdir()
    (tmp_path / "x" / PATH).symlink_to("/etc/hostname")
    git("add", ".", folder=tmp_path / "x")
    git("commit", "--quiet", "-m", "theirs", folder=tmp_path / "x")
    git("push", "--quiet", "origin", "HEAD:main", folder=tmp_path / "x")


def no_branch(bare: Path, tmp_path: Path) -> None:
    git("branch", "-m", "main", "trunk", folder=bare)


def refusing_hook(bare: Path, tmp_path: Path) -> None:
    (bare / "hooks").mkdir(exist_ok=True)
    hook = bare / "hooks/pre-receive"
    hook.write_text("#!/bin/sh\necho main is protected >&2\nexit 1\n")
    hook.chmod(0o755)


def gone(bare: Path, tmp_path: Path) -> None:
    bare.rename(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (two_documents, InputError, "is not one InferenceService"),
        (another_kind, InputError, "is not one InferenceService"),
        (a_symlink, InputError, "is a symlink"),
        (no_branch, InputError, "has no branch 'main'"),
        (refusing_hook, DeployError, "git could not push .*main is protected"),
        (gone, DeployError, "git could not clone .*does not exist"),
    ],
)
def test_what_cannot_be_committed_is_told(
    bare: Path,
    model: ModelFolder,
    tmp_path: Path,
    spoil: Callable[[Path, Path], None],
    error: type[HaechiError],
    message: str,
) -> None:
    spoil(bare, tmp_path)
    with pytest.raises(error, match=message) as caught:
        deploy(bare, model)
    assert caught.value.remedy


# --- credentials ------------------------------------------------------------------------------------------------------


@pytest.fixture
def served(bare: Path) -> Iterator[str]:
    """The bare repository's URL."""
    with git_over_http(bare.parent) as url:
        yield f"{url}/{bare.name}"


def test_a_password_comes_from_a_file_and_shows_nowhere(
    bare: Path,
    served: str,
    model: ModelFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "username").write_text("bot\n")
    (secret / "password").write_text(f"{PASSWORD}\n")
    commands: list[str] = []
    run = subprocess.run

    def noted(command: Any, *args: Any, **options: Any) -> Any:
        commands.append(str(command) + str(options.get("env")))
        return run(command, *args, **options)

    monkeypatch.setattr(git_target.subprocess, "run", noted)
    deploy(served, model, secret)
    monkeypatch.undo()
    assert shown(bare)["spec"]["predictor"]["model"]["storageUri"] == place(model)
    ours = [command for command in commands if "http-backend" not in command]
    encoded = base64.b64encode(f"bot:{PASSWORD}".encode()).decode()
    told = capfd.readouterr()
    for text in (*ours, told.out, told.err, *map(str, tmp_path.glob("haechi-git-*"))):
        assert PASSWORD not in text
        assert encoded not in text
    (secret / "password").write_text("wrong")
    with pytest.raises(DeployError, match="git could not clone") as caught:
        deploy(served, model, secret)
    assert "wrong" not in str(caught.value).replace("something went wrong", "")
