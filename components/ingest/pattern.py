"""Path patterns: what an object's key tells of camera and capture time.

A pattern is matched against the whole key below the source's prefix. Text is literal; a field stands in braces:

| field | matches | gives |
|---|---|---|
| `{camera}` | text without `/` | the camera's name |
| `{sequence}` | text without `/` | the video that the frame belongs to |
| `{date}` | `YYYYMMDD`, `YYYY-MM-DD`, `YYYY_MM_DD` or `YYYY/MM/DD` | the day |
| `{year}` `{month}` `{day}` | 4, 2 and 2 digits | the day, in parts |
| `{time}` | `HHMMSS`, `HH-MM-SS`, `HH:MM:SS` or `HH_MM_SS` | the time of day |
| `{hour}` `{minute}` `{second}` | 2 digits each | the time of day, in parts |
| `{ms}` | 1 to 3 digits | milliseconds within the second |
| `{epoch}`, `{epoch_ms}` | digits | Unix time in seconds or milliseconds |
| `{offset_ms}` | digits | milliseconds after the date and time, or after the source's `start` where there is no date |
| `{name}` | text without `/` | nothing; `{_}` is the same |
| `{any}` | any text, also with `/` | nothing |

`{date:%d.%m.%Y}` and `{time:%H.%M}` read other notations by strptime's digits-only directives.
`{name}`, `{_}` and `{any}` may stand more than once, all others once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, tzinfo

from ..shared.errors import InputError

__all__ = ["EPOCH", "PathPattern", "Place"]

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_TEXT = r"[^/]+?"
_FIELDS = {
    "camera": _TEXT,
    "sequence": _TEXT,
    "date": r"\d{4}(?P<date_mark>[-_/]?)\d{2}(?P=date_mark)\d{2}",
    "year": r"\d{4}",
    "month": r"\d{2}",
    "day": r"\d{2}",
    "time": r"\d{2}(?P<time_mark>[-_:]?)\d{2}(?P=time_mark)\d{2}",
    "hour": r"\d{2}",
    "minute": r"\d{2}",
    "second": r"\d{2}",
    "ms": r"\d{1,3}",
    "epoch": r"\d{1,11}",
    "epoch_ms": r"\d{1,14}",
    "offset_ms": r"\d{1,14}",
}
_IGNORED = {"name": _TEXT, "_": _TEXT, "any": ".*?"}
_DIRECTIVES = {"%Y": r"\d{4}", "%y": r"\d{2}", "%j": r"\d{3}", "%f": r"\d{1,6}"} | {
    f"%{letter}": r"\d{2}" for letter in "mdHMS"
}
_PART = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class Place:
    """What a key tells: camera, capture time (UTC) and sequence; empty or None where it does not."""

    camera: str = ""
    captured_at: datetime | None = None
    sequence: str = ""


@dataclass(frozen=True)
class PathPattern:
    """A compiled path pattern.

    Args:
        text: the pattern, in the language above.
        start: where `{offset_ms}` counts from when there is no date.
        zone: time zone of dates and times in keys.

    Raises:
        InputError: an unknown or repeated field, or one that makes no sense beside another.
    """

    text: str
    start: datetime = EPOCH
    zone: tzinfo = UTC
    _regex: re.Pattern[str] = field(init=False, repr=False, compare=False)
    _formats: dict[str, str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        pieces, formats, used = [], {}, set()
        rest = 0
        for part in _PART.finditer(self.text):
            pieces.append(re.escape(self.text[rest : part.start()]))
            rest = part.end()
            name, _, notation = part[1].partition(":")
            if name in _IGNORED and not notation:
                pieces.append(f"(?:{_IGNORED[name]})")
                continue
            if name not in _FIELDS:
                known = ", ".join([*_FIELDS, *_IGNORED])
                raise InputError(f"pattern {self.text!r} has the unknown field {{{name}}}", f"Known fields: {known}.")
            if name in used:
                raise InputError(f"pattern {self.text!r} has {{{name}}} twice", "Use {_} for the other one.")
            used.add(name)
            if notation:
                formats[name] = notation
            pieces.append(f"(?P<{name}>{_notation(self.text, name, notation) if notation else _FIELDS[name]})")
        pieces.append(re.escape(self.text[rest:]))
        if "{" in _PART.sub("", self.text) or "}" in _PART.sub("", self.text):
            raise InputError(f"pattern {self.text!r} has an unpaired brace", "Write fields as {camera}.")
        if used & {"year", "month", "day"} and not {"year", "month", "day"} <= used:
            raise InputError(f"pattern {self.text!r} has a part of a date", "Use {year}, {month} and {day} together.")
        object.__setattr__(self, "_regex", re.compile("".join(pieces), re.DOTALL))
        object.__setattr__(self, "_formats", formats)

    def read(self, key: str) -> Place | None:
        """What `key` (relative to the prefix) tells; None where it does not match or names an impossible time."""
        match = self._regex.fullmatch(key)
        if match is None:
            return None
        found = {name: value for name, value in match.groupdict().items() if value is not None}
        try:
            moment = self._moment(found)
        except (ValueError, OverflowError):
            return None
        return Place(found.get("camera", ""), moment, found.get("sequence", ""))

    def _moment(self, found: dict[str, str]) -> datetime | None:
        offset = timedelta(milliseconds=int(found.get("offset_ms", "0")))
        if "epoch_ms" in found:
            return EPOCH + timedelta(milliseconds=int(found["epoch_ms"])) + offset
        if "epoch" in found:
            return EPOCH + timedelta(seconds=int(found["epoch"]), milliseconds=int(found.get("ms", "0"))) + offset
        day = self._day(found)
        if day is None:
            return self.start + offset if "offset_ms" in found else None
        clock = self._clock(found)
        local = day.replace(hour=clock.hour, minute=clock.minute, second=clock.second, tzinfo=self.zone)
        return local.astimezone(UTC) + timedelta(milliseconds=int(found.get("ms", "0"))) + offset

    def _day(self, found: dict[str, str]) -> datetime | None:
        if "date" in found:
            if "date" in self._formats:
                return datetime.strptime(found["date"], self._formats["date"])
            return datetime.strptime(re.sub(r"\D", "", found["date"]), "%Y%m%d")
        if "year" in found:
            return datetime(int(found["year"]), int(found["month"]), int(found["day"]))
        return None

    def _clock(self, found: dict[str, str]) -> datetime:
        if "time" in found:
            if "time" in self._formats:
                return datetime.strptime(found["time"], self._formats["time"])
            return datetime.strptime(re.sub(r"\D", "", found["time"]), "%H%M%S")
        hour, minute, second = (int(found.get(name, "0")) for name in ("hour", "minute", "second"))
        return datetime(1970, 1, 1, hour, minute, second)


def _notation(pattern: str, name: str, notation: str) -> str:
    """The regular expression of a strptime notation made of digits and literal text."""
    if name not in ("date", "time"):
        raise InputError(f"pattern {pattern!r}: {{{name}}} takes no notation", "Only {date:…} and {time:…} do.")
    pieces = re.split(r"(%.)", notation)
    unknown = [piece for piece in pieces if piece.startswith("%") and piece not in _DIRECTIVES]
    if unknown:
        raise InputError(f"pattern {pattern!r}: {unknown[0]} is not supported", f"Use {' '.join(_DIRECTIVES)}.")
    return "".join(_DIRECTIVES.get(piece, re.escape(piece)) for piece in pieces)
