"""The journey: raw frames in, a gated detector out. The calls in the data's order and nothing else."""

from typing import Dict, List

from kfp import dsl

from haechi.components.build.component import build
from haechi.components.deploy.component import deploy, refuse
from haechi.components.evaluate.component import evaluate
from haechi.components.export.component import export
from haechi.components.ingest.component import ingest
from haechi.components.label.component import label
from haechi.components.resolve.component import resolve
from haechi.components.train.component import train

from .placement import on_cluster, on_gpu, with_endpoint, with_git, with_requests, with_roboflow

__all__ = ["training"]


@dsl.pipeline(
    name="training",
    description="Ingest frames, label, review, build a dataset, train candidates, export ONNX, evaluate, gate, deploy.",
)
def training(
    name: str = "safety",
    classes: List[str] = ["smoke", "fire", "person_down"],  # noqa: B006 - kfp copies the default into the IR
    sources: List[Dict] = [],  # noqa: B006
    imports: List[Dict] = [],  # noqa: B006
    quality: dict = {},  # noqa: B006
    teacher: str = "",
    class_map: dict = {},  # noqa: B006
    bands: dict = {"default": [0.25, 0.6]},  # noqa: B006
    review_limit: int = 500,
    ratios: dict = {"val": 0.15, "test": 0.15},  # noqa: B006
    grouping: dict = {},  # noqa: B006
    candidates: List[Dict] = [{"name": "yolo11n", "model": "yolo11n", "epochs": 50, "imgsz": 640, "batch": 16}],  # noqa: B006
    thresholds: dict = {"default": 0.25},  # noqa: B006
    iou: float = 0.7,
    golden_images: int = 8,
    gate: dict = {},  # noqa: B006
    target: str = "none",
    rollout: dict = {},  # noqa: B006
    seed: int = 0,
    retrain: bool = False,
    device: str = "auto",
    train_cpu: str = "2",
    train_memory: str = "4Gi",
    infer_cpu: str = "1",
    infer_memory: str = "2Gi",
    gpu_type: str = "nvidia.com/gpu",
    gpu_count: str = "0",
    node_selector: dict = {},  # noqa: B006
    tolerations: list = [],  # noqa: B006
    steps_image: str = "haechi/steps:0.1.0",
    train_image: str = "haechi/train:0.1.0",
    settings_config_map: str = "haechi-settings",
    s3_secret: str = "haechi-s3",  # noqa: S107 - the Secret's name, not a secret
    mlflow_secret: str = "haechi-mlflow",  # noqa: S107
    roboflow_secret: str = "haechi-roboflow",  # noqa: S107
    git_secret: str = "haechi-git",  # noqa: S107
    endpoint_secret: str = "haechi-endpoint",  # noqa: S107
) -> str:
    """Turn the flywheel once.

    Args:
        name: registered model and dataset name, kebab-case.
        classes: ordered class names.
        sources: raw frames, each {"uri", "pattern"}.
        imports: labelled data, each {"uri", "format", "covers", "class_map"}.
        quality: frame quality limits that differ from the defaults.
        teacher: model folder that proposes labels; empty for the champion.
        class_map: the teacher's class names to ours.
        bands: per class [review from, accept from].
        review_limit: open review tasks at most; -1 for no limit.
        ratios: shares of val and test.
        grouping: what ties frames into groups that never straddle splits, where it differs from the defaults.
        candidates: trainings to compare; the best by val mAP50-95 goes on.
        thresholds: confidence per class in service.
        iou: overlap above which boxes of one class are one.
        golden_images: images in the model folder that prove it.
        gate: floors and margins of the promotion gate.
        target: none, dir:/path, kserve:namespace/name or git:repository#branch:path.
        rollout: steps and limits of a rollout on KServe that differ from the defaults.
        seed: of splits, training and bootstrap.
        retrain: train also where the bucket holds an equal training, of the same data, settings and code.
        device: auto, cpu, mps, 0 or 0,1.
        train_cpu: CPUs that a training asks its node for, such as 2 or 500m.
        train_memory: memory that a training asks its node for, such as 4Gi; shared memory counts in.
        infer_cpu: CPUs that label, export and evaluate ask for.
        infer_memory: memory that label, export and evaluate ask for.
        gpu_type: accelerator resource name.
        gpu_count: accelerators a training gets; 0 for none.
        node_selector: of the training pods.
        tolerations: of the training pods.
        steps_image: image of all steps but train and export.
        train_image: image of train and export.
        settings_config_map: ConfigMap with endpoint, bucket and tracking URI.
        s3_secret: Secret with the store's credentials.
        mlflow_secret: Secret with MLflow's `username` and `password`, or `token`; needed only where MLflow asks.
        roboflow_secret: Secret with the key `api_key`; needed only where an import is a Roboflow project.
        git_secret: Secret with `username` and `password`, or `ssh-privatekey` and `known_hosts`; needed only for a target git:.
        endpoint_secret: Secret with `api_key` or `token` of the role `predict`; needed only where runtimes ask who calls.

    Returns:
        `promote`, `refuse` or `not_enough_data`.
    """
    steps = (steps_image, settings_config_map, s3_secret, mlflow_secret)
    heavy = (train_image, settings_config_map, s3_secret, mlflow_secret)
    run_id = dsl.PIPELINE_JOB_ID_PLACEHOLDER

    world = on_cluster(
        resolve(
            name=name,
            classes=classes,
            sources=sources,
            imports=imports,
            quality=quality,
            teacher=teacher,
            class_map=class_map,
            bands=bands,
            review_limit=review_limit,
            ratios=ratios,
            grouping=grouping,
            candidates=candidates,
            thresholds=thresholds,
            iou=iou,
            golden_images=golden_images,
            gate=gate,
            target=target,
            rollout=rollout,
            seed=seed,
            device=device,
        ),
        *steps,
    )
    champion, previous_dataset = world.outputs["champion"], world.outputs["previous_dataset"]

    arrived = on_cluster(
        ingest(sources=sources, imports=imports, classes=classes, quality=quality, run_id=run_id).after(world), *steps
    )
    with_roboflow(arrived, roboflow_secret)
    labelled = on_cluster(
        label(
            frames=arrived.outputs["frames"],
            name=name,
            champion=champion,
            teacher=teacher,
            classes=classes,
            class_map=class_map,
            bands=bands,
            review_limit=review_limit,
        ),
        *steps,
    )
    with_requests(labelled, infer_cpu, infer_memory)
    built = on_cluster(
        build(
            labels=labelled.outputs["labels"],
            name=name,
            classes=classes,
            previous_dataset=previous_dataset,
            ratios=ratios,
            seed=seed,
            grouping=grouping,
        ),
        *steps,
    )
    dataset = built.outputs["dataset"]

    with dsl.ParallelFor(candidates, parallelism=4) as candidate:
        fitted = train(
            dataset=dataset,
            name=name,
            candidate=candidate,
            champion=champion,
            seed=seed,
            retrain=retrain,
            device=device,
            train_cpu=train_cpu,
            train_memory=train_memory,
            gpu_type=gpu_type,
            gpu_count=gpu_count,
            run_id=run_id,
        )
        with_requests(on_cluster(fitted, *heavy), train_cpu, train_memory)
        on_gpu(fitted, gpu_type, gpu_count, node_selector, tolerations)

    exported = on_cluster(
        export(
            checkpoints=dsl.Collected(fitted.outputs["checkpoint"]),
            dataset=dataset,
            name=name,
            thresholds=thresholds,
            iou=iou,
            golden_images=golden_images,
        ),
        *heavy,
    )
    with_requests(exported, infer_cpu, infer_memory)
    onnx_model = exported.outputs["onnx_model"]
    judged = on_cluster(
        evaluate(onnx_model=onnx_model, dataset=dataset, name=name, champion=champion, gate=gate), *steps
    )
    with_requests(judged, infer_cpu, infer_memory)
    verdict = judged.outputs["verdict"]

    with dsl.If(judged.outputs["Output"] == "promote"):
        deployed = deploy(
            onnx_model=onnx_model,
            verdict=verdict,
            report=judged.outputs["report"],
            name=name,
            champion=champion,
            target=target,
            rollout=rollout,
            run_id=run_id,
        )
        with_endpoint(with_git(on_cluster(deployed, *steps), git_secret), endpoint_secret)
    with dsl.Else():
        refused = on_cluster(refuse(onnx_model=onnx_model, verdict=verdict, name=name, run_id=run_id), *steps)
    # If neither branch ran (a condition that failed to evaluate), OneOf makes that an error instead of a success.
    decision: str = dsl.OneOf(deployed.outputs["Output"], refused.outputs["Output"])
    return decision
