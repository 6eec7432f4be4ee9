"""Train one candidate: dataset and settings in, a checkpoint and its validation figures out.

A candidate that cannot train (its settings, too little memory, a loss that became NaN) gives a result of status
`failed` with the reason, because one bad candidate must not end the run of the others.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ..shared.cpus import granted_cpus
from ..shared.dataset import ManifestRow, dataset_digest, read_rows
from ..shared.errors import InputError, IntegrityError, NoDataError, TrainError
from ..shared.files import atomic_folder, read_json, write_bytes, write_json
from ..shared.progress import say
from ..shared.settings import Settings
from ..shared.storage import Store
from ..shared.yolo import tame
from .candidate import Candidate
from .parameters import check_device, check_seed
from .reporting import EpochReporter, open_run
from .state import StateKeeper, TrainPlan, training_key
from .weights import Base, resolve_base

__all__ = ["TrainResult", "choose_device", "train"]

_RAM_SHARE = 4  # decoded pictures may take one part in so many of the free memory: candidates train side by side
_BYTES_A_PIXEL = 3
_PREFETCH = 4
_MAX_WORKERS = 8


@dataclass(frozen=True)
class TrainResult:
    """How a candidate's training ended.

    Attributes:
        name: the candidate's.
        status: `ok` or `failed`.
        reason: why it failed and what to do, or a note.
        map50_95, map50: of the best epoch on val, over covered classes that have a box there; None where failed.
        epochs_run: epochs trained; fewer than asked for after early stopping.
        seconds: training time, over all attempts where it was resumed.
        candidate: its settings, defaults filled in.
        dataset_digest: what it was trained on.
        run_id: MLflow run, or empty.
        classes: ordered class names.
        imgsz: input size.
    """

    name: str
    status: str
    reason: str
    map50_95: float | None
    map50: float | None
    epochs_run: int
    seconds: float
    candidate: dict[str, Any]
    dataset_digest: str
    run_id: str
    classes: tuple[str, ...]
    imgsz: int

    def metadata(self) -> dict[str, Any]:
        """JSON-plain values for `train.json` and the artifact."""
        return asdict(self) | {"classes": list(self.classes)}


@dataclass(frozen=True)
class _Data:
    """The dataset artifact as training needs it."""

    manifest: Path
    classes: tuple[str, ...]
    digest: str
    frames: Counter[str]

    @classmethod
    def read(cls, folder: Path) -> _Data:
        try:
            names = yaml.safe_load((folder / "data.yaml").read_text(encoding="utf-8"))["names"]
            classes = tuple(names[key] for key in sorted(names)) if isinstance(names, dict) else tuple(names)
        except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
            raise IntegrityError(
                f"{folder}/data.yaml is not a dataset's ({error})", "Run the build step again."
            ) from error
        rows = read_rows(folder / "manifest.parquet", ManifestRow)
        frames = Counter(row.split for row in rows)
        if not any(row.boxes for row in rows if row.split == "train"):
            raise NoDataError(
                f"the dataset {folder} has no box in train", "Label more frames, or import labelled data."
            )
        if not frames["val"]:
            raise NoDataError(
                f"the dataset {folder} has no frame in val, so nothing could tell a good epoch from a bad one",
                "Label frames of more groups (cameras, hours), or raise ratios.val.",
            )
        return cls(folder / "manifest.parquet", classes, dataset_digest(classes, rows), frames)


def train(
    dataset: Path,
    name: str,
    candidate: Mapping[str, Any],
    champion: str,
    seed: int,
    device: str,
    run_id: str,
    out: Path,
    work: Path,
    settings: Settings,
    upload_every: float = 60.0,
    retrain: bool = False,
) -> TrainResult:
    """Train one candidate and write `checkpoint.pt`, `train.json` and `results.csv` into `out`.

    Killed at any moment and called again with the same arguments, it gives the same checkpoint: it resumes from
    `work` or, where that is gone, from `state/train/<key>/`. A training that had finished is not run again.

    Args:
        dataset: folder of the dataset artifact.
        name: registered model's name, whose champion a candidate may start from.
        candidate: settings, see `Candidate`.
        champion: the champion's version, or empty.
        seed: of weights, order and augmentation.
        device: `auto`, `cpu`, `mps`, `0`, or `0,1`.
        run_id: the pipeline's run, noted in MLflow; may be empty.
        out: folder that is written whole.
        work: scratch folder.
        settings: of object store and MLflow; `threads` are torch's.
        upload_every: seconds between uploads of the resumable state.
        retrain: take nothing from other runs; within `run_id` it is resumed, and not run twice, all the same.

    Raises:
        InputError: the device cannot be or is not there, or the seed is negative.
        NoDataError: no boxes in train or no frames in val.
        IntegrityError: the dataset is not what its manifest says.
        StorageError, TrackingError: a service cannot be reached.
    """
    check_seed(seed)
    check_device(device)
    data = _Data.read(dataset)
    work.mkdir(parents=True, exist_ok=True)
    tame(settings.threads, work / "ultralytics")
    failed = TrainResult(
        name=str(candidate.get("name") or "candidate"),
        status="failed",
        reason="",
        map50_95=None,
        map50=None,
        epochs_run=0,
        seconds=0.0,
        candidate=dict(candidate),
        dataset_digest=data.digest,
        run_id="",
        classes=data.classes,
        imgsz=0,
    )
    chosen = choose_device(device)
    try:
        settled = Candidate.parse(candidate)
        _check_batch(settled, chosen)
        base = resolve_base(settled, name, champion, settings, work)
    except InputError as error:
        return _write_failed(replace(failed, reason=str(error)), out)
    failed = replace(failed, candidate=settled.to_dict(), imgsz=settled.imgsz)
    only_run = run_id if retrain else ""
    return _Attempt(data, settled, base, seed, chosen, work, settings, upload_every, only_run).run(
        failed, out, {"haechi.run": run_id, "haechi.model": name}
    )


def choose_device(device: str) -> str:
    """Turn the parameter into Ultralytics' device, or say what is missing.

    Args:
        device: `auto` (all GPUs that this process sees, else the CPU), `cpu`, `mps`, or GPU numbers `0`, `0,1`.

    Raises:
        InputError: it is not there.
    """
    import torch

    count = torch.cuda.device_count()
    if device in ("", "auto"):
        device = ",".join(map(str, range(count))) if torch.cuda.is_available() and count else "cpu"
        say(f"device auto: {'GPU ' + device if device != 'cpu' else 'cpu'}")
    if device == "cpu" or (device == "mps" and torch.backends.mps.is_available()):
        return device
    if device == "mps":
        raise InputError("device is 'mps', which is not here", "Give auto, cpu, or 0 or 0,1 for GPUs.")
    if not all(int(item) < count for item in device.split(",")):
        raise InputError(
            f"device is {device!r}, but this machine shows {count} GPUs",
            "Raise gpu_count, check the node's driver, or give cpu.",
        )
    return device


def _check_batch(candidate: Candidate, device: str) -> None:
    gpus = len(device.split(","))
    if candidate.batch < gpus:
        raise InputError(
            f"candidate {candidate.name}: batch {candidate.batch} is less than {gpus} GPUs", "Raise batch."
        )


def _write_failed(result: TrainResult, out: Path) -> TrainResult:
    say(f"candidate {result.name} failed: {result.reason}")
    return _write(result, None, out)


def _write(result: TrainResult, files: Path | None, out: Path) -> TrainResult:
    with atomic_folder(out) as folder:
        if files:
            for name in ("checkpoint.pt", "results.csv"):
                shutil.copyfile(files / name, folder / name)
        write_json(folder / "train.json", result.metadata())
    return result


@dataclass(frozen=True)
class _Attempt:
    """One attempt at a settled candidate, fresh or resumed."""

    data: _Data
    candidate: Candidate
    base: Base
    seed: int
    device: str
    work: Path
    settings: Settings
    upload_every: float
    only_run: str

    def run(self, blank: TrainResult, out: Path, tags: dict[str, str]) -> TrainResult:
        key = training_key(self.data.digest, self.candidate.to_dict(), self.seed, self.base.sha256, self.only_run)
        home = self.work / key
        keeper = StateKeeper(home, self.settings, key, self.upload_every)
        known = keeper.finished(home / "finished")
        if known:
            say(f"candidate {blank.name} was trained before: state/train/{key}/")
            result = TrainResult(**(known | {"classes": tuple(known["classes"])}))
            result = replace(result, name=blank.name, candidate=blank.candidate)
            return _write(result, home / "finished", out)
        tags = tags | {"haechi.dataset": self.data.digest, "haechi.candidate": blank.name}
        params = blank.candidate | {"seed": self.seed, "dataset_digest": self.data.digest, "device": self.device}
        mlflow_run = open_run(self.settings, blank.name, params, tags, keeper.mlflow_run())
        if mlflow_run:
            keeper.keep_mlflow_run(mlflow_run)
        reporter = EpochReporter(self.settings, mlflow_run)
        try:
            self._fit(keeper, mlflow_run)
        except TrainError as error:
            reporter.finish(ok=False)
            return _write_failed(replace(blank, reason=str(error), run_id=mlflow_run), out)
        except Exception:
            reporter.finish(ok=False)
            raise
        result = self._finish(blank, keeper, out, mlflow_run)
        best = {"val/mAP50-95": float(result.map50_95 or 0), "val/mAP50": float(result.map50 or 0)}
        reporter.log(best, result.epochs_run + 1)
        reporter.finish(ok=True)
        return result

    def _fit(self, keeper: StateKeeper, mlflow_run: str) -> None:
        """Train until the last epoch's state is kept; nothing to do where it is kept already."""
        state = keeper.load()
        if state and state["stop"]:
            return
        from ..shared.materialize import materialize

        folder = self.work / "dataset"
        materialize(self.data.manifest, self.data.classes, folder, Store(self.settings), self.settings.cache_path)
        plan = TrainPlan(
            key=keeper.key,
            seed=self.seed,
            covers=str(folder.resolve() / "covers.json"),
            mlflow_run=mlflow_run,
            upload_every=self.upload_every,
            cache=self._fits_memory(),
            threads=self.settings.threads,
        )
        plan.write(keeper.folder)
        (keeper.folder / "failure.json").unlink(missing_ok=True)
        shutil.rmtree(keeper.folder / "run", ignore_errors=True)
        self._start(keeper.folder, folder.resolve() / "data.yaml")

    def _start(self, home: Path, data: Path) -> None:
        from .trainer import FlywheelTrainer, explain

        if "," in self.device:
            # The children that Ultralytics starts for several GPUs read the settings from their environment.
            os.environ.update({key: value for key, value in self.settings.to_env().items() if value})
        try:
            FlywheelTrainer(overrides=self._options(home, data), settings=self.settings).train()
        except Exception as error:
            told = home / "failure.json"
            if told.is_file():
                raise TrainError(**read_json(told)) from error
            failure = explain(error, self.candidate.batch, self.candidate.imgsz)
            if failure is None:
                raise
            raise failure from error

    def _options(self, home: Path, data: Path) -> dict[str, Any]:
        base = {
            "model": self.base.architecture or str(self.base.checkpoint),
            "pretrained": str(self.base.checkpoint) if self.base.checkpoint and self.base.architecture else True,
        }
        if self.base.checkpoint is None:
            base["pretrained"] = False
        fixed = {
            "data": str(data),
            "project": str(home.resolve()),
            "name": "run",
            "exist_ok": True,
            "device": self.device,
            "seed": self.seed,
            "workers": self._workers(),
            "plots": False,
            "verbose": False,
            "deterministic": True,
        }
        plain = {key: getattr(self.candidate, key) for key in ("epochs", "imgsz", "batch", "patience")}
        return {**base, **plain, **self.candidate.options, **fixed}

    def _workers(self) -> int:
        """Loader processes: none on the CPU; on GPUs as many as processors and shared memory bear."""
        if not self.device[0].isdigit():
            return 0
        share = granted_cpus().threads // len(self.device.split(","))
        batch = self.candidate.batch * _BYTES_A_PIXEL * self.candidate.imgsz**2
        shared = Path("/dev/shm")  # noqa: S108 - the loader's own place, nothing is written by us
        free = shutil.disk_usage(shared).free if shared.is_dir() else 0
        workers = min(_MAX_WORKERS, share, free // (2 * _PREFETCH * batch))
        if workers < min(_MAX_WORKERS, share):
            say(f"{shared} has {free >> 20} MiB free, so {workers} loader processes; mount a memory volume there")
        return int(workers)

    def _fits_memory(self) -> bool:
        frames = self.data.frames["train"] + self.data.frames["val"]
        return frames * _BYTES_A_PIXEL * self.candidate.imgsz**2 * _RAM_SHARE < _free_memory()

    def _finish(self, blank: TrainResult, keeper: StateKeeper, out: Path, mlflow_run: str) -> TrainResult:
        state = keeper.load()
        if state is None:
            raise IntegrityError(f"{keeper.folder}/state.pt is gone", "Run the step again.")
        best = state["best_metrics"]
        result = replace(
            blank,
            status="ok",
            reason="" if state["val_boxes"] else "val holds no box, so its mAP is 0 and the last epoch was taken",
            map50_95=best["map50_95"],
            map50=best["map50"],
            epochs_run=state["epoch"] + 1,
            seconds=round(state["seconds"], 1),
            run_id=mlflow_run,
        )
        files = keeper.folder / "finished"
        write_bytes(files / "checkpoint.pt", state["checkpoint"].numpy().tobytes())
        write_bytes(files / "results.csv", state["csv"].encode())
        keeper.finish(files, result.metadata())
        say(f"candidate {blank.name}: val mAP50-95 {result.map50_95:.3f} after {result.epochs_run} epochs")
        return _write(result, files, out)


def _free_memory() -> int:
    """Bytes that this process may still take: the machine's free memory, or less under a container's limit."""
    import psutil

    free = int(psutil.virtual_memory().available)
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):
            continue
    return free
