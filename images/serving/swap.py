"""Hot swap: another model in the folder is proven beside the one that serves, and takes its place at once.

A look compares stamps of the files that matter. `current` pointing elsewhere, a folder put in place by a rename and
files written over are all the same to it: the stamp is another. What is still being written is left alone until two
looks see the same, and what changed while it was read is never served.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from haechi.components.shared.errors import HaechiError, InputError, IntegrityError, LoadRefused, ModelError
from haechi.components.shared.model_folder import ModelFolder
from haechi.components.shared.progress import say

from .engine import Engine, Models

__all__ = ["Swap", "Swapper"]

_TRIES = 5  # of the first load, where the folder changes under it
_Result = TypeVar("_Result")


class Swap(StrEnum):
    """How a look at another model ended, as metrics name it."""

    SWAPPED = "swapped"
    REFUSED = "refused"


@dataclass(frozen=True)
class _Stamp:
    """What a folder looked like: where it really is, and name, inode, size and times of the files that matter."""

    folder: Path
    files: tuple[tuple[str, int, int, int, int], ...]


class _Moved(Exception):
    """The folder changed while it was read."""


class Swapper:
    """Keeps one served model equal to what its folder holds.

    Args:
        models: where the engine is put.
        name: what clients call the model.
        folder: the model folder, or a symlink to it.
        open_engine: makes the proven engine of a folder and its description; called in a thread.
        seconds: between looks.
        allow_unverified: take folders without golden images.
        any_name: take a model that is called otherwise in its description, since `name` was chosen by the operator.
        on_swap: told of each end (outcome, version or empty where it cannot be read); on the loop, must not raise.
    """

    def __init__(
        self,
        models: Models,
        name: str,
        folder: Path,
        open_engine: Callable[[Path, ModelFolder], Engine],
        seconds: float = 1.0,
        allow_unverified: bool = False,
        any_name: bool = True,
        on_swap: Callable[[Swap, str], None] | None = None,
    ) -> None:
        self.name = name
        self._models = models
        self._folder = folder
        self._open_engine = open_engine
        self._seconds = seconds
        self._allow_unverified = allow_unverified
        self._any_name = any_name
        self._on_swap = on_swap
        # One thread for all loads: more would each keep an arena of freed memory.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="swap")
        self._busy = asyncio.Lock()
        self._tried: _Stamp | None = None
        self._refusal = ""

    async def first(self) -> ModelFolder:
        """Load the model that the process starts with.

        Returns:
            Its description.

        Raises:
            ModelError, IntegrityError: it is unusable, unproven, or gives other boxes than its golden ones.
        """
        for _ in range(_TRIES):
            # No stamp where a file is missing: the load says which.
            stamp = await self._in_thread(_stamp, self._folder) or _Stamp(self._folder, ())
            try:
                engine = await self._in_thread(self._open, stamp)
            except _Moved:
                continue
            self._tried = stamp
            self._models.put(self.name, engine)
            return engine.model
        raise ModelError(f"{self._folder} changes all the time", "Start when it has been written.")

    async def watch(self) -> None:
        """Look again and again, until cancelled; nothing that the folder holds ends it."""
        last: _Stamp | None = None
        while True:
            await asyncio.sleep(self._seconds)
            seen = await self._in_thread(_stamp, self._folder)
            # Missing for a moment is no error; changed since the last look is still being written.
            if seen is not None and seen == last and seen != self._tried:
                try:
                    await self._take(seen)
                except LoadRefused as refusal:
                    await self._in_thread(say, str(refusal))
                except _Moved:
                    pass
            last = seen

    async def load(self, name: str, with_parameters: bool = False) -> str:
        """Look now, also at what was refused before.

        Args:
            name: of the model.
            with_parameters: whether the caller sends a configuration or files along, which is refused.

        Returns:
            The version that is served from now on.

        Raises:
            InputError: there are parameters.
            NotFoundError: no such model.
            LoadRefused: the folder's content was not taken, and why; the former model goes on.
        """
        if with_parameters:
            raise InputError(
                "a model cannot be sent along", "Put it into the model folder, and load without parameters."
            )
        former = self._models.find(name).model.version
        stamp = await self._in_thread(_stamp, self._folder)
        try:
            if stamp is None:
                raise LoadRefused(f"{self._folder} is no complete model folder", f"Model {former} goes on serving.")
            await self._take(stamp, again=True)
        except _Moved:
            raise LoadRefused(
                f"{self._folder} changed while it was read", "Load it when it has been written."
            ) from None
        return self._models.find(name).model.version

    def index(self) -> list[dict[str, Any]]:
        """The models as the repository extension lists them: name, version, state and reason."""
        engine = self._models.get(self.name)
        state = "READY" if engine else "LOADING"
        version = engine.model.version if engine else ""
        return [{"name": self.name, "version": version, "state": state, "reason": self._refusal}]

    def unload(self, name: str) -> None:
        """Refuse: a process has one model, and is ended rather than left without.

        Raises:
            NotFoundError: no such model.
            InputError: the reason.
        """
        self._models.find(name)
        raise InputError(f"{name} is the only model here", "End the process instead, or load another version.")

    def close(self) -> None:
        """Let the thread go; a load that runs is waited for."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    async def _take(self, stamp: _Stamp, again: bool = False) -> None:
        """Serve what bears this stamp, unless it is what is served already."""
        async with self._busy:
            if stamp == self._tried and not (again and self._refusal):
                return
            try:
                engine = await self._in_thread(self._open, stamp)
            except _Moved:
                raise
            # Engines raise classes of their own for broken graphs, and none of them may end the watch.
            except Exception as error:
                raise await self._refused(stamp, error) from error
            self._tried, self._refusal = stamp, ""
            former = self._models.find(self.name)
            if engine is former:
                return
            self._models.put(self.name, engine)
            self._tell(Swap.SWAPPED, engine.model.version)
            told = f"{self.name} {engine.model.version} is served from now on, after {former.model.version}"
            await self._in_thread(say, told)  # where nobody reads our log, the loop must not wait for it

    async def _refused(self, stamp: _Stamp, error: Exception) -> LoadRefused:
        former = self._models.find(self.name).model.version
        self._tried, self._refusal = stamp, f"refused: {error}"
        self._tell(Swap.REFUSED, await self._in_thread(_version, stamp.folder))
        return LoadRefused(f"what {self._folder} holds now is refused: {error}", f"Model {former} goes on serving.")

    def _tell(self, outcome: Swap, version: str) -> None:
        if self._on_swap:
            self._on_swap(outcome, version)

    def _open(self, stamp: _Stamp) -> Engine:
        """The proven engine of what bears this stamp, or the one that serves it already; in the thread."""
        former = self._models.get(self.name)
        try:
            model = ModelFolder.load(stamp.folder)
            if former and model == former.model:
                return former
            self._check(model)
            engine = self._open_engine(stamp.folder, model)
        except Exception:
            _still(stamp)  # half-written is no verdict
            raise
        _still(stamp)
        return engine

    def _check(self, model: ModelFolder) -> None:
        if not model.golden and not self._allow_unverified:
            raise ModelError(
                f"{self._folder} has no golden images, so nothing proves that it gives the right boxes here",
                "Export it with `--images` or `--data`, or serve it with --allow-unverified.",
            )
        if model.name != self.name and not self._any_name:
            raise IntegrityError(
                f"{self._folder} holds model {model.name} now, not {self.name}", "Restart, or serve it under a --name."
            )

    async def _in_thread(self, work: Callable[..., _Result], *values: object) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *values)


def _stamp(folder: Path) -> _Stamp | None:
    """None where the description or the graph is missing."""
    try:
        real = folder.resolve()
        golden = sorted((real / "golden").iterdir()) if (real / "golden").is_dir() else []
        files = [(path, path.stat()) for path in (real / "model.json", real / "model.onnx", *golden)]
    except (OSError, RuntimeError):  # the latter of a symlink that leads to itself
        return None
    # The time of change too: tools that copy times with the files leave the time of modification as it was.
    return _Stamp(real, tuple((at.name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for at, s in files))


def _still(stamp: _Stamp) -> None:
    if stamp.files and _stamp(stamp.folder) != stamp:
        raise _Moved


def _version(folder: Path) -> str:
    try:
        return ModelFolder.load(folder, verify=False).version
    except HaechiError:
        return ""
