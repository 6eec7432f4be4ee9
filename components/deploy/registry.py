"""What deploy and refuse tell MLflow: scores and settings on the run, one registered version, its tags."""

from __future__ import annotations

from haechi.components.shared.errors import DeployRefused, TrackingError
from haechi.components.shared.model_folder import ModelFolder
from haechi.components.shared.tracking import EXPERIMENT, VERSION_TAG, RegisteredVersion, Tracker, metric_names

from .verdict import Verdict

__all__ = ["FORMER", "check_champion", "crown", "record"]

FORMER = "haechi.former"  # of a champion: the champion before it, where `haechi rollback` goes


def check_champion(tracker: Tracker, name: str, pinned: str, version: str) -> None:
    """Raise if the champion is no longer the one that this run was compared with.

    Our own version is fine: a step that was killed after its last act and is repeated finds exactly that.

    Raises:
        DeployRefused: the alias moved meanwhile.
    """
    found = tracker.alias(name, "champion")
    current = (found.version or f"MLflow's version {found.number}") if found else ""
    if current not in (pinned, version):
        raise DeployRefused(
            f"the champion of {name!r} changed from {pinned or 'none'} to {current or 'none'} since this run began",
            "Run the pipeline again, so that the challenger is compared with the champion of today.",
        )


def crown(tracker: Tracker, name: str, registered: RegisteredVersion, former: str) -> None:
    """Make a version the champion, and note whom it follows."""
    if former and former != registered.version:
        tracker.tag_version(name, registered.number, {FORMER: former})
    tracker.set_alias(name, "champion", registered.number)


def record(
    tracker: Tracker, model: ModelFolder, verdict: Verdict, uri: str, pipeline_run: str, report: str = ""
) -> RegisteredVersion:
    """Log the evaluation on the model's run and register the version; a repeated call changes nothing.

    Args:
        tracker: MLflow.
        model: the model folder's description; its `run_id` is the training's run.
        verdict: what evaluate decided.
        uri: the stored model folder.
        pipeline_run: KFP's run id, or empty.
        report: HTML of the evaluation, kept with the run; empty for none.

    Returns:
        The registered version, which alias `challenger` now names.
    """
    run_id, own = _run(tracker, model)
    known = tracker.run(run_id)
    if known is None:
        raise TrackingError(f"MLflow's run {run_id} was deleted meanwhile", "Run deploy again.")
    # The training logged its settings and its val curve itself; MLflow refuses to change a parameter, and a number that
    # is there already must not become a second point of its curve.
    names = metric_names([*model.training, *model.metrics, *verdict.metrics()])
    tracker.log_params(run_id, {key: value for key, value in model.training.items() if names[key] not in known.params})
    metrics: dict[str, float | None] = {k: v for k, v in model.metrics.items() if names[k] not in known.metrics}
    metrics |= {k: v for k, v in verdict.metrics().items() if known.metrics.get(names[k]) != v}
    tracker.log_metrics(run_id, metrics)
    tags = _tags(model, verdict, pipeline_run)
    tracker.set_tags(run_id, {VERSION_TAG: model.version, **tags})
    if report:
        tracker.log_text(run_id, report, "report.html")
    if own:
        tracker.finish(run_id)
    registered = tracker.register(model.name, model.version, uri, run_id, tags, _description(verdict))
    tracker.set_alias(model.name, "challenger", registered.number)
    return registered


def _run(tracker: Tracker, model: ModelFolder) -> tuple[str, bool]:
    """The training's run; for a model that was trained elsewhere, a run of our own, which a repeated step finds again."""
    if tracker.run(model.run_id):
        return model.run_id, False
    mine = {VERSION_TAG: model.version, "haechi.model": model.name}
    found = tracker.find_run(EXPERIMENT, mine)
    return found or tracker.start_run(EXPERIMENT, f"deploy-{model.version}", mine), True


def _tags(model: ModelFolder, verdict: Verdict, pipeline_run: str) -> dict[str, str]:
    return {
        "haechi.onnx_sha256": model.onnx_sha256,
        "haechi.checkpoint_sha256": model.checkpoint_sha256,
        "haechi.dataset_digest": model.dataset_digest,
        "haechi.verdict": verdict.decision,
        "haechi.compared_with": verdict.champion,
        "haechi.run": pipeline_run,
    }


def _description(verdict: Verdict) -> str:
    scores = verdict.metrics()
    shown = ", ".join(
        f"{name} {value:.3f}" for name, value in scores.items() if value is not None and name.count("/") == 1
    )
    reasons = "".join(f"\n- {reason}" for reason in verdict.reasons)
    return f"Verdict: **{verdict.decision}** against {verdict.champion or 'no champion'}. {shown}\n{reasons}"
