"""build: merging, groups, the sticky split, the certificate, and a step that survives being killed."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import uuid
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from haechi.components.build.certificate import certify
from haechi.components.build.config import BuildConfig, Grouping
from haechi.components.build.merge import Exclusions, MergedFrame, merge, merge_frame
from haechi.components.build.previous import Place, Previous
from haechi.components.build.split import retired_frames, split_frames
from haechi.components.build.step import build
from haechi.components.build.stratify import FRAMES, GroupSize, assign
from haechi.components.shared.dataset import (
    Box,
    LabelExport,
    LabelledFrame,
    ManifestRow,
    dataset_digest,
    frame_key,
    latest_dataset,
    read_rows,
    write_export,
)
from haechi.components.shared.errors import InputError, IntegrityError, NoDataError
from haechi.components.shared.files import sha256_bytes
from haechi.components.shared.images import decode, signature
from haechi.components.shared.settings import Settings
from haechi.components.shared.storage import Store

CLASSES = ("smoke", "fire")
RATIOS = {"val": 0.15, "test": 0.15}
T0 = datetime(2026, 1, 1, tzinfo=UTC)
FILES = ("certificate.json", "data.yaml", "manifest.parquet", "stats.json")


def sha(number: int | str) -> str:
    return hashlib.sha256(f"frame-{number}".encode()).hexdigest()


def box(name: str = "fire", corners: tuple[float, ...] = (10, 10, 50, 50), origin: str = "import") -> Box:
    return Box(name, *corners, origin=origin)


def frame(number: int | str, **fields: Any) -> LabelledFrame:
    """A frame that looks like no other: its signature is random, drawn from its number."""
    rng = np.random.default_rng(int(sha(number)[:12], 16))
    defaults: dict[str, Any] = {
        "phash": int(rng.integers(0, 2**63)),
        "thumb": rng.integers(0, 256, 256).astype(np.uint8).tobytes(),
        "boxes": (box(),),
        "covers": CLASSES,
        "labelled_at": T0,
        "actor": "src",
    }
    return LabelledFrame(sha(number), "jpg", 100, 80, f"file:///{number}.jpg", "src", **(defaults | fields))


def merged(row: LabelledFrame) -> MergedFrame:
    return merge_frame([(row, LabelExport(f"{row.origin}-0", row.origin, "2026"))], CLASSES)


def split(
    rows: list[LabelledFrame], previous: Previous | None = None, **config: Any
) -> tuple[dict[str, ManifestRow], dict[str, int]]:
    excluded = Exclusions()
    config = {"ratios": RATIOS, **config}
    outcome = split_frames(
        [merged(row) for row in rows], previous or Previous(), BuildConfig("d", CLASSES, **config), excluded
    )
    return {row.sha256: row for row in outcome.rows}, excluded.counts()


def places(**splits: list[int]) -> Previous:
    """A previous dataset in which every frame is a group of its own, named after its number."""
    return Previous({sha(n): Place(split, f"group{n}") for split, numbers in splits.items() for n in numbers})


def publish(store: Store, rows: list[LabelledFrame], kind: str = "import", now: datetime = T0) -> LabelExport:
    for row in rows:
        store.put(frame_key(row.sha256, row.ext), b"not read by build")
    return write_export(store, kind, rows, {}, now)


class TestMerge:
    @pytest.mark.parametrize(
        ("labels", "covers", "boxes"),
        [
            pytest.param(
                [("import", 9, "fire", [box("fire")]), ("review", 1, "fire", [])],
                ["fire"],
                [],
                id="review-beats-import",
            ),
            pytest.param(
                [("review", 1, "fire", [box("fire")]), ("review", 2, "fire", [])], ["fire"], [], id="newest-review-wins"
            ),
            pytest.param(
                [("import", 1, "fire", [box("fire")]), ("import", 2, "smoke", [box("smoke")])],
                ["smoke", "fire"],
                ["smoke", "fire"],
                id="imports-of-different-classes-add-up",
            ),
            pytest.param(
                [("import", 2, "fire", []), ("import", 1, "fire", [box("fire")])], ["fire"], [], id="newest-import-wins"
            ),
            pytest.param(
                [("import", 1, "fire", [box("fire")]), ("machine", 2, "fire smoke", [box("smoke", origin="machine")])],
                ["smoke", "fire"],
                ["smoke", "fire"],
                id="machine-fills-what-people-did-not-cover",
            ),
            pytest.param(
                [("machine", 2, "fire", [box(origin="machine")] * 2), ("import", 1, "smoke", [box("fire")])],
                ["smoke"],
                ["fire"],
                id="a-persons-box-beats-a-machine-even-uncovered",
            ),
            pytest.param(
                [("import", 1, "fire", [box("fire"), box("dog")])], ["fire"], ["fire"], id="other-classes-are-dropped"
            ),
        ],
    )
    def test_each_class_comes_from_its_best_source(
        self, labels: list[tuple[str, int, str, list[Box]]], covers: list[str], boxes: list[str]
    ) -> None:
        rows = [
            (
                frame(
                    1,
                    origin=origin,
                    labelled_at=T0 + timedelta(days=day),
                    covers=tuple(names.split()),
                    boxes=tuple(drawn),
                ),
                LabelExport(f"{origin}-{day}", origin, f"2026-01-0{day}"),
            )
            for origin, day, names, drawn in labels
        ]
        for order in (rows, rows[::-1]):
            found = merge_frame(order, CLASSES).row
            assert (list(found.covers), [item.class_name for item in found.boxes]) == (covers, boxes)

    def test_val_and_test_form_holds_only_what_people_cover(self) -> None:
        person = frame(1, covers=("fire",), boxes=(box("fire"), box("smoke")))
        machine = frame(1, origin="machine", covers=CLASSES, boxes=(box("smoke", origin="machine"),))
        found = merge_frame(
            [(person, LabelExport("import-1", "import", "1")), (machine, LabelExport("m", "m", "2"))], CLASSES
        )
        assert found.human is not None
        assert (found.human.covers, [item.class_name for item in found.human.boxes]) == (("fire",), ["fire"])
        assert {item.class_name for item in found.row.boxes} == {"fire", "smoke"}

    def test_a_row_names_every_export_that_gave_it_and_keeps_the_split_hint(self) -> None:
        imported = frame(1, covers=("fire",), split_hint="test")
        reviewed = frame(1, origin="review", covers=("smoke",), boxes=(box("smoke", origin="review"),), actor="kim")
        found = merge_frame(
            [(imported, LabelExport("import-1", "import", "1")), (reviewed, LabelExport("review-1", "review", "2"))],
            CLASSES,
        ).row
        assert (found.export_id, found.origin, found.actor) == ("review-1 import-1", "review", "kim")
        assert found.split_hint == "test"
        assert {item.class_name: item.origin for item in found.boxes} == {"fire": "import", "smoke": "review"}

    def test_broken_rows_are_left_out_with_a_reason(self, store: Store) -> None:
        broken = {
            "box_not_finite": frame(1, boxes=(box(corners=(float("nan"), 0, 5, 5)),)),
            "box_outside": frame(2, boxes=(box(corners=(0, 0, 102, 5)),)),
            "box_empty": frame(3, boxes=(box(corners=(20, 20, 20, 40)),)),
            "bad_size": replace(frame(4), width=0),
            "no_signature": frame(5, thumb=b""),
            "no_class": frame(6, covers=("dog",), boxes=(box("dog"),)),
            "unknown_origin": frame(7, origin="oracle"),
        }
        publish(store, [*broken.values(), frame("sound")])
        write_export(store, "import", [frame("missing")], {}, T0)
        found = merge(store, CLASSES)
        assert found.excluded.counts() == dict.fromkeys(sorted([*broken, "frame_missing"]), 1)
        assert {reason: item[0][0] for reason, item in found.excluded.frames.items()} == {
            reason: row.sha256 for reason, row in broken.items()
        } | {"frame_missing": sha("missing")}
        assert [item.sha256 for item in found.frames] == [sha("sound")]

    def test_an_overshoot_of_one_pixel_is_clipped_and_other_classes_are_counted(self, store: Store) -> None:
        publish(store, [frame(1, boxes=(box(corners=(-0.9, 0, 100.9, 80.5)), box("dog"), box("dog")))])
        found = merge(store, CLASSES)
        (kept,) = found.frames[0].row.boxes
        assert (kept.x1, kept.y1, kept.x2, kept.y2) == (0, 0, 100, 80)
        assert found.dropped_boxes == {"dog": 2}


def burst(numbers: list[int], start: int, gap: int, camera: str = "cam1") -> list[LabelledFrame]:
    return [frame(n, camera=camera, captured_at=T0 + timedelta(seconds=start + gap * k)) for k, n in enumerate(numbers)]


def alike(numbers: list[int]) -> list[LabelledFrame]:
    first = frame(numbers[0])
    return [
        frame(n, phash=first.phash ^ k, thumb=bytes(min(255, value + 5 * k) for value in first.thumb))
        for k, n in enumerate(numbers)
    ]


class TestGroups:
    @pytest.mark.parametrize(
        ("rows", "groups"),
        [
            pytest.param(
                [frame(1, sequence="v"), frame(2, sequence="v"), frame(3, sequence="w")], [{1, 2}, {3}], id="video"
            ),
            pytest.param(burst([1, 2, 3], 0, 30), [{1, 2, 3}], id="burst-is-a-chain"),
            pytest.param(burst([1, 2], 0, 31), [{1}, {2}], id="gap-too-long"),
            pytest.param(burst([1], 0, 0) + burst([2], 1, 0, "cam2"), [{1}, {2}], id="another-camera"),
            pytest.param([*alike([1, 2]), frame(3)], [{1, 2}, {3}], id="near-duplicates"),
            pytest.param(
                [replace(alike([1, 2])[0], sequence="v"), alike([1, 2])[1], frame(3, sequence="v")],
                [{1, 2, 3}],
                id="ties-of-two-kinds",
            ),
        ],
    )
    def test_what_is_tied_is_one_group(self, rows: list[LabelledFrame], groups: list[set[int]]) -> None:
        found, _ = split(rows)
        numbers = {sha(n): n for n in range(10)}
        together: dict[str, set[int]] = {}
        for row in found.values():
            together.setdefault(row.group, set()).add(numbers[row.sha256])
        assert sorted(map(sorted, together.values())) == sorted(map(sorted, groups))
        assert all(row.group == min(sha(n) for n in together[row.group])[:12] for row in found.values())

    def test_a_tie_that_only_one_of_two_sources_knows_still_holds(self) -> None:
        twice = merge_frame(
            [
                (frame(1, sequence="v"), LabelExport("import-1", "import", "1")),
                (frame(1, sequence="w"), LabelExport("import-2", "import", "2")),
            ],
            CLASSES,
        )
        others = [merged(frame(2, sequence="v")), merged(frame(3, sequence="w"))]
        rows = split_frames([twice, *others], Previous(), BuildConfig("d", CLASSES), Exclusions()).rows
        assert len({row.group for row in rows}) == 1

    @pytest.mark.parametrize(
        "values",
        [{"burst_gap_s": -1}, {"near_bits": 65}, {"near_levels": "x"}, {"gap": 3}, {"burst_gap_s": float("nan")}],
    )
    def test_unusable_grouping_is_refused(self, values: dict[str, Any]) -> None:
        with pytest.raises(InputError, match="grouping"):
            Grouping.of(values)


class TestStickySplit:
    def test_known_frames_keep_split_and_group_and_new_ones_join(self) -> None:
        rows = [frame(1, sequence="v"), frame(2), frame(3, sequence="v"), frame(4)]
        found, excluded = split(rows, places(test=[1], val=[2]))
        assert {n: (found[sha(n)].split, found[sha(n)].group) for n in (1, 2, 3)} == {
            1: ("test", "group1"),
            2: ("val", "group2"),
            3: ("test", "group1"),
        }
        assert found[sha(4)].group == sha(4)[:12]
        assert excluded == {}

    def test_only_frames_that_bridge_splits_are_left_out(self) -> None:
        # 10 is tied to test (video a) and train (video b); 11 only to test, though over frame 1 it is in one web with 10.
        first, second = alike([10, 2])
        rows = [frame(1, sequence="a"), second, replace(first, sequence="a"), frame(11, sequence="a")]
        found, excluded = split(rows, places(test=[1], train=[2]))
        assert excluded == {"bridges_splits": 1}
        assert {sha256: row.split for sha256, row in found.items()} == {
            sha(1): "test",
            sha(2): "train",
            sha(11): "test",
        }

    def test_frames_tied_to_a_bridge_through_new_frames_stay_out_with_it(self) -> None:
        first, second = alike([10, 2])
        rows = [frame(1, sequence="a"), second, replace(first, sequence="a"), frame(11, camera="c", captured_at=T0)]
        rows[2] = replace(rows[2], camera="c", captured_at=T0 + timedelta(seconds=9))
        found, excluded = split(rows, places(test=[1], train=[2]))
        assert excluded == {"bridges_splits": 2}
        assert set(found) == {sha(1), sha(2)}

    def test_known_frames_of_two_splits_that_turn_out_tied_leave_the_less_guarded_split_for_good(self) -> None:
        rows = [frame(n, sequence="v") for n in (1, 2, 3)] + [frame(4)]
        previous = places(test=[1], val=[2], train=[3, 4])
        found, excluded = split(rows, previous)
        assert excluded == {"leak": 2}
        assert set(found) == {sha(1), sha(4)}
        record = Exclusions()
        split_frames([merged(row) for row in rows], previous, BuildConfig("d", CLASSES), record)
        retired = retired_frames(previous, found.values(), record)
        assert {sha256: entry["reason"] for sha256, entry in retired.items()} == {sha(2): "leak", sha(3): "leak"}
        # A frame that was trained on must not come back as a test frame.
        later = Previous(
            {sha256: Place(row.split, row.group) for sha256, row in found.items()},
            {sha256: Place(entry["split"], entry["group"]) for sha256, entry in retired.items()},
        )
        again, excluded = split(rows, later)
        assert again == found
        assert excluded == {"leak": 2}

    def test_a_frame_that_was_away_comes_back_to_its_split(self) -> None:
        previous = places(test=[1], train=[2])
        found, _ = split([frame(2)], previous)
        retired = retired_frames(previous, found.values(), Exclusions())
        assert retired == {sha(1): {"split": "test", "group": "group1", "reason": "absent"}}

    def test_machine_labels_never_reach_val_or_test(self) -> None:
        rows = [
            frame(1, sequence="v"),
            frame(2, sequence="v", origin="machine"),
            frame(3, sequence="w", origin="machine"),
        ]
        found, excluded = split(rows, places(test=[1]))
        assert excluded == {"machine_in_test": 1}
        assert (found[sha(3)].split, found[sha(3)].origin) == ("train", "machine")

    def test_purely_machine_labelled_groups_train(self) -> None:
        found, excluded = split([frame(n, origin="machine") for n in range(40)])
        assert {row.split for row in found.values()} == {"train"}
        assert excluded == {}

    def test_the_split_does_not_depend_on_the_order_of_input_but_on_the_seed(self) -> None:
        rows = [frame(n, boxes=(box(CLASSES[n % 2]),)) for n in range(60)]
        shuffled = rows.copy()
        random.Random(1).shuffle(shuffled)
        assert split(rows) == split(shuffled)
        assert split(rows) != split(rows, seed=1)

    @pytest.mark.parametrize("seed", range(6))
    def test_rounds_of_growing_random_worlds_never_leak_and_are_stable(self, seed: int) -> None:
        rng = random.Random(seed)
        looks = [frame(f"look-{seed}-{n}") for n in range(25)]
        previous, rows = Previous(), []
        tested: set[str] = set()
        for round_ in range(4):
            for n in range(60):
                look = rng.choice(looks)
                similar = {"phash": look.phash, "thumb": look.thumb} if rng.random() < 0.2 else {}
                rows.append(
                    frame(
                        f"{seed}-{round_}-{n}",
                        sequence=rng.choice(["", "", "", f"v{rng.randrange(12)}"]),
                        camera=rng.choice(["", "cam1", "cam2"]),
                        captured_at=T0 + timedelta(seconds=rng.randrange(20_000)),
                        origin=rng.choice(["import", "review", "machine"]),
                        boxes=tuple(box(rng.choice(CLASSES)) for _ in range(rng.randrange(3))),
                        **similar,
                    )
                )
            # The limits tighten halfway, so that frames of different splits become tied.
            config = BuildConfig("d", CLASSES, ratios=RATIOS, grouping=Grouping(burst_gap_s=5 if round_ < 2 else 60))
            record = Exclusions()
            frames = [merged(row) for row in rows]
            outcome = split_frames(frames, previous, config, record).rows
            certify(outcome, config)
            here = {row.sha256: row for row in outcome}
            assert all(here[known].split == place.split for known, place in previous.places.items() if known in here)
            assert tested <= {row.sha256 for row in outcome if row.split == "test"}, "a group never leaves test"
            tested |= {row.sha256 for row in outcome if row.split == "test"}
            assert len(outcome) + sum(record.counts().values()) == len(rows)
            retired = retired_frames(previous, outcome, record)
            previous = Previous(
                {
                    item: Place(entry["split"], entry["group"])
                    for item, entry in retired.items()
                    if entry["reason"] != "leak"
                }
                | {row.sha256: Place(row.split, row.group) for row in outcome},
                {
                    item: Place(entry["split"], entry["group"])
                    for item, entry in retired.items()
                    if entry["reason"] == "leak"
                },
            )
            again = split_frames(frames, previous, config, Exclusions()).rows
            assert dataset_digest(CLASSES, again) == dataset_digest(CLASSES, outcome)


def sizes(**groups: tuple[int, int, int]) -> list[GroupSize]:
    """Groups by name: frames, boxes of smoke, boxes of fire."""
    return [GroupSize(name, {FRAMES: n, "smoke": smoke, "fire": fire}) for name, (n, smoke, fire) in groups.items()]


class TestStratify:
    def test_frames_and_boxes_of_each_class_come_near_their_shares(self) -> None:
        rng = random.Random(0)
        groups = sizes(**{f"g{n}": (rng.randint(1, 8), rng.randint(0, 4), int(rng.random() < 0.1)) for n in range(300)})
        chosen = assign(groups, {}, RATIOS, 0)
        total, held = Counter[str](), {split: Counter[str]() for split in ("train", "val", "test")}
        for item in groups:
            total.update(item.sizes)
            held[chosen[item.group]].update(item.sizes)
        for split_ in ("val", "test"):
            for key in (FRAMES, "smoke", "fire"):
                assert held[split_][key] / total[key] == pytest.approx(0.15, abs=0.03)

    @pytest.mark.parametrize("seed", range(20))
    def test_a_rare_class_reaches_all_splits_where_three_groups_have_it(self, seed: int) -> None:
        groups = sizes(**{f"g{n}": (3, 5, 0) for n in range(40)}, a=(2, 0, 9), b=(5, 0, 1), c=(4, 0, 3))
        chosen = assign(groups, {}, RATIOS, seed)
        assert {chosen[name] for name in "abc"} == {"train", "val", "test"}

    @pytest.mark.parametrize(
        ("groups", "expected"),
        [
            pytest.param(sizes(a=(50, 9, 9)), {"a": {"train"}}, id="one-group-trains"),
            pytest.param(sizes(a=(80, 9, 9), b=(10, 9, 9), c=(10, 9, 9)), {"a": {"train"}}, id="large-group-trains"),
            pytest.param(
                sizes(a=(45, 9, 9), b=(55, 9, 9)), {"a": {"train"}, "b": {"train"}}, id="test-would-be-one-group"
            ),
            pytest.param(
                sizes(a=(10, 1, 1), b=(10, 1, 1), c=(10, 1, 1)),
                {"abc": {"train", "val", "test"}},
                id="three-equal-groups",
            ),
        ],
    )
    def test_few_groups(self, groups: list[GroupSize], expected: dict[str, set[str]]) -> None:
        chosen = assign(groups, {}, RATIOS, 0)
        for names, splits in expected.items():
            assert {chosen[name] for name in names} == splits

    @pytest.mark.parametrize("seed", range(20))
    def test_a_group_above_the_whole_share_of_test_trains(self, seed: int) -> None:
        chosen = assign(sizes(large=(16, 16, 16), **{f"g{n}": (1, 1, 1) for n in range(84)}), {}, RATIOS, seed)
        assert chosen["large"] == "train"
        assert Counter(chosen.values()) == {"train": 70 - 15, "val": 15, "test": 15}

    def test_what_splits_hold_already_counts(self) -> None:
        have = {"train": {FRAMES: 10, "smoke": 10}, "val": {FRAMES: 50, "smoke": 50}, "test": {FRAMES: 50, "smoke": 50}}
        chosen = assign(sizes(**{f"g{n}": (2, 2, 0) for n in range(10)}), have, RATIOS, 0)
        assert set(chosen.values()) == {"train"}

    def test_a_ratio_of_zero_gives_nothing(self) -> None:
        chosen = assign(sizes(**{f"g{n}": (1, 1, 1) for n in range(50)}), {}, {"val": 0.2, "test": 0.0}, 0)
        assert Counter(chosen.values()) == {"train": 40, "val": 10}


def row(number: int, split_: str, group: str = "", **fields: Any) -> ManifestRow:
    base = frame(number, **fields)
    return ManifestRow(**vars(base), split=split_, group=group or f"g{number}")


class TestCertificate:
    @pytest.mark.parametrize(
        ("rows", "named"),
        [
            ([row(1, "train", "g"), row(2, "test", "g")], "groups_straddling"),
            ([row(1, "train", sequence="v"), row(2, "val", sequence="v")], "sequences_straddling"),
            (
                [
                    row(1, "train", camera="c", captured_at=T0),
                    row(2, "test", camera="c", captured_at=T0 + timedelta(seconds=30)),
                ],
                "bursts_straddling",
            ),
            (
                [
                    ManifestRow(**vars(item), split=where, group=where)
                    for item, where in zip(alike([1, 2]), ("val", "test"), strict=True)
                ],
                "near_duplicates_across",
            ),
            ([row(1, "train", "g"), row(1, "train", "g")], "frames_twice"),
        ],
    )
    def test_a_leak_of_any_kind_is_refused(self, rows: list[ManifestRow], named: str) -> None:
        with pytest.raises(IntegrityError, match=named):
            certify(rows, BuildConfig("d", CLASSES))

    def test_counts_what_was_checked(self) -> None:
        rows = (
            [row(n, "train") for n in range(5)] + [row(n, "val") for n in (5, 6)] + [row(n, "test") for n in (7, 8, 9)]
        )
        found = certify(rows, BuildConfig("d", CLASSES))
        assert found["checked"]["pairs_across_splits"] == 5 * 2 + 5 * 3 + 2 * 3
        assert found["checked"]["groups"] == {"train": 5, "val": 2, "test": 3}
        assert found["random_split"]["either"] == {"mean": 0.0, "sd": 0.0}

    def test_a_random_split_of_pairs_leaks_as_probability_says(self) -> None:
        rows = [row(n, "train", f"g{n // 2}") for n in range(2000)]
        found = certify(rows, BuildConfig("d", CLASSES, ratios=RATIOS))["random_split"]
        # A test frame's one mate is in train with probability 1400 / 1999.
        assert found["group_mate"]["mean"] == pytest.approx(1400 / 1999, abs=0.02)
        assert found["near_duplicate"]["mean"] == 0.0
        assert (found["draws"], found["test_frames"]) == (20, 300)

    def test_machine_labelled_frames_stay_in_train_in_a_random_split_too(self) -> None:
        rows = [row(n, "train", f"g{n % 10}", origin="import" if n < 10 else "machine") for n in range(20)]
        found = certify(rows, BuildConfig("d", CLASSES, ratios={"val": 0.0, "test": 0.5}))["random_split"]
        assert (found["test_frames"], found["group_mate"]["mean"]) == (5, 1.0)

    def test_imported_splits_are_measured_under_their_usual_names(self) -> None:
        hints = {1: "train", 2: "valid", 3: "val2017", 4: "test"}
        groups = {1: "g", 2: "g", 3: "h", 4: "g"}
        rows = [row(n, "train", groups[n], split_hint=hint) for n, hint in hints.items()]
        assert certify(rows, BuildConfig("d", CLASSES))["imported_splits"] == {
            "src": {
                "val": {"frames": 2, "group_mate_in_train": 1, "near_duplicate_in_train": 0},
                "test": {"frames": 1, "group_mate_in_train": 1, "near_duplicate_in_train": 0},
            }
        }


def world(count: int = 60) -> list[LabelledFrame]:
    """Frames in bursts of three, with both classes and backgrounds."""
    rows = []
    for n in range(count):
        boxes = ((), (box("fire"),), (box("smoke"), box("fire")), (box("smoke"),))[(n // 3) % 4]
        rows.append(
            frame(n, camera="cam", captured_at=T0 + timedelta(minutes=10 * (n // 3), seconds=n % 3), boxes=boxes)
        )
    return rows


def run(settings: Settings, out: Path, previous: str = "", **changes: Any) -> Any:
    arguments = {"name": "safety", "classes": list(CLASSES), "ratios": RATIOS, "seed": 0} | changes
    return build(previous_dataset=previous, out=out, settings=settings, **arguments)


class TestStep:
    def test_writes_the_dataset_to_the_folder_and_to_the_store(
        self, store: Store, settings: Settings, tmp_path: Path
    ) -> None:
        publish(store, world())
        result = run(settings, tmp_path / "out")
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == list(FILES)
        rows = read_rows(tmp_path / "out" / "manifest.parquet", ManifestRow)
        assert result.digest == dataset_digest(CLASSES, rows)
        assert result.uri == f"s3://{store.bucket}/datasets/safety/{result.digest}/"
        prefix = f"datasets/safety/{result.digest}/"
        assert {name: store.get(prefix + name) for name in FILES} == {
            name: (tmp_path / "out" / name).read_bytes() for name in FILES
        }
        described = yaml.safe_load((tmp_path / "out" / "data.yaml").read_text())
        assert (described["names"], described["digest"]) == ({0: "smoke", 1: "fire"}, result.digest)
        stats = json.loads((tmp_path / "out" / "stats.json").read_text())
        assert stats["frames"] == {"train": result.train, "val": result.val, "test": result.test}
        assert min(stats["classes"][name][part]["boxes"] for name in CLASSES for part in ("train", "val", "test")) > 0
        assert stats["notes"] == []
        assert json.loads(json.dumps(result.metadata())) == result.metadata()

    def test_the_same_labels_give_the_same_bytes_and_a_build_on_itself_the_same_digest(
        self, store: Store, settings: Settings, tmp_path: Path
    ) -> None:
        publish(store, world())
        first = run(settings, tmp_path / "a")
        assert run(settings, tmp_path / "b") == first
        assert [(tmp_path / "a" / name).read_bytes() for name in FILES] == [
            (tmp_path / "b" / name).read_bytes() for name in FILES
        ]
        prefix = f"datasets/safety/{first.digest}/"
        before = [store.get(prefix + name) for name in FILES]
        assert run(settings, tmp_path / "c", previous=first.digest) == first
        assert [store.get(prefix + name) for name in FILES] == before, "a complete dataset is never written again"
        assert latest_dataset(store, "safety") == first.digest

    def test_new_labels_grow_the_dataset_and_move_nothing(
        self, store: Store, settings: Settings, tmp_path: Path
    ) -> None:
        rows = world(90)
        publish(store, rows[:60])
        first = run(settings, tmp_path / "a")
        publish(store, rows[60:], now=T0 + timedelta(days=1))
        second = run(settings, tmp_path / "b", previous=first.digest)
        before = {
            item.sha256: (item.split, item.group) for item in read_rows(tmp_path / "a/manifest.parquet", ManifestRow)
        }
        after = {
            item.sha256: (item.split, item.group) for item in read_rows(tmp_path / "b/manifest.parquet", ManifestRow)
        }
        assert len(after) == 90
        assert before.items() <= after.items()
        assert latest_dataset(store, "safety") == second.digest
        assert json.loads((tmp_path / "b/stats.json").read_text())["previous_dataset"] == first.digest

    def test_an_image_object_that_comes_back_finds_its_split_again(
        self, store: Store, settings: Settings, tmp_path: Path
    ) -> None:
        publish(store, world())
        first = run(settings, tmp_path / "a")
        rows = read_rows(tmp_path / "a/manifest.parquet", ManifestRow)
        lost = next(item for item in rows if item.split == "test")
        store.remove(frame_key(lost.sha256, "jpg"))
        second = run(settings, tmp_path / "b", previous=first.digest)
        assert second.excluded == {"frame_missing": 1}
        store.put(frame_key(lost.sha256, "jpg"), b"found again")
        assert run(settings, tmp_path / "c", previous=second.digest).digest == first.digest

    @pytest.mark.parametrize(
        "rows", [pytest.param([], id="no-exports"), pytest.param([frame(1)], id="frame-object-lost")]
    )
    def test_nothing_to_learn_from_is_told_with_the_remedy(
        self, store: Store, settings: Settings, tmp_path: Path, rows: list[LabelledFrame]
    ) -> None:
        if rows:
            write_export(store, "import", rows, {}, T0)
        with pytest.raises(NoDataError, match=r"labels/.*Import labelled data.*review"):
            run(settings, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_a_single_group_trains_and_the_statistics_say_so(
        self, store: Store, settings: Settings, tmp_path: Path
    ) -> None:
        publish(store, [frame(n, sequence="v") for n in range(9)])
        result = run(settings, tmp_path / "out")
        assert (result.train, result.val, result.test) == (9, 0, 0)
        notes = json.loads((tmp_path / "out/stats.json").read_text())["notes"]
        assert [note.split(":")[0] for note in notes[:2]] == ["val is empty", "test is empty"]
        assert "class 'smoke' has no box at all" in notes

    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            ({"name": "Bad Name"}, "name"),
            ({"classes": []}, "classes"),
            ({"classes": ["fire", "fire"]}, "fire"),
            ({"classes": ["fire", ""]}, "classes"),
            ({"ratios": {"val": 0.6, "test": 0.4}}, "ratios"),
            ({"ratios": {"val": -0.1}}, "ratios.val"),
            ({"ratios": {"val": float("nan")}}, "ratios.val"),
            ({"ratios": {"train": 0.8}}, "train"),
            ({"seed": 0.5}, "seed"),
            ({"previous": "latest"}, "previous_dataset"),
            ({"previous": "0" * 64}, "previous_dataset 0000"),
            ({"grouping": {"gap": 1}}, "grouping"),
        ],
    )
    def test_unusable_parameters_are_named(
        self, store: Store, settings: Settings, tmp_path: Path, changes: dict[str, Any], named: str
    ) -> None:
        with pytest.raises(InputError, match=named) as caught:
            run(settings, tmp_path / "out", **changes)
        assert caught.value.remedy

    def test_a_previous_dataset_that_was_changed_is_refused(
        self, store: Store, settings: Settings, tmp_path: Path
    ) -> None:
        publish(store, world())
        first = run(settings, tmp_path / "out")
        for content in (b"names: {0: fire, 1: smoke}\n", b"names: 5\n", b"[", b""):
            store.put(f"datasets/safety/{first.digest}/data.yaml", content)
            with pytest.raises(IntegrityError, match=first.digest):
                run(settings, tmp_path / "out", previous=first.digest)

    def test_killed_at_any_point_and_run_again_is_as_never_killed(self, s3_settings: Settings, tmp_path: Path) -> None:
        calm, stormy = (replace(s3_settings, bucket=f"kill-{uuid.uuid4().hex[:12]}") for _ in range(2))
        for settings in (calm, stormy):
            store = Store(settings)
            store.ensure_bucket()
            publish(store, world())
        expected = run(calm, tmp_path / "calm")
        for line in ("labels exports", "groups are new", "checking", "publishing"):
            _kill_at(line, stormy, tmp_path / "stormy")
            # `publishing` is followed by the uploads: the marker may or may not have made it, but never before the rest.
            if latest_dataset(store, "safety"):
                assert all(store.exists(f"datasets/safety/{expected.digest}/{name}") for name in FILES)
        result = run(stormy, tmp_path / "stormy")
        assert result.digest == expected.digest
        assert [store.get(f"datasets/safety/{result.digest}/{name}") for name in FILES] == [
            (tmp_path / "calm" / name).read_bytes() for name in FILES
        ]
        assert sorted(path.name for path in (tmp_path / "stormy").iterdir()) == list(FILES)

    def test_half_a_dataset_is_no_dataset(self, store: Store, settings: Settings, tmp_path: Path) -> None:
        publish(store, world())
        digest = run(settings, tmp_path / "out").digest
        store.remove(f"datasets/safety/{digest}/stats.json")
        store.put(f"datasets/safety/{digest}/manifest.parquet", b"half")
        assert latest_dataset(store, "safety") == ""
        assert run(settings, tmp_path / "out").digest == digest
        assert (
            store.get(f"datasets/safety/{digest}/manifest.parquet") == (tmp_path / "out/manifest.parquet").read_bytes()
        )

    def test_the_component_writes_the_artifact_and_its_metadata(
        self, store: Store, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from kfp.dsl import Artifact, Dataset

        from haechi.components.build.component import build as component

        publish(store, world())
        for name, value in settings.to_env().items():
            monkeypatch.setenv(name, value)
        dataset = Dataset(uri=str(tmp_path / "dataset"))
        # kfp hands numbers inside dicts over as floats.
        component.python_func(
            Artifact(), "safety", list(CLASSES), "", RATIOS, 0, dataset, {"burst_gap_s": 30.0, "near_bits": 10.0}
        )
        assert dataset.metadata["digest"] == latest_dataset(store, "safety")
        assert sorted(path.name for path in (tmp_path / "dataset").iterdir()) == list(FILES)


def _kill_at(line: str, settings: Settings, out: Path) -> None:
    """Start a build in a process of its own and SIGKILL it when it says `line`."""
    program = (
        "import sys; from pathlib import Path; from haechi.components.build.step import build;"
        "from haechi.components.shared.settings import Settings;"
        f"build('safety', {list(CLASSES)!r}, '', {RATIOS!r}, 0, Path({str(out)!r}), Settings.from_env())"
    )
    command = [sys.executable, "-c", program]
    env = {**os.environ, **settings.to_env()}
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = next((text for text in process.stderr if line in text), "")
        process.send_signal(signal.SIGKILL)
    assert said, f"the build never said {line!r}"


@pytest.mark.realdata
def test_published_splits_of_real_frames_leak_and_ours_do_not(
    realdata: Path, store: Store, settings: Settings, tmp_path: Path
) -> None:
    rows = []
    for image in sorted((realdata / "fire_smoke" / "images").rglob("*.jpg")):
        data = image.read_bytes()
        pixels = decode(data)
        look = signature(pixels)
        rows.append(
            LabelledFrame(
                sha256_bytes(data),
                "jpg",
                pixels.shape[1],
                pixels.shape[0],
                image.as_uri(),
                "fire_smoke",
                phash=look.phash,
                thumb=look.thumb,
                boxes=_yolo_boxes(image, pixels.shape[1], pixels.shape[0]),
                covers=CLASSES,
                split_hint=image.parent.name,
            )
        )
    publish(store, rows)
    result = run(settings, tmp_path / "out")
    assert (result.train + result.val + result.test, result.excluded) == (402, {})
    certificate = json.loads((tmp_path / "out/certificate.json").read_text())
    assert certificate["checked"]["near_duplicates_across"] == 0
    published = certificate["imported_splits"]["fire_smoke"]
    assert (published["val"]["frames"], published["test"]["frames"]) == (47, 55)
    assert published["val"]["near_duplicate_in_train"] > 0 and published["test"]["near_duplicate_in_train"] > 0
    assert certificate["random_split"]["either"]["mean"] > 0.1
    stats = json.loads((tmp_path / "out/stats.json").read_text())
    for name in CLASSES:
        boxes = {part: stats["classes"][name][part]["boxes"] for part in ("train", "val", "test")}
        assert all(0.08 < boxes[part] / sum(boxes.values()) < 0.22 for part in ("val", "test"))


def _yolo_boxes(image: Path, width: int, height: int) -> tuple[Box, ...]:
    lines = (image.parents[2] / "labels" / image.parent.name / f"{image.stem}.txt").read_text().splitlines()
    boxes = []
    for line in lines:
        number, *fractions = line.split()
        x, y, w, h = map(float, fractions)
        corners = ((x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height)
        boxes.append(Box(CLASSES[int(number)], *corners))
    return tuple(boxes)
