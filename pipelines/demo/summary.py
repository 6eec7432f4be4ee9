"""What a round comes to, read from the artifacts that its steps wrote; summary.json and the closing table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from haechi.components.shared.files import read_json

from ..local_run import RunResult

__all__ = ["checkpoints", "round_summary", "table"]

_INGEST = ("seen", "accepted", "duplicates", "quarantined")
_LABEL = ("accepted", "review", "background")


def round_summary(
    run: RunResult,
    ingest: Mapping[str, Any],
    label: Mapping[str, Any],
    seconds: Mapping[str, float],
    champion: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """One entry of `rounds`.

    Args:
        run: the finished pipeline run.
        ingest, label: `ingest.json` and `label.json` of the pass that met the new frames.
        seconds: of what ran outside the pipeline.
        champion: what was deployed before, which stays where this round promotes nothing.
    """
    verdict = read_json(run.artifact("verdict") / "verdict.json")
    scorecard = read_json(run.artifact("verdict") / "scorecard.json")
    collected = read_json(run.artifact("labels") / "label.json")
    dataset = run.artifact("dataset")
    parity = read_json(run.artifact("onnx_model") / "parity.json")
    trained = [read_json(path / "train.json") for path in checkpoints(run)]
    return {
        "ingest": {key: int(ingest[key]) for key in _INGEST}
        | {"imported": int(ingest.get("imported", 0)), "reasons": dict(ingest.get("reasons", {}))},
        "label": {key: int(label[key]) for key in _LABEL}
        | {"reviewed": int(collected["reviewed"]), "teacher": str(label.get("teacher", ""))},
        "dataset": _dataset(dataset),
        "candidates": [
            {key: item[key] for key in ("name", "map50_95", "map50", "status", "epochs_run", "seconds")}
            for item in trained
        ],
        "chosen": read_json(run.artifact("onnx_model") / "model.json")["training"].get("name", ""),
        "parity": {name: value for name, value in parity.items() if name != "rows"},
        "verdict": {
            "decision": verdict["decision"],
            "reasons": list(verdict["reasons"]),
            "challenger": _score(scorecard["challenger"]),
            "champion": _score(scorecard["champion"]) if scorecard.get("champion") else None,
        },
        "deployed": _deployed(run, champion),
        "seconds": {**dict(seconds), **run.seconds},
    }


def checkpoints(run: RunResult) -> list[Path]:
    """The candidates' checkpoint artifacts in the order of the parameter `candidates`."""
    return sorted(run.artifacts["checkpoint"])  # the loop's iteration is in the path


def _dataset(folder: Path) -> dict[str, Any]:
    frames = read_json(folder / "stats.json")["frames"]
    digest = yaml.safe_load((folder / "data.yaml").read_text(encoding="utf-8"))["digest"]
    return {"digest": digest, **{split: int(frames[split]) for split in ("train", "val", "test")}}


def _score(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: entry[key] for key in ("map50_95", "map50", "precision", "recall")} | {
        "per_class": {
            name: {"map50": item["map50"], "boxes": item["boxes"]} for name, item in entry["per_class"].items()
        }
    }


def _deployed(run: RunResult, champion: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What serves after this round: the new model, or the champion that stays, or nothing yet."""
    if "deployed" not in run.artifacts:
        return {**champion, "changed": False} if champion else None
    done = read_json(run.artifact("deployed") / "deployed.json")
    return {"model": done["model"], "version": done["version"], "uri": done["uri"], "changed": True}


def table(summary: Mapping[str, Any]) -> list[str]:
    """The closing table, one row a figure and one column a round."""
    rounds: Sequence[Mapping[str, Any]] = summary["rounds"]
    rows: list[tuple[str, list[str]]] = [
        ("frames seen", [str(item["ingest"]["seen"]) for item in rounds]),
        ("  accepted", [str(item["ingest"]["accepted"]) for item in rounds]),
        ("  near-duplicates", [str(item["ingest"]["duplicates"]) for item in rounds]),
        ("  quarantined", [str(item["ingest"]["quarantined"]) for item in rounds]),
        ("imported with labels", [str(item["ingest"]["imported"]) for item in rounds]),
        ("labelled by the machine", [str(item["label"]["accepted"] + item["label"]["background"]) for item in rounds]),
        ("reviewed", [str(item["label"]["reviewed"]) for item in rounds]),
        (
            "train / val / test",
            [" / ".join(str(item["dataset"][s]) for s in ("train", "val", "test")) for item in rounds],
        ),
    ]
    width = max(len(item["candidates"]) for item in rounds)
    for place in range(width):
        rows.append((f"candidate {place + 1}, val mAP50", [_candidate(item["candidates"], place) for item in rounds]))
    rows += [
        ("test mAP50, challenger", [_number(item["verdict"]["challenger"]["map50"]) for item in rounds]),
        ("test mAP50, champion", [_number((item["verdict"]["champion"] or {}).get("map50")) for item in rounds]),
        ("export parity", ["ok" if item["parity"]["ok"] else "differs" for item in rounds]),
        ("verdict", [item["verdict"]["decision"] for item in rounds]),
        ("deployed", [(item["deployed"] or {"version": "–"})["version"] for item in rounds]),
        ("seconds", [f"{item['seconds']['total']:.0f}" for item in rounds]),
    ]
    first = max(len(name) for name, _ in rows)
    columns = [max(len(values[place]) for _, values in rows) for place in range(len(rounds))]
    columns = [max(size, 8) for size in columns]
    head = " " * first + "".join(f"  {f'round {place + 1}':>{size}}" for place, size in enumerate(columns))
    lines = [head, "-" * len(head)]
    lines += [
        name.ljust(first) + "".join(f"  {value:>{size}}" for value, size in zip(values, columns, strict=True))
        for name, values in rows
    ]
    return lines


def _candidate(candidates: Sequence[Mapping[str, Any]], place: int) -> str:
    if place >= len(candidates):
        return ""
    item = candidates[place]
    return f"{item['name']} {_number(item['map50']) if item['status'] == 'ok' else 'failed'}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
