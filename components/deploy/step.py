"""Deploy a promoted challenger, or record a refused one. Every act can be repeated: a killed step ends the same.

The order is what makes that true: the model folder is stored first (its marker last), then MLflow knows the version as
`challenger`, then the target switches, and only when that works does the alias `champion` move.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from haechi.components.shared.errors import InputError
from haechi.components.shared.files import write_json
from haechi.components.shared.model_folder import ModelFolder, fetch_model
from haechi.components.shared.progress import say
from haechi.components.shared.settings import Settings
from haechi.components.shared.storage import Store
from haechi.components.shared.tracking import Tracker

from .inference_service import Patience
from .publish import publish
from .registry import check_champion, crown, record
from .rollout import Rollout
from .switch import held
from .target import Target
from .verdict import Verdict, check_about, check_allows

__all__ = ["DeployResult", "deploy", "refuse"]


@dataclass(frozen=True)
class DeployResult:
    """What `deployed.json` holds.

    Attributes:
        model, version: registered model's name and Haechi's version.
        uri: `s3://<bucket>/models/<name>/<version>/`.
        target: as given.
        registered_version: MLflow's number.
        previous: the champion before, or empty.
    """

    model: str
    version: str
    uri: str
    target: str
    registered_version: int
    previous: str


def deploy(
    onnx_model: Path,
    verdict: Path,
    report: Path,
    name: str,
    champion: str,
    target: str,
    run_id: str,
    out: Path,
    settings: Settings,
    rollout: Mapping[str, Any] | None = None,
    patience: Patience | None = None,
) -> DeployResult:
    """Store the model, register it, switch the target, and make it the champion, in that order.

    Args:
        onnx_model: model folder.
        verdict: folder with `verdict.json` and `scorecard.json`.
        report: the evaluation's HTML page.
        name: registered model's name.
        champion: the version that the challenger was compared with, or empty.
        target: `none`, `dir:/abs/path`, `kserve:<namespace>/<name>` or `git:<repository>#<branch>:<path>`.
        run_id: the pipeline run's id, or empty.
        out: folder for `deployed.json`.
        settings: the object store and MLflow.
        rollout: steps and limits of a rollout on KServe, where they differ from `Rollout`'s defaults.
        patience: how long to wait for an InferenceService.

    Raises:
        DeployRefused: the verdict is not `promote`, is about another model, parity is not proven, the champion
            changed since `champion` was pinned, another deploy is under way, or the cluster has no such rollout.
        InputError: the target, the verdict or the name cannot be used.
        ModelError, IntegrityError: the model folder is unusable, or another one stands at its place.
        DeployError: Kubernetes refused, or the service did not become ready; the previous model was put back.
        StorageError, TrackingError: a service cannot be reached or refuses us.
    """
    place_to, how = Target.parse(target), Rollout.parse(rollout or {})
    model, judged = _load(onnx_model), Verdict.load(verdict)
    check_about(judged, model, name)
    check_allows(judged, champion, onnx_model)
    store, tracker = Store(settings), Tracker(settings)
    store.check()
    check_champion(tracker, name, champion, model.version)
    uri = publish(store, model, onnx_model, report)
    registered = record(tracker, model, judged, uri, run_id, report.read_text(encoding="utf-8"))
    owner = f"run {run_id}" if run_id else f"deploy {uuid.uuid4().hex[:12]}"
    with held(place_to, store, owner, how, patience or Patience(), _evidence(judged)) as switch:
        # Copying took a while: look again just before traffic moves.
        check_champion(tracker, name, champion, model.version)
        switch(model, onnx_model)
        # A rollout takes its time: whom a person made champion meanwhile stays.
        check_champion(tracker, name, champion, model.version)
        crown(tracker, name, registered, champion)
    result = DeployResult(name, model.version, uri, target, registered.number, champion)
    write_json(out / "deployed.json", asdict(result))
    say(f"{name} {model.version} is the champion (MLflow's version {registered.number}), target {target or 'none'}")
    return result


def refuse(onnx_model: Path, verdict: Path, name: str, run_id: str, settings: Settings) -> str:
    """Record a challenger that was not promoted; the champion and the target stay as they are.

    Its folder is stored and registered with alias `challenger` and tag `haechi.verdict`, so that the dashboard shows
    it, and so that a person who moves the alias `champion` to it by hand finds it where `resolve` looks.

    Args:
        onnx_model, verdict, name, run_id, settings: as in `deploy`.

    Returns:
        The decision, `refuse` or `not_enough_data`.

    Raises:
        InputError: the verdict says promote, or cannot be read.
        DeployRefused: the verdict is about another model.
        ModelError, IntegrityError, StorageError, TrackingError: as in `deploy`.
    """
    model, judged = _load(onnx_model), Verdict.load(verdict)
    check_about(judged, model, name)
    if judged.decision == "promote":
        raise InputError("the verdict says promote, so there is nothing to refuse", "Call deploy.")
    store, tracker = Store(settings), Tracker(settings)
    store.check()
    champion = tracker.alias(name, "champion")
    if champion and champion.version == model.version:
        # Training gave the champion's very file again: what MLflow says of the champion must not turn to "refuse".
        say(f"{name} {model.version} is the champion itself: nothing to record")
        return judged.decision
    uri = publish(store, model, onnx_model)
    registered = record(tracker, model, judged, uri, run_id)
    say(f"{name} {model.version} stays challenger (MLflow's version {registered.number}): {judged.decision}")
    return judged.decision


def _load(folder: Path) -> ModelFolder:
    """The folder's description, after the digests of both graph and checkpoint were checked."""
    return ModelFolder.load(fetch_model(None, str(folder), cache=folder), verify=False)


def _evidence(judged: Verdict) -> dict[str, str]:
    """What a commit tells of the verdict."""
    score = judged.scores.get("map50_95")
    return {
        "Verdict": judged.decision,
        "Compared-with": judged.champion or "no champion",
        "Test-mAP50-95": "" if score is None else f"{score:.4f}",
        "Reasons": "; ".join(judged.reasons),
    }
