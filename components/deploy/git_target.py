"""The target `git:<repo>#<branch>:<path>`: the same change as a commit, for Argo CD or Flux to apply.

The file at `path` is an InferenceService in YAML. Only the model's fields are ours, as with `kserve:`; what else stands
in it stays, but for comments. Credentials come from files of a folder (a mounted Secret) and reach git through a
configuration file of its own: neither its arguments nor the log ever show them.
"""

from __future__ import annotations

import base64
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from haechi.components.shared.errors import DeployError, InputError
from haechi.components.shared.model_folder import ModelFolder
from haechi.components.shared.progress import say
from haechi.components.shared.settings import environment_with

from .inference_service import manifest
from .readiness import storage_uri as uri_of

__all__ = ["commit", "named_version"]

_TRIES = 5
_SECONDS = 300
_AUTHOR = ("user.name=Haechi deploy", "user.email=haechi-deploy@localhost")
_HEADER = "# The model's fields are written by Haechi's deploy; the others are yours. Comments do not stay.\n"
_REJECTED = re.compile(r"rejected|fetch first|non-fast-forward|cannot lock ref|failed to update ref", re.I)


def commit(
    repository: str,
    branch: str,
    path: str,
    model: ModelFolder,
    storage_uri: str,
    evidence: Mapping[str, str],
    credentials: Path,
) -> str:
    """Let the file name the model, commit with the evidence, and push; somebody else's push is taken in first.

    Args:
        repository, branch, path: of the file; the branch must be there, the file need not.
        model: the model folder's description.
        storage_uri: where KServe finds it.
        evidence: lines for the message, such as the verdict.
        credentials: folder with `username` and `password`, or `ssh-privatekey` and `known_hosts`; may be absent.

    Returns:
        The commit's id, also where the branch names the model already.

    Raises:
        InputError: no such branch, or the file is no InferenceService or lies behind a symlink.
        DeployError: git cannot reach the repository, is refused, or others push all the time.
    """
    with tempfile.TemporaryDirectory(prefix="haechi-git-") as scratch:
        git = _Git(Path(scratch), repository, credentials)
        git.clone(branch)
        for _ in range(_TRIES):
            if not _write(git.file(path), model, storage_uri):
                say(f"{repository}#{branch}:{path} names {model.version} already")
                return git.run("rev-parse", "HEAD")
            git.run("add", "--", path)
            git.run("commit", "--quiet", "--message", _message(model, storage_uri, evidence))
            if git.push(branch):
                done = git.run("rev-parse", "HEAD")
                say(f"{repository}#{branch}:{path} names {model.version} since commit {done[:12]}")
                return done
            git.follow(branch)
    raise DeployError(
        f"others pushed to {repository}#{branch} {_TRIES} times while we did", "Run deploy again when it is quieter."
    )


def named_version(repository: str, branch: str, path: str, credentials: Path) -> str:
    """The version that the file names, or empty.

    Raises:
        InputError, DeployError: as `commit`.
    """
    with tempfile.TemporaryDirectory(prefix="haechi-git-") as scratch:
        git = _Git(Path(scratch), repository, credentials)
        git.clone(branch)
        return uri_of(_read(git.file(path))).rstrip("/").rsplit("/", 1)[-1]


class _Git:
    """One shallow clone, and how git is called for it."""

    def __init__(self, scratch: Path, repository: str, credentials: Path) -> None:
        self.folder = scratch / "clone"
        self._repository = repository
        self._config = scratch / "config"
        self._config.touch(mode=0o600)
        self._config.write_text(_config(repository, credentials))

    def clone(self, branch: str) -> None:
        self._call(["init", "--quiet", "--", str(self.folder)])
        self.run("remote", "add", "--", "origin", self._repository)
        try:
            self.follow(branch)
        except DeployError as error:
            if "couldn't find remote ref" in error.problem:
                raise InputError(
                    f"{self._repository} has no branch {branch!r}", "Make it first, or name another in the target."
                ) from error
            raise

    def file(self, path: str) -> Path:
        """Where a file of the repository lies here.

        Raises:
            InputError: it, or a folder on the way to it, is a symlink: what is written there may lie anywhere.
        """
        wanted = self.folder.resolve() / path
        if wanted.resolve() != wanted:
            raise InputError(
                f"{path} in the repository is a symlink, or behind one", "Name the file itself in the target."
            )
        return wanted

    def run(self, *arguments: str) -> str:
        return self._call(["-C", str(self.folder), *arguments])

    def push(self, branch: str) -> bool:
        """Whether the remote took it; False where somebody was faster."""
        try:
            self.run("push", "--quiet", "origin", f"HEAD:refs/heads/{branch}")
        except DeployError as error:
            if _REJECTED.search(error.problem) and "protected" not in error.problem and "hook" not in error.problem:
                return False
            raise
        return True

    def follow(self, branch: str) -> None:
        """Be where the remote is, without our commit."""
        # The bare name might be a tag's.
        self.run("fetch", "--quiet", "--depth=1", "--no-tags", "origin", f"refs/heads/{branch}")
        self.run("reset", "--quiet", "--hard", "FETCH_HEAD")

    def _call(self, arguments: list[str]) -> str:
        options = ["commit.gpgSign=false", "core.hooksPath=/dev/null", f"include.path={self._config}", *_AUTHOR]
        command = ["git", *[word for option in options for word in ("-c", option)], *arguments]
        try:
            status, told, complaint = _run(command)
        except FileNotFoundError as error:
            raise DeployError("git is not installed here", "Install git in the image that deploys.") from error
        except subprocess.TimeoutExpired as error:
            raise DeployError(f"git took more than {_SECONDS} s with {self._repository}", "Try again later.") from error
        if status:
            raise DeployError(
                f"git could not {_verb(arguments)} {self._repository}: {complaint.strip()[-800:]}",
                "Check the repository's address (redirects are not followed with a password), the branch's protection and "
                "the Secret with its credentials.",
            )
        return told.strip()


def _run(command: list[str]) -> tuple[int, str, str]:
    """Exit status, stdout and stderr; whatever the command started is gone at the end of its time.

    Raises:
        FileNotFoundError: there is no such program.
        subprocess.TimeoutExpired: it took too long.
    """
    # English, for we read what git says; no prompt: say that a password is wanted instead of waiting for it.
    env = environment_with(LC_ALL="C", GIT_TERMINAL_PROMPT="0")
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, errors="replace", env=env, start_new_session=True, **pipes) as child:
        try:
            told, complaint = child.communicate(timeout=_SECONDS)
        except BaseException:
            os.killpg(child.pid, signal.SIGKILL)  # git leaves its transport's process behind
            raise
    return child.returncode, told, complaint


def _verb(arguments: list[str]) -> str:
    return arguments[2] if arguments[0] == "-C" else arguments[0]


def _config(repository: str, credentials: Path) -> str:
    """What git needs to know of the credentials, as the text of a configuration file."""
    url = urlsplit(repository)
    password, key = credentials / "password", credentials / "ssh-privatekey"
    if url.scheme in ("http", "https") and password.is_file():
        name = credentials / "username"
        user = name.read_text(encoding="utf-8").strip() if name.is_file() else "haechi"
        secret = f"{user}:{password.read_text(encoding='utf-8').strip()}"
        header = base64.b64encode(secret.encode()).decode()
        # For this server only. Where one redirects, git would send the header along.
        server, secret = f"{url.scheme}://{url.netloc}/", f"extraHeader = Authorization: Basic {header}"
        return f'[http "{server}"]\n\t{secret}\n\tfollowRedirects = false\n'
    if key.is_file():
        known = credentials / "known_hosts"
        hosts = f" -o UserKnownHostsFile={known}" if known.is_file() else ""
        strict = "-o StrictHostKeyChecking=yes -o IdentitiesOnly=yes -o BatchMode=yes"
        return f'[core]\n\tsshCommand = "ssh -i {key} {strict}{hosts}"\n'
    return ""


def _read(file: Path) -> dict[str, Any]:
    """The InferenceService in a file; empty where there is no file.

    Raises:
        InputError: it holds something else.
    """
    if not file.exists():
        return {}
    try:
        entries = [entry for entry in yaml.safe_load_all(file.read_text(encoding="utf-8")) if entry is not None]
        (found,) = entries
        sound = found["kind"] == "InferenceService" and isinstance(found["metadata"]["name"], str)
        uri_of(found)
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise InputError(
            f"{file.name} in the repository is not one InferenceService in YAML",
            "Give the service a file of its own, and name that in the target.",
        )
    return dict(found)


def _write(file: Path, model: ModelFolder, storage_uri: str) -> bool:
    """Let the file name the model; whether anything changed."""
    found = _read(file)
    meta = found.get("metadata") or {"name": model.name}
    wanted = manifest(str(meta.get("namespace") or ""), str(meta["name"]), model, storage_uri)
    if not wanted["metadata"]["namespace"]:
        del wanted["metadata"]["namespace"]  # Argo CD, Flux and kustomize give one
    merged = _merge(found, wanted)
    if merged == found:
        return False
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(
            f"{file.parent.name} in the repository is no folder", "Name another path in the target."
        ) from error
    text = yaml.safe_dump(merged, sort_keys=False, allow_unicode=True, width=120)
    file.write_text(_HEADER + text, encoding="utf-8")
    return True


def _merge(below: Any, above: Any) -> Any:
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return {**below, **{key: _merge(below.get(key), value) for key, value in above.items()}}


def _message(model: ModelFolder, storage_uri: str, evidence: Mapping[str, str]) -> str:
    lines = {
        "Model": model.name,
        "Version": model.version,
        "Place": storage_uri,
        "ONNX-SHA256": model.onnx_sha256,
        "Dataset": model.dataset_digest,
        **evidence,
    }
    # One line each, whatever a verdict's reasons hold.
    told = [f"{key}: {' '.join(value.split())}" for key, value in lines.items() if value]
    return f"Serve {model.name} {model.version}\n\n" + "\n".join(told) + "\n"
