"""Labelled data from outside: fetch it, read its labels, and write one labels export for it.

Nothing is written before every label has been read and found sound. Then the pictures go up (content-addressed), then
the export, whose marker comes last: a killed import leaves pictures that nothing names, and is simply made again.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..shared.dataset import Box, LabelExport, LabelledFrame, frame_key, label_exports, write_export
from ..shared.errors import InputError, IntegrityError, NoDataError, StorageError
from ..shared.files import sha256_bytes
from ..shared.progress import Progress, say
from ..shared.settings import Settings
from ..shared.storage import Store, ordered_map, parse_s3_uri
from .archive import extract
from .coco import find_coco, parse_coco
from .collect import quarantine
from .examples import Example, Parsed, inside, sequence_of, split_hint
from .parameters import Import
from .quality import Examined, examine
from .roboflow import download
from .sources import Reader, folder_of
from .voc import find_voc, parse_voc
from .yolo import find_data_yaml, parse_yolo

__all__ = ["Imported", "run_import"]

_PARSERS = {"yolo": parse_yolo, "coco": parse_coco, "voc": parse_voc}
_SHOWN_PROBLEMS = 10
# Raised when importing the same bytes gives other rows, so that they are read again.
_VERSION = 1


@dataclass(frozen=True)
class Imported:
    """What became of one import: its export, the run that wrote it, its frames, and quarantined pictures by reason."""

    export_id: str
    run_id: str
    frames: int
    reasons: dict[str, int]

    @classmethod
    def of(cls, export: LabelExport) -> Imported:
        """From the export's own record, so that a run that finds it finished tells the same as the one that wrote it."""
        return cls(
            export.export_id,
            str(export.info.get("run_id", "")),
            int(export.info["frames"]),
            dict(export.info.get("reasons", {})),
        )


def run_import(store: Store, spec: Import, run_id: str, out: Path, settings: Settings, now: datetime) -> Imported:
    """Import one labelled set, unless it was imported just so before.

    Args:
        store: the bucket.
        spec: what and how.
        run_id: recorded with the export.
        out: the step's output folder; a temporary folder beside it holds archives and downloads.
        settings: workers, and Roboflow's key.
        now: time of import, UTC.

    Raises:
        InputError: the set or a label in it cannot be used; nothing was written but quarantined pictures.
        NoDataError: not one usable labelled picture is in it.
    """
    identity = _fingerprint(store, spec)
    for export in label_exports(store):
        if export.kind == "import" and export.info.get("fingerprint") == identity:
            say(f"{spec.name}: imported before as {export.export_id}")
            return Imported.of(export)
    with _fetched(store, spec, out, settings) as root:
        base = _home(root)
        parsed = _parse(spec, base)
        covers, mapping = _map_classes(spec, parsed.names)
        batch = _Batch(spec, root, covers, mapping, parsed)
        batch.read(settings.workers)
        if not covers:
            # A VOC set has no list of classes: where no label has any, the labels' own errors come first.
            raise _no_class(spec, parsed.names)
        if not batch.rows:
            raise NoDataError(f"{spec.uri} has no usable labelled image", "Check the set, its format and its labels.")
        batch.store(store, settings.workers)
        info = batch.info() | {"run_id": run_id, "fingerprint": identity}
        export = write_export(store, "import", list(batch.rows.values()), info, now)
    say(f"{spec.name}: {batch.summary()} as {export.export_id}")
    return Imported.of(export)


class _Batch:
    """The labelled frames of one import while they are gathered."""

    def __init__(
        self, spec: Import, root: Path, covers: tuple[str, ...], mapping: dict[str, str], parsed: Parsed
    ) -> None:
        self.spec, self.root, self.covers, self.mapping, self.parsed = spec, root.resolve(), covers, mapping, parsed
        self.rows: dict[str, LabelledFrame] = {}
        self.paths: dict[str, Path] = {}
        self.refused: list[tuple[Path, Examined]] = []
        self.problems: list[str] = list(parsed.missing)
        self.notes: Counter[str] = Counter(parsed.notes)
        self.dropped: Counter[str] = Counter()
        self._pattern = re.compile(spec.sequence_pattern) if spec.sequence_pattern else None

    def read(self, workers: int) -> None:
        """Decode every picture and read every label, in path order.

        Raises:
            InputError: labels that are wrong, unless the import quarantines them.
        """
        ordered = sorted(self.parsed.examples, key=lambda example: str(example.path))
        wanted = [one for one in ordered if one.boxes is not None or self.spec.unlabelled == "background"]
        self.notes["images without a label, skipped"] += len(ordered) - len(wanted)
        progress = Progress(f"labelled images of {self.spec.name} read", len(wanted))
        for example, found, boxes, problem in ordered_map(self._look, wanted, workers):
            self._take(example, found, boxes, problem)
            progress.step()
        if self.problems and self.spec.on_error == "refuse":
            shown = "; ".join(self.problems[:_SHOWN_PROBLEMS])
            rest = len(self.problems) - _SHOWN_PROBLEMS
            raise InputError(
                f"{self.spec.uri}: {len(self.problems)} labels cannot be used: {shown}"
                + (f"; and {rest} more" if rest > 0 else ""),
                'Correct them, or import with "on_error": "quarantine" to leave these images out.',
            )

    def _look(self, example: Example) -> tuple[Example, Examined, list[Box], str]:
        found = examine(_bytes(example.path), example.path.name, None)
        if found.reason or example.boxes is None:
            return example, found, [], ""
        try:
            return example, found, example.boxes(found.width, found.height), ""
        except InputError as error:
            return example, found, [], error.problem.replace(f"{self.root}/", "")

    def _take(self, example: Example, found: Examined, boxes: list[Box], problem: str) -> None:
        if problem:
            self.problems.append(problem)
            self.refused.append((example.path, replace(found, reason="bad_label", detail=problem)))
        elif found.reason or found.signature is None:
            self.refused.append((example.path, found))
        else:
            self._add(example, self._row(example, found, boxes))

    def _row(self, example: Example, found: Examined, boxes: list[Box]) -> LabelledFrame:
        uri = self.spec.uri
        kept = []
        for box in boxes:
            ours = self.mapping.get(box.class_name, "")
            if ours:
                kept.append(replace(box, class_name=ours, actor=uri))
            else:
                self.dropped[box.class_name] += 1
        sequence = sequence_of(example.path.name, self._pattern)
        taken = found.captured_at.replace(tzinfo=UTC) if found.captured_at else None
        return LabelledFrame(
            sha256=found.sha256,
            ext=found.ext,
            width=found.width,
            height=found.height,
            key=self._key(example.path),
            source=self.spec.name,
            captured_at=taken,
            sequence=f"{self.spec.name}/{sequence}" if sequence else "",
            phash=found.signature.phash if found.signature else 0,
            thumb=found.signature.thumb if found.signature else b"",
            boxes=tuple(kept),
            covers=self.covers,
            actor=uri,
            split_hint=example.split,
        )

    def _add(self, example: Example, row: LabelledFrame) -> None:
        """The first of identical pictures stays; that a later one has other boxes is told, since one of them is wrong."""
        first = self.rows.setdefault(row.sha256, row)
        self.paths.setdefault(row.sha256, example.path)
        if first is row:
            return
        self.notes["identical images merged"] += 1
        if set(first.boxes) != set(row.boxes):
            self.notes["identical images with other boxes, first kept"] += 1
            say(f"{self.spec.name}: {row.key} is the same picture as {first.key} with other boxes; the first is kept")

    def _key(self, path: Path) -> str:
        relative = path.resolve().relative_to(self.root).as_posix()
        base = self.spec.uri.rstrip("/")
        return f"{base}!/{relative}" if base.endswith(".zip") else f"{base}/{relative}"

    def store(self, store: Store, workers: int) -> None:
        """Put pictures under `frames/`, refused ones under `quarantine/`."""

        def put(item: tuple[str, Path]) -> None:
            sha256, path = item
            data = _bytes(path)
            if sha256_bytes(data) != sha256:
                raise IntegrityError(f"{path} changed while it was imported", "Run the import again.")
            store.put_if_absent(frame_key(sha256, self.rows[sha256].ext), data)

        def refuse(item: tuple[Path, Examined]) -> None:
            path, found = item
            data = _bytes(path)
            key = self._key(path)
            quarantine(store, found.sha256, found.ext, data, found.reason, found.detail, key, len(data))

        for _ in ordered_map(put, self.paths.items(), workers):
            pass
        for _ in ordered_map(refuse, self.refused, workers):
            pass

    def info(self) -> dict[str, Any]:
        """What the export records of its making."""
        reasons = Counter(found.reason for _, found in self.refused) + Counter(missing_image=len(self.parsed.missing))
        return {
            "source": self.spec.uri,
            "name": self.spec.name,
            "covers": list(self.covers),
            "class_map": dict(self.mapping),
            "boxes": sum(len(row.boxes) for row in self.rows.values()),
            "dropped_boxes": dict(sorted(self.dropped.items())),
            "reasons": dict(sorted(reasons.items())),
            "notes": {name: count for name, count in sorted(self.notes.items()) if count},
        }

    def summary(self) -> str:
        """The same in a line for people."""
        info = self.info()
        parts = [f"{len(self.rows)} labelled frames, {info['boxes']} boxes, covers {', '.join(self.covers)}"]
        parts += [f"{count} boxes of {name} left out" for name, count in info["dropped_boxes"].items()]
        parts += [f"{count} {name}" for name, count in (info["notes"] | info["reasons"]).items()]
        return "; ".join(parts)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}", "Check its permissions.") from error


def _map_classes(spec: Import, names: Sequence[str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """The classes covered, and the source's names to ours; a class that maps to nothing is told."""
    unknown = sorted(set(spec.class_map) - set(names))
    if unknown:
        raise InputError(
            f"class_map of {spec.uri} names {', '.join(unknown)}, which the source does not have",
            f"Its classes are {', '.join(names)}.",
        )
    mapping = {name: spec.class_map.get(name, name if name in spec.classes else "") for name in names}
    unmapped = [name for name in names if not mapping[name] and name not in spec.class_map]
    if unmapped:
        say(f"{spec.name}: boxes of {', '.join(unmapped)} are left out: no class of this run, and not in class_map")
    mapped = tuple(name for name in spec.classes if name in mapping.values())
    covers = tuple(name for name in spec.classes if name in spec.covers) or mapped
    if not covers and names:
        raise _no_class(spec, names)
    bare = [name for name in covers if name not in mapped]
    if bare:
        say(f"{spec.name}: covers {', '.join(bare)} without any class for it: its frames count as free of it")
    return covers, mapping


def _no_class(spec: Import, names: Sequence[str]) -> InputError:
    return InputError(
        f"none of the classes of {spec.uri} ({', '.join(names)}) is a class of this run",
        f"Give class_map to {', '.join(spec.classes)}, or covers for a set of empty scenes.",
    )


def _fingerprint(store: Store, spec: Import) -> str:
    """Digest of the import's settings and of its files' names, sizes and ETags: what was imported just so is known."""
    settings = asdict(spec) | {"class_map": sorted(spec.class_map.items())}
    return sha256_bytes(json.dumps([_VERSION, settings, _contents(store, spec.uri)]).encode())


def _contents(store: Store, uri: str) -> list[list[Any]]:
    if uri.startswith("roboflow://"):
        return []  # a version never changes
    if not uri.endswith(".zip"):
        listed = [list(item) for item in Reader(store).list(uri)]
        if not listed:
            raise NoDataError(f"there is no file under {uri}", "Check the URI of the import.")
        return sorted(listed)
    if uri.startswith("s3://"):
        bucket, key = parse_s3_uri(uri)
        found = [item for item in store.for_bucket(bucket).list(key) if item.key == key]
        if not found:
            raise InputError(f"{uri} does not exist", "Check the URI of the import.")
        return [[uri, found[0].size, found[0].etag]]
    path = folder_of(uri)
    if not path.is_file():
        raise InputError(f"the file {path} does not exist", "Check the file:// URI and that it is mounted here.")
    return [[uri, path.stat().st_size, path.stat().st_mtime_ns]]


@contextmanager
def _fetched(store: Store, spec: Import, out: Path, settings: Settings) -> Iterator[Path]:
    """The set as a local folder; what was unpacked or downloaded is removed afterwards."""
    if spec.uri.startswith("file://") and not spec.uri.endswith(".zip"):
        yield folder_of(spec.uri)
        return
    mark = f".{out.name}.import-"
    for stale in out.parent.glob(f"{mark}*"):
        shutil.rmtree(stale, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=mark))
    try:
        folder = temporary / "set"
        folder.mkdir()
        if spec.uri.startswith("roboflow://"):
            download(spec.uri, spec.format, folder, settings.roboflow_api_key)
        elif spec.uri.endswith(".zip"):
            extract(_local_zip(store, spec.uri, temporary), folder, spec.uri)
        else:
            _get_folder(store, spec.uri, folder, settings.workers)
        yield folder
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _local_zip(store: Store, uri: str, temporary: Path) -> Path:
    if uri.startswith("file://"):
        return folder_of(uri)
    bucket, key = parse_s3_uri(uri)
    return store.for_bucket(bucket).get_file(key, temporary / "set.zip")


def _get_folder(store: Store, uri: str, folder: Path, workers: int) -> None:
    reader = Reader(store)
    items = list(reader.list(uri))
    total, free = sum(item.size for item in items), shutil.disk_usage(folder).free
    if total > free:
        raise StorageError(f"{uri} needs {total} bytes, {folder} has {free}", "Free disk space.")

    def fetch(relative: str, source: str) -> None:
        bucket, key = parse_s3_uri(source)
        reader.store(bucket).get_file(key, inside(folder, folder / relative, source))

    for _ in ordered_map(lambda item: fetch(item.relative, item.uri), items, workers):
        pass


def _home(root: Path) -> Path:
    """The folder that holds the set: archives often wrap it in one more folder."""
    while True:
        entries = [path for path in root.iterdir() if not path.name.startswith(".")]
        wrapped = len(entries) == 1 and entries[0].is_dir() and not entries[0].is_symlink()
        meaningful = ("images", "Annotations", "annotations")
        if not wrapped or entries[0].name in meaningful or split_hint(entries[0].name):
            return root
        root = entries[0]


def _parse(spec: Import, root: Path) -> Parsed:
    try:
        return _PARSERS[spec.format if spec.format != "auto" else _detect(root)](root)
    except InputError as error:
        raise InputError(f"{spec.uri}: {error.problem.replace(f'{root.resolve()}/', '')}", error.remedy) from error


def _detect(root: Path) -> str:
    if find_data_yaml(root):
        return "yolo"
    if find_coco(root):
        return "coco"
    if find_voc(root):
        return "voc"
    raise InputError("is no YOLO, COCO or VOC set", "Add data.yaml, a COCO JSON or VOC XML files, or correct the URI.")
