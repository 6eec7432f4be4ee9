"""What the scheduler's words about nodes mean, where comparing pod and nodes does not tell."""

from __future__ import annotations

import re
from typing import Any

__all__ = ["said", "short_of"]

# Words → cause, fix; the first that is found counts.
_WORDS: tuple[tuple[str, str, str], ...] = (
    (
        r"had volume node affinity conflict",
        "a volume that it mounts is in a zone, or on a node, where no node that suits it is",
        "kubectl -n {namespace} get pvc   # then kubectl describe pv: Node Affinity; move the volume, or the node pool",
    ),
    (
        r"exceed max volume count",
        "the nodes that suit it carry as many volumes as they may",
        "kubectl get csinodes -o yaml   # allocatable.count; end pods with volumes, or add a node",
    ),
    (
        r"didn't (?:match pod|satisfy existing pods) anti-affinity rules",
        "pod anti-affinity, its own or that of pods that run there, keeps it away from the nodes that suit it",
        "kubectl -n {namespace} get pod {name} -o jsonpath='{{.spec.affinity}}'   # relax it, or add a node",
    ),
    (
        r"didn't (?:match|satisfy) pod affinity rules",
        "pod affinity wants it beside pods that run on none of the nodes that suit it",
        "kubectl -n {namespace} get pod {name} -o jsonpath='{{.spec.affinity}}'   # relax it, or start those pods",
    ),
    (
        r"didn't match pod topology spread constraints",
        "its topology spread constraints leave no node",
        "kubectl -n {namespace} get pod {name} -o jsonpath='{{.spec.topologySpreadConstraints}}'   # relax them",
    ),
    (
        r"didn't have free ports",
        "another pod holds the host port that it asks for",
        "kubectl -n {namespace} get pod {name} -o yaml | grep hostPort   # do without, or use another",
    ),
    (
        r"Too many pods",
        "the nodes that suit it run as many pods as they may",
        "kubectl get nodes -o custom-columns=NAME:.metadata.name,PODS:.status.allocatable.pods   # end pods, or add a node",
    ),
)


def said(pod: dict[str, Any], message: str) -> tuple[str, str] | None:
    """Cause and fix by the scheduler's words, or None where they name none of the table's."""
    place = {"namespace": pod["metadata"]["namespace"], "name": pod["metadata"]["name"]}
    for pattern, cause, fix in _WORDS:
        if re.search(pattern, message):
            return cause, fix.format(**place)
    return None


def short_of(message: str) -> list[str]:
    """The resources that the scheduler calls insufficient."""
    return list(dict.fromkeys(re.findall(r"Insufficient ([\w./-]*\w)", message)))
