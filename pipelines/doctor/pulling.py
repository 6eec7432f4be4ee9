"""Why a node does not get an image, read from what kubelet and the container runtime say."""

from __future__ import annotations

import re
from typing import Any

__all__ = ["PULL_REASONS", "why_not_pulled"]

PULL_REASONS = ("ImagePullBackOff", "ErrImagePull", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable")
_LOGIN = (
    "kubectl -n {namespace} create secret docker-registry registry --docker-server=… --docker-username=…\n"
    "kubectl -n {namespace} patch serviceaccount {account} "
    """-p '{{"imagePullSecrets": [{{"name": "registry"}}]}}'"""
)
# Words (of the reason, `ours` or `theirs` for the image, or of the message in lower case) → cause, fix. The first that is
# found counts: a runtime puts the special before the general, as in `no match for platform in manifest: not found`.
_CAUSES: tuple[tuple[str, str, str], ...] = (
    ("^InvalidImageName", "{image!r} is no image name", "{override}"),
    (
        "^ErrImageNeverPull",
        "the node has no such image, and imagePullPolicy forbids to pull it",
        "kind load docker-image {image}",
    ),
    (
        "no match for platform|no matching manifest",
        "the image has no variant for the node's kind of processor",
        "kubectl get nodes -L kubernetes.io/arch   # then build the image for it too, or select nodes that suit the image",
    ),
    (
        "toomanyrequests|too many requests|rate limit",
        "the registry limits how often an address or account may pull",
        _LOGIN + "\n{override}   # or a registry of your own",
    ),
    (
        "no space left",
        "the disk of node {node} is full",
        "kubectl describe node {node}   # see DiskPressure; free space there (crictl rmi --prune), or use another node",
    ),
    (
        "server gave http response to https client",
        "the registry speaks plain HTTP, and the node wants TLS",
        "Give the registry TLS, or allow HTTP on the nodes: "
        '/etc/containerd/certs.d/REGISTRY/hosts.toml with server = "http://REGISTRY"',
    ),
    (
        r"^\S+ ours [\s\S]*(unauthorized|denied|authentication required|not found|(manifest|name) unknown)",
        "our images are in no registry until you push them there, and not under this name",
        "make images   # then: kind load docker-image {image}\n"
        "make images REGISTRY=… TAG=…   # then push them; {override}",
    ),
    (
        "unauthorized|denied|authentication required|no basic auth|forbidden",
        "the registry wants credentials that the pod has not, or there is no such repository",
        _LOGIN,
    ),
    (
        "no such host|server misbehaving|timeout|refused|unreachable|deadline|connection reset",
        "the node does not reach the registry",
        "{override}   # a registry that the nodes reach",
    ),
    (
        "x509|certificate",
        "the node does not trust the registry's certificate",
        "Give the nodes the registry's CA, then delete the pod.",
    ),
    (
        "not found|manifest unknown|name unknown|notfound",
        "the registry has no such repository or tag",
        "make images REGISTRY=… TAG=…   # then push; or {override}",
    ),
    ("", "the node gives no reason that we know", "kubectl -n {namespace} describe pod {pod}"),
)
# The names that pipeline and manifests begin with, without a registry: kubelet then asks docker.io.
_OURS = re.compile(r"(docker\.io/)?haechi/")


def why_not_pulled(pod: dict[str, Any], image: str, reason: str, said: str) -> tuple[str, str]:
    """Cause and fix for a container that waits for its image.

    Args:
        pod: the pod.
        image: its name.
        reason: one of PULL_REASONS.
        said: the message beside it.
    """
    ours = bool(_OURS.match(image))
    words = f"{reason} {'ours' if ours else 'theirs'} {said.lower()}"
    cause, fix = next((cause, fix) for pattern, cause, fix in _CAUSES if re.search(pattern, words))
    place = {
        "image": image.removeprefix("docker.io/") if ours else image,
        "namespace": pod["metadata"]["namespace"],
        "pod": pod["metadata"]["name"],
        "account": pod["spec"].get("serviceAccountName", "default"),
        "node": pod["spec"].get("nodeName", "NODE"),
        "override": _override(pod, image),
    }
    return cause.format(**place), fix.format(**place)


def _override(pod: dict[str, Any], image: str) -> str:
    """How another image is named: for a predictor in the overlay, for a step when it is submitted."""
    if "serving.kserve.io/inferenceservice" in (pod["metadata"].get("labels") or {}):
        return f"newName: REGISTRY/{image.split(':')[0]}   # in images: of your overlay, then kubectl apply -k"
    return "haechi submit … --set steps_image=REGISTRY/haechi/steps:TAG --set train_image=REGISTRY/haechi/train:TAG"
