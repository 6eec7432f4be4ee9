"""Let a deploy target serve another model, and let nobody else change it meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from haechi.components.shared.model_folder import ModelFolder
from haechi.components.shared.storage import Store

from .credential import Credential
from .directory import place
from .git_target import commit
from .inference_service import Patience
from .job import Job
from .kubernetes_api import InferenceServiceApi
from .lease import Lease
from .publish import model_prefix
from .rollout import Rollout
from .swap import swap
from .target import Target

__all__ = ["Switch", "held"]

# A stored model's description and its folder here.
Switch = Callable[[ModelFolder, Path], None]


@contextmanager
def held(
    target: Target,
    store: Store,
    owner: str,
    rollout: Rollout,
    patience: Patience,
    evidence: Mapping[str, str],
    take_over: bool = False,
) -> Iterator[Switch]:
    """Hold a target for the duration of the block, and yield what switches it.

    The block should end with what must agree with the target (the alias in MLflow): until then nobody else deploys.

    Args:
        target: where to.
        store: where the models lie.
        owner: who we are, for others to read.
        rollout, patience: the settings for `kserve`.
        evidence: what is told of the model in the message of a commit, for `git`.
        take_over: take the target from whoever holds it.

    Raises:
        Busy: another deploy holds it.
        DeployError, DeployRefused, StorageError, IntegrityError, InputError: from the switch, as the target has them.
    """
    if target.kind != "kserve":
        yield lambda model, folder: _switch(target, store, model, {**evidence, "Deployed-by": owner})
        return
    api = InferenceServiceApi(target.namespace, target.name)
    credential = Credential(Path(store.settings.endpoint_credentials))
    with Lease(api, owner, patience.lease, take_over) as lease:

        def switch(model: ModelFolder, folder: Path) -> None:
            uri = store.uri(model_prefix(model.name, model.version)).rstrip("/")
            swap(Job(api, lease, model, folder, uri, rollout, patience, credential))

        yield switch


def _switch(target: Target, store: Store, model: ModelFolder, evidence: Mapping[str, str]) -> None:
    prefix = model_prefix(model.name, model.version)
    if target.kind == "dir":
        place(Path(target.path), store, prefix, model)
    elif target.kind == "git":
        uri, credentials = store.uri(prefix).rstrip("/"), Path(store.settings.git_credentials)
        commit(target.repository, target.branch, target.path, model, uri, evidence, credentials)
