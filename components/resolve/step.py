"""Pin the world for one run: the champion's version and the previous dataset's digest, looked up once, at the start.

Every later step gets these two strings, so that a promotion in the middle of a run cannot change what the run compares
with; deploy refuses where the champion changed meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass

from haechi.components.shared.dataset import latest_dataset
from haechi.components.shared.errors import IntegrityError
from haechi.components.shared.files import check_name
from haechi.components.shared.progress import say
from haechi.components.shared.settings import Settings
from haechi.components.shared.storage import Store
from haechi.components.shared.tracking import VERSION_TAG, RegisteredVersion, Tracker

__all__ = ["Resolved", "resolve"]


@dataclass(frozen=True)
class Resolved:
    """What a run starts from.

    Attributes:
        champion: model version (12 hex digits) that alias `champion` names, or empty.
        previous_dataset: digest of the newest complete dataset, or empty.
    """

    champion: str
    previous_dataset: str


def resolve(name: str, settings: Settings) -> Resolved:
    """Look up the champion and the previous dataset.

    The store and MLflow are both asked, so that a missing bucket, wrong credentials or a server that is away are told
    here, before an hour of work.

    Args:
        name: registered model and dataset name.
        settings: the object store and MLflow.

    Raises:
        InputError: `name` is not kebab-case.
        StorageError, TrackingError: a service cannot be reached or refuses us.
        IntegrityError: the alias names a version whose model folder is not in the store.
    """
    check_name(name)
    store, tracker = Store(settings), Tracker(settings)
    store.check()
    found = tracker.alias(name, "champion")
    champion = _stored_version(store, name, found) if found else ""
    dataset = latest_dataset(store, name)
    say(f"champion of {name}: {champion or 'none yet'}; previous dataset: {dataset[:12] or 'none yet'}")
    return Resolved(champion, dataset)


def _stored_version(store: Store, name: str, found: RegisteredVersion) -> str:
    if not found.version:
        raise IntegrityError(
            f"alias 'champion' of model {name!r} names MLflow's version {found.number}, which has no tag {VERSION_TAG}",
            "Move the alias to a version that Haechi registered, or remove it.",
        )
    key = f"models/{name}/{found.version}/model.json"
    if not store.exists(key):
        raise IntegrityError(
            f"alias 'champion' of model {name!r} names {found.version}, but {store.uri(key)} does not exist",
            "Restore that folder, check HAECHI_BUCKET, or move the alias in MLflow to a version that is stored.",
        )
    return found.version
