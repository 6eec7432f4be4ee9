"""KServe's own settings, of which two sections matter here: its mode (`deploy`) and its Gateway (`ingress`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["CONFIG_MAP", "NAMESPACES", "kserve_settings"]

CONFIG_MAP = "inferenceservice-config"
# KServe stands in its own namespace by its charts and manifests, beside Pipelines by those of the Kubeflow platform.
NAMESPACES = ("kserve", "kubeflow")
_SECTIONS = ("deploy", "ingress")


def kserve_settings(
    read: Callable[[str, str], Mapping[str, str] | None],
) -> tuple[str, dict[str, dict[str, Any]]] | None:
    """The namespace of KServe's settings and those sections that are mappings; None where there are none to be seen.

    Args:
        read: gives the data of a ConfigMap by namespace and name, or None where it is not there or may not be read.
    """
    for namespace in NAMESPACES:
        data = read(namespace, CONFIG_MAP)
        if data is not None:
            return namespace, dict(_mappings(data))
    return None


def _mappings(data: Mapping[str, str]) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for name in _SECTIONS:
        try:
            section = json.loads(data.get(name, ""))
        except ValueError:
            continue
        if isinstance(section, dict):
            found.append((name, section))
    return found
