"""The contract of `resolve` with Kubeflow Pipelines."""

from typing import Dict, List, NamedTuple

from kfp import dsl

__all__ = ["resolve"]


@dsl.component(base_image="haechi/steps:0.1.0", install_kfp_package=False)
def resolve(
    name: str,
    classes: List[str],
    sources: List[Dict],
    imports: List[Dict],
    quality: dict,
    teacher: str,
    class_map: dict,
    bands: dict,
    review_limit: int,
    ratios: dict,
    grouping: dict,
    candidates: List[Dict],
    thresholds: dict,
    iou: float,
    golden_images: int,
    gate: dict,
    target: str,
    rollout: dict,
    seed: int,
    device: str,
) -> NamedTuple("Resolved", [("champion", str), ("previous_dataset", str)]):  # type: ignore[valid-type] # kfp's form
    """Refuse parameters that a later step would refuse, and pin champion and previous dataset for the whole run.

    All but `name` are only checked here, by the parsers of the steps that use them.

    Args:
        name: registered model and dataset name, kebab-case.
        classes: ordered class names.
        sources: as `ingest` takes them.
        imports: as `ingest` takes them.
        quality: as `ingest` takes it.
        teacher: as `label` takes it.
        class_map: as `label` takes it.
        bands: as `label` takes them.
        review_limit: as `label` takes it.
        ratios: as `build` takes them.
        grouping: as `build` takes it.
        candidates: trainings to compare, as `train` takes them.
        thresholds: as `export` takes them.
        iou: as `export` takes it.
        golden_images: as `export` takes it.
        gate: as `evaluate` takes it.
        target: as `deploy` takes it.
        rollout: as `deploy` takes it.
        seed: as `build` and `train` take it.
        device: as `train` takes it.

    Returns:
        champion: model version (12 hex digits) that alias `champion` names in MLflow, or empty.
        previous_dataset: digest of the newest complete dataset of that name, or empty.
    """
    from haechi.components.resolve import step
    from haechi.components.resolve.parameters import check_parameters
    from haechi.components.shared.settings import Settings

    asked = {
        "name": name,
        "classes": classes,
        "sources": sources,
        "imports": imports,
        "quality": quality,
        "teacher": teacher,
        "class_map": class_map,
        "bands": bands,
        "review_limit": review_limit,
        "ratios": ratios,
        "grouping": grouping,
        "candidates": candidates,
        "thresholds": thresholds,
        "iou": iou,
        "golden_images": golden_images,
        "gate": gate,
        "target": target,
        "rollout": rollout,
        "seed": seed,
        "device": device,
    }
    check_parameters(asked)
    found = step.resolve(name=name, settings=Settings.from_env())
    return (found.champion, found.previous_dataset)
