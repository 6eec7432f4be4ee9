"""Where a promoted model goes: the parameter `target`, parsed once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from haechi.components.shared.errors import InputError

__all__ = ["Target"]

_FORMS = "Use 'none', 'dir:/absolute/path', 'kserve:<namespace>/<name>' or 'git:<repository>#<branch>:<path>'."
_DNS_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
# Other transports of git (ext::, -u…) could start programs.
_REPOSITORY = re.compile(r"(https?|ssh|file)://[^\s]+|[\w.-]+@[\w.-]+:[^\s]+|/[^\s]+")
_BRANCH = re.compile(r"[A-Za-z0-9][\w./-]*")
# KServe makes host names of <name>-predictor-<namespace>; a DNS label has 63 characters.
_NAME_LENGTH = 63 - len("-predictor")


@dataclass(frozen=True)
class Target:
    """A parsed deploy target.

    Attributes:
        kind: `none` (register only), `dir`, `kserve` or `git`.
        path: for `dir`, the absolute folder that holds `versions/` and `current`; for `git`, the file in the repository.
        namespace, name: for `kserve`, the InferenceService.
        repository, branch: for `git`.

    Raises:
        InputError: a field cannot be used; the message lists the forms.
    """

    kind: str = "none"
    path: str = ""
    namespace: str = ""
    name: str = ""
    repository: str = ""
    branch: str = ""

    def __post_init__(self) -> None:
        if self.kind not in ("none", "dir", "kserve", "git"):
            raise InputError(f"deploy target kind {self.kind!r} is unknown", _FORMS)
        if self.kind == "dir":
            _check_path(self.path)
        if self.kind == "kserve":
            _check_label("namespace", self.namespace, 63)
            _check_label("name", self.name, _NAME_LENGTH)
        if self.kind == "git":
            _check_git(self.repository, self.branch, self.path)

    def __str__(self) -> str:
        """As users write it."""
        forms = {
            "none": "none",
            "dir": f"dir:{self.path}",
            "kserve": f"kserve:{self.namespace}/{self.name}",
            "git": f"git:{self.repository}#{self.branch}:{self.path}",
        }
        return forms[self.kind]

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read a target as users write it; empty means `none`.

        Raises:
            InputError: another form.
        """
        kind, colon, rest = text.strip().partition(":")
        if kind in ("", "none") and not rest:
            return cls()
        if kind == "git":
            repository, _, place = rest.rpartition("#")
            branch, _, path = place.partition(":")
            return cls("git", path=path, repository=repository, branch=branch)
        if kind == "dir" and colon:
            return cls("dir", path=rest)
        if kind == "kserve" and rest.count("/") == 1:
            namespace, name = rest.split("/")
            return cls("kserve", namespace=namespace, name=name)
        raise InputError(f"deploy target {text!r} cannot be read", _FORMS)


def _check_git(repository: str, branch: str, path: str) -> None:
    form = "Write it as git:https://git.example.org/team/models.git#main:entrance/inferenceservice.yaml."
    if not repository or not branch or not path:
        raise InputError("the deploy target git: lacks repository, branch or path", form)
    try:
        url = urlsplit(repository)
    except ValueError as error:
        raise InputError(f"the repository in the deploy target is no URL ({error})", form) from None
    if url.password or (url.scheme in ("http", "https") and ("@" in repository or url.query)):
        raise InputError(
            "the repository in the deploy target holds credentials, and parameters are logged",
            "Leave them out; put them in the Secret that the parameter git_secret names.",
        )
    if not _REPOSITORY.fullmatch(repository):
        raise InputError(f"repository {repository!r} in the deploy target is not one that we know", form)
    if not _BRANCH.fullmatch(branch) or ".." in branch or branch.endswith((".lock", "/")):
        raise InputError(f"branch {branch!r} in the deploy target is not a branch's name", form)
    parts = PurePosixPath(path).parts
    if path.startswith("/") or {".", "..", ".git"} & set(parts) or not path.endswith((".yaml", ".yml")):
        raise InputError(f"path {path!r} in the deploy target is not a YAML file of the repository", form)


def _check_path(path: str) -> None:
    parts = PurePosixPath(path)
    if not parts.is_absolute() or ".." in parts.parts or len(parts.parts) < 2:
        raise InputError(f"deploy target folder {path!r} is not an absolute path", "Write it as dir:/absolute/path.")


def _check_label(what: str, value: str, length: int) -> None:
    if not _DNS_LABEL.fullmatch(value) or len(value) > length:
        raise InputError(
            f"{what} {value!r} in the deploy target is not a Kubernetes name of at most {length} characters",
            "Use lower-case letters, digits and '-', as in kserve:models/entrance.",
        )
