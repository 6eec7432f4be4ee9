"""The InferenceServices that the checks judge."""

from __future__ import annotations

from typing import Any

from .world import World

__all__ = ["GROUP", "name_of", "services"]

GROUP = "serving.kserve.io"


def services(world: World) -> list[dict[str, Any]]:
    """All of the serving namespace; none where the cluster does not know the kind."""
    return world.objects(world.aim.serving, "inferenceservices", f"{GROUP}/v1beta1")


def name_of(service: dict[str, Any]) -> str:
    """How a finding names one."""
    return f"InferenceService {service['metadata']['namespace']}/{service['metadata']['name']}"
