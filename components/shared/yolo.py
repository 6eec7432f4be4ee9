"""Ultralytics, kept quiet: offline, weights-only loading, its own logging and telemetry off, settings untouched.

Used by train and export, the only two rooms with torch. Nothing here is imported until it is called, so that the
other images, which have no torch, can hold this module.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from .cpus import granted_cpus
from .errors import ModelError

__all__ = ["load_detector", "tame"]

_ENVIRONMENT = {
    "YOLO_OFFLINE": "true",  # never look for a newer version, weights or data sets on the net
    "YOLO_AUTOINSTALL": "false",  # never run pip
    "YOLO_VERBOSE": "false",
    "ULTRALYTICS_SAFE_LOAD": "1",  # a checkpoint is a pickle: load tensors and known classes only
}
_INTEGRATIONS = ("sync", "clearml", "comet", "dvc", "mlflow", "raytune", "tensorboard", "wandb")


def tame(threads: int = 0, home: Path | None = None) -> Any:
    """Import Ultralytics so that it neither phones, installs, logs elsewhere nor touches the user's settings.

    The variables are also what a multi-GPU training's child processes inherit.

    Args:
        threads: compute threads for torch; 0 for as many as the CPUs that are granted bear.
        home: a writable folder for its settings and matplotlib's cache; a temporary one by default.

    Returns:
        The module `ultralytics`.
    """
    if "ultralytics" not in sys.modules:
        home = home or _own_folder()
        for name, folder in (("YOLO_CONFIG_DIR", home / "config"), ("MPLCONFIGDIR", home / "matplotlib")):
            folder.mkdir(parents=True, exist_ok=True)
            os.environ[name] = str(folder)
        # Its import would otherwise set one thread for the whole process when the variable is missing.
        os.environ.setdefault("OMP_NUM_THREADS", str(threads or granted_cpus().threads))
    os.environ.update(_ENVIRONMENT)
    package = importlib.import_module("ultralytics")
    utils = importlib.import_module("ultralytics.utils")
    # In memory only: SETTINGS.update would write the user's file if someone imported Ultralytics before us.
    dict.update(utils.SETTINGS, dict.fromkeys(_INTEGRATIONS, False))
    importlib.import_module("ultralytics.utils.events").events.enabled = False
    tasks: Any = importlib.import_module("ultralytics.nn.tasks")
    tasks.SAFE_LOAD = True  # read from the environment at its import, which may lie before us
    logging.getLogger("ultralytics").setLevel(logging.ERROR)
    torch = importlib.import_module("torch")
    torch.set_num_threads(threads or granted_cpus().threads)
    return package


def _own_folder() -> Path:
    """A folder that stays, so that matplotlib's fonts are listed once; a fresh one where another user took its name."""
    folder = Path(tempfile.gettempdir()) / f"haechi-ultralytics-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        return Path(tempfile.mkdtemp(prefix="haechi-ultralytics-"))
    return folder


def load_detector(path: Path) -> Any:
    """Load a detection checkpoint, weights-only, as a float32 `DetectionModel` in evaluation mode.

    Call `tame` first.

    Raises:
        ModelError: no such file, not an Ultralytics checkpoint, or one of another task.
    """
    if not path.is_file():
        raise ModelError(f"there is no checkpoint {path}", "Give the path of a .pt file on this machine.")
    if path.suffix != ".pt":
        raise ModelError(f"{path} does not end in .pt", "Give an Ultralytics checkpoint, such as best.pt.")
    tasks = importlib.import_module("ultralytics.nn.tasks")
    try:
        model, _ = tasks.load_checkpoint(path)
    # A damaged or hostile file comes out of the loader as one of many types; each means the same to us.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"{path} is not a checkpoint that can be loaded weights-only ({reason})",
            "Give a .pt file that Ultralytics 8.3 or later saved.",
        ) from error
    head = getattr(model, "model", [None])[-1]
    detects = isinstance(head, tasks.Detect) and not isinstance(head, tasks.Segment | tasks.Pose | tasks.OBB)
    if not (isinstance(model, tasks.DetectionModel) and detects):
        raise ModelError(
            f"{path} is a {type(model).__name__} with a {type(head).__name__} head, not a YOLO detector",
            "Give a detection checkpoint, such as one trained from yolo11n.pt.",
        )
    return model
