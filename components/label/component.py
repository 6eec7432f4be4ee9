"""The label step's contract with Kubeflow Pipelines."""

from typing import List

from kfp import dsl
from kfp.dsl import Artifact, Input, Output

__all__ = ["label"]


@dsl.component(base_image="haechi/steps:0.1.0", install_kfp_package=False)
def label(
    frames: Input[Artifact],
    name: str,
    champion: str,
    teacher: str,
    classes: List[str],
    class_map: dict,
    bands: dict,
    review_limit: int,
    labels: Output[Artifact],
) -> None:
    """Collect reviewed answers, let a teacher propose boxes, and accept, queue for review or mark as background.

    Args:
        frames: accepted frames that no labels export holds yet, from ingest.
        name: registered model's name.
        champion: version of the champion, the teacher where `teacher` is empty; may be empty.
        teacher: model folder that proposes labels, as path, file:// or s3://; empty for the champion. Without both,
            frames go to review without proposals.
        classes: ordered class names.
        class_map: the teacher's class name to ours; equal names need no entry, "" ignores a class.
        bands: per class (and "default") [low, high]: below low ignored, from high accepted, between them reviewed.
        review_limit: open review tasks at most; -1 for no limit.
        labels: what was decided (label.json); the labels themselves are objects under labels/.
    """
    from pathlib import Path

    from haechi.components.label import step
    from haechi.components.shared.settings import Settings

    result = step.label(
        Path(frames.path),
        name=name,
        champion=champion,
        teacher=teacher,
        classes=classes,
        class_map=class_map,
        bands=bands,
        review_limit=review_limit,
        out=Path(labels.path),
        settings=Settings.from_env(),
    )
    labels.metadata.update(result.metadata())
