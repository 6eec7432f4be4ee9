"""What a check can say: a finding, that it could not look, or that nobody asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from haechi.components.shared.errors import HaechiError

__all__ = ["CannotLook", "Finding", "NotAsked", "each", "each_object"]

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
    return list(dict.fromkeys(found))


def each_object(items: Iterable[dict[str, Any]], look: Callable[[dict[str, Any]], list[Finding]]) -> list[Finding]:
    """Look at every object of the cluster, also where one of them is not built as its kind is.

    Raises:
        CannotLook: as `each`, and of objects that are not built as their kind.
    """

    def guarded(item: dict[str, Any]) -> list[Finding]:
        try:
            return look(item)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            meta = item.get("metadata") or {}
            name = f"{item.get('kind') or 'object'} {meta.get('namespace')}/{meta.get('name')}"
            problem = f"{name} is not built as its kind is ({type(error).__name__}: {error})"
            raise CannotLook(
                problem, "Look at it with kubectl get -o yaml, and delete it if nobody needs it."
            ) from error

    return each(items, guarded)
