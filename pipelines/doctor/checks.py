"""The table of checks: name → what it looks at, and the function that looks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from . import addresses, canary, cluster, kserve_store, kubeflow, local, pods, serving, storage, tracking
from .findings import Finding
from .world import World

__all__ = ["CHECKS", "Check"]


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        area: what it is about, as in docs/doctor.md.
        look: looks at the world; no finding means healthy. Raises CannotLook or NotAsked.
    """

    area: str
    look: Callable[[World], list[Finding]]


CHECKS: dict[str, Check] = {
    "packages": Check("machine", local.packages),
    "disk": Check("machine", local.disk),
    "shared-memory": Check("machine", local.shared_memory),
    "ports": Check("machine", local.ports),
    "services": Check("machine", local.services),
    "settings": Check("machine", storage.settings),
    "store": Check("storage", storage.store),
    "step-keys": Check("storage", storage.step_keys),
    "kserve-keys": Check("storage", kserve_store.kserve_keys),
    "mlflow": Check("tracking", tracking.mlflow),
    "step-mlflow": Check("tracking", tracking.step_mlflow),
    "label-studio": Check("tracking", tracking.label_studio),
    "pipelines-api": Check("kubeflow", kubeflow.pipelines_api),
    "cached-steps": Check("kubeflow", kubeflow.cached_steps),
    "cluster": Check("cluster", cluster.cluster_answers),
    "namespaces": Check("cluster", cluster.namespaces),
    "step-settings": Check("cluster", cluster.step_settings),
    "rights": Check("cluster", cluster.rights),
    "service-endpoints": Check("cluster", addresses.services_in_cluster),
    "pending": Check("cluster", pods.pending),
    "quota": Check("cluster", pods.quota),
    "train-shm": Check("cluster", pods.train_shm),
    "image-pull": Check("cluster", pods.image_pull),
    "pod-security": Check("cluster", pods.pod_security),
    "kserve": Check("serving", serving.kserve_installed),
    "canary-mode": Check("serving", canary.canary_mode),
    "runtime": Check("serving", serving.runtime),
    "model-load": Check("serving", serving.model_load),
    "left-overs": Check("serving", serving.left_overs),
}
