"""The contract of `train` with Kubeflow Pipelines."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Model, Output

__all__ = ["train"]


@dsl.component(base_image="haechi/train:0.1.0", install_kfp_package=False)
def train(
    dataset: Input[Dataset],
    name: str,
    candidate: dict,
    champion: str,
    seed: int,
    retrain: bool,
    device: str,
    train_cpu: str,
    train_memory: str,
    gpu_type: str,
    gpu_count: str,
    run_id: str,
    checkpoint: Output[Model],
) -> None:
    """Train one candidate; one that cannot train gives status `failed` instead of ending the run.

    Args:
        dataset: manifest and class names.
        name: registered model's name.
        candidate: name, model, weights, epochs, imgsz, batch, patience and further Ultralytics options.
        champion: the champion's version, which a candidate may start from; empty for none.
        seed: of weights, order and augmentation.
        retrain: train also where the bucket holds an equal training.
        device: auto, cpu, mps, 0, or 0,1.
        train_cpu: CPUs that the pod asks for; used by the scheduler, not here.
        train_memory: memory that the pod asks for; used by the scheduler, not here.
        gpu_type: accelerator resource that the pod asks for; used by the scheduler, not here.
        gpu_count: accelerators that the pod asks for; used by the scheduler, not here.
        run_id: the pipeline's run, noted in MLflow.
        checkpoint: checkpoint.pt, train.json and results.csv.
    """
    import tempfile
    from pathlib import Path

    from haechi.components.shared.settings import Settings
    from haechi.components.train.step import train as run

    with tempfile.TemporaryDirectory(prefix="haechi-train-") as work:
        out, settings = Path(checkpoint.path), Settings.from_env()
        given = (Path(dataset.path), name, candidate, champion, seed, device, run_id)
        result = run(*given, out, Path(work), settings, retrain=retrain)
        checkpoint.metadata.update({key: value for key, value in result.metadata().items() if value is not None})
