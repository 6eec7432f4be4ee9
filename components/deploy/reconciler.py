"""The reconciler: whatever MLflow's alias `champion` names is what a target serves, after the same checks as any deploy.

A person sets the alias in MLflow's own page, or with `haechi promote`; the next round follows. While a pipeline deploys,
the target is its: it moves the alias itself before it lets go. A champion that was tried and withdrawn is not tried again
until the alias changes: tags of its version in MLflow keep that, so a reconciler that is started again knows it too. What
fails without a word on the model (a right, the network, a full disk; all that can fail at `dir:` and `git:`) is tried in
each round.
"""

from __future__ import annotations

import hashlib
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from haechi.components.shared.errors import DeployError, HaechiError
from haechi.components.shared.progress import say
from haechi.components.shared.tracking import RegisteredVersion, Tracker

from .bring import Bringer
from .observe import Served, observe
from .registry import FORMER
from .target import Target

__all__ = ["SITUATION", "Pair", "Reconciler"]

SITUATION = "haechi.reconciler"  # tag of a registered version: what became of it
_NOT_NOW = "cannot be followed now"
_REASON_LENGTH = 500


@dataclass(frozen=True)
class Pair:
    """A registered model and where its champion is to serve."""

    name: str
    bringer: Bringer


class Reconciler:
    """Follows the champions of some models.

    Args:
        pairs: which, and where to.
    """

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self._pairs = pairs
        self._seen: dict[tuple[str, Target], str] = {}  # the champion of the last round
        self._said: dict[str, str] = {}

    def run(self, every: float, stop: Callable[[], bool] = lambda: False) -> None:
        """Round after round, `every` seconds apart, until `stop`."""
        while not stop():
            self.once()
            time.sleep(every)

    def once(self) -> dict[str, str]:
        """One round; model → what is so, in a sentence. No error of one model keeps the others from theirs."""
        told = {}
        for pair in self._pairs:
            try:
                sentence = self._follow(pair)
            except HaechiError as error:
                sentence = f"{_NOT_NOW}: {error}"
            except Exception as error:  # a fault of ours, or data that nobody foresaw: the others have their turn
                sentence = f"{_NOT_NOW}: {type(error).__name__}: {str(error)[:_REASON_LENGTH]}"
                if self._said.get(pair.name) != sentence:
                    say(f"{pair.name}: please report this: {traceback.format_exc()}")
            if self._said.get(pair.name) != sentence:
                say(f"{pair.name}: {sentence}")
            told[pair.name] = self._said[pair.name] = sentence
        return told

    def _follow(self, pair: Pair) -> str:
        bringer, name = pair.bringer, pair.name
        tracker = Tracker(bringer.settings)
        champion = tracker.alias(name, "champion")
        if champion is None:
            return "MLflow names no champion, so nothing is changed"
        if not champion.version:
            return (
                f"the champion is MLflow's version {champion.number}, which Haechi did not register; nothing is changed"
            )
        self._forgive_others(tracker, pair, champion.version)
        served = observe(bringer.target, Path(bringer.settings.git_credentials))
        if served.holder and served.holder != bringer.owner:
            return f"{served.holder} is deploying; waiting until that has ended"
        if served.version == champion.version and not served.canary and not served.state.under_way:
            return f"champion {champion.version} is what the target names"
        reason = champion.tags.get(_failed_at(bringer.target), "")
        return _failed(champion.version, reason) if reason else self._bring(tracker, pair, champion, served)

    def _forgive_others(self, tracker: Tracker, pair: Pair, version: str) -> None:
        """Once the alias has left a champion that failed, that one may come back and is tried."""
        target = pair.bringer.target
        if self._seen.get((pair.name, target)) == version:
            return
        for other in tracker.versions(pair.name):
            if other.version != version and other.tags.get(_failed_at(target)):
                tracker.tag_version(pair.name, other.number, {_failed_at(target): ""})
        self._seen[pair.name, target] = version

    def _bring(self, tracker: Tracker, pair: Pair, champion: RegisteredVersion, served: Served) -> str:
        name, version = pair.name, champion.version
        if not self._said.get(name, "").startswith(_NOT_NOW):
            say(f"{name}: the champion is {version}, the target names {served.version or 'none'}; following")

        def still() -> bool:
            now = tracker.alias(name, "champion")
            return now is not None and now.version == version

        def note() -> None:
            tags = {SITUATION: f"serving at {pair.bringer.owner}"}
            # After a rollback the target's former model is the one that was fled from.
            if FORMER not in champion.tags and served.version:
                tags[FORMER] = served.version
            tracker.tag_version(name, champion.number, tags)

        try:
            wanted = pair.bringer.bring(name, champion, still, note, {"Ordered-by": "alias champion"})
        except DeployError as error:
            if not _was_withdrawn(pair.bringer, version, served):
                raise  # the next round sees how it ended, or tries again
            reason = error.problem[:_REASON_LENGTH]
            told = {SITUATION: f"failed: {reason}", _failed_at(pair.bringer.target): reason}
            tracker.tag_version(name, champion.number, told)
            return _failed(version, str(error))
        return f"champion {version} serves" if wanted else "the alias changed meanwhile; the next round follows it"


def _failed(version: str, reason: str) -> str:
    return f"champion {version} failed and is not tried again until the alias changes: {reason}"


def _failed_at(target: Target) -> str:
    """The tag of a version that tells why this target does not take it; MLflow's keys do not take a target itself."""
    return f"haechi.failed.{hashlib.sha256(str(target).encode()).hexdigest()[:8]}"


def _was_withdrawn(bringer: Bringer, version: str, before: Served) -> bool:
    """Whether the target itself tells of a failed rollout of this version, and did not before."""
    try:
        state = observe(bringer.target, Path(bringer.settings.git_credentials)).state
    except HaechiError:
        return False
    return (state.phase, state.version) == ("failed", version) and state != before.state
