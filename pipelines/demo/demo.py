"""`haechi demo`: two rounds of the flywheel on one machine, from nothing to a served prediction.

Round 1 imports a small labelled set. Round 2 takes raw frames in, lets round 1's champion label them, has the doubtful
ones reviewed, trains on, and promotes or refuses. Every round is the real pipeline, run by kfp.local.

A start always begins clean: whatever an earlier start left in the folder is removed first, under a lock.
"""

from __future__ import annotations

import csv
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from haechi.components.ingest.step import ingest
from haechi.components.label.step import label
from haechi.components.shared.dataset import Box, frame_key
from haechi.components.shared.errors import InputError
from haechi.components.shared.files import read_json, sha256_bytes, write_json
from haechi.components.shared.progress import say
from haechi.components.shared.settings import Settings
from haechi.components.shared.storage import Store, ordered_map

from ..local_run import RunResult, run_training
from ..services import FolderLock, running, services
from .plan import NAME, Plan
from .prediction import Prediction, ask, serving
from .report import Evidence, write_report
from .reviewer import Audit, Reviewed, answer_queue, audit_machine
from .summary import checkpoints, round_summary, table
from .world import CLASSES, RawFrame, draw_labelled, draw_raw

__all__ = ["demo"]

_MARK = ".haechi-demo"
_LOCK = ".demo.lock"
_THREADS = 1  # two candidates train side by side: one torch thread each is what two cores bear


def demo(workdir: Path, plan: Plan | None = None) -> dict[str, Any]:
    """Run the demo and write `summary.json` and `report.html` into `workdir`.

    Args:
        workdir: a folder of the demo's own; an earlier demo's is emptied first.
        plan: its size.

    Returns:
        The summary, as in summary.json.

    Raises:
        InputError: the folder holds something that is not a demo's.
        ServiceError: another demo is using it, or a service does not come up.
        HaechiError: a step failed.
    """
    plan = plan or Plan()
    workdir = Path(workdir).resolve()
    started = time.monotonic()
    with _claimed(workdir), services(workdir) as embedded:
        settings = replace(embedded.settings(), threads=_THREADS)
        journey = _Journey(plan, workdir, settings)
        first = journey.first_round()
        second = journey.second_round()
        prediction = journey.prediction()
        summary = {
            "rounds": [first, second],
            "prediction": prediction.to_json() if prediction else None,
            "autolabel": _audit(journey.audit),
            "seconds": round(time.monotonic() - started, 1),
        }
        write_report(workdir / "report.html", summary, journey.evidence())
        # Last: a summary tells that the demo is complete.
        write_json(workdir / "summary.json", summary)
    _tell(summary, workdir)
    return summary


@contextmanager
def _claimed(workdir: Path) -> Iterator[None]:
    """Take the folder for this demo alone, and empty it of an earlier one."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{workdir} cannot be made ({error.strerror})", "Choose another --workdir.") from error
    strange = [path.name for path in workdir.iterdir() if not path.name.endswith(".lock")]
    if strange and not (workdir / _MARK).is_file():
        raise InputError(
            f"{workdir} is not empty and no earlier demo's folder (it holds {strange[0]!r})",
            "Name an empty or new folder with --workdir.",
        )
    with FolderLock(workdir / _LOCK):
        if running(workdir):
            raise InputError(f"services that `haechi up` started are running in {workdir}", "Run `haechi down` first.")
        (workdir / _MARK).touch()
        _empty(workdir)
        yield


def _empty(workdir: Path) -> None:
    """Remove all but mark and locks; a killed demo's services may still be writing for a second or two."""
    deadline = time.monotonic() + 20
    while True:
        left = [path for path in workdir.iterdir() if path.name != _MARK and not path.name.endswith(".lock")]
        if not left:
            return
        if time.monotonic() > deadline:
            raise InputError(f"{left[0]} cannot be removed", "Remove it by hand, or name another --workdir.")
        for path in left:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


@dataclass
class _Journey:
    """The two rounds, and what the report shows of them."""

    plan: Plan
    workdir: Path
    settings: Settings

    def __post_init__(self) -> None:
        self.store = Store(self.settings)
        self.target = f"dir:{self.workdir / 'deploy'}"
        self.champion: dict[str, Any] | None = None
        self.truth: dict[str, tuple[Box, ...]] = {}
        self.raw: list[RawFrame] = []
        self.reviewed: list[Reviewed] = []
        self.audit: Audit | None = None
        self.runs: list[RunResult] = []
        self.asked: list[tuple[RawFrame, Prediction]] = []

    def first_round(self) -> dict[str, Any]:
        """Import the labelled set, train from scratch, judge, deploy."""
        say("round 1: a small labelled set")
        clock = _Clock()
        labelled = draw_labelled(self.workdir / "world" / "labelled", self.plan.seed, self.plan.labelled)
        clock.lap("draw")
        run = self._run(self.plan.first_round(labelled, self.target))
        files = read_json(run.artifact("frames") / "ingest.json"), read_json(run.artifact("labels") / "label.json")
        return self._closed(run, *files, clock)

    def second_round(self) -> dict[str, Any]:
        """Take raw frames in, label them with the champion, have the doubtful reviewed, train on, judge, deploy."""
        say("round 2: raw frames from the cameras")
        clock = _Clock()
        self._cameras_send()
        clock.lap("draw")
        parameters = self.plan.second_round(self.settings.bucket, self.target, self._version())
        taken, labelled = self._arrive(parameters)
        clock.lap("ingest_and_label")
        self.audit = audit_machine(self.store, self.truth)
        self.reviewed = answer_queue(self.store, self.truth)
        say(f"the simulated reviewer answered {len(self.reviewed)} tasks from the world's truth")
        clock.lap("review")
        return self._closed(self._run(parameters), taken, labelled, clock)

    def prediction(self) -> Prediction | None:
        """Serve the champion and ask it about frames of a day that it has not seen; None where there is no champion."""
        if self.champion is None:
            say("no model was promoted, so there is nothing to serve")
            return None
        tomorrow = [frame for frame in draw_raw(self.plan.seed, day=1, bursts=2, frames=1) if frame.boxes]
        with serving(self.workdir / "deploy" / "current", self.workdir / "logs" / "serve.log", self.settings) as base:
            self.asked = [(frame, ask(base, NAME, frame)) for frame in tomorrow[:6]]
        shown = self.asked[0][1]
        say(
            f"served: {shown.url} answered for {shown.frame} with {len(shown.boxes)} box(es) ({shown.milliseconds:.0f} ms)"
        )
        return shown

    def evidence(self) -> Evidence:
        """What the report shows."""
        reviewed = [(item, self.store.get(_frame_key(item))) for item in islice(self.reviewed, 8)]
        reports = [run.artifact("report").read_text(encoding="utf-8") for run in self.runs]
        curves = [[_curve(path) for path in checkpoints(run)] for run in self.runs]
        return Evidence(_samples(self.raw), reviewed, self.asked, reports, curves)

    def _cameras_send(self) -> None:
        self.raw = list(draw_raw(self.plan.seed, bursts=self.plan.bursts, frames=self.plan.frames))
        self.truth = {sha256_bytes(frame.data): frame.boxes for frame in self.raw if frame.boxes is not None}
        for _ in ordered_map(lambda item: self.store.put(item.key, item.data), self.raw, self.settings.workers):
            pass
        say(f"{len(self.raw)} files arrived under {self.store.uri('raw/')}")

    def _arrive(self, parameters: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The pass that fills the review queue: ingest and label, called as the pipeline calls them."""
        folder = self.workdir / "arrival"
        ingest(
            sources=parameters["sources"],
            imports=[],
            classes=CLASSES,
            quality={},
            run_id="arrival",
            out=folder / "frames",
            settings=self.settings,
        )
        label(
            folder / "frames",
            name=NAME,
            champion=self._version(),
            teacher="",
            classes=CLASSES,
            class_map={},
            bands=parameters["bands"],
            review_limit=parameters["review_limit"],
            out=folder / "labels",
            settings=self.settings,
        )
        return read_json(folder / "frames" / "ingest.json"), read_json(folder / "labels" / "label.json")

    def _run(self, parameters: Mapping[str, Any]) -> RunResult:
        run = run_training(parameters, self.workdir, self.settings)
        self.runs.append(run)
        return run

    def _closed(
        self, run: RunResult, taken: Mapping[str, Any], labelled: Mapping[str, Any], clock: _Clock
    ) -> dict[str, Any]:
        summary = round_summary(run, taken, labelled, clock.close(), self.champion)
        if summary["deployed"]:
            self.champion = {key: summary["deployed"][key] for key in ("model", "version", "uri")}
        verdict = summary["verdict"]
        say(f"round {len(self.runs)}: {verdict['decision']}. {' '.join(verdict['reasons'])}")
        return summary

    def _version(self) -> str:
        return str(self.champion["version"]) if self.champion else ""


class _Clock:
    """Seconds of the laps outside the pipeline, and of the whole round."""

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self._laps[name] = round(now - self._last, 1)
        self._last = now

    def close(self) -> dict[str, float]:
        return {**self._laps, "total": round(time.monotonic() - self._start, 1)}


def _samples(raw: list[RawFrame]) -> list[RawFrame]:
    """One frame of each of some bursts, spread over cameras and hours."""
    first = {frame.burst: frame for frame in reversed(raw) if frame.boxes is not None}
    shown = [first[burst] for burst in sorted(first)]
    return shown[:: max(1, len(shown) // 8)][:8]


def _frame_key(item: Reviewed) -> str:
    return frame_key(item.task.frame.sha256, item.task.frame.ext)


def _curve(checkpoint: Path) -> tuple[str, list[float]]:
    """A candidate's name and its val mAP50 after each epoch."""
    name = str(read_json(checkpoint / "train.json")["name"])
    path = checkpoint / "results.csv"
    if not path.is_file():
        return name, []
    with path.open(encoding="utf-8") as file:
        rows = [{key.strip(): value for key, value in row.items()} for row in csv.DictReader(file)]
    return name, [float(row["metrics/mAP50(B)"]) for row in rows]


def _audit(audit: Audit | None) -> dict[str, Any] | None:
    return {**asdict(audit), "precision": audit.precision, "recall": audit.recall} if audit else None


def _tell(summary: Mapping[str, Any], workdir: Path) -> None:
    lines = ["", *table(summary), ""]
    lines += [
        f"took     {summary['seconds']:.0f} s",
        f"summary  {workdir / 'summary.json'}",
        f"report   {workdir / 'report.html'}",
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()
