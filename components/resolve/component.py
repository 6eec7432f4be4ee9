"""The contract of `resolve` with Kubeflow Pipelines."""

from typing import Dict, List, NamedTuple

from kfp import dsl

__all__ = ["resolve"]


@dsl.component(base_image="haechi/steps:0.1.0", install_kfp_package=False)
def resolve(
    name: str,
    candidates: List[Dict],
    target: str,
    rollout: dict,
) -> NamedTuple("Resolved", [("champion", str), ("previous_dataset", str)]):  # type: ignore[valid-type] # kfp's form
    """Refuse parameters that the last steps would refuse, and pin champion and previous dataset for the whole run.

    Args:
        name: registered model and dataset name, kebab-case.
        candidates: trainings to compare, as `train` takes them; only checked here.
        target: where a promoted model goes, as `deploy` takes it; only checked here.
        rollout: steps and limits of a rollout on KServe, as `deploy` takes them; only checked here.

    Returns:
        champion: model version (12 hex digits) that alias `champion` names in MLflow, or empty.
        previous_dataset: digest of the newest complete dataset of that name, or empty.
    """
    from haechi.components.resolve import step
    from haechi.components.resolve.parameters import check_parameters
    from haechi.components.shared.settings import Settings

    check_parameters(candidates, target, rollout)
    found = step.resolve(name=name, settings=Settings.from_env())
    return (found.champion, found.previous_dataset)
