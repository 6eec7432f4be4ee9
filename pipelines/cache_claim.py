"""The compiled pipeline with a volume for frames, so that a training does not fetch what an earlier one has fetched.

Kubeflow mounts a volume or it does not; no parameter makes one optional. So a pipeline with a cache is another one, of the
same steps and parameters and with a version of its own, made by an edit of the compiled one.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import yaml

from haechi.components.shared.errors import InputError

__all__ = ["MOUNT", "check_claim", "with_claim", "write_with_claim"]

MOUNT = "/var/cache/haechi"
_STEPS = ("train", "evaluate")  # they read a whole dataset's frames; label and export read what nobody reads again
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_TAKEN = ("tmp", "shm")  # volumes that a pod of ours has already; Pipelines names a claim's volume like the claim


def check_claim(claim: str) -> None:
    """Refuse a name that no PersistentVolumeClaim can have, or that a pod could not mount.

    Raises:
        InputError: not 1 to 63 lower-case letters, digits and inner hyphens, or `tmp` or `shm`.
    """
    if not _NAME.fullmatch(claim):
        raise InputError(
            f"--cache-claim is {claim!r}",
            "Name a PersistentVolumeClaim: lower-case letters, digits, hyphens; 63 at most.",
        )
    if claim in _TAKEN:
        raise InputError(f"--cache-claim is {claim!r}, which a pod has already", "Name the claim otherwise.")


def with_claim(documents: list[dict[str, Any]], claim: str) -> list[dict[str, Any]]:
    """A copy of an IR's documents in which trainings and evaluations mount the claim and keep frames there.

    Raises:
        InputError: the claim's name cannot be.
    """
    check_claim(claim)
    spec, platform = copy.deepcopy(documents)
    containers = spec["deploymentSpec"]["executors"]
    pods = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    for step in _STEPS:
        container, pod = containers[f"exec-{step}"]["container"], pods[f"exec-{step}"]
        container["env"] = [*container.get("env", []), {"name": "HAECHI_CACHE_DIR", "value": MOUNT}]
        name = {"runtimeValue": {"constant": claim}}
        pod["pvcMount"] = [*pod.get("pvcMount", []), {"mountPath": MOUNT, "pvcNameParameter": name, "constant": claim}]
    return [spec, platform]


def write_with_claim(source: Path, claim: str, out: Path) -> Path:
    """Write the IR file `source` with the claim mounted to `out`, and give `out`."""
    documents = with_claim(list(yaml.safe_load_all(source.read_text(encoding="utf-8"))), claim)
    out.write_text(yaml.safe_dump_all(documents, sort_keys=True), encoding="utf-8")
    return out
