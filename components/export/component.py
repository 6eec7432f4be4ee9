"""The contract of `export` with Kubeflow Pipelines."""

from typing import List

from kfp import dsl
from kfp.dsl import Dataset, Input, Model, Output

__all__ = ["export"]


@dsl.component(base_image="haechi/train:0.1.0", install_kfp_package=False)
def export(
    checkpoints: Input[List[Model]],
    dataset: Input[Dataset],
    name: str,
    thresholds: dict,
    iou: float,
    golden_images: int,
    onnx_model: Output[Model],
) -> None:
    """Export the best candidate to ONNX as a model folder, proven against its checkpoint.

    Args:
        checkpoints: what the candidates' trainings wrote; the best val mAP50-95 is taken.
        dataset: its val frames become golden images.
        name: registered model's name.
        thresholds: confidence per class in service, `default` for the others.
        iou: overlap above which boxes of one class are one.
        golden_images: pictures in the folder whose boxes prove it; 0 for none.
        onnx_model: the model folder.
    """
    from pathlib import Path

    from haechi.components.export.step import export as run
    from haechi.components.shared.settings import Settings

    folders = [Path(item.path) for item in checkpoints]
    out, settings = Path(onnx_model.path), Settings.from_env()
    result = run(folders, Path(dataset.path), name, thresholds, iou, golden_images, out, settings)
    onnx_model.metadata.update(result.metadata())
