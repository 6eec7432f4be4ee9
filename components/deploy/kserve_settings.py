"""KServe's own settings, of which two sections matter here: its usual mode (`deploy`) and its Gateway (`ingress`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["CONFIG_MAP", "MODE", "NAMESPACES", "Sections", "kserve_settings", "told_mode"]

Sections = dict[str, dict[str, Any]]

CONFIG_MAP = "inferenceservice-config"
MODE = "serving.kserve.io/deploymentMode"
# KServe stands in its own namespace by its charts and manifests, beside Pipelines by those of the Kubeflow platform.
NAMESPACES = ("kserve", "kubeflow")
_SECTIONS = ("deploy", "ingress")


def kserve_settings(read: Callable[[str, str], Mapping[str, str] | None]) -> tuple[str, Sections] | None:
    """The namespace of KServe's settings and those sections that are mappings; None where there are none to be seen.

    Args:
        read: gives the data of a ConfigMap by namespace and name, or None where it is not there or may not be read.
    """
    for namespace in NAMESPACES:
        data = read(namespace, CONFIG_MAP)
        if data is not None:
            return namespace, _mappings(data)
    return None


def told_mode(service: dict[str, Any], settings: Sections) -> str:
    """A service's mode in KServe's words: what happened, else what was asked, else what is usual; empty where nothing tells."""
    notes = service["metadata"].get("annotations") or {}
    usual = settings.get("deploy", {}).get("defaultDeploymentMode")
    return str((service.get("status") or {}).get("deploymentMode") or notes.get(MODE) or usual or "")


def _mappings(data: Mapping[str, str]) -> Sections:
    found: Sections = {}
    for name in _SECTIONS:
        try:
            section = json.loads(data.get(name, ""))
        except ValueError:
            continue
        if isinstance(section, dict):
            found[name] = section
    return found
