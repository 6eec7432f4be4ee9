"""What ingest is asked for: sources, imports, and the limits of a frame's quality; checked on the way in.

Without numpy and the object store's client, so that a run can be refused before it starts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime, tzinfo
from typing import Any
from urllib.parse import unquote
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from ..shared.errors import InputError
from .pattern import EPOCH, PathPattern
from .roboflow import parse_roboflow_uri

__all__ = ["Import", "Quality", "Source", "in_utc", "iso_time"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KEYS = ("uri", "format", "covers", "class_map", "name", "sequence_pattern", "on_error", "unlabelled")


@dataclass(frozen=True)
class Source:
    """One entry of the parameter `sources`.

    Attributes:
        uri: `s3://bucket/folder` or `file:///absolute/folder`; everything below it is taken.
        name: short name for state segments; by default made of the URI.
        pattern: path pattern, see `pattern.py`, or None.
        camera: camera of frames whose key and metadata name none.
        zone: time zone of times in keys, EXIF and metadata that name none themselves.
        object_metadata: also ask the store for `x-amz-meta-camera` and `x-amz-meta-captured-at`, one request a frame.
    """

    uri: str
    name: str
    pattern: PathPattern | None = None
    camera: str = ""
    zone: tzinfo = UTC
    object_metadata: bool = False

    @classmethod
    def parse(cls, item: Mapping[str, Any], position: int) -> Source:
        """Read an entry of `sources`.

        Raises:
            InputError: an unknown key or a value that cannot be used; names the entry.
        """
        where = f"sources[{position}]"
        _check_keys(where, item, ("uri", "name", "pattern", "camera", "start", "timezone", "object_metadata"))
        uri = str(item.get("uri") or "")
        if not uri.startswith(("s3://", "file://")):
            raise InputError(f"{where}.uri is {uri!r}", "Write s3://bucket/folder or file:///absolute/folder.")
        zone = _zone(where, str(item.get("timezone") or "UTC"))
        start = iso_time(str(item["start"]), zone) if item.get("start") else EPOCH
        if start is None:
            raise InputError(f"{where}.start is {item['start']!r}", "Write a time such as 2026-03-01T08:00:00Z.")
        text = str(item.get("pattern") or "")
        return cls(
            uri,
            _short_name(where, str(item.get("name") or ""), uri),
            PathPattern(text, start, zone) if text else None,
            str(item.get("camera") or ""),
            zone,
            str(item.get("object_metadata") or "false").lower() in ("true", "1", "1.0"),
        )


@dataclass(frozen=True)
class Import:
    """One entry of the parameter `imports`.

    Attributes:
        uri: a folder or `.zip` at `file:///…` or `s3://…`, or `roboflow://workspace/project/version`.
        name: short name; by default made of the URI.
        classes: our class names.
        format: `auto`, `yolo`, `coco` or `voc`.
        covers: those of our classes that the source labels exhaustively; empty for all that its classes map to. A
            class that is not covered is unknown in these frames, never absent.
        class_map: the source's class names to ours, "" to leave a class out; others map to the same name.
        sequence_pattern: regular expression that finds a picture's video in its name, see `examples.sequence_of`.
        on_error: `refuse` the import for a label that is wrong, or `quarantine` that picture.
        unlabelled: `skip` pictures that have no label, or take them for `background`. An empty label file always is
            background; a missing one may as well be a lost one, and a false "nothing here" in the test split judges
            every model wrongly.
    """

    uri: str
    name: str
    classes: tuple[str, ...]
    format: str = "auto"
    covers: tuple[str, ...] = ()
    class_map: Mapping[str, str] = field(default_factory=dict)
    sequence_pattern: str = ""
    on_error: str = "refuse"
    unlabelled: str = "skip"

    @classmethod
    def parse(cls, item: Mapping[str, Any], position: int, classes: Sequence[str]) -> Import:
        """Read an entry of `imports`.

        Raises:
            InputError: an unknown key or a value that cannot be used; names the entry.
        """
        where = f"imports[{position}]"
        _check_keys(where, item, _KEYS)
        uri = str(item.get("uri") or "")
        if uri.startswith("roboflow://"):
            parse_roboflow_uri(uri)
        elif not uri.startswith(("file://", "s3://")):
            raise InputError(f"{where}.uri is {uri!r}", "Write file:///…, s3://… or roboflow://….")
        if not isinstance(item.get("covers") or [], list | tuple) or not isinstance(
            item.get("class_map") or {}, Mapping
        ):
            raise InputError(f"{where}: covers or class_map is malformed", 'Write ["fire"] and {"Flame": "fire"}.')
        class_map = {str(name): str(ours or "") for name, ours in (item.get("class_map") or {}).items()}
        covers = tuple(str(name) for name in item.get("covers") or ())
        for key, names in (("covers", covers), ("class_map", tuple(filter(None, class_map.values())))):
            unknown = sorted(set(names) - set(classes))
            if unknown:
                raise InputError(
                    f"{where}.{key} names {', '.join(unknown)}, which is no class of this run",
                    f"Classes are {', '.join(classes)}.",
                )
        name = _short_name(where, str(item.get("name") or ""), uri.removesuffix("/").removesuffix(".zip"))
        return cls(
            uri,
            name,
            tuple(classes),
            _one_of(where, item, "format", ("auto", "yolo", "coco", "voc")),
            covers,
            class_map,
            _checked_pattern(where, str(item.get("sequence_pattern") or "")),
            _one_of(where, item, "on_error", ("refuse", "quarantine")),
            _one_of(where, item, "unlabelled", ("skip", "background")),
        )


@dataclass(frozen=True)
class Quality:
    """Limits that a raw frame must keep.

    Attributes:
        min_side: the shorter side's least length in pixels.
        black: brightest grey level (0 to 255) of a black frame.
        white: darkest grey level of a white frame.
        blur: least sharpness, see `quality.py`; 0 accepts any.
    """

    min_side: int = 64
    black: float = 12.0
    white: float = 245.0
    blur: float = 0.004

    def __post_init__(self) -> None:
        if self.min_side < 1 or not 0 <= self.black < self.white <= 256 or not 0 <= self.blur < 10:
            raise InputError(
                f"quality {self} is not min_side >= 1, 0 <= black < white <= 256, 0 <= blur < 10",
                "Correct the parameter quality.",
            )

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Quality:
        """The defaults with `values` in their place.

        Raises:
            InputError: an unknown key, or a value that is no number.
        """
        known = [item.name for item in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise InputError(f"quality has the unknown keys {', '.join(unknown)}", f"Known keys: {', '.join(known)}.")
        for name, value in values.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise InputError(f"quality.{name} is {value!r}, not a number", "Write a number.")
        # kfp hands every number over as a float.
        limits: dict[str, Any] = {name: int(value) if name == "min_side" else value for name, value in values.items()}
        return cls(**limits)


def _short_name(where: str, name: str, uri: str) -> str:
    """The given short name, checked, or one made of the URI's last parts.

    Raises:
        InputError: a given name with other characters than letters, digits, dot, dash and underscore.
    """
    if name:
        if not _NAME.fullmatch(name):
            raise InputError(f"{where}.name is {name!r}", "Use up to 64 letters, digits, dots, dashes, underscores.")
        return name
    last = [part for part in unquote(uri).split("://", 1)[-1].split("/") if part][-2:]
    picked = last[-1:] if uri.startswith("file://") else last
    made = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(picked)).strip("-._")[-64:].lstrip("-._")
    return made or "source"


def _check_keys(where: str, item: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise an InputError that names the keys of `item` that are not known."""
    if not isinstance(item, Mapping):
        raise InputError(f"{where} is {item!r}, not a mapping", 'Write it as {"uri": "…"}.')
    unknown = sorted(set(item) - set(known))
    if unknown:
        raise InputError(f"{where} has the unknown keys {', '.join(unknown)}", f"Known keys: {', '.join(known)}.")


def iso_time(text: str, zone: tzinfo = UTC) -> datetime | None:
    """An ISO 8601 time in UTC; None where it is none. A time without offset is in `zone`."""
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        return None
    return in_utc(moment if moment.tzinfo else moment.replace(tzinfo=zone))


def in_utc(moment: datetime) -> datetime | None:
    """A time with its zone, in UTC; None where the calendar has no such day, as for the first one east of Greenwich."""
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        return None


def _zone(where: str, name: str) -> tzinfo:
    if name.upper() == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise InputError(f"{where}.timezone {name!r} is not known", "Write a name such as Asia/Seoul.") from error


def _one_of(where: str, item: Mapping[str, Any], key: str, allowed: Sequence[str]) -> str:
    value = str(item.get(key) or allowed[0])
    if value not in allowed:
        raise InputError(f"{where}.{key} is {value!r}", f"Use one of {', '.join(allowed)}.")
    return value


def _checked_pattern(where: str, text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise InputError(f"{where}.sequence_pattern {text!r}: {error}", "Write a regular expression.") from error
    return text
