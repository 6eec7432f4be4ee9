"""Why the scheduler places a pod nowhere: compared with the nodes, and read from the scheduler's own words."""

from __future__ import annotations

import re
from collections.abc import Iterable
from decimal import Decimal
from typing import Any

from .scheduler_words import said, short_of

__all__ = ["why_pending"]

Node = dict[str, Any]
_BLOCKING = ("NoSchedule", "NoExecute")
_STATE = "node.kubernetes.io/"  # taints that Kubernetes itself sets: no toleration mends what they tell


def why_pending(pod: dict[str, Any], nodes: list[Node] | None, message: str) -> tuple[str, str]:
    """Cause and fix for a pod that waits for a node.

    Args:
        pod: the pod.
        nodes: all nodes, or None where we may not list them.
        message: the scheduler's, from the condition PodScheduled.
    """
    gates = [str(gate["name"]) for gate in pod["spec"].get("schedulingGates") or []]
    if gates:
        return _gated(pod, gates)
    if "persistentvolumeclaim" in message.lower():
        namespace = pod["metadata"]["namespace"]
        return "a volume that it mounts is not there or not bound", f"kubectl -n {namespace} describe pvc"
    if nodes is None:
        return _from_message(pod, message)
    if not nodes:
        return "the cluster has no node", "kubectl get nodes   # join one, or let the autoscaler"
    wanted = _accelerators(pod)
    for resource, count in wanted.items():
        missing = _missing(pod, resource, count, nodes)
        if missing:
            return missing
    suited = [node for node in nodes if all(_offers(node, name) >= count for name, count in wanted.items())]
    selected = [node for node in suited if not _unmet(pod, node)]
    if not selected:
        return _selector(pod, suited)
    ready = [node for node in selected if not any(_state_taint(taint) for taint in _taints(node))]
    if not ready:
        names = ", ".join(node["metadata"]["name"] for node in selected)
        return (
            f"the nodes that suit it are cordoned or not ready: {names}",
            f"kubectl describe node {names.split(',')[0]}",
        )
    tolerated = [node for node in ready if not _untolerated(pod, node)]
    if not tolerated:
        return _taint(pod, ready)
    return _too_large(pod, tolerated) or said(pod, message) or _taken(wanted, tolerated, message)


def _gated(pod: dict[str, Any], gates: list[str]) -> tuple[str, str]:
    namespace = pod["metadata"]["namespace"]
    cause = f"the scheduler does not look at it before its gates are lifted: {', '.join(gates)}"
    if any(gate.startswith("kueue.x-k8s.io/") for gate in gates):
        cause += " (Kueue: its queue has no room for it, or does not exist)"
        return cause, f"kubectl -n {namespace} get workloads,localqueues   # then describe its workload"
    return (
        cause,
        f"kubectl -n {namespace} describe pod {pod['metadata']['name']}   # whoever sets the gate must lift it",
    )


def _too_large(pod: dict[str, Any], nodes: list[Node]) -> tuple[str, str] | None:
    """More CPU or memory than any of the nodes has, even when nothing else runs there."""
    for resource, parameter in (("cpu", "train_cpu"), ("memory", "train_memory")):
        asked = _asked(pod, resource)
        most = max((str(_allocatable(node).get(resource, "0")) for node in nodes), key=_quantity)
        if asked > _quantity(most):
            amount = f"{asked.normalize():f} CPUs" if resource == "cpu" else f"{asked / 2**30:.1f}Gi of memory"
            fix = f"haechi submit … --set {parameter}=…   # below {most}; the node's own daemons take a part"
            if _serves(pod):
                fix = f"resources.requests.{resource}: …   # below {most}, in ServingRuntime haechi-yolo's container"
            return f"it asks for {amount}, and no node that suits it has more than {most}", fix
    return None


def _taken(wanted: dict[str, int], nodes: list[Node], message: str) -> tuple[str, str]:
    """The nodes would do, were they empty; the scheduler tells which resource is short."""
    short = short_of(message)
    shown = [f"{wanted[name]} {name}" if name in wanted else name for name in short or wanted]
    names = ", ".join(node["metadata"]["name"] for node in nodes[:3])
    return (
        f"other pods hold what it asks for ({', '.join(shown) or 'CPU and memory'}) on the nodes that suit it: {names}",
        f"kubectl describe node {nodes[0]['metadata']['name']}   # see Allocated resources; wait, end a pod, or add a node",
    )


def _missing(pod: dict[str, Any], resource: str, count: int, nodes: list[Node]) -> tuple[str, str] | None:
    most = max(_offers(node, resource) for node in nodes)
    if most == 0:
        others = sorted({name for node in nodes for name in _allocatable(node) if "/" in name and _offers(node, name)})
        if others:
            return f"no node offers {resource}; there is {', '.join(others)}", _setting(pod, "gpu_type", others[0])
        return (
            f"no node offers {resource}: no such device, or its device plugin does not run",
            "kubectl get nodes -o custom-columns=NAME:.metadata.name,GPU:.status.allocatable.nvidia\\.com/gpu   "
            "# then install the plugin, or train with --set gpu_count=0",
        )
    if most < count:
        return f"it asks for {count} {resource}, and no node has more than {most}", _setting(
            pod, "gpu_count", str(most)
        )
    return None


def _selector(pod: dict[str, Any], nodes: list[Node]) -> tuple[str, str]:
    """No node of those that have the resources matches the selector: say which keys, and what nodes have instead."""
    unmet = {key: value for node in nodes for key, value in _unmet(pod, node).items()}
    parts = []
    known: dict[str, str] = {}
    for key, value in sorted(unmet.items()):
        values = sorted({str(label) for node in nodes if (label := _labels(node).get(key)) is not None})
        parts.append(f"{key}={value} (nodes have {', '.join(values) if values else 'no such label'})")
        if len(values) == 1:
            known[key] = values[0]
    cause = f"no node that could take it matches its node selector or affinity: {'; '.join(parts)}"
    text = ", ".join(f"{key}: '{value}'" for key, value in known.items())
    if not text:
        label = next(iter(unmet), "KEY")
        return cause, (
            f"kubectl label node {nodes[0]['metadata']['name']} {label}={unmet.get(label, 'VALUE')}   "
            "# if that node is meant; else " + _setting(pod, "node_selector", "{}")
        )
    return cause, _setting(pod, "node_selector", "{" + text + "}")


def _taint(pod: dict[str, Any], nodes: list[Node]) -> tuple[str, str]:
    node = min(nodes, key=lambda item: len(_untolerated(pod, item)))
    taints = _untolerated(pod, node)
    shown = ", ".join(f"{item['key']}={item.get('value', '')}:{item['effect']}" for item in taints)
    entries = ", ".join(_toleration(item) for item in taints)
    return (
        f"the nodes that suit it are tainted, and it does not tolerate {shown}",
        _setting(pod, "tolerations", f"[{entries}]"),
    )


def _toleration(taint: dict[str, Any]) -> str:
    if taint.get("value"):
        return f"{{key: {taint['key']}, operator: Equal, value: '{taint['value']}', effect: {taint['effect']}}}"
    return f"{{key: {taint['key']}, operator: Exists, effect: {taint['effect']}}}"


def _setting(pod: dict[str, Any], parameter: str, value: str) -> str:
    """How that is set: by a parameter of the pipeline, or in the runtime of a predictor."""
    if not _serves(pod):
        return f'haechi submit … --set "{parameter}={value}"'
    field = {"node_selector": "nodeSelector", "tolerations": "tolerations"}.get(parameter)
    if field:
        return f"{field}: {value}   # under spec of ServingRuntime haechi-yolo (manifests/components/gpu)"
    return f"resources.limits of ServingRuntime haechi-yolo's container: {parameter} {value} (manifests/components/gpu)"


def _from_message(pod: dict[str, Any], message: str) -> tuple[str, str]:
    """Nodes cannot be seen: the scheduler names the reasons, in the order of what to mend first."""
    taints = re.findall(r"untolerated taint\(?s?\)? \{([^:}]+): ?([^}]*)\}", message)
    if taints:
        entries = [{"key": key, "value": value, "effect": "NoSchedule"} for key, value in taints]
        if all(key.startswith(_STATE) for key, _ in taints):
            return "the nodes are cordoned or not ready", "kubectl get nodes"
        own = [item for item in entries if not item["key"].startswith(_STATE)]
        names = ", ".join(item["key"] for item in own)
        return f"it does not tolerate the taint {names}", _setting(
            pod, "tolerations", f"[{', '.join(map(_toleration, own))}]"
        )
    if "affinity/selector" in message or "node selector" in message:
        chosen = ", ".join(f"{key}={value}" for key, value in (pod["spec"].get("nodeSelector") or {}).items())
        return f"no node matches its node selector or affinity ({chosen or 'affinity'})", _setting(
            pod, "node_selector", "{}"
        )
    told, short = said(pod, message), short_of(message)
    if told:
        return told
    if short:
        return (
            f"no node has enough {', '.join(short)}: none there at all, or all taken",
            "Ask who may list nodes: kubectl describe nodes | grep -A8 Allocatable",
        )
    return "the scheduler says no more than that", (
        f"kubectl -n {pod['metadata']['namespace']} describe pod {pod['metadata']['name']}"
    )


def _accelerators(pod: dict[str, Any]) -> dict[str, int]:
    """Extended resources (those with a slash, such as nvidia.com/gpu) that the pod's containers ask for, together."""
    wanted: dict[str, int] = {}
    for container in pod["spec"]["containers"]:
        resources = container.get("resources") or {}
        both = {**(resources.get("requests") or {}), **(resources.get("limits") or {})}
        for name, count in both.items():
            if "/" in name and str(count).isdigit():
                wanted[name] = wanted.get(name, 0) + int(count)
    return {name: count for name, count in wanted.items() if count}


def _asked(pod: dict[str, Any], resource: str) -> Decimal:
    """What the pod asks of a resource: its containers together, or its largest init container."""

    def amount(container: dict[str, Any]) -> Decimal:
        resources = container.get("resources") or {}
        both = {**(resources.get("limits") or {}), **(resources.get("requests") or {})}
        return _quantity(str(both.get(resource, "0")))

    spec = pod["spec"]
    return max(sum(map(amount, spec["containers"]), Decimal(0)), *map(amount, spec.get("initContainers") or [{}]))


def _quantity(text: str) -> Decimal:
    from kubernetes.utils import parse_quantity

    return Decimal(parse_quantity(text))


def _serves(pod: dict[str, Any]) -> bool:
    return "serving.kserve.io/inferenceservice" in (pod["metadata"].get("labels") or {})


def _allocatable(node: Node) -> dict[str, Any]:
    found: dict[str, Any] = (node.get("status") or {}).get("allocatable") or {}
    return found


def _offers(node: Node, resource: str) -> int:
    text = str(_allocatable(node).get(resource, "0"))
    return int(text) if text.isdigit() else 0


def _labels(node: Node) -> dict[str, str]:
    found: dict[str, str] = node["metadata"].get("labels") or {}
    return found


def _taints(node: Node) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = node["spec"].get("taints") or []
    return found


def _state_taint(taint: dict[str, Any]) -> bool:
    return str(taint["key"]).startswith(_STATE) and taint["effect"] in _BLOCKING


def _untolerated(pod: dict[str, Any], node: Node) -> list[dict[str, Any]]:
    tolerations = pod["spec"].get("tolerations") or []
    return [
        taint
        for taint in _taints(node)
        if taint["effect"] in _BLOCKING and not any(_tolerates(item, taint) for item in tolerations)
    ]


def _tolerates(toleration: dict[str, Any], taint: dict[str, Any]) -> bool:
    if toleration.get("effect") not in (None, "", taint["effect"]):
        return False
    if toleration.get("operator") == "Exists":
        return toleration.get("key") in (None, "", taint["key"])
    return toleration.get("key") == taint["key"] and (toleration.get("value") or "") == (taint.get("value") or "")


def _unmet(pod: dict[str, Any], node: Node) -> dict[str, str]:
    """What the pod's selector and required affinity ask of a node's labels and the node has not: key → wanted."""
    labels = _labels(node)
    wanted = {
        key: value for key, value in (pod["spec"].get("nodeSelector") or {}).items() if labels.get(key) != str(value)
    }
    affinity = ((pod["spec"].get("affinity") or {}).get("nodeAffinity") or {}).get(
        "requiredDuringSchedulingIgnoredDuringExecution"
    ) or {}
    terms = [dict(_unmet_term(term, labels)) for term in affinity.get("nodeSelectorTerms") or []]
    if terms and all(terms):  # terms are alternatives: the nearest one tells most
        nearest: dict[str, str] = min(terms, key=len)
        wanted |= nearest
    return wanted


def _unmet_term(term: dict[str, Any], labels: dict[str, str]) -> Iterable[tuple[str, str]]:
    for rule in term.get("matchExpressions") or []:
        key, operator, values = rule["key"], rule["operator"], [str(value) for value in rule.get("values") or []]
        have = labels.get(key)
        met = {
            "In": have in values,
            "NotIn": have not in values,
            "Exists": have is not None,
            "DoesNotExist": have is None,
            "Gt": have is not None and have.isdigit() and int(have) > int(values[0] if values else 0),
            "Lt": have is not None and have.isdigit() and int(have) < int(values[0] if values else 0),
        }.get(operator, True)
        if not met:
            yield key, f"{operator} {'|'.join(values)}".strip()
