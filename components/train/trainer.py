"""Ultralytics' detection trainer with an exact resume, honest coverage, and failures that say what to do.

Ultralytics resumes from half-precision weights and without the state of its random numbers, so that a killed run ends
elsewhere than an undisturbed one. Here each epoch is seeded by itself, gradients never cross an epoch's end, and the
whole state is kept in full precision: a run that was killed and started again gives the same weights (bit for bit on
CPU with the same number of threads).
"""

from __future__ import annotations

import io
import math
import random
import time
from contextlib import redirect_stdout
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ultralytics.models.yolo.detect.train import DetectionTrainer
from ultralytics.utils import DEFAULT_CFG, DEFAULT_CFG_KEYS, RANK
from ultralytics.utils.torch_utils import unwrap_model

from ..shared.errors import HaechiError, TrainError
from ..shared.progress import Progress, say
from ..shared.settings import Settings
from ..shared.yolo import tame
from .coverage import CoverageDataset, CoverageValidator, coverage_criterion, read_covers
from .reporting import EpochReporter, metric_table
from .state import StateKeeper, TrainPlan, write_failure

__all__ = ["FlywheelTrainer", "explain"]

_PATHS = ("data", "model", "pretrained", "project", "name", "save_dir", "device", "workers", "cache")
_NO_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "cublas_status_alloc_failed",
    "cudnn_status_internal_error",
    "unable to find an engine",
    "std::bad_alloc",
)


def explain(error: BaseException, batch: int, imgsz: int) -> TrainError | None:
    """What a candidate's failure means and what to change; None for what is no candidate's fault: store and disk."""
    text = str(error).lower()
    if isinstance(error, TrainError):
        return error
    if isinstance(error, HaechiError | OSError):
        return None
    if isinstance(error, MemoryError) or any(sign in text for sign in _NO_MEMORY):
        return TrainError(
            f"out of memory at batch {batch}, imgsz {imgsz}",
            "Give a smaller batch, a smaller imgsz or a smaller model, or a machine with more memory.",
        )
    if isinstance(error, ValueError) and "gives batchnorm a single value" in text:
        return TrainError(
            f"the last batch of an epoch would hold one picture at imgsz {imgsz}", "Change batch, or enlarge imgsz."
        )
    if isinstance(error, RuntimeError) and "froze the entire model" in text:
        return TrainError("freeze leaves nothing to train", "Freeze fewer layers.")
    # Whatever else a network, a driver or Ultralytics raises must not end the other candidates' run.
    first = (str(error).strip() or "no message").splitlines()[0]
    return TrainError(f"training stopped with {type(error).__name__}: {first}", "The traceback is in this step's log.")


class FlywheelTrainer(DetectionTrainer):
    """One candidate's training in the folder `<save_dir>/..`, which holds `plan.json` and `state.pt`.

    What differs from Ultralytics: the epoch's seed, the step at an epoch's end, no automatic change of the batch after
    an out-of-memory, no second chance after NaN, no final validation (the best epoch was validated already), and what
    `coverage` does. Instances are also made by Ultralytics' multi-GPU launcher, from the class and its options alone.

    Args:
        settings: of object store and MLflow; from the environment by default.
    """

    accumulate: int

    def __init__(
        self,
        cfg: Any = DEFAULT_CFG,
        overrides: dict[str, Any] | None = None,
        _callbacks: Any = None,
        settings: Settings | None = None,
    ) -> None:
        super().__init__(cfg, overrides, _callbacks)
        self.settings = settings or Settings.from_env()
        self.home = Path(self.save_dir).parent
        self.plan = TrainPlan.read(self.home)
        # select_device has just set a thread count of its own.
        tame(self.plan.threads)
        self.keeper = StateKeeper(self.home, self.settings, self.plan.key, self.plan.upload_every)
        self.reporter = EpochReporter(self.settings, self.plan.mlflow_run if RANK in (-1, 0) else "")
        self.train_loader: Any = None
        self.best_weights: dict[str, torch.Tensor] = {}
        self.best_metrics: dict[str, float] = {}
        self._nominal, self._pending, self._batch = 1, 0, 0
        self._earlier_seconds, self._epoch_start = 0.0, time.monotonic()

    def _do_train(self) -> None:
        self._began = time.monotonic()
        try:
            super()._do_train()
        except Exception as error:
            failure = explain(error, int(self.args.batch), int(self.args.imgsz))
            if failure is None:
                raise
            if RANK in (-1, 0):
                write_failure(self.home, failure.problem, failure.remedy)
            raise failure from error

    # ---- data

    def build_dataset(self, img_path: str, mode: str = "train", batch: int | None = None) -> CoverageDataset:
        """The dataset of one split, with coverage."""
        names = self.data["names"]
        training = mode == "train"
        # Reading pictures into memory draws a progress bar on standard output, which belongs to the verbs.
        with redirect_stdout(io.StringIO()):
            return CoverageDataset(
                covers=read_covers(Path(self.plan.covers), [names[index] for index in sorted(names)]),
                img_path=img_path,
                imgsz=self.args.imgsz,
                batch_size=batch,
                augment=training,
                hyp=self.args,
                rect=not training,
                cache="ram" if self.plan.cache else None,
                stride=max(int(unwrap_model(self.model).stride.max()), 32),
                pad=0.0 if training else 0.5,
                data=self.data,
                task="detect",
            )

    def get_validator(self) -> CoverageValidator:
        """The validator that respects coverage."""
        return CoverageValidator(
            self.test_loader, save_dir=self.save_dir, args=deepcopy(self.args), _callbacks=self.callbacks
        )

    def _build_train_pipeline(self) -> None:
        if self.train_loader is not None:
            # Ultralytics comes here again to halve the batch; the result would then depend on the machine.
            raise MemoryError
        super()._build_train_pipeline()
        # The loop must offer every batch; when to step is decided in optimizer_step.
        self._nominal, self.accumulate = self.accumulate, 1

    def set_class_weights(self) -> None:
        """Class weights, and the criterion, which must exist before the moving average copies the model."""
        super().set_class_weights()
        if self.train_loader.dataset.partial or self.test_loader.dataset.partial:
            model = unwrap_model(self.model)
            model.criterion = coverage_criterion(model)

    # ---- one epoch

    def _model_train(self) -> None:
        """Called at the start of every epoch: seed it."""
        super()._model_train()
        self._pending = self._batch = 0
        self._epoch_start = time.monotonic()
        self._progress = Progress(f"batches of epoch {self.epoch + 1}", len(self.train_loader), every=20.0)
        seed = int(np.random.SeedSequence([self.plan.seed, self.epoch, RANK + 1]).generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        self.train_loader.generator.manual_seed(seed)
        self.train_loader.dataset.begin_epoch()
        # Workers hold the dataset as it was when they began; a fresh iterator starts them anew.
        self.train_loader.reset()

    def optimizer_step(self) -> None:
        """Step once enough batches are gathered, and at the end of the epoch, so that no gradient is carried over."""
        self._pending += 1
        self._batch += 1
        self._progress.step()
        if self._pending < self._accumulation() and self._batch < len(self.train_loader):
            return
        self._pending = 0
        super().optimizer_step()

    def _accumulation(self) -> int:
        """Batches a step: rises from 1 to the nominal number during warm-up, as in Ultralytics."""
        batches = len(self.train_loader)
        warmup = self._get_warmup_iterations(batches)
        done = self.epoch * batches + self._batch - 1
        if done > warmup or not warmup:
            return self._nominal
        return max(1, round(float(np.interp(done, [0, warmup], [1, self._nominal]))))

    def _handle_nan_recovery(self, epoch: int) -> bool:
        losses = [float(value.detach()) for value in (self.tloss or {}).values()] + [float(self.loss.detach())]
        if all(map(math.isfinite, losses)) and (self.fitness is None or math.isfinite(self.fitness)):
            return False
        raise TrainError(
            f"the loss became NaN or infinite in epoch {epoch + 1}",
            "Give a smaller lr0, more warmup_epochs, or amp false; check the labels.",
        )

    def final_eval(self) -> None:
        """Nothing: the best epoch's weights were validated when they were made."""

    # ---- state

    def save_model(self) -> bool:
        """Keep the best checkpoint and the whole state; say and log the epoch."""
        if self.best_fitness == self.fitness:
            self.best_weights = self._average()
            metrics = metric_table(self.metrics)
            self.best_metrics = {
                "map50_95": metrics["val/mAP50-95"],
                "map50": metrics["val/mAP50"],
                "epoch": self.epoch + 1,
            }
        if self.stop or self.keeper.due():
            self.keeper.save(self._state())
        self._tell()
        return True

    def _average(self) -> dict[str, torch.Tensor]:
        """The moving average of the weights in half precision, as checkpoints hold them."""
        weights = {
            key: (value.half() if value.is_floating_point() else value).to("cpu", copy=True).contiguous()
            for key, value in self.ema.ema.state_dict().items()
        }
        if not all(bool(torch.isfinite(value).all()) for value in weights.values()):
            raise TrainError(f"weights became NaN or infinite in epoch {self.epoch + 1}", "Give a smaller lr0.")
        return weights

    def _checkpoint(self) -> bytes:
        """The best epoch as an Ultralytics checkpoint, without paths, dates and other marks of this machine."""
        options = {k: v for k, v in vars(self.args).items() if k in DEFAULT_CFG_KEYS and k not in _PATHS}
        ema = deepcopy(self.ema.ema).half().to("cpu", memory_format=torch.contiguous_format)
        ema.load_state_dict(self.best_weights)
        ema.criterion, ema.args, ema.pt_path = None, options, None
        for parameter in ema.parameters():
            parameter.requires_grad = False
        buffer = io.BytesIO()
        entry = {"epoch": -1, "model": ema, "ema": None, "train_args": options, "version": _version()}
        torch.save(entry | {"date": None, "license": "AGPL-3.0 (https://ultralytics.com/license)"}, buffer)
        return buffer.getvalue()

    def _state(self) -> dict[str, Any]:
        criterion = getattr(unwrap_model(self.model), "criterion", None)
        return {
            "epoch": self.epoch,
            "stop": bool(self.stop),
            "model": unwrap_model(self.model).state_dict(),
            "ema": self.ema.ema.state_dict(),
            "updates": self.ema.updates,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "stopper": [float(self.stopper.best_fitness), int(self.stopper.best_epoch), self.stopper.possible_stop],
            "best_fitness": self.best_fitness,
            "criterion_updates": getattr(criterion, "updates", 0),
            "csv": self.csv.read_text(encoding="utf-8"),
            "best": self.best_weights,
            "checkpoint": torch.frombuffer(bytearray(self._checkpoint() if self.stop else b"-"), dtype=torch.uint8),
            "best_metrics": self.best_metrics,
            "val_boxes": int(sum(len(label["cls"]) for label in self.test_loader.dataset.labels)),
            "seconds": self._earlier_seconds + time.monotonic() - self._began,
        }

    def resume_training(self, ckpt: Any) -> None:
        """Take up the state of a killed training, if there is one."""
        state = self.keeper.load()
        if state is None:
            return
        model = unwrap_model(self.model)
        model.load_state_dict(state["model"])
        self.ema.ema.load_state_dict(state["ema"])
        self.ema.updates = state["updates"]
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.stopper.best_fitness, self.stopper.best_epoch, self.stopper.possible_stop = state["stopper"]
        self.best_fitness = state["best_fitness"]
        if getattr(model.model[-1], "one2one_cv2", None) is not None and state["criterion_updates"]:
            # YOLO26's loss shifts its weights from the one branch to the other with each epoch.
            model.criterion = getattr(model, "criterion", None) or model.init_criterion()
            model.criterion.updates = state["criterion_updates"] - 1
            model.criterion.update()
        self.csv.write_text(state["csv"], encoding="utf-8")
        self.best_weights, self.best_metrics = state["best"], state["best_metrics"]
        self._earlier_seconds = state["seconds"]
        self.start_epoch = state["epoch"] + 1
        say(f"resumed after epoch {self.start_epoch} of {self.epochs}")

    def _tell(self) -> None:
        losses: dict[str, float] = self.label_loss_items(self.tloss)
        table = metric_table({**losses, **self.metrics, **self.lr})
        self.reporter.log(table, self.epoch + 1)
        loss = ", ".join(
            f"{key.removeprefix('train/').removesuffix('_loss')} {value:.3f}" for key, value in losses.items()
        )
        say(
            f"epoch {self.epoch + 1}/{self.epochs}: loss {loss}; val mAP50 {table['val/mAP50']:.3f}, "
            f"mAP50-95 {table['val/mAP50-95']:.3f} ({time.monotonic() - self._epoch_start:.1f} s)"
        )


def _version() -> str:
    from ultralytics import __version__

    return str(__version__)
