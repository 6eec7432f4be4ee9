"""Share out new groups between train, val and test, so that frames and boxes of every class come near their shares.

Iterative stratification (Sechidis, Tsoumakas, Vlahavas 2011, "On the stratification of multi-label data") carried over
to whole groups. First every class that can be is given to test, val and train, the rarest class first; then each
remaining group goes where it brings the shares nearest to what is wanted. The order is a hash of seed and group, so the
outcome does not depend on the order of input, and groups are drawn without regard to what they show.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..shared.dataset import SPLITS

__all__ = ["FRAMES", "GroupSize", "assign"]

FRAMES = ""  # the key under which frames are counted beside boxes per class; no class has an empty name

# Where no group fits into a split's share, it may still take one to have the class at all, but never more than this
# part of all frames: a test that is mostly one group measures that group.
LARGEST_SHARE = 1 / 3


@dataclass(frozen=True)
class GroupSize:
    """A group to place.

    Attributes:
        group: its id.
        sizes: boxes per class, and frames under FRAMES; of what val or test could hold of it.
    """

    group: str
    sizes: Mapping[str, int]


def assign(
    groups: Sequence[GroupSize], have: Mapping[str, Mapping[str, int]], ratios: Mapping[str, float], seed: int
) -> dict[str, str]:
    """Choose a split for every group.

    Args:
        groups: new groups, in any order.
        have: split → what it already holds, counted as in GroupSize.
        ratios: shares of val and test.
        seed: of the order.

    Returns:
        Group id → split.
    """
    plan = _Plan(groups, have, ratios, seed)
    for name in plan.rarest_first():
        for split in ("test", "val", "train"):
            plan.provide(split, name)
    # Groups that can only train go first, so that the others are weighed against what train then still lacks.
    for group in sorted(plan.waiting, key=lambda group: len(plan.able(group)) > 1):
        plan.place(group, plan.best(group))
    return plan.chosen


class _Plan:
    def __init__(
        self,
        groups: Sequence[GroupSize],
        have: Mapping[str, Mapping[str, int]],
        ratios: Mapping[str, float],
        seed: int,
    ) -> None:
        self.waiting = sorted(groups, key=lambda item: hashlib.sha256(f"{seed}:{item.group}".encode()).digest())
        self.chosen: dict[str, str] = {}
        self.have = {split: Counter(have.get(split, {})) for split in SPLITS}
        self.total = Counter[str]()
        for sizes in (*self.have.values(), *(item.sizes for item in groups)):
            self.total.update(sizes)
        shares = {**ratios, "train": 1 - sum(ratios.values())}
        self.quota = {split: {key: shares[split] * count for key, count in self.total.items()} for split in SPLITS}
        self.classes = sorted(key for key, count in self.total.items() if key != FRAMES and count)

    def rarest_first(self) -> list[str]:
        spread = Counter(name for item in self.waiting for name in self.classes if item.sizes.get(name))
        return sorted(self.classes, key=lambda name: (spread[name], name))

    def provide(self, split: str, name: str) -> None:
        """Give the split one group with the class if it has none of it yet and one can be spared."""
        if self.have[split][name] or not self.quota[split].get(FRAMES):
            return
        having = [item for item in self.waiting if item.sizes.get(name)]
        # The last group of a class is train's: what is never learnt need not be tested.
        if split != "train" and len(having) <= (0 if self.have["train"][name] else 1):
            return
        fitting = [item for item in having if self.fits(item, split)]
        modest = [item for item in fitting if item.sizes[name] <= self.quota[split][name]]
        by_boxes = sorted(fitting, key=lambda item: item.sizes[name])
        choice = modest or by_boxes or sorted(having, key=lambda item: item.sizes[FRAMES])
        room = self.total[FRAMES] * LARGEST_SHARE - self.have[split][FRAMES]
        if choice and (fitting or split == "train" or choice[0].sizes[FRAMES] <= room):
            self.place(choice[0], split)

    def fits(self, group: GroupSize, split: str) -> bool:
        return self.have[split][FRAMES] + group.sizes[FRAMES] <= self.quota[split][FRAMES]

    def able(self, group: GroupSize) -> list[str]:
        """Splits that the group may go to: never val or test for one above their whole share."""
        return [split for split in SPLITS if split == "train" or group.sizes[FRAMES] <= self.quota[split][FRAMES]]

    def best(self, group: GroupSize) -> str:
        """The split that comes nearest to its shares by this group."""
        return max(self.able(group), key=lambda split: (self.gain(group, split), split == "train", split))

    def gain(self, group: GroupSize, split: str) -> float:
        """By how much the squared distance to the wanted shares falls; frames weigh as much as all classes together."""

        def fall(key: str) -> float:
            lack, size = self.quota[split][key] - self.have[split][key], group.sizes.get(key, 0)
            return size * (2 * lack - size) / self.total[key] ** 2

        boxes = sum(fall(name) for name in self.classes) / max(1, len(self.classes))
        return fall(FRAMES) + boxes

    def place(self, group: GroupSize, split: str) -> None:
        self.chosen[group.group] = split
        self.have[split].update(group.sizes)
        self.waiting.remove(group)
