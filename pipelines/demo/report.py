"""The demo's report: one self-contained page with pictures, plots and both evaluations inside; nothing is fetched."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from haechi.components.evaluate.style import STYLE
from haechi.components.shared.files import write_bytes
from haechi.components.shared.images import decode, encode_jpeg

from .prediction import Prediction
from .reviewer import Reviewed
from .summary import table
from .world import RawFrame

__all__ = ["Evidence", "write_report"]

_TRUE, _GUESS = (53, 196, 106), (255, 176, 32)
_SCALE = 1.5
_COLOURS = ("#1d5fbf", "#b3261e", "#1a7a45", "#9a6400")
_EXTRA = """
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(230px,1fr));gap:12px}
.pictures figure{margin:0}.pictures img{width:100%;display:block;border-radius:6px}
figcaption{font-size:12.5px;color:var(--soft);overflow-wrap:anywhere}
pre{overflow-x:auto;margin:0}
iframe{width:100%;height:720px;border:1px solid var(--line);border-radius:8px;background:#fff}
summary{cursor:pointer;font-weight:600}
"""
_KEY = '<p class="key"><i class="truth"></i>truth<i class="guess"></i>the machine\'s box</p>'

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Evidence:
    """What the page shows beside the numbers.

    Attributes:
        samples: some raw frames.
        reviewed: some answered tasks, each with its picture's bytes.
        asked: frames sent to the served model, with its answers.
        evaluations: the evaluation page of each round.
        curves: a round's candidates, each with its val mAP50 after every epoch.
    """

    samples: Sequence[RawFrame]
    reviewed: Sequence[tuple[Reviewed, bytes]]
    asked: Sequence[tuple[RawFrame, Prediction]]
    evaluations: Sequence[str]
    curves: Sequence[Sequence[tuple[str, Sequence[float]]]]


def write_report(path: Path, summary: Mapping[str, Any], evidence: Evidence) -> None:
    """Write the page to `path`, whole or not at all."""
    parts = [
        _banner(summary),
        _numbers(summary),
        _plots(summary, evidence),
        _world(evidence),
        _review(summary, evidence),
    ]
    parts += [_served(evidence), _evaluations(evidence), _raw(summary)]
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-src 'self' data: about:"
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><title>Haechi: two rounds</title>'
        f"<style>{STYLE}{_EXTRA}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    )
    write_bytes(path, page.encode())


def _banner(summary: Mapping[str, Any]) -> str:
    last = summary["rounds"][-1]["verdict"]
    rows = "".join(
        f"<li>Round {place}: <b>{escape(item['verdict']['decision'])}</b>. {escape(' '.join(item['verdict']['reasons']))}</li>"
        for place, item in enumerate(summary["rounds"], start=1)
    )
    return (
        "<h1>The flywheel turned twice</h1>"
        '<p class="sub">A synthetic camera world with known truth, one machine, the real pipeline.</p>'
        f'<section class="banner {escape(last["decision"])}"><strong>{escape(last["decision"])}</strong><ul>{rows}</ul></section>'
    )


def _numbers(summary: Mapping[str, Any]) -> str:
    return f"<section><h2>In numbers</h2><pre>{escape(chr(10).join(table(summary)))}</pre></section>"


def _plots(summary: Mapping[str, Any], evidence: Evidence) -> str:
    bars = []
    for place, item in enumerate(summary["rounds"], start=1):
        verdict = item["verdict"]
        bars.append((f"round {place} challenger", verdict["challenger"]["map50"], _COLOURS[0]))
        if verdict["champion"]:
            bars.append((f"round {place} champion", verdict["champion"]["map50"], "#8c96a3"))
    charts = [f"<div><h3>mAP50 on the frozen test</h3>{_bar_chart(bars)}</div>"]
    for place, curves in enumerate(evidence.curves, start=1):
        charts.append(f"<div><h3>Round {place}: val mAP50 by epoch</h3>{_line_chart(curves)}</div>")
    return f'<section><h2>Quality</h2><div class="charts">{"".join(charts)}</div></section>'


def _bar_chart(bars: Sequence[tuple[str, float | None, str]]) -> str:
    rows = []
    for place, (name, value, colour) in enumerate(bars):
        y = 8 + 30 * place
        width = 150 * (value or 0.0)
        rows.append(
            f'<text class="label" x="0" y="{y + 15}">{escape(name)}</text>'
            f'<rect x="135" y="{y}" width="{width:.1f}" height="20" style="fill:{colour}"/>'
            f'<text class="label" x="{140 + width:.1f}" y="{y + 15}">{"–" if value is None else f"{value:.3f}"}</text>'
        )
    return f'<svg viewBox="0 0 340 {16 + 30 * len(bars)}" role="img">{"".join(rows)}</svg>'


def _line_chart(curves: Sequence[tuple[str, Sequence[float]]]) -> str:
    longest = max((len(values) for _, values in curves), default=0)
    parts = [
        f'<line class="grid" x1="30" x2="330" y1="{170 - 150 * tick / 4:.0f}" y2="{170 - 150 * tick / 4:.0f}"/>'
        f'<text class="tick" x="4" y="{174 - 150 * tick / 4:.0f}">{tick / 4:.2f}</text>'
        for tick in range(5)
    ]
    for place, (name, values) in enumerate(curves):
        colour = _COLOURS[place % len(_COLOURS)]
        step = 300 / max(1, longest - 1)
        points = " ".join(f"{30 + step * index:.1f},{170 - 150 * value:.1f}" for index, value in enumerate(values))
        parts.append(f'<polyline class="line" points="{points}" style="stroke:{colour}"/>')
        parts.append(f'<text class="label" x="{36 + 150 * place}" y="192" style="fill:{colour}">{escape(name)}</text>')
    return f'<svg viewBox="0 0 340 200" role="img">{"".join(parts)}</svg>'


def _world(evidence: Evidence) -> str:
    figures = []
    for frame in evidence.samples:
        caption = ", ".join(sorted({box.class_name for box in frame.boxes or ()})) or "nothing to find"
        figures.append(_figure(_picture(frame.data), f"{frame.key.rpartition('/')[2]}: {caption}"))
    return _gallery("What the cameras sent", "", figures)


def _review(summary: Mapping[str, Any], evidence: Evidence) -> str:
    figures = []
    for item, data in evidence.reviewed:
        boxes = [(box.class_name, (box.x1, box.y1, box.x2, box.y2), _TRUE) for box in item.truth]
        boxes += [
            (f"{box.class_name} {box.score:.2f}", (box.x1, box.y1, box.x2, box.y2), _GUESS)
            for box in item.task.proposals
        ]
        figures.append(_figure(_picture(data, boxes), f"{item.task.frame.camera}: {item.task.reason}"))
    audit = summary.get("autolabel")
    told = ""
    if audit and audit["frames"]:
        told = (
            f"<p>{audit['frames']} frames were labelled without a person. Held against the truth, {audit['right']} of the "
            f"machine's {audit['boxes']} boxes are right, and {audit['true']} objects are really there.</p>"
        )
    return _gallery("What a person was asked", told + _KEY, figures)


def _served(evidence: Evidence) -> str:
    figures = []
    for frame, answer in evidence.asked:
        boxes = [(row["class"], tuple(row["box"]), _TRUE) for row in answer.truth]
        boxes += [(f"{row['class']} {row['score']:.2f}", tuple(row["box"]), _GUESS) for row in answer.boxes]
        figures.append(_figure(_picture(frame.data, boxes), f"{frame.key}, {answer.milliseconds:.0f} ms"))
    told = f"<p>{escape(evidence.asked[0][1].url)}</p>" if evidence.asked else "<p>No model was promoted.</p>"
    return _gallery("What the served champion says of the next day", told + _KEY, figures)


def _evaluations(evidence: Evidence) -> str:
    rows = [
        f'<details><summary>Evaluation of round {place}</summary><iframe sandbox="" srcdoc="{escape(page)}"></iframe></details>'
        for place, page in enumerate(evidence.evaluations, start=1)
    ]
    return f"<section><h2>The evaluations in full</h2>{''.join(rows)}</section>"


def _raw(summary: Mapping[str, Any]) -> str:
    text = escape(json.dumps(summary, indent=2, ensure_ascii=False))
    return f"<section><details><summary>summary.json</summary><pre>{text}</pre></details></section>"


def _gallery(title: str, intro: str, figures: Sequence[str]) -> str:
    inside = "".join(figures) or "<p>None.</p>"
    return f'<section><h2>{escape(title)}</h2>{intro}<div class="pictures">{inside}</div></section>'


def _figure(jpeg: bytes, caption: str) -> str:
    text = base64.b64encode(jpeg).decode()
    return (
        f'<figure><img alt="" src="data:image/jpeg;base64,{text}"><figcaption>{escape(caption)}</figcaption></figure>'
    )


def _picture(data: bytes, boxes: Sequence[tuple[str, Sequence[float], tuple[int, int, int]]] = ()) -> bytes:
    """The picture, enlarged so that text can be read, with boxes and their names."""
    pixels: Pixels = np.asarray(cv2.resize(decode(data), None, fx=_SCALE, fy=_SCALE), np.uint8)
    for name, corners, colour in boxes:
        x1, y1, x2, y2 = (round(value * _SCALE) for value in corners)
        cv2.rectangle(pixels, (x1, y1), (x2, y2), colour, 2)
        # The truth is named below its box, the machine's guess above it: both can be read.
        low = y2 + 13 if colour == _TRUE else max(11, y1 - 4)
        cv2.putText(pixels, name, (x1, low), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (0, 0, 0), 3, cv2.LINE_AA)
        cv2.putText(pixels, name, (x1, low), cv2.FONT_HERSHEY_SIMPLEX, 0.42, colour, 1, cv2.LINE_AA)
    return encode_jpeg(pixels, quality=82)
