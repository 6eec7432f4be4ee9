"""The contract of `build` with Kubeflow Pipelines."""

from typing import Dict, List

from kfp import dsl
from kfp.dsl import Artifact, Dataset, Input, Output

__all__ = ["build"]


@dsl.component(base_image="haechi/steps:0.1.0", install_kfp_package=False)
def build(
    labels: Input[Artifact],
    name: str,
    classes: List[str],
    previous_dataset: str,
    ratios: Dict[str, float],
    seed: int,
    dataset: Output[Dataset],
    grouping: Dict = {},  # noqa: B006 - kfp copies the default into the IR
) -> None:
    """Merge all labels exports into a content-addressed dataset, split by group without a leak.

    Args:
        labels: what `label` wrote; orders the steps and records where the labels come from.
        name: dataset name, kebab-case.
        classes: ordered class names; boxes of other classes are dropped and counted.
        previous_dataset: digest of the dataset whose splits are kept; empty for none.
        ratios: shares of `val` and `test`; the rest is train.
        seed: order in which new groups are placed.
        dataset: manifest, class names, certificate and statistics.
        grouping: `burst_gap_s`, `near_bits`, `near_levels` where they differ from 30, 10 and 24.
    """
    from pathlib import Path

    from haechi.components.build.step import build as run
    from haechi.components.shared.settings import Settings

    result = run(name, classes, previous_dataset, ratios, seed, Path(dataset.path), Settings.from_env(), grouping)
    dataset.metadata.update(result.metadata())
