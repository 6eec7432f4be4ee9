"""Pods that wait, cannot pull, are refused, or train with too little shared memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .findings import CannotLook, Finding, each, each_object
from .pulling import PULL_REASONS, why_not_pulled
from .scheduling import why_pending
from .world import World

__all__ = ["image_pull", "pending", "pod_security", "quota", "train_shm"]

_TRAIN = "haechi.components.train"
_SMALL = 64 * 2**20  # bytes of /dev/shm that a container runtime gives
_BUS_ERROR = 135  # 128 + SIGBUS: what a write beyond /dev/shm's end becomes
_INITIALIZER_FIX = (
    "kubectl patch clusterstoragecontainer default --type=merge "
    "--patch-file=manifests/examples/clusterstoragecontainer-patch.yaml"
)
_RESTRICTED = (
    "securityContext: {runAsNonRoot: true, runAsUser: 1000, allowPrivilegeEscalation: false, "
    "capabilities: {drop: [ALL]}, seccompProfile: {type: RuntimeDefault}}   # on the containers that it names"
)


def pending(world: World) -> list[Finding]:
    """Pods that the scheduler places nowhere: gates, resources, selectors, taints, volumes, or everything is taken."""

    def judge(pod: dict[str, Any]) -> list[Finding]:
        condition = _condition(pod, "PodScheduled")
        if condition.get("status") != "False":
            return []
        message = str(condition.get("message") or condition.get("reason") or "no reason was given")
        cause, fix = why_pending(pod, _nodes(world), message)
        return [Finding(f"{_name(pod)} is Pending: {message}", cause, fix)]

    query = "fieldSelector=status.phase%3DPending"
    return each(_namespaces(world), lambda name: each_object(world.objects(name, "pods", query=query), judge))


def image_pull(world: World) -> list[Finding]:
    """Containers that wait for an image that cannot be pulled."""

    def judge(pod: dict[str, Any]) -> list[Finding]:
        found = []
        for container in _container_statuses(pod):
            waiting = (container.get("state") or {}).get("waiting") or {}
            image, reason = container["image"], waiting.get("reason")
            if reason in PULL_REASONS:
                said = str(waiting.get("message") or reason)
                cause, fix = why_not_pulled(pod, image, reason, said)
                found.append(Finding(f"{_name(pod)} cannot pull {image}: {said}", cause, fix))
        return found

    return each(_namespaces(world), lambda name: each_object(world.objects(name, "pods"), judge))


def train_shm(world: World) -> list[Finding]:
    """Training pods whose /dev/shm is the 64 MiB that a container gets without a volume."""

    def judge(pod: dict[str, Any]) -> list[Finding]:
        container = next((item for item in pod["spec"]["containers"] if _trains(item)), None)
        if container is None or (pod.get("status") or {}).get("phase") == "Succeeded":
            return []
        small = _small_shm(pod, container)
        if not small:
            return []
        killed = ", and it was killed by a bus error" if _bus_error(pod) else ""
        return [
            Finding(
                f"{_name(pod)} trains with {small} of /dev/shm{killed}",
                "data loader processes hand images over in shared memory; a pod without a memory volume there has 64 MiB",
                "haechi compile   # the pipeline mounts one; then submit it again\n"
                "volumes: [{name: shm, emptyDir: {medium: Memory}}] and "
                "volumeMounts: [{name: shm, mountPath: /dev/shm}]   # in a pod of your own",
            )
        ]

    return each_object(world.objects(world.aim.namespace, "pods"), judge)


def pod_security(world: World) -> list[Finding]:
    """Pods that Pod Security admission refused, so that nothing is there to look at, at the level that still holds."""

    def judge(where: str, message: str) -> list[Finding]:
        refused = re.search(r'violates PodSecurity "([^":]+)[^"]*": (.*)', message, re.DOTALL)
        if not refused or _enforced(world, where.split()[1].split("/")[0]) not in ("", refused[1]):
            return []
        cause = f"the namespace enforces Pod Security {refused[1]!r}, and the pod asks for more: {refused[2][:400]}"
        fix = _INITIALIZER_FIX if "storage-initializer" in message else _RESTRICTED
        return [Finding(f"{where} makes no pods", cause, fix)]

    return _refusals(world, judge)


def _enforced(world: World, namespace: str) -> str:
    """The level that a namespace's label enforces now; empty where it has none, or we may not see it."""
    try:
        found = world.cluster.get(f"/api/v1/namespaces/{namespace}") or {}
    except CannotLook:
        return ""
    labels = (found.get("metadata") or {}).get("labels") or {}
    return str(labels.get("pod-security.kubernetes.io/enforce", ""))


def quota(world: World) -> list[Finding]:
    """Pods that a ResourceQuota refused, and would refuse again."""

    def judge(where: str, message: str) -> list[Finding]:
        refused = re.search(r"(?:exceeded|failed) quota: ([^,:]+).*", message, re.DOTALL)
        if not refused:
            return []
        namespace = where.split()[1].split("/")[0]
        if not _still_refuses(world, namespace, refused[1], message):
            return []
        fix = f"kubectl -n {namespace} describe resourcequota {refused[1]}   # raise it, ask for less, or end what uses it"
        return [Finding(f"{where} makes no pods", refused[0][:400], fix)]

    return _refusals(world, judge)


def _still_refuses(world: World, namespace: str, name: str, message: str) -> bool:
    """Whether a quota is as narrow now as when it refused; messages stay when it was raised, or what used it has ended."""
    from kubernetes.utils import parse_quantity

    try:
        found = world.cluster.get(f"/api/v1/namespaces/{namespace}/resourcequotas/{name}")
    except CannotLook:
        return True
    if found is None:
        return False
    requested = re.search(r"requested: (.*?), used: ", message, re.DOTALL)
    if not requested:
        return True  # it wants requests or limits where none are given
    hard = (found.get("spec") or {}).get("hard") or {}
    used = (found.get("status") or {}).get("used") or {}
    asked = [entry.partition("=") for entry in requested[1].split(",")]
    return any(
        resource in hard
        and parse_quantity(amount) + parse_quantity(used.get(resource, "0")) > parse_quantity(hard[resource])
        for resource, _, amount in asked
    )


def _refusals(world: World, judge: Callable[[str, str], list[Finding]]) -> list[Finding]:
    """Judge who could not make a pod (`ReplicaSet namespace/name`), in the API server's words."""

    def look(place: tuple[str, _Source]) -> list[Finding]:
        namespace, source = place

        def judge_one(item: dict[str, Any]) -> list[Finding]:
            kind, name, messages = source.refused(item)
            found = [finding for message in messages for finding in judge(f"{kind} {namespace}/{name}", message)]
            return found[-1:]  # one object tells the same of each of its pods

        return each_object(world.objects(namespace, source.kind, source.group, source.query), judge_one)

    return each([(namespace, source) for namespace in _namespaces(world) for source in _SOURCES], look)


def _of_replica_set(item: dict[str, Any]) -> tuple[str, str, list[str]]:
    return "ReplicaSet", item["metadata"]["name"], [str(_condition(item, "ReplicaFailure").get("message", ""))]


def _of_event(item: dict[str, Any]) -> tuple[str, str, list[str]]:
    owner = item["involvedObject"]
    # Events stay an hour, also when the fault is gone; a ReplicaSet tells by a condition that ends with it.
    messages = [] if owner.get("kind") == "ReplicaSet" else [str(item.get("message", ""))]
    return str(owner.get("kind")), str(owner.get("name")), messages


def _of_workflow(item: dict[str, Any]) -> tuple[str, str, list[str]]:
    return "Workflow", item["metadata"]["name"], [str(node.get("message", "")) for node in _failed_nodes(item)]


@dataclass(frozen=True)
class _Source:
    """Objects that tell of refused pods; `refused` reads kind, name and messages from one."""

    kind: str
    group: str
    query: str
    refused: Callable[[dict[str, Any]], tuple[str, str, list[str]]]


_SOURCES = (
    _Source("replicasets", "apps/v1", "", _of_replica_set),
    _Source("events", "", "fieldSelector=reason%3DFailedCreate", _of_event),
    _Source("workflows", "argoproj.io/v1alpha1", "", _of_workflow),
)


def _failed_nodes(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    status = workflow.get("status") or {}
    if status.get("phase") == "Succeeded":
        return []
    nodes = (status.get("nodes") or {}).values()
    return [node for node in nodes if node.get("type") == "Pod" and node.get("message")]


def _small_shm(pod: dict[str, Any], container: dict[str, Any]) -> str:
    """How small /dev/shm is; empty where it is large enough."""
    from kubernetes.utils import parse_quantity

    mount = next((item for item in container.get("volumeMounts") or [] if item["mountPath"] == "/dev/shm"), None)  # noqa: S108
    if mount is None:
        return "64 MiB"
    volume: dict[str, Any] = next(
        (item for item in pod["spec"].get("volumes") or [] if item["name"] == mount["name"]), {}
    )
    limit = str((volume.get("emptyDir") or {}).get("sizeLimit") or "")
    return limit if limit and parse_quantity(limit) <= _SMALL else ""


def _trains(container: dict[str, Any]) -> bool:
    return any(_TRAIN in word for word in [*(container.get("command") or []), *(container.get("args") or [])])


def _bus_error(pod: dict[str, Any]) -> bool:
    for container in _container_statuses(pod):
        for state in (container.get("state") or {}, container.get("lastState") or {}):
            if (state.get("terminated") or {}).get("exitCode") == _BUS_ERROR:
                return True
    return False


def _container_statuses(pod: dict[str, Any]) -> list[dict[str, Any]]:
    status = pod.get("status") or {}
    return [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]


def _condition(item: dict[str, Any], kind: str) -> dict[str, Any]:
    conditions = (item.get("status") or {}).get("conditions") or []
    return next((entry for entry in conditions if entry.get("type") == kind), {})


def _nodes(world: World) -> list[dict[str, Any]] | None:
    """The nodes, or None where we may not see them: then the scheduler's words must do."""
    try:
        return world.cluster.collection("/api/v1/nodes")
    except CannotLook:
        return None


def _name(pod: dict[str, Any]) -> str:
    return f"pod {pod['metadata']['namespace']}/{pod['metadata']['name']}"


def _namespaces(world: World) -> list[str]:
    return list(dict.fromkeys([world.aim.namespace, world.aim.serving]))
