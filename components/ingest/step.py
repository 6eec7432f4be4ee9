"""The step ingest: raw frames and labelled data in, content-addressed frames and labels exports out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..shared.dataset import Frame, write_rows
from ..shared.errors import InputError
from ..shared.files import check_classes, write_json
from ..shared.progress import say
from ..shared.settings import Settings
from ..shared.storage import Store
from .collect import PART, Labelled, collect, no_data, settle
from .dedup import choose
from .imports import run_import
from .parameters import Import, Quality, Source
from .state import State

__all__ = ["IngestResult", "ingest"]

_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class IngestResult:
    """Counts of one run.

    Attributes:
        seen: objects looked at by this run: accepted + duplicates + quarantined (raw ones).
        accepted, duplicates: of these, frames kept and frames that equal another, by the union of all runs.
        quarantined: objects and labelled images refused.
        imported: labelled frames that this run was the first to import.
        reasons: quarantine reason to count.
        pending: rows in frames.parquet.
        exports: labels exports that `imports` stand for, written now or before.
    """

    seen: int
    accepted: int
    duplicates: int
    quarantined: int
    imported: int
    reasons: dict[str, int] = field(default_factory=dict)
    pending: int = 0
    exports: tuple[str, ...] = ()

    def metadata(self) -> dict[str, Any]:
        """The counts as plain JSON values."""
        return asdict(self) | {"exports": list(self.exports)}


def ingest(
    sources: Sequence[Mapping[str, Any]],
    imports: Sequence[Mapping[str, Any]],
    classes: Sequence[str],
    quality: Mapping[str, Any],
    run_id: str,
    out: Path,
    settings: Settings,
    *,
    store: Store | None = None,
    part: int = PART,
) -> IngestResult:
    """Import labelled data, take in new raw frames, and list what waits for a label.

    Everything that the run learns goes to the bucket as it goes on, so a killed run continues where it was; the same
    `run_id` given again counts as the same run.

    Args:
        sources: see `parameters.Source`.
        imports: see `parameters.Import`.
        classes: ordered class names.
        quality: see `parameters.Quality`.
        run_id: letters, digits, dots, dashes and underscores.
        out: folder for `frames.parquet` and `ingest.json`.
        settings: store, credentials, workers.
        store: the bucket, where the caller has it open already.
        part: rows in a state segment.

    Raises:
        InputError: a parameter, pattern or label that cannot be used.
        NoDataError: there are no imports and no source holds a single object.
        StorageError: the store or the disk.
    """
    if not _RUN_ID.fullmatch(run_id):
        raise InputError(f"run_id is {run_id!r}", "Use letters, digits, dots, dashes and underscores.")
    check_classes(classes)
    limits = Quality.parse(quality)
    wanted = [Source.parse(item, position) for position, item in enumerate(sources)]
    given = [Import.parse(item, position, classes) for position, item in enumerate(imports)]
    store = store or Store(settings)
    store.check()
    out.mkdir(parents=True, exist_ok=True)

    done = [run_import(store, one, run_id, out, settings, datetime.now(UTC)) for one in given]
    state, labelled = State(store, settings.workers), Labelled(store)
    state.refresh()
    _, kept = choose(state.entries(), labelled.read(), run_id)
    held = collect(store, wanted, limits, state, kept, run_id, settings.workers, part)
    if wanted and not held and not given:
        raise no_data(wanted)
    choice, frames = settle(store, state, labelled, run_id, settings.workers)

    mine = [one for one in done if one.run_id == run_id]
    reasons = choice.reasons
    for one in mine:
        reasons.update(one.reasons)
    result = IngestResult(
        seen=choice.accepted + choice.duplicates + choice.quarantined,
        accepted=choice.accepted,
        duplicates=choice.duplicates,
        quarantined=reasons.total(),
        imported=sum(one.frames for one in mine),
        reasons=dict(sorted(reasons.items())),
        pending=len(frames),
        exports=tuple(dict.fromkeys(one.export_id for one in done)),
    )
    write_rows(out / "frames.parquet", Frame, frames)
    write_json(out / "ingest.json", result.metadata())
    say(
        f"ingest: {result.seen} seen, {result.accepted} accepted, {result.duplicates} duplicates, "
        f"{result.quarantined} quarantined, {result.imported} imported, {result.pending} wait for labels"
    )
    return result
