"""Charts of the report as inline SVG, and its confusion matrix as a table: plain text, no script, nothing fetched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from .ap import Curve
from .bootstrap import Interval
from .pictures import Mark, Picture

__all__ = ["confusion_table", "forest", "marks", "pr_chart"]

_W, _H, _LEFT, _BOTTOM, _TOP, _RIGHT = 300, 230, 34, 30, 20, 8


def pr_chart(
    title: str, challenger: Curve, champion: Curve | None, point: tuple[float, float] | None, known: bool = True
) -> str:
    """Precision over recall of one class at IoU 0.5; `point` is (recall, precision) at the reporting threshold."""
    inner_w, inner_h = _W - _LEFT - _RIGHT, _H - _TOP - _BOTTOM

    def xy(recall: float, precision: float) -> str:
        return f"{_LEFT + recall * inner_w:.1f},{_TOP + (1 - precision) * inner_h:.1f}"

    parts = [f'<svg viewBox="0 0 {_W} {_H}" role="img" aria-label="Precision over recall of {escape(title)}">']
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = xy(tick, tick).split(",")
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{y}" x2="{_W - _RIGHT}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 5}" y="{float(y) + 3:.1f}" text-anchor="end">{tick:g}</text>')
        parts.append(f'<text class="tick" x="{x}" y="{_H - _BOTTOM + 13}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text class="tick" x="{_W - _RIGHT}" y="{_H - 4}" text-anchor="end">recall</text>')
    parts.append('<text class="tick" x="4" y="9">precision</text>')
    for curve, css in ((champion, "champion"), (challenger, "challenger")):
        if curve is not None and curve.precision.any():
            reached = curve.precision > 0
            line = " ".join(xy(r, p) for r, p in zip(curve.recall[reached], curve.precision[reached], strict=True))
            parts.append(f'<polyline class="line {css}" points="{line}"/>')
    if point:
        x, y = xy(*point).split(",")
        parts.append(f'<circle class="point" cx="{x}" cy="{y}" r="4"/>')
    if not known or not challenger.precision.any():
        text = "no true detection" if known else "the model lacks this class"
        parts.append(f'<text class="tick" x="{_W / 2}" y="{_H / 2}" text-anchor="middle">{text}</text>')
    return "".join([*parts, "</svg>"])


def forest(rows: Sequence[tuple[str, float, Interval]], limits: Mapping[str, float]) -> str:
    """Gains with their intervals, one line a row; `limits` marks on each row how large a loss is allowed."""
    reach = max([0.05, *(abs(v) for _, value, bounds in rows for v in (value, bounds.low, bounds.high))]) * 1.1
    width, row_height, left = 640, 30, 190
    height = row_height * len(rows) + 26
    scale = (width - left - 70) / (2 * reach)
    zero = left + reach * scale
    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="Change of AP against the champion, by class">',
        f'<line class="axis" x1="{zero:.1f}" y1="4" x2="{zero:.1f}" y2="{height - 20}"/>',
    ]
    for index, (name, value, bounds) in enumerate(rows):
        y = row_height * index + 18
        css = "good" if bounds.low > 0 else "bad" if bounds.high < 0 else "open"
        low, high, at = (zero + item * scale for item in (bounds.low, bounds.high, value))
        label = name if len(name) <= 26 else name[:25] + "…"
        parts.append(f'<text class="label" x="{left - 12}" y="{y + 4}" text-anchor="end">{escape(label)}</text>')
        if name in limits:
            x = zero - limits[name] * scale
            parts.append(f'<line class="limit" x1="{x:.1f}" y1="{y - 11}" x2="{x:.1f}" y2="{y + 11}"/>')
        parts.append(f'<line class="range {css}" x1="{low:.1f}" y1="{y}" x2="{high:.1f}" y2="{y}"/>')
        parts.append(f'<circle class="dot {css}" cx="{at:.1f}" cy="{y}" r="5"/>')
        parts.append(f'<text class="label" x="{width - 62}" y="{y + 4}">{value:+.3f}</text>')
    parts.append(f'<text class="tick" x="{zero - 8:.1f}" y="{height - 5}" text-anchor="end">worse</text>')
    parts.append(f'<text class="tick" x="{zero + 8:.1f}" y="{height - 5}">better</text></svg>')
    return "".join(parts)


def confusion_table(categories: Sequence[str], matrix: NDArray[np.int64]) -> str:
    """Truth down, prediction across; a cell's tint is its share of the row."""
    head = "".join(f"<th scope='col'>{escape(name)}</th>" for name in categories)
    rows = []
    for index, name in enumerate(categories):
        total = max(1, int(matrix[index].sum()))
        cells = []
        for column, value in enumerate(matrix[index]):
            css = "hit" if index == column else "off"
            corner = index == column == len(categories) - 1
            tint = 0.0 if corner else float(value) / total
            text = "" if corner else f"{int(value)}"
            cells.append(f'<td class="{css}" style="--share:{tint:.2f}">{text}</td>')
        rows.append(f"<tr><th scope='row'>{escape(name)}</th>{''.join(cells)}</tr>")
    return (
        f"<table class='confusion'><thead><tr><td class='corner'>truth ↓ prediction →</td>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def marks(picture: Picture) -> str:
    """The boxes over a picture."""
    return "".join(_mark(item) for item in picture.marks)


def _mark(mark: Mark) -> str:
    rect = (
        f'<rect class="{mark.kind}" x="{mark.x:.1f}" y="{mark.y:.1f}" width="{mark.width:.1f}" '
        f'height="{mark.height:.1f}"/>'
    )
    if not mark.text:
        return rect
    # Truth is named below its box and predictions above, so that they stay apart where they agree.
    y = mark.y + mark.height + 12 if mark.kind == "truth" else mark.y - 4
    return (
        rect + f'<text class="{mark.kind}" x="{max(2.0, mark.x):.1f}" y="{max(11.0, y):.1f}">{escape(mark.text)}</text>'
    )
