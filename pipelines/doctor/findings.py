"""What a check can say: a finding, that it could not look, or that nobody asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from haechi.components.shared.errors import HaechiError

__all__ = ["CannotLook", "Finding", "NotAsked", "each"]

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Finding:
    """One fault.

    Attributes:
        symptom: what a person sees, naming the object.
        cause: why.
        fix: the command or the YAML line that mends it; lines after the first stand for themselves.
    """

    symptom: str
    cause: str
    fix: str


class CannotLook(HaechiError):
    """A check has no right to look, or what it looks at does not answer: that is not health.

    Args:
        problem: what could not be seen, and why.
        remedy: what would let us look.
        found: findings made before or beside it.
    """

    exit_code = 20

    def __init__(self, problem: str, remedy: str = "", found: Iterable[Finding] = ()) -> None:
        super().__init__(problem, remedy)
        self.found = list(found)


class NotAsked(Exception):
    """Nothing that a check looks at was named; the message says what would name it."""


def each(items: Iterable[_Item], look: Callable[[_Item], list[Finding]]) -> list[Finding]:
    """Look at every item, also where one of them cannot be seen.

    Raises:
        CannotLook: one or more could not be seen; it carries what the others showed.
    """
    found: list[Finding] = []
    unseen: list[CannotLook] = []
    for item in items:
        try:
            found += look(item)
        except CannotLook as error:
            found += error.found
            unseen.append(error)
    if unseen:
        problems = "; ".join(dict.fromkeys(error.problem for error in unseen))
        raise CannotLook(problems, unseen[0].remedy, found)
    return found
