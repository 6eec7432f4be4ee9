"""The target `dir:/abs/path`: `versions/<version>/` is a complete copy, `current` a symlink that is swapped at once."""

from __future__ import annotations

from pathlib import Path

from haechi.components.shared.errors import InputError, IntegrityError, ModelError, StorageError
from haechi.components.shared.files import atomic_folder
from haechi.components.shared.model_folder import ModelFolder
from haechi.components.shared.progress import say
from haechi.components.shared.storage import Store

__all__ = ["place"]


def place(root: Path, store: Store, prefix: str, model: ModelFolder) -> Path:
    """Copy the stored model folder under `root` and let `current` name it.

    A reader that opens `<root>/current/` sees the old folder or the new one, never a mixture; versions stay, so that
    going back is one symlink.

    Args:
        root: absolute folder; made where it is missing.
        store: where the folder is copied from.
        prefix: its key prefix.
        model: its description.

    Returns:
        `<root>/versions/<version>`.

    Raises:
        InputError: `current` is there and is no symlink.
        IntegrityError: `versions/<version>` holds other files.
        StorageError: the folder cannot be written (rights, full disk).
    """
    folder, link = root / "versions" / model.version, root / "current"
    if link.exists() and not link.is_symlink():
        raise InputError(f"{link} is not a symlink", "Move it away, or name another folder as the deploy target.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _copy(folder, store, prefix, model)
        _point(link, f"versions/{model.version}")
    except OSError as error:
        raise StorageError(
            f"cannot write {error.filename or root}: {error.strerror or error}",
            "Give this user the right to write there, or free disk space.",
        ) from error
    say(f"{link} names versions/{model.version}")
    return folder


def _copy(folder: Path, store: Store, prefix: str, model: ModelFolder) -> None:
    if folder.exists():
        _check(folder, model)
        return
    with atomic_folder(folder) as partial:
        store.get_folder(prefix, partial)
        _check(partial, model)


def _check(folder: Path, model: ModelFolder) -> None:
    try:
        same = ModelFolder.load(folder).onnx_sha256 == model.onnx_sha256
    except (ModelError, IntegrityError):
        same = False
    if not same:
        raise IntegrityError(f"{folder} does not hold model {model.version}", "Remove that folder and deploy again.")


def _point(link: Path, to: str) -> None:
    # A relative target stays right when the folder is mounted somewhere else.
    following = link.with_name(".current.next")
    following.unlink(missing_ok=True)
    following.symlink_to(to)
    following.replace(link)
