"""deploy to `git:`: real git, real bare repositories, and a real HTTP server that asks for a password."""

from __future__ import annotations

import base64
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from git_servers import PASSWORD, git_over_http, git_over_ssh, redirecting_to
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


def a_folder_that_is_a_symlink(bare: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    git("clone", "--quiet", str(bare), str(tmp_path / "x"))
    (tmp_path / "x/entrance").symlink_to(tmp_path / "outside")
    git("add", ".", folder=tmp_path / "x")
    git("commit", "--quiet", "-m", "theirs", folder=tmp_path / "x")
    git("push", "--quiet", "origin", "HEAD:main", folder=tmp_path / "x")


def a_file_for_a_folder(bare: Path, tmp_path: Path) -> None:
    push(bare, tmp_path / "x", {"entrance": "a file"})


def a_tag(bare: Path, tmp_path: Path) -> None:
    git("tag", "main", "main", folder=bare)
    git("branch", "-m", "main", "trunk", folder=bare)


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
        (a_folder_that_is_a_symlink, InputError, f"{PATH} in the repository is a symlink, or behind one"),
        (a_file_for_a_folder, InputError, "entrance in the repository is no folder"),
        (no_branch, InputError, "has no branch 'main'"),
        (a_tag, InputError, "has no branch 'main'"),
        (refusing_hook, DeployError, "git could not push .*main is protected"),
        (gone, DeployError, "git could not fetch .*does not appear to be a git repository"),
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
    assert not list((tmp_path / "outside").glob("*"))


@pytest.mark.parametrize(
    "spec", ["", "spec:", "spec: {predictor: }", "spec: {predictor: []}", "spec: {predictor: {model: }}"]
)
def test_a_service_without_a_model_names_none_and_gets_one(
    bare: Path, model: ModelFolder, tmp_path: Path, spec: str
) -> None:
    push(bare, tmp_path / "x", {PATH: f"kind: InferenceService\nmetadata: {{name: a}}\n{spec}\n"})
    assert named_version(str(bare), "main", PATH, NOWHERE) == ""
    deploy(bare, model)
    assert named_version(str(bare), "main", PATH, NOWHERE) == model.version


@pytest.mark.parametrize(
    "spec", ["spec: [1]", "spec: {predictor: [1]}", "spec: {predictor: {model: x}}", f"spec: {'[' * 5000}"]
)
def test_a_service_of_another_form_is_told_to_who_looks_and_to_who_writes(
    bare: Path, model: ModelFolder, tmp_path: Path, spec: str
) -> None:
    push(bare, tmp_path / "x", {PATH: f"kind: InferenceService\nmetadata: {{name: a}}\n{spec}\n"})
    with pytest.raises(InputError, match="is not one InferenceService"):
        named_version(str(bare), "main", PATH, NOWHERE)
    with pytest.raises(InputError, match="is not one InferenceService"):
        deploy(bare, model)


def test_the_users_own_settings_of_git_start_no_program_and_change_no_words(
    bare: Path, model: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hooks, ran = tmp_path / "hooks", tmp_path / "ran"
    hooks.mkdir()
    for name in ("pre-commit", "post-commit", "pre-push", "reference-transaction"):
        (hooks / name).write_text(f'#!/bin/sh\n[ "$GIT_DIR" = . ] || echo {name} >> {ran}\n')
        (hooks / name).chmod(0o755)
    (tmp_path / "config").write_text(f"[core]\n\thooksPath = {hooks}\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "config"))
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    monkeypatch.setenv("LANGUAGE", "de")
    deploy(bare, model)
    assert not ran.exists()
    with pytest.raises(InputError, match="has no branch 'other'"):
        named_version(str(bare), "other", PATH, NOWHERE)


def test_a_server_that_never_answers_leaves_no_process_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(git_target, "_SECONDS", 1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/models.git"
        with pytest.raises(DeployError, match="git took more than 1 s"):
            named_version(url, "main", PATH, NOWHERE)
        deadline = time.monotonic() + 30
        while left := [path for path in Path("/proc").glob("[0-9]*/cmdline") if url.encode() in told(path)]:
            assert time.monotonic() < deadline, [told(path) for path in left]
            time.sleep(0.05)


def told(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""  # it has ended meanwhile


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
    popen = subprocess.Popen

    class Noted(popen):  # type: ignore[valid-type, misc]
        def __init__(self, command: Any, *args: Any, **options: Any) -> None:
            commands.append(str(command) + str(options.get("env")))
            super().__init__(command, *args, **options)

    monkeypatch.setattr(git_target.subprocess, "Popen", Noted)
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
    with pytest.raises(DeployError, match="git could not fetch") as caught:
        deploy(served, model, secret)
    assert "wrong" not in str(caught.value).replace("something went wrong", "")


@pytest.fixture
def password(tmp_path: Path) -> Path:
    """The Secret of a person with a password."""
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "username").write_text("bot")
    (secret / "password").write_text(PASSWORD)
    return secret


def test_a_password_does_not_follow_a_redirect(bare: Path, model: ModelFolder, password: Path) -> None:
    asked: list[str] = []
    with (
        git_over_http(bare.parent, asked) as other,
        redirecting_to(other) as url,
        pytest.raises(DeployError, match=r"git could not fetch .* 302") as caught,
    ):
        deploy(f"{url}/{bare.name}", model, password)
    assert "redirects are not followed" in caught.value.remedy
    assert not asked


@pytest.mark.parametrize(
    ("url", "known"),
    [
        ("https://git.example.org/team/a.git", True),
        ("https://git.example.org/other/b.git", True),
        ("http://git.example.org/team/a.git", False),
        ("https://git.example.org:8443/team/a.git", False),
        ("https://example.org/team/a.git", False),
    ],
)
def test_a_password_is_for_one_server(password: Path, tmp_path: Path, url: str, known: bool) -> None:
    (tmp_path / "config").write_text(git_target._config("https://git.example.org/team/a.git", password))
    command = ["git", "config", "--file", str(tmp_path / "config"), "--get-urlmatch", "http", url]
    found = subprocess.run(command, capture_output=True, text=True).stdout
    assert ("Authorization" in found) == known


@pytest.mark.parametrize("hosts", [None, "other.example.org ssh-ed25519 AAAA\n"], ids=["none is known", "another is"])
def test_an_ssh_server_that_nobody_vouched_for_is_refused(
    bare: Path, model: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hosts: str | None
) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    with git_over_ssh(secret) as url:
        (secret / "ssh-privatekey").chmod(0o600)
        deploy(f"{url}{bare}", model, secret)
        assert shown(bare)["spec"]["predictor"]["model"]["storageUri"] == place(model)
        (secret / "known_hosts").unlink()
        if hosts:
            (secret / "known_hosts").write_text(hosts)
        with pytest.raises(DeployError, match="Host key verification failed"):
            named_version(f"{url}{bare}", "main", PATH, secret)
