"""The contract of `resolve` with Kubeflow Pipelines."""

from typing import NamedTuple

from kfp import dsl

__all__ = ["resolve"]


@dsl.component(base_image="haechi/steps:0.1.0", install_kfp_package=False)
def resolve(
    name: str,
) -> NamedTuple("Resolved", [("champion", str), ("previous_dataset", str)]):  # type: ignore[valid-type] # kfp's form
    """Pin the champion and the previous dataset for the whole run.

    Args:
        name: registered model and dataset name, kebab-case.

    Returns:
        champion: model version (12 hex digits) that alias `champion` names in MLflow, or empty.
        previous_dataset: digest of the newest complete dataset of that name, or empty.
    """
    from haechi.components.resolve import step
    from haechi.components.shared.settings import Settings

    found = step.resolve(name=name, settings=Settings.from_env())
    return (found.champion, found.previous_dataset)
