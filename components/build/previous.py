"""What earlier datasets decided: the split and group of every frame that they held, and what they took out for good."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import yaml

from ..shared.dataset import ManifestRow, dataset_digest, read_rows
from ..shared.errors import InputError, IntegrityError
from ..shared.storage import ObjectMissing, Store

__all__ = ["Place", "Previous", "read_previous"]


@dataclass(frozen=True)
class Place:
    """Where a frame stands: its split, and its group, which never straddles splits."""

    split: str
    group: str


@dataclass(frozen=True)
class Previous:
    """Decisions to keep.

    Attributes:
        places: sha256 → place, of frames in the previous dataset and of those that left it (their object or label
            broke, say) and may come back.
        leaked: sha256 → place that frames had before they were taken out because a frame of another split turned out
            to be tied to them. They stay out: a model may have been trained on them.
    """

    places: Mapping[str, Place] = field(default_factory=dict)
    leaked: Mapping[str, Place] = field(default_factory=dict)


def read_previous(store: Store, name: str, digest: str) -> Previous:
    """Read the decisions of dataset `digest`; none where it is empty.

    Raises:
        InputError: there is no such complete dataset.
        IntegrityError: its manifest is not what its digest says.
    """
    if not digest:
        return Previous()
    prefix = f"datasets/{name}/{digest}/"
    try:
        stats = store.get_json(prefix + "stats.json")
        manifest, described = store.get(prefix + "manifest.parquet"), store.get(prefix + "data.yaml")
    except ObjectMissing as error:
        raise InputError(
            f"previous_dataset {digest} is not a complete dataset {name!r} ({error.problem})",
            f"Give a digest listed under {store.uri(f'datasets/{name}/')}, or leave previous_dataset empty.",
        ) from error
    except json.JSONDecodeError as error:
        raise IntegrityError(f"{store.uri(prefix)}stats.json is damaged", "Restore it from a backup.") from error
    rows = read_rows(manifest, ManifestRow)
    try:
        classes = list(yaml.safe_load(described)["names"].values())
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{store.uri(prefix)}data.yaml has no class names", "Restore it from a backup.") from error
    if dataset_digest(classes, rows) != digest:
        raise IntegrityError(
            f"{store.uri(prefix)}manifest.parquet does not have the digest of its folder",
            "It was changed after it was written: restore it from a backup.",
        )
    retired = {
        sha: (Place(item["split"], item["group"]), item["reason"]) for sha, item in stats.get("retired", {}).items()
    }
    return Previous(
        places={sha: place for sha, (place, reason) in retired.items() if reason != "leak"}
        | {row.sha256: Place(row.split, row.group) for row in rows},
        leaked={sha: place for sha, (place, reason) in retired.items() if reason == "leak"},
    )
