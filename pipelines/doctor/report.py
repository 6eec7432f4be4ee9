"""A diagnosis for people and for programs; neither ever shows a secret, or steers a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from haechi.components.shared.errors import printable

from .examine import Diagnosis, Result

__all__ = ["as_json", "as_lines"]


def as_json(diagnosis: Diagnosis, redact: Callable[[str], str]) -> dict[str, Any]:
    """The diagnosis as plain values: what was found, what could not be seen, what was not asked, what is well."""
    value = {
        "healthy": diagnosis.exit_code == 0,
        "cluster": diagnosis.cluster,
        "findings": [
            {"check": result.check, **asdict(finding)} for result in diagnosis.results for finding in result.findings
        ],
        "unseen": [
            {"check": result.check, "problem": result.unseen, "remedy": result.remedy}
            for result in diagnosis.results
            if result.unseen
        ],
        "skipped": {result.check: result.skipped for result in diagnosis.results if result.skipped},
        "well": [result.check for result in diagnosis.results if _well(result)],
    }
    return {key: _redacted(part, redact) for key, part in value.items()}


def as_lines(diagnosis: Diagnosis, redact: Callable[[str], str]) -> list[str]:
    """A table: a row a finding (symptom, cause, fix), then what could not be seen, then the rest in short."""
    width = max(len(name) for name in ["not asked", *(result.check for result in diagnosis.results)]) + 2
    lines: list[str] = []
    for result in diagnosis.results:
        for finding in result.findings:
            lines += _row(result.check, width, (("", finding.symptom), ("cause", finding.cause), ("fix", finding.fix)))
    unseen = _grouped((result.check, (result.unseen, result.remedy)) for result in diagnosis.results if result.unseen)
    for (problem, remedy), names in unseen.items():
        lines += _row("NOT SEEN", width, (("", problem), ("checks", ", ".join(names)), ("fix", remedy)))
    skipped = _grouped((result.check, result.skipped) for result in diagnosis.results if result.skipped)
    for reason, names in skipped.items():
        lines.append(f"{'not asked':{width}}{', '.join(names)}: {reason}")
    well = [result.check for result in diagnosis.results if _well(result)]
    lines.append(f"{'well':{width}}{', '.join(well) or 'nothing'}")
    where = f"cluster {diagnosis.cluster}" if diagnosis.cluster else "no cluster was looked at"
    faults = sum(len(result.findings) for result in diagnosis.results)
    lines += ["", f"{faults} found, {sum(map(len, unseen.values()))} checks could not look, {len(well)} well; {where}"]
    return [printable(redact(line)) for line in lines]


def _row(check: str, width: int, parts: Iterable[tuple[str, str]]) -> list[str]:
    """One row: the check's name at the left, then symptom, cause and fix; commands stay whole, to be copied."""
    lines: list[str] = []
    for label, text in parts:
        if not text:
            continue
        for number, line in enumerate(text.splitlines()):
            head = check if not lines else ""
            lines.append(
                f"{head:{width}}{(label if number == 0 else ''):7}{line}" if label else f"{head:{width}}{line}"
            )
    return [*lines, ""]


def _well(result: Result) -> bool:
    return not (result.findings or result.unseen or result.skipped)


def _grouped(pairs: Iterable[tuple[str, Any]]) -> dict[Any, list[str]]:
    groups: dict[Any, list[str]] = {}
    for name, key in pairs:
        groups.setdefault(key, []).append(name)
    return groups


def _redacted(value: Any, redact: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return printable(redact(value))
    if isinstance(value, dict):
        return {key: _redacted(part, redact) for key, part in value.items()}
    return [_redacted(part, redact) for part in value] if isinstance(value, list) else value
