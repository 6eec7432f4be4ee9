"""Where a promoted model goes: the parameter `target`, parsed once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from haechi.components.shared.errors import InputError

__all__ = ["Target"]

_FORMS = "Use 'none', 'dir:/absolute/path' or 'kserve:<namespace>/<name>'."
_DNS_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
# KServe makes host names of <name>-predictor-<namespace>; a DNS label has 63 characters.
_NAME_LENGTH = 63 - len("-predictor")


@dataclass(frozen=True)
class Target:
    """A parsed deploy target.

    Attributes:
        kind: `none` (register only), `dir` or `kserve`.
        path: for `dir`, the absolute folder that holds `versions/` and `current`.
        namespace, name: for `kserve`, the InferenceService.

    Raises:
        InputError: a field cannot be used; the message lists the forms.
    """

    kind: str = "none"
    path: str = ""
    namespace: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        if self.kind not in ("none", "dir", "kserve"):
            raise InputError(f"deploy target kind {self.kind!r} is unknown", _FORMS)
        if self.kind == "dir":
            _check_path(self.path)
        if self.kind == "kserve":
            _check_label("namespace", self.namespace, 63)
            _check_label("name", self.name, _NAME_LENGTH)

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read `none`, `dir:/abs/path` or `kserve:<namespace>/<name>`; empty means `none`.

        Raises:
            InputError: another form.
        """
        kind, colon, rest = text.strip().partition(":")
        if kind in ("", "none") and not rest:
            return cls()
        if kind == "git":
            raise InputError(f"deploy target {text!r} is planned but not there yet", _FORMS)
        if kind == "dir" and colon:
            return cls("dir", path=rest)
        if kind == "kserve" and rest.count("/") == 1:
            namespace, name = rest.split("/")
            return cls("kserve", namespace=namespace, name=name)
        raise InputError(f"deploy target {text!r} cannot be read", _FORMS)


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
