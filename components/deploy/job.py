"""One model on its way into one InferenceService: what every strategy needs to know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from haechi.components.shared.model_folder import ModelFolder
from haechi.components.shared.parity import Agreement

from .credential import Credential
from .endpoint import Endpoint, check_golden_at
from .inference_service import TAG_ROUTING, Patience, bare, manifest, own_name, persist, wait
from .kserve_settings import MODE
from .kubernetes_api import InferenceServiceApi
from .lease import Lease
from .readiness import look, storage_uri
from .rollout import Rollout
from .rollout_state import RolloutState, now

__all__ = ["Job"]

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Job:
    """A model, where it goes, and how.

    Attributes:
        api: the service.
        lease: held as long as the job lasts.
        model, folder: the model folder, whose golden images are asked for.
        uri: its `storageUri`.
        rollout, patience: the settings.
        credential: what runtimes know us by.
    """

    api: InferenceServiceApi
    lease: Lease
    model: ModelFolder
    folder: Path
    uri: str
    rollout: Rollout
    patience: Patience
    credential: Credential = field(default_factory=Credential)

    def state(self, phase: str, strategy: str, **more: Any) -> RolloutState:
        """The rollout of this job in a phase that begins now."""
        return RolloutState(phase, strategy, self.model.version, self.uri, owner=self.lease.holder, since=now(), **more)

    def wanted(self) -> dict[str, Any]:
        """The service with this model and nothing else."""
        return manifest(self.api.namespace, self.api.name, self.model, self.uri)

    def apply(self, body: dict[str, Any], state: RolloutState) -> None:
        """Apply our part of the service together with how far we are; an API server that is away is tried again."""
        self.lease.renew()
        notes = {**body["metadata"].get("annotations", {}), **state.to_annotation()}
        self.persist(lambda: self.api.apply({**body, "metadata": {**body["metadata"], "annotations": notes}}))

    def persist(self, work: Callable[[], _Result]) -> _Result:
        """Call the API, and try again where it is away, for a while."""
        return persist(work, self.patience, self.lease.renew)

    def restore(self, found: dict[str, Any], failed: RolloutState) -> None:
        """Put the former model back in place and wait until it serves; what serves goes on until then.

        Args:
            found: the service as it is. The predictor keeps its name: by another one it would be another Deployment, and
                KServe takes away what the spec no longer names before anything else is up.
            failed: the state to end in; it names the former model and the reason.
        """
        former, meta = failed.former, found["metadata"]
        version = former.rstrip("/").rsplit("/", 1)[-1]
        model = (meta.get("labels") or {}).get("app.kubernetes.io/name", self.model.name)
        body = bare(self.api.namespace, self.api.name, model, version, former)
        notes = meta.get("annotations") or {}
        body["metadata"]["annotations"] = {key: notes[key] for key in (MODE, TAG_ROUTING) if key in notes}
        body["spec"]["predictor"] |= own_name(found["spec"]["predictor"])
        self.apply(body, replace(failed, phase="back", since=now()))
        wait(
            self.api,
            self.patience,
            lambda seen: look(seen, "", self.api.deployment) if storage_uri(seen) == former else None,
            former,
            self.lease.renew,
        )
        self.apply(body, failed)

    def ask(self, service: str, name: str = "") -> Agreement:
        """Ask a predictor's Service for the golden images; raises where it gives other boxes, or none."""
        return check_golden_at(self.endpoint(service, name), self.folder, self.model.version, self.lease.renew)

    def endpoint(self, service: str, model: str = "") -> Endpoint:
        """A predictor's Service; it serves under the InferenceService's name."""
        settle = min(30.0, self.patience.timeout / 10)
        url = self.rollout.url(self.api.namespace, service)
        return Endpoint(url, model or self.api.name, settle, self.credential)
