"""The contracts of `deploy` and `refuse` with Kubeflow Pipelines."""

from kfp import dsl
from kfp.dsl import HTML, Artifact, Input, Model, Output

__all__ = ["deploy", "refuse"]


@dsl.component(base_image="haechi/steps:0.1.0", install_kfp_package=False)
def deploy(
    onnx_model: Input[Model],
    verdict: Input[Artifact],
    report: Input[HTML],
    name: str,
    champion: str,
    target: str,
    run_id: str,
    deployed: Output[Artifact],
    rollout: dict = {},  # noqa: B006 - kfp copies the default into the IR
) -> str:
    """Store and register a promoted model, switch the target, and make it the champion.

    Args:
        onnx_model: the model folder.
        verdict: what evaluate decided about it; anything but `promote` is refused.
        report: the evaluation's page.
        name: registered model's name.
        champion: version that the model was compared with, or empty; refused if the champion changed since.
        target: `none`, `dir:/abs/path`, `kserve:<namespace>/<name>` or `git:<repository>#<branch>:<path>`.
        run_id: the pipeline run's id.
        deployed: folder with `deployed.json`.
        rollout: steps and limits of a rollout on KServe that differ from the defaults.

    Returns:
        `promote`.
    """
    from dataclasses import asdict
    from pathlib import Path

    from haechi.components.deploy import step
    from haechi.components.shared.settings import Settings

    result = step.deploy(
        onnx_model=Path(onnx_model.path),
        verdict=Path(verdict.path),
        report=Path(report.path),
        name=name,
        champion=champion,
        target=target,
        run_id=run_id,
        out=Path(deployed.path),
        settings=Settings.from_env(),
        rollout=rollout,
    )
    deployed.metadata.update(asdict(result))
    return "promote"


@dsl.component(base_image="haechi/steps:0.1.0", install_kfp_package=False)
def refuse(onnx_model: Input[Model], verdict: Input[Artifact], name: str, run_id: str) -> str:
    """Record a challenger that was not promoted; champion and target stay as they are.

    Args:
        onnx_model: the model folder.
        verdict: what evaluate decided about it.
        name: registered model's name.
        run_id: the pipeline run's id.

    Returns:
        The decision: `refuse` or `not_enough_data`.
    """
    from pathlib import Path

    from haechi.components.deploy import step
    from haechi.components.shared.settings import Settings

    return step.refuse(Path(onnx_model.path), Path(verdict.path), name, run_id, Settings.from_env())
