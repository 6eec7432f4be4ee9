"""The KFP contract of the step ingest."""

from typing import Dict, List

from kfp import dsl
from kfp.dsl import Artifact, Output

__all__ = ["ingest"]


@dsl.component(base_image="haechi/steps:0.1.0", install_kfp_package=False)
def ingest(
    sources: List[Dict],
    imports: List[Dict],
    classes: List[str],
    quality: dict,
    run_id: str,
    frames: Output[Artifact],
) -> None:
    """Take in new raw frames and labelled data: decode, quarantine, drop duplicates, store by content.

    Args:
        sources: raw frames, each {"uri": s3:// or file:// folder} and optionally "name", "pattern", "camera", "start",
            "timezone", "object_metadata".
        imports: labelled data, each {"uri": folder, zip or roboflow://workspace/project/version} and optionally
            "format", "covers", "class_map", "name", "sequence_pattern", "on_error", "unlabelled".
        classes: ordered class names; labels map to them by name.
        quality: limits that differ from the defaults: "min_side", "black", "white", "blur".
        run_id: names this run's state segments; a step repeated under one id gives one result.
        frames: every accepted frame that is in no labels export yet (frames.parquet), and counts (ingest.json).
    """
    from pathlib import Path

    from haechi.components.ingest.step import ingest as work
    from haechi.components.shared.settings import Settings

    result = work(sources, imports, classes, quality, run_id, Path(frames.path), Settings.from_env())
    frames.metadata.update(result.metadata())
