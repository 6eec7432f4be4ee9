"""Pods that wait, cannot pull, are refused, or train with too little shared memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from .findings import CannotLook, Finding, each
from .scheduling import why_pending
from .world import World

__all__ = ["image_pull", "pending", "pod_security", "quota", "train_shm"]

_PULL = ("ImagePullBackOff", "ErrImagePull", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable")
_TRAIN = "haechi.components.train"
_SMALL = 64 * 2**20  # bytes of /dev/shm that a container runtime gives
_BUS_ERROR = 135  # 128 + SIGBUS: what a write beyond /dev/shm's end becomes
_UNITS = {"": 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "k": 10**3, "M": 10**6, "G": 10**9}
_INITIALIZER_FIX = (
    "kubectl patch clusterstoragecontainer default --type=merge "
    "--patch-file=manifests/examples/clusterstoragecontainer-patch.yaml"
)
_RESTRICTED = (
    "securityContext: {runAsNonRoot: true, runAsUser: 1000, allowPrivilegeEscalation: false, "
    "capabilities: {drop: [ALL]}, seccompProfile: {type: RuntimeDefault}}   # on the containers that it names"
)


def pending(world: World) -> list[Finding]:
    """Pods that the scheduler places nowhere: no such resource, selectors, taints, or everything is taken."""

    def look(namespace: str) -> list[Finding]:
        found = []
        for pod in world.objects(namespace, "pods", query="fieldSelector=status.phase%3DPending"):
            condition = _condition(pod, "PodScheduled")
            if condition.get("status") == "False":
                message = str(condition.get("message") or condition.get("reason") or "no reason was given")
                cause, fix = why_pending(pod, _nodes(world), message)
                found.append(Finding(f"{_name(pod)} is Pending: {message}", cause, fix))
        return found

    return each(_namespaces(world), look)


def image_pull(world: World) -> list[Finding]:
    """Containers that wait for an image that cannot be pulled."""

    def look(namespace: str) -> list[Finding]:
        return [
            _pull_finding(pod, container["image"], waiting)
            for pod in world.objects(namespace, "pods")
            for container in _container_statuses(pod)
            if (waiting := (container.get("state") or {}).get("waiting") or {}).get("reason") in _PULL
        ]

    return each(_namespaces(world), look)


def train_shm(world: World) -> list[Finding]:
    """Training pods whose /dev/shm is the 64 MiB that a container gets without a volume."""
    found = []
    for pod in world.objects(world.aim.namespace, "pods"):
        container = next((item for item in pod["spec"]["containers"] if _trains(item)), None)
        if container is None or (pod.get("status") or {}).get("phase") == "Succeeded":
            continue
        small = _small_shm(pod, container)
        if small:
            killed = ", and it was killed by a bus error" if _bus_error(pod) else ""
            found.append(
                Finding(
                    f"{_name(pod)} trains with {small} of /dev/shm{killed}",
                    "data loader processes hand images over in shared memory; a pod without a memory volume there has 64 MiB",
                    "haechi compile   # the pipeline mounts one; then submit it again\n"
                    "volumes: [{name: shm, emptyDir: {medium: Memory}}] and "
                    "volumeMounts: [{name: shm, mountPath: /dev/shm}]   # in a pod of your own",
                )
            )
    return found


def pod_security(world: World) -> list[Finding]:
    """Pods that Pod Security admission refused, so that nothing is there to look at."""

    def judge(where: str, message: str) -> list[Finding]:
        refused = re.search(r'violates PodSecurity "([^":]+)[^"]*": (.*)', message, re.DOTALL)
        if not refused:
            return []
        cause = f"the namespace enforces Pod Security {refused[1]!r}, and the pod asks for more: {refused[2][:400]}"
        fix = _INITIALIZER_FIX if "storage-initializer" in message else _RESTRICTED
        return [Finding(f"{where} makes no pods", cause, fix)]

    return _refusals(world, judge)


def quota(world: World) -> list[Finding]:
    """Pods that a ResourceQuota refused."""

    def judge(where: str, message: str) -> list[Finding]:
        refused = re.search(r"(?:exceeded|failed) quota: ([^,:]+).*", message, re.DOTALL)
        if not refused:
            return []
        namespace = where.split()[1].split("/")[0]
        fix = f"kubectl -n {namespace} describe resourcequota {refused[1]}   # raise it, ask for less, or end what uses it"
        return [Finding(f"{where} makes no pods", refused[0][:400], fix)]

    return _refusals(world, judge)


def _refusals(world: World, judge: Callable[[str, str], list[Finding]]) -> list[Finding]:
    """Judge who could not make a pod (`ReplicaSet namespace/name`), in the API server's words."""

    def look(place: tuple[str, Callable[[World, str], Iterator[tuple[str, str]]]]) -> list[Finding]:
        namespace, source = place
        said = {who.replace(" ", f" {namespace}/", 1): message for who, message in source(world, namespace)}
        return [finding for who, message in said.items() for finding in judge(who, message)]

    sources = (_replica_sets, _events, _workflows)
    return each([(namespace, source) for namespace in _namespaces(world) for source in sources], look)


def _replica_sets(world: World, namespace: str) -> Iterator[tuple[str, str]]:
    for item in world.objects(namespace, "replicasets", "apps/v1"):
        yield f"ReplicaSet {item['metadata']['name']}", str(_condition(item, "ReplicaFailure").get("message", ""))


def _events(world: World, namespace: str) -> Iterator[tuple[str, str]]:
    for item in world.objects(namespace, "events", query="fieldSelector=reason%3DFailedCreate"):
        owner = item["involvedObject"]
        # Events stay an hour, also when the fault is gone; a ReplicaSet tells by a condition that ends with it.
        if owner.get("kind") != "ReplicaSet":
            yield f"{owner.get('kind')} {owner.get('name')}", str(item.get("message", ""))


def _workflows(world: World, namespace: str) -> Iterator[tuple[str, str]]:
    for item in world.objects(namespace, "workflows", "argoproj.io/v1alpha1"):
        for node in _failed_nodes(item):
            yield f"Workflow {item['metadata']['name']}", str(node.get("message", ""))


def _failed_nodes(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    status = workflow.get("status") or {}
    if status.get("phase") == "Succeeded":
        return []
    nodes = (status.get("nodes") or {}).values()
    return [node for node in nodes if node.get("type") == "Pod" and node.get("message")]


def _pull_finding(pod: dict[str, Any], image: str, waiting: dict[str, Any]) -> Finding:
    said = str(waiting.get("message") or waiting.get("reason"))
    namespace, low = pod["metadata"]["namespace"], said.lower()
    override = "haechi submit … --set steps_image=REGISTRY/haechi/steps:TAG --set train_image=REGISTRY/haechi/train:TAG"
    if _served(pod):
        override = f"newName: REGISTRY/{image.split(':')[0]}   # in images: of your overlay, then kubectl apply -k"
    if waiting.get("reason") == "InvalidImageName":
        cause, fix = f"{image!r} is no image name", override
    elif waiting.get("reason") == "ErrImageNeverPull":
        cause, fix = (
            "the node has no such image, and imagePullPolicy forbids to pull it",
            f"kind load docker-image {image}",
        )
    elif any(
        word in low for word in ("unauthorized", "denied", "authentication required", "no basic auth", "forbidden")
    ):
        cause = "the registry wants credentials that the pod has not, or there is no such repository"
        account = pod["spec"].get("serviceAccountName", "default")
        fix = (
            f"kubectl -n {namespace} create secret docker-registry registry --docker-server=… --docker-username=…\n"
            f"kubectl -n {namespace} patch serviceaccount {account} "
            """-p '{"imagePullSecrets": [{"name": "registry"}]}'"""
        )
    elif any(word in low for word in ("not found", "manifest unknown", "name unknown", "notfound")):
        cause, fix = (
            "the registry has no such repository or tag",
            f"make images REGISTRY=… TAG=…   # then push; or {override}",
        )
    elif "x509" in low or "certificate" in low:
        cause, fix = (
            "the node does not trust the registry's certificate",
            "Give the nodes the registry's CA, then delete the pod.",
        )
    elif any(word in low for word in ("no such host", "timeout", "refused", "unreachable", "deadline")):
        cause, fix = "the node does not reach the registry", override + "   # a registry that the nodes reach"
    else:
        cause, fix = (
            "the node gives no reason that we know",
            f"kubectl -n {namespace} describe pod {pod['metadata']['name']}",
        )
    return Finding(f"{_name(pod)} cannot pull {image}: {said}", cause, fix)


def _small_shm(pod: dict[str, Any], container: dict[str, Any]) -> str:
    """How small /dev/shm is; empty where it is large enough."""
    mount = next((item for item in container.get("volumeMounts") or [] if item["mountPath"] == "/dev/shm"), None)  # noqa: S108
    if mount is None:
        return "64 MiB"
    volume: dict[str, Any] = next(
        (item for item in pod["spec"].get("volumes") or [] if item["name"] == mount["name"]), {}
    )
    limit = str((volume.get("emptyDir") or {}).get("sizeLimit") or "")
    number = re.fullmatch(r"(\d+)(Ki|Mi|Gi|k|M|G|)", limit)
    return limit if number and int(number[1]) * _UNITS[number[2]] <= _SMALL else ""


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


def _served(pod: dict[str, Any]) -> bool:
    return "serving.kserve.io/inferenceservice" in (pod["metadata"].get("labels") or {})


def _name(pod: dict[str, Any]) -> str:
    return f"pod {pod['metadata']['namespace']}/{pod['metadata']['name']}"


def _namespaces(world: World) -> list[str]:
    return list(dict.fromkeys([world.aim.namespace, world.aim.serving]))
