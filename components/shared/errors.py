"""One error tree for all of Haechi: each message names the thing and the remedy, each error its exit code."""

from __future__ import annotations

import re
import unicodedata

__all__ = [
    "AccessError",
    "DeadlineError",
    "DeployError",
    "DeployRefused",
    "HaechiError",
    "InputError",
    "IntegrityError",
    "LoadRefused",
    "ModelError",
    "NoDataError",
    "NotFoundError",
    "NotReadyError",
    "OverloadError",
    "SettingsError",
    "StorageError",
    "TrackingError",
    "TrainError",
    "printable",
    "without_userinfo",
]

# A user of ssh is a name alone; elsewhere what stands before the @ may be a secret, with or without a colon. A password
# that nobody escaped may hold a slash or worse; what follows a host's colon is a port.
_USERINFO = re.compile(r"""(?<!ssh)(://)(?:[^\s/?#"@:]*:(?!\d+(?:[/?#\s"']|$))[^\s"]*|[^\s/?#"]*)@""")

_STEERS = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def printable(text: str) -> str:
    r"""The text without what steers a terminal: control and formatting characters, but for line feed and tab, as \x1b."""
    if text.isprintable():
        return text
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char) in _STEERS and char not in "\n\t" else char
        for char in text
    )


def without_userinfo(text: str) -> str:
    """The text without the user and the password of the URLs in it."""
    return _USERINFO.sub(r"\1", text)


class HaechiError(Exception):
    """Base of all errors that a user can cause or mend.

    Args:
        problem: what is wrong, naming the file, field, key or parameter; URLs lose their credentials here,
            and what others wrote its control characters.
        remedy: what the user can do about it; printed after the problem.
    """

    exit_code = 1
    http_status: int = 500

    def __init__(self, problem: str, remedy: str = "") -> None:
        self.problem = printable(without_userinfo(problem)).rstrip(". ")
        self.remedy = printable(without_userinfo(remedy))
        super().__init__(f"{self.problem}. {self.remedy}".rstrip() if remedy else self.problem)


class InputError(HaechiError):
    """A parameter, file or request that cannot be used as it is."""

    exit_code = 2
    http_status = 400


class SettingsError(HaechiError):
    """A setting (environment variable, preset) is missing or malformed."""

    exit_code = 2


class NoDataError(HaechiError):
    """The input is well-formed but holds nothing to work on."""

    exit_code = 3
    http_status = 422


class StorageError(HaechiError):
    """The object store or the disk cannot be reached, refuses us, or is full."""

    exit_code = 4
    http_status = 503


class IntegrityError(HaechiError):
    """Stored bytes are not what their digest or manifest says."""

    exit_code = 5


class TrainError(HaechiError):
    """Training cannot go on (out of memory, diverged, unusable base weights)."""

    exit_code = 6


class ModelError(HaechiError):
    """A model folder, checkpoint or graph is unusable or does not match its description."""

    exit_code = 7
    http_status = 503


class OverloadError(HaechiError):
    """The server has as many requests waiting as it may hold; nothing is wrong with this one."""

    exit_code = 13
    http_status = 503


class NotReadyError(HaechiError):
    """What was asked for is still loading."""

    exit_code = 15
    http_status = 503


class LoadRefused(HaechiError):
    """The folder's new model was not taken; the former one goes on serving."""

    exit_code = 19
    http_status = 409


class NotFoundError(HaechiError):
    """There is no such model, version or address."""

    exit_code = 16
    http_status = 404


class DeadlineError(HaechiError):
    """The time that a request may take is over."""

    exit_code = 17
    http_status = 504


class AccessError(HaechiError):
    """The caller is unknown (401), or may not do this (403).

    Args:
        problem, remedy: as in HaechiError; neither tells a secret or what would have been right.
        known: the caller is known, but not allowed.
    """

    exit_code = 18

    def __init__(self, problem: str, remedy: str = "", known: bool = False) -> None:
        super().__init__(problem, remedy)
        self.http_status = 403 if known else 401


class TrackingError(HaechiError):
    """MLflow cannot be reached or refuses a call."""

    exit_code = 8
    http_status = 503


class DeployRefused(HaechiError):
    """Deploy declined: the verdict does not allow it, or the champion changed meanwhile."""

    exit_code = 9
    http_status = 409


class DeployError(HaechiError):
    """The deploy target did not take the model (Kubernetes refused or never became ready); it is as it was before."""

    exit_code = 10
    http_status = 502
