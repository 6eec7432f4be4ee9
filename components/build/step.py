"""The step `build`: all labels exports in, one content-addressed dataset out, split by group without a leak."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..shared.dataset import SPLITS, ManifestRow, dataset_digest, read_rows, write_rows
from ..shared.errors import NoDataError
from ..shared.files import atomic_folder, write_bytes, write_json
from ..shared.progress import say
from ..shared.settings import Settings
from ..shared.storage import Store
from .certificate import certify
from .config import BuildConfig, Grouping
from .merge import Exclusions, merge
from .previous import read_previous
from .split import Split, retired_frames, split_frames
from .stats import statistics_of

__all__ = ["BuildResult", "build"]

_MARKER = "stats.json"  # written last: its presence makes the dataset complete


@dataclass(frozen=True)
class BuildResult:
    """What `build` made.

    Attributes:
        digest: the dataset's Merkle root.
        uri: its folder in the bucket.
        train, val, test: frames.
        excluded: reason → frames left out.
    """

    digest: str
    uri: str
    train: int
    val: int
    test: int
    excluded: dict[str, int]

    def metadata(self) -> dict[str, Any]:
        """The artifact's metadata, JSON-plain."""
        return {
            "digest": self.digest,
            "uri": self.uri,
            "train": self.train,
            "val": self.val,
            "test": self.test,
            "excluded": dict(self.excluded),
        }


def build(
    name: str,
    classes: Sequence[str],
    previous_dataset: str,
    ratios: Mapping[str, float],
    seed: int,
    out: Path,
    settings: Settings,
    grouping: Mapping[str, Any] | None = None,
) -> BuildResult:
    """Merge all labels exports into a dataset and write it to `out` and to `datasets/<name>/<digest>/`.

    The same labels and the same previous dataset give the same bytes; run again on top of its own outcome it gives
    the same digest. A dataset that is complete in the store is never written again.

    Args:
        name: dataset name, kebab-case.
        classes: ordered class names; boxes of others are dropped and counted.
        previous_dataset: digest whose splits and groups are kept; empty for none.
        ratios: shares of `val` and `test`.
        seed: order in which new groups are placed.
        out: folder to write; what it held is replaced.
        settings: the object store.
        grouping: keys of `Grouping` that differ from its defaults.

    Raises:
        InputError: a parameter that cannot be used, or an unknown previous dataset.
        NoDataError: no labels exports, or no sound frame in them.
        IntegrityError: the previous dataset was tampered with, or the outcome would leak.
        StorageError: the store cannot be reached or the disk is full.
    """
    config = BuildConfig(name, tuple(classes), previous_dataset, ratios, seed, Grouping.of(grouping))
    store = Store(settings)
    previous = read_previous(store, name, previous_dataset)
    merged = merge(store, config.classes)
    excluded = merged.excluded
    _require(merged.exports > 0, store, "there are no labels exports", excluded)
    split = split_frames(merged.frames, previous, config, excluded)
    _require(bool(split.rows), store, "no frame of the labels exports can be used", excluded)
    digest = dataset_digest(config.classes, split.rows)
    retired = retired_frames(previous, split.rows, excluded)
    dropped = {"other_classes": merged.dropped_boxes, **split.dropped_boxes}
    stats = statistics_of(digest, split.rows, config, excluded, dropped, retired)
    _write(out, digest, split, config, stats)
    result = BuildResult(digest, store.uri(f"datasets/{name}/{digest}/"), **stats["frames"], excluded=excluded.counts())
    _publish(store, f"datasets/{name}/{digest}/", out)
    say(f"dataset {name} {digest[:12]}: {result.train} train, {result.val} val, {result.test} test frames")
    for note in stats["notes"]:
        say(f"note: {note}")
    return result


def _require(condition: bool, store: Store, problem: str, excluded: Exclusions) -> None:
    if not condition:
        reasons = f" (left out: {excluded.counts()})" if excluded.frames else ""
        raise NoDataError(
            f"{problem} under {store.uri('labels/')}{reasons}",
            "Import labelled data (parameter `imports` of ingest), or answer the review queue, then build again.",
        )


def _write(out: Path, digest: str, split: Split, config: BuildConfig, stats: dict[str, Any]) -> None:
    with atomic_folder(out) as folder:
        manifest = folder / "manifest.parquet"
        write_rows(manifest, ManifestRow, split.rows)
        described = {
            "names": dict(enumerate(config.classes)),
            "dataset": config.name,
            "digest": digest,
            "frames": {name: stats["frames"][name] for name in SPLITS},
        }
        write_bytes(folder / "data.yaml", yaml.safe_dump(described, sort_keys=False, allow_unicode=True).encode())
        # From the file, not from memory: what is certified is what will be read.
        say("checking that nothing leaks between the splits")
        write_json(folder / "certificate.json", certify(read_rows(manifest, ManifestRow), config))
        write_json(folder / _MARKER, stats)


def _publish(store: Store, prefix: str, folder: Path) -> None:
    if store.exists(prefix + _MARKER):
        say(f"{store.uri(prefix)} is there already")
        return
    say(f"publishing {store.uri(prefix)}")
    store.put_folder(prefix, folder, _MARKER)
