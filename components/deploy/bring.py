"""A stored model to a target without a pipeline: what `haechi promote`, `haechi rollback` and the reconciler do."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from haechi.components.shared.errors import InputError, IntegrityError
from haechi.components.shared.model_folder import ModelFolder, fetch_model, model_cache
from haechi.components.shared.settings import Settings
from haechi.components.shared.storage import Store
from haechi.components.shared.tracking import RegisteredVersion, Tracker

from .inference_service import Patience
from .publish import model_prefix
from .rollout import Rollout
from .switch import held
from .target import Target
from .verdict import check_proven

__all__ = ["Bringer", "find_version"]

_VERSION = re.compile(r"[0-9a-f]{12}")


@dataclass(frozen=True)
class Bringer:
    """Who brings models where.

    Attributes:
        settings: the object store and MLflow.
        target: where to.
        owner: who we are, for others to read.
        rollout, patience: the settings for `kserve`.
    """

    settings: Settings
    target: Target
    owner: str
    rollout: Rollout
    patience: Patience

    def bring(
        self,
        name: str,
        registered: RegisteredVersion,
        still: Callable[[], bool] = lambda: True,
        then: Callable[[], None] = lambda: None,
        evidence: Mapping[str, str] | None = None,
        take_over: bool = False,
    ) -> bool:
        """Let the target serve a registered model, through the same checks as a pipeline's deploy.

        Args:
            name: registered model's name.
            registered: its version.
            still: asked once the target is held: whether this is still wanted.
            then: done before the target is let go.
            evidence: for the message of a commit.
            take_over: take the target from whoever holds it.

        Returns:
            Whether it was still wanted.

        Raises:
            InputError: it is no version of ours.
            ModelError, IntegrityError, StorageError: the model folder is not there, damaged, or another model's.
            DeployRefused: nothing proves its export.
            DeployError, DeployRefused: the target did not take it; the former model serves.
        """
        if not _VERSION.fullmatch(registered.version):
            raise InputError(
                f"MLflow's version {registered.number} of {name!r} has a tag haechi.version that is no version of ours",
                "Let another version be champion.",
            )
        store = Store(self.settings)
        with model_cache(self.settings) as cache:
            folder = fetch_model(store, store.uri(model_prefix(name, registered.version)), cache)
            model = ModelFolder.load(folder)
            if (model.name, model.version) != (name, registered.version):
                raise IntegrityError(
                    f"the folder of {name} {registered.version} in the store holds {model.name} {model.version}",
                    "Delete that folder, and deploy or export that model again.",
                )
            check_proven(folder)
            told = {"Verdict": registered.tags.get("haechi.verdict", ""), **(evidence or {})}
            with held(self.target, store, self.owner, self.rollout, self.patience, told, take_over) as switch:
                if not still():
                    return False
                switch(model, folder)
                then()
        return True


def find_version(tracker: Tracker, name: str, version: str) -> RegisteredVersion:
    """A registered version by Haechi's version or the beginning of it.

    Raises:
        InputError: there is none, or the beginning fits several.
    """
    known = [item for item in tracker.versions(name) if item.version]
    fits = {item.version: item for item in reversed(known) if version and item.version.startswith(version)}
    if len(fits) == 1:
        return next(iter(fits.values()))
    shown = ", ".join(item.version for item in known[-5:]) or "none at all"
    problem = "fits several versions" if fits else "is no version"
    raise InputError(f"{version!r} {problem} of model {name!r}", f"The last registered ones are: {shown}.")
