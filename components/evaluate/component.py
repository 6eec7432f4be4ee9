"""The contract of `evaluate` with Kubeflow Pipelines."""

from kfp import dsl
from kfp.dsl import HTML, Artifact, ClassificationMetrics, Dataset, Input, Metrics, Model, Output

__all__ = ["evaluate"]


@dsl.component(base_image="haechi/steps:0.1.0", install_kfp_package=False)
def evaluate(
    onnx_model: Input[Model],
    dataset: Input[Dataset],
    name: str,
    champion: str,
    gate: dict,
    scorecard: Output[Metrics],
    confusion: Output[ClassificationMetrics],
    report: Output[HTML],
    verdict: Output[Artifact],
) -> str:
    """Score the ONNX model that will ship on the frozen test split, beside the champion, and decide.

    Args:
        onnx_model: the challenger's model folder, as `export` wrote it.
        dataset: the dataset, as `build` wrote it.
        name: model name; the champion lies at models/<name>/<champion>/ in the bucket.
        champion: version of the champion, as `resolve` found it; empty for none.
        gate: min_boxes, min_groups, floors, min_gain, noninferiority, max_class_drop, confidence, draws, seed,
            where they differ from the defaults.
        scorecard: AP, precision and recall as a table.
        confusion: the confusion matrix with background.
        report: one self-contained page.
        verdict: verdict.json and scorecard.json.

    Returns:
        promote, refuse or not_enough_data.
    """
    from pathlib import Path

    from haechi.components.evaluate.step import evaluate as run
    from haechi.components.shared.settings import Settings

    model, data = Path(onnx_model.path), Path(dataset.path)
    outs = Path(verdict.path), Path(report.path)
    result = run(model, data, name, champion, gate, *outs, Settings.from_env())
    for metric, value in result.metrics.items():
        scorecard.log_metric(metric, value)
    confusion.log_confusion_matrix(list(result.categories), [list(row) for row in result.matrix])
    verdict.metadata.update(result.metadata())
    return result.decision
