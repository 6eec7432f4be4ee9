"""The reconciler: whatever MLflow's alias `champion` names is what a target serves, after the same checks as any deploy.

A person sets the alias in MLflow's own page, or with `haechi promote`; the next round follows. While a pipeline deploys,
the target is its: it moves the alias itself before it lets go. A champion that fails its checks is not tried again until
the alias changes; the target goes on with the former model, and the version's tag `haechi.reconciler` says why.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from haechi.components.shared.errors import DeployError, DeployRefused, HaechiError
from haechi.components.shared.progress import say
from haechi.components.shared.tracking import RegisteredVersion, Tracker

from .bring import Bringer
from .kubernetes_api import Away
from .lease import Busy, LeaseLost
from .observe import Served, observe
from .registry import FORMER

__all__ = ["SITUATION", "Pair", "Reconciler"]

SITUATION = "haechi.reconciler"  # tag of a registered version: what became of it


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
        self._failed: dict[str, str] = {}  # model → version that its target refused, for targets that keep no state
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
                sentence = f"cannot be followed now: {error}"
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
        served = observe(bringer.target, Path(bringer.settings.git_credentials))
        if served.holder and served.holder != bringer.owner:
            return f"{served.holder} is deploying; waiting until that has ended"
        if served.version == champion.version and not served.canary and not served.state.under_way:
            self._failed.pop(name, None)
            return f"champion {champion.version} is what the target names"
        reason = self._failure(name, champion.version, served)
        if reason:
            return f"champion {champion.version} failed and is not tried again until the alias changes: {reason}"
        return self._bring(tracker, pair, champion, served)

    def _failure(self, name: str, version: str, served: Served) -> str:
        """Why this champion was refused before; empty where it was not."""
        if self._failed.get(name, version) != version:
            del self._failed[name]
        if served.state.phase == "failed" and served.state.version == version:
            return served.state.reason
        return "as said" if name in self._failed else ""

    def _bring(self, tracker: Tracker, pair: Pair, champion: RegisteredVersion, served: Served) -> str:
        name, version = pair.name, champion.version
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
        except (Busy, LeaseLost, Away):
            raise  # the next round sees how it ended
        except (DeployError, DeployRefused) as error:
            self._failed[name] = version
            tracker.tag_version(name, champion.number, {SITUATION: f"failed: {error.problem}"[:500]})
            return f"champion {version} failed and is not tried again until the alias changes: {error}"
        return f"champion {version} serves" if wanted else "the alias changed meanwhile; the next round follows it"
