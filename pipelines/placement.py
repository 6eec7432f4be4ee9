"""Where a step's pod runs and what it gets there: image, settings, credentials, CPU and memory, accelerators.

Nothing here has an effect under kfp.local, where steps read the same settings from the environment.
"""

from typing import Any

from kfp import dsl, kubernetes

from haechi.components.shared.settings import ENDPOINT_CREDENTIALS, GIT_CREDENTIALS

__all__ = ["on_cluster", "on_gpu", "with_endpoint", "with_git", "with_requests", "with_roboflow"]

_SETTINGS = ("HAECHI_S3_ENDPOINT", "HAECHI_S3_REGION", "HAECHI_BUCKET", "MLFLOW_TRACKING_URI")
_CREDENTIALS = {"access_key": "HAECHI_S3_ACCESS_KEY", "secret_key": "HAECHI_S3_SECRET_KEY"}
_MLFLOW = {
    "username": "MLFLOW_TRACKING_USERNAME",
    "password": "MLFLOW_TRACKING_PASSWORD",
    "token": "MLFLOW_TRACKING_TOKEN",
}
_USER = 1000  # the numeric user of the images
# A pod that loses its node is started again. Argo counts `backoff_max_duration` from the start of the first attempt, and ends
# a later attempt there too: kfp's default of one hour would neither retry nor finish a long training. A factor of 1 keeps
# the wait at a minute, whichever attempt it is.
_RETRY: dict[str, Any] = {
    "num_retries": 10,
    "backoff_duration": "60s",
    "backoff_factor": 1.0,
    "backoff_max_duration": "14d",
}
# What a step asks for that runs no model: it waits for the store and for MLflow, and decodes pictures.
_LIGHT = {"cpu": "250m", "memory": "512Mi"}


def on_cluster(
    task: dsl.PipelineTask, image: Any, config_map: Any, secret: Any, mlflow_secret: Any
) -> dsl.PipelineTask:
    """Give a task its image, settings, credentials, CPU and memory, a non-root user and a writable /tmp.

    Pipelines' own cache is off: its key tells artifacts by the number of their record and code by the image's tag, so it
    would miss equal data and take a rebuilt image for the old one. What may be reused is found by digest in the steps.

    Args:
        task: the task, in the pipeline's function.
        image: pipeline parameter that names the image.
        config_map: pipeline parameter that names the ConfigMap with the settings.
        secret: pipeline parameter that names the Secret with `access_key` and `secret_key`.
        mlflow_secret: pipeline parameter that names the Secret with `username` and `password`, or `token`; a cluster
            whose MLflow asks for none needs no such Secret.
    """
    task.set_caching_options(False)
    task.set_container_image(image)
    kubernetes.use_config_map_as_env(task, config_map, {name: name for name in _SETTINGS})
    kubernetes.use_secret_as_env(task, secret, _CREDENTIALS)
    kubernetes.use_secret_as_env(task, mlflow_secret, _MLFLOW, optional=True)
    kubernetes.set_security_context(task, run_as_user=_USER, run_as_group=_USER, run_as_non_root=True)
    # The step pods must work with a read-only root: everything that they scribble goes here.
    kubernetes.empty_dir_mount(task, "tmp", "/tmp")  # noqa: S108
    return with_requests(task, **_LIGHT)


def with_requests(task: dsl.PipelineTask, cpu: Any, memory: Any) -> dsl.PipelineTask:
    """Ask for CPU and memory on the node that a task's pod goes to; it may use more where the node has it.

    Args:
        task: the task, in the pipeline's function.
        cpu, memory: Kubernetes quantities such as "2" or "500m" and "4Gi", or pipeline parameters.
    """
    return task.set_cpu_request(cpu).set_memory_request(memory)


def on_gpu(
    task: dsl.PipelineTask, gpu_type: Any, gpu_count: Any, node_selector: Any, tolerations: Any
) -> dsl.PipelineTask:
    """Give a training task its accelerators, its node pool, shared memory, and retries for spot nodes.

    A retried pod starts with an empty /tmp, on any node of the pool: `train` resumes from `state/train/<key>/` in the
    object store. Retries and the kind of shared memory are compiled in; KFP takes no parameters for them.

    Args:
        task: the task, in the pipeline's function.
        gpu_type: pipeline parameter that names the accelerator's resource.
        gpu_count: pipeline parameter, a number as text; "0" asks for none.
        node_selector: pipeline parameter, labels that the node must have; {} for any node.
        tolerations: pipeline parameter, a list of Kubernetes tolerations; [] for none.
    """
    task.set_accelerator_type(gpu_type).set_accelerator_limit(gpu_count)
    kubernetes.add_node_selector_json(task, node_selector)
    kubernetes.add_toleration_json(task, tolerations)
    # Kubernetes gives 64 MiB of /dev/shm, too little for data loader workers.
    kubernetes.empty_dir_mount(task, "shm", "/dev/shm", medium="Memory")  # noqa: S108
    return task.set_retry(**_RETRY)


def with_roboflow(task: dsl.PipelineTask, secret: Any) -> dsl.PipelineTask:
    """Let a task use Roboflow where the cluster has a Secret with its `api_key`; without one it starts all the same."""
    kubernetes.use_secret_as_env(task, secret, {"api_key": "ROBOFLOW_API_KEY"}, optional=True)
    return task


def with_git(task: dsl.PipelineTask, secret: Any) -> dsl.PipelineTask:
    """Let a task push to a Git repository where the cluster has a Secret for it; its keys become files."""
    return kubernetes.use_secret_as_volume(task, secret, mount_path=GIT_CREDENTIALS, optional=True)


def with_endpoint(task: dsl.PipelineTask, secret: Any) -> dsl.PipelineTask:
    """Let a task ask guarded serving runtimes where the cluster has a Secret with `api_key` or `token`, as files."""
    return kubernetes.use_secret_as_volume(task, secret, mount_path=ENDPOINT_CREDENTIALS, optional=True)
