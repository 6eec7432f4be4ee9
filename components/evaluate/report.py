"""The report: one self-contained HTML page of an evaluation, for KFP's sandboxed frame, a mail or a disk.

No script, no external request (the page's own content security policy forbids both). Everything that comes from outside
(class, camera and file names, training settings) is escaped.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..shared.model_folder import ModelFolder
from .ap import pr_curve
from .bootstrap import Interval
from .charts import confusion_table, forest, marks, pr_chart
from .gate import Comparison, Judgement
from .parameters import Gate
from .pictures import KINDS, Picture
from .score import BACKGROUND, ClassScore, ModelScore
from .style import STYLE

__all__ = ["DatasetFacts", "Evaluation", "render"]

_TITLES = {
    "promote": "Promote",
    "refuse": "Refuse",
    "not_enough_data": "Not enough data to decide",
}
_PICTURE_TITLES = {
    "label suspect": "Is the label right? Detections where the label has nothing, surest first",
    "false alarm": "False alarms, most confident first",
    "miss": "Misses, largest first",
}


@dataclass(frozen=True)
class DatasetFacts:
    """What the report says of the dataset.

    Attributes:
        digest: of the dataset.
        splits: frames in each split.
        groups: groups in the test.
        cameras: frames in the test by camera; empty name for unknown.
        frames: frames in the test.
    """

    digest: str
    splits: Mapping[str, int]
    groups: int
    cameras: Mapping[str, int]
    frames: int


@dataclass(frozen=True)
class Evaluation:
    """All that the report shows."""

    model: ModelFolder
    champion: ModelFolder | None
    dataset: DatasetFacts
    score: ModelScore
    champion_score: ModelScore | None
    comparison: Comparison
    gate: Gate
    judgement: Judgement
    confusion: NDArray[np.int64]
    pictures: Sequence[Picture]


def render(item: Evaluation) -> str:
    """The whole page."""
    title = f"{item.model.name} {item.model.version}"
    parts = [
        _head(f"Evaluation of {title}"),
        f"<h1>Evaluation of {escape(item.model.name)}</h1>",
        f"<p class='sub'>version <code>{escape(item.model.version)}</code> on dataset "
        f"<code>{escape(item.dataset.digest[:12])}</code>, {item.dataset.frames} test frames in "
        f"{item.dataset.groups} groups</p>",
        _banner(item.judgement),
        _tiles(item),
        _table(item),
        _gains(item),
        _curves(item),
        _confusion(item),
        _gallery(item.pictures),
        _checks(item),
        _facts(item),
        _method(item),
        "</main></body></html>\n",
    ]
    return "\n".join(part for part in parts if part)


def _head(title: str) -> str:
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
    )


def _banner(judgement: Judgement) -> str:
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in judgement.reasons)
    title = _TITLES.get(judgement.decision, judgement.decision)
    return (
        f"<section class='banner {escape(judgement.decision)}'><strong>{escape(title)}</strong>"
        f"<ul>{reasons}</ul></section>"
    )


def _tiles(item: Evaluation) -> str:
    bounds = item.comparison.challenger.get("")
    told = f"{bounds.low:.3f} to {bounds.high:.3f}" if bounds else ""
    rows = [
        ("mAP50-95", "map50_95", told),
        ("mAP50", "map50", ""),
        ("precision", "precision", "at the thresholds"),
        ("recall", "recall", "at the thresholds"),
    ]
    tiles = []
    for title, key, note in rows:
        notes = [title, note] if note else [title]
        if item.champion_score:
            notes.append(f"champion {_number(item.champion_score.mean(key))}")
        value = _number(item.score.mean(key))
        tiles.append(f"<div class='tile'><b>{value}</b><span>{'<br>'.join(notes)}</span></div>")
    return f"<div class='tiles'>{''.join(tiles)}</div>"


def _table(item: Evaluation) -> str:
    champion = item.champion_score
    head = ["class", "boxes", "frames", "groups", "AP50-95"]
    head += ["champion", "change"] if champion else []
    head += ["AP50", "floor", "precision", "recall"]
    rows = [_row(item, name, score) for name, score in item.score.per_class.items()]
    overall = [
        "<th scope='row'>all classes</th>",
        *["<td></td>"] * 3,
        _cell(_number(item.score.mean("map50_95")), _range(item.comparison.challenger.get(""))),
    ]
    if champion:
        overall.append(_cell(_number(champion.mean("map50_95")), _range(item.comparison.champion.get(""))))
        overall.append(_change(item.comparison.gains.get("")))
    overall += [_cell(_number(item.score.mean("map50"))), "<td></td>"]
    overall += [_cell(_number(item.score.mean("precision"))), _cell(_number(item.score.mean("recall")))]
    cells = "".join(f"<th scope='col'>{name}</th>" for name in head)
    return (
        f"<section><h2>Per class</h2><div class='wide'><table><thead><tr>{cells}</tr></thead><tbody>"
        f"<tr class='all'>{''.join(overall)}</tr>{''.join(rows)}</tbody></table></div>{_coverage(item)}</section>"
    )


def _row(item: Evaluation, name: str, score: ClassScore) -> str:
    cells = [f"<th scope='row'>{escape(name)}</th>"]
    cells += [_cell(str(value)) for value in (score.boxes, score.frames, score.groups)]
    cells.append(_cell(_number(score.map50_95), _range(item.comparison.challenger.get(name))))
    if item.champion_score:
        theirs = item.champion_score.per_class[name]
        note = _range(item.comparison.champion.get(name)) if theirs.known else "lacks this class"
        cells += [_cell(_number(theirs.map50_95), note), _change(item.comparison.gains.get(name))]
    floor = item.gate.floor(name)
    missed = floor is not None and (score.map50 is None or score.map50 < floor)
    cells.append(_cell(_number(score.map50)))
    cells.append(_cell("–" if floor is None else f"{floor:.3f}", css="" if floor is None else "no" if missed else "ok"))
    reported = f"at {score.threshold:.2f}" if score.precision is not None else ""
    cells += [_cell(_number(score.precision), reported), _cell(_number(score.recall), reported)]
    return f"<tr>{''.join(cells)}</tr>"


def _coverage(item: Evaluation) -> str:
    partly = [
        f"{escape(name)} in {score.frames}"
        for name, score in item.score.per_class.items()
        if score.frames < item.dataset.frames
    ]
    empty = [escape(name) for name, score in item.score.per_class.items() if not score.boxes]
    lacking = [escape(name) for name, score in item.score.per_class.items() if not score.known]
    notes = []
    if partly:
        notes.append(
            f"Of {item.dataset.frames} test frames, labels speak of {', '.join(partly)}; a class is judged on those "
            "frames only."
        )
    if empty:
        notes.append(f"No box in the test, so no AP: {', '.join(empty)}.")
    if lacking:
        notes.append(f"The model lacks: {', '.join(lacking)}.")
    return "".join(f"<p class='key'>{note}</p>" for note in notes)


def _gains(item: Evaluation) -> str:
    gains = item.comparison.gains
    if not gains or item.champion is None:
        return ""
    rows = [("all classes", *gains[""])] if "" in gains else []
    rows += [(name, *gains[name]) for name in item.comparison.shared if name in gains]
    limits = dict.fromkeys(item.comparison.shared, item.gate.max_class_drop) | {"all classes": item.gate.noninferiority}
    return (
        f"<section><h2>Change of AP50-95 against champion <code>{escape(item.champion.version)}</code></h2>"
        f"<div class='forest'>{forest(rows, limits)}</div><p class='key'>Bars are {item.gate.confidence:.0%} intervals "
        f"of {item.gate.draws} paired resamples of whole groups; the dashed line is the loss that the gate allows."
        "</p></section>"
    )


def _curves(item: Evaluation) -> str:
    charts = []
    for name, matches in zip(item.score.classes, item.score.matches, strict=True):
        score = item.score.per_class[name]
        if not score.boxes:
            continue
        theirs = item.champion_score.matches[item.score.classes.index(name)] if item.champion_score else None
        point = (score.recall, score.precision) if score.recall is not None and score.precision is not None else None
        chart = pr_chart(name, pr_curve(matches), pr_curve(theirs) if theirs else None, point, score.known)
        charts.append(f"<div><h3>{escape(name)}, AP50 {_number(score.map50)}</h3>{chart}</div>")
    if not charts:
        return ""
    key = "<i></i>challenger" + ("<i class='champion'></i>champion" if item.champion_score else "")
    return (
        f"<section><h2>Precision over recall at IoU 0.5</h2><div class='charts'>{''.join(charts)}</div>"
        f"<p class='key'>{key} · circle: at the reporting threshold</p></section>"
    )


def _confusion(item: Evaluation) -> str:
    if not item.confusion.sum():
        return ""
    table = confusion_table([*item.score.classes, BACKGROUND], item.confusion)
    return (
        f"<section><h2>Confusion at the reporting thresholds</h2><div class='wide'>{table}</div><p class='key'>The "
        "column background counts misses, the row background false alarms. Tint: share of the row.</p></section>"
    )


def _gallery(pictures: Sequence[Picture]) -> str:
    parts = []
    for kind in KINDS:
        figures = [_figure(picture) for picture in pictures if picture.mistake.kind == kind]
        if figures:
            parts.append(f"<h3 class='group'>{_PICTURE_TITLES[kind]}</h3><div class='gallery'>{''.join(figures)}</div>")
    if not parts:
        return ""
    key = "<i class='truth'></i>label<i class='guess'></i>prediction<i class='error'></i>the error in question"
    return f"<section><h2>Worst errors</h2>{''.join(parts)}<p class='key'>{key}</p></section>"


def _figure(picture: Picture) -> str:
    size = f'width="{picture.width}" height="{picture.height}"'
    data = base64.b64encode(picture.jpeg).decode()
    mistake = picture.mistake
    return (
        f'<figure><svg viewBox="0 0 {picture.width} {picture.height}" role="img" '
        f'aria-label="{escape(mistake.kind)}: {escape(mistake.class_name)}">'
        f'<image href="data:image/jpeg;base64,{data}" {size}/>{marks(picture)}</svg>'
        f"<figcaption><b>{escape(mistake.class_name)}</b>, {escape(mistake.note)}"
        f"<small>{escape(_tail(picture.frame_name))}</small></figcaption></figure>"
    )


def _checks(item: Evaluation) -> str:
    rows = "".join(
        f"<tr><td class='{'ok' if check.ok else 'no'}'>{escape(check.name)}</td><td>{_value(check.value)}</td>"
        f"<td>{_value(check.limit)}</td><td class='words'>{escape(check.sentence)}</td></tr>"
        for check in item.judgement.checks
    )
    return (
        "<section><h2>What the gate checked</h2><div class='wide'><table><thead><tr><th>check</th><th>value</th>"
        f"<th>limit</th><th class='words'>in words</th></tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def _facts(item: Evaluation) -> str:
    model, data = item.model, item.dataset
    cameras = ", ".join(f"{name or 'unknown'} ({count})" for name, count in list(data.cameras.items())[:30])
    if len(data.cameras) > 30:
        cameras += f", and {len(data.cameras) - 30} more"
    dataset = {
        "digest": data.digest,
        "frames": ", ".join(f"{name} {count}" for name, count in data.splits.items()),
        "test groups": str(data.groups),
        "test cameras": cameras or "–",
        "trained on": "this dataset" if model.dataset_digest == data.digest else model.dataset_digest or "unknown",
    }
    network = {
        "name, version": f"{model.name} {model.version}",
        "ONNX sha256": model.onnx_sha256,
        "checkpoint sha256": model.checkpoint_sha256 or "–",
        "classes": ", ".join(model.classes),
        "input": f"{model.imgsz} px, NMS IoU {model.iou:g}",
        "MLflow run": model.run_id or "–",
        "training": json.dumps(model.training, ensure_ascii=False, sort_keys=True) if model.training else "–",
        "validation": ", ".join(f"{name} {value:.3f}" for name, value in model.metrics.items()) or "–",
        "licence": model.licence,
    }
    if item.champion:
        network["champion"] = (
            f"{item.champion.name} {item.champion.version}, dataset {item.champion.dataset_digest[:12]}"
        )
    return (
        f"<section class='two'><div><h2>Dataset</h2>{_list(dataset)}</div>"
        f"<div><h2>Model</h2>{_list(network)}</div></section>"
    )


def _method(item: Evaluation) -> str:
    return (
        "<section><h2>How this was measured</h2><p>The exported ONNX graph, not the checkpoint, ran on the frozen test "
        "split through the code that serves it. AP follows the COCO protocol: greedy matching, at most 100 detections "
        "a class and frame, IoU 0.50 to 0.95 in steps of 0.05, precision read at 101 recalls; means are over classes "
        "with a box in the test. Precision and recall are at each class's reporting threshold and IoU 0.5.</p>"
        f"<p>Intervals ({item.gate.confidence:.0%}) come from {item.gate.draws} resamples of whole groups with "
        f"replacement (seed {item.gate.seed}); challenger and champion share the resamples.</p></section>"
    )


def _list(rows: Mapping[str, str]) -> str:
    return (
        "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in rows.items()) + "</dl>"
    )


def _cell(text: str, note: str = "", css: str = "") -> str:
    small = f"<small>{escape(note)}</small>" if note else ""
    return f"<td{f' class={css!r}' if css else ''}>{escape(text)}{small}</td>"


def _change(gain: tuple[float, Interval] | None) -> str:
    if gain is None:
        return "<td>–</td>"
    value, bounds = gain
    css = "up" if bounds.low > 0 else "down" if bounds.high < 0 else ""
    return _cell(f"{value:+.3f}", f"{bounds.low:+.3f} to {bounds.high:+.3f}", css)


def _range(bounds: Interval | None) -> str:
    return f"{bounds.low:.3f} to {bounds.high:.3f}" if bounds else ""


def _tail(text: str, length: int = 60) -> str:
    return text if len(text) <= length else "…" + text[1 - length :]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _value(value: Any) -> str:
    return _number(value) if value is None or isinstance(value, float) else escape(str(value))
