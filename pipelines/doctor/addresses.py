"""The Services that settings name: there, on that port, with a ready pod behind them."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from .findings import Finding, each
from .web import resolves
from .world import World

__all__ = ["place_of", "service_answers", "services_in_cluster"]

_KFP = "ml-pipeline"


@dataclass(frozen=True)
class _Address:
    """A Service that a URL names."""

    url: str
    name: str
    namespace: str
    port: int
    source: str


def services_in_cluster(world: World) -> list[Finding]:
    """The Services that settings name: there, on that port, with a ready pod behind them."""
    return each(_addresses(world), lambda address: _service(world, address))


def place_of(url: str, namespace: str) -> tuple[str, ...]:
    """What a URL names from inside a namespace: a Service and its port, else a host; equal for one place in two spellings."""
    address = _parse(url, namespace, "")
    host = url.partition("://")[2].partition("/")[0]
    return (address.name, address.namespace, str(address.port)) if address else (host,)


def service_answers(world: World, url: str, namespace: str, source: str) -> list[Finding]:
    """The Service that a URL names, if it names one: there, on that port, with a ready pod behind it.

    Args:
        world: what to look at.
        url: as it is written in `namespace`.
        namespace: of who asks.
        source: where the URL is set, in words.
    """
    address = _parse(url, namespace, source)
    return _service(world, address) if address else []


def _addresses(world: World) -> list[_Address]:
    """Services that the ConfigMaps name, and KFP's own; those outside the cluster are left to other checks."""
    aim = world.aim
    named = []
    for namespace, name in ((aim.namespace, aim.config_map), (aim.serving, "haechi-serving-settings")):
        data = world.config(namespace, name) or {}
        for key in ("HAECHI_S3_ENDPOINT", "MLFLOW_TRACKING_URI"):
            if data.get(key):
                named.append((data[key], namespace, f"{key} of ConfigMap {namespace}/{name}"))
    addresses = [address for entry in named if (address := _parse(*entry))]
    unique = list({(item.name, item.namespace, item.port): item for item in addresses}.values())
    kfp = _Address(f"http://{_KFP}.kubeflow:8888", _KFP, "kubeflow", 8888, "Kubeflow Pipelines")
    return [*unique, kfp]


def _parse(url: str, namespace: str, source: str) -> _Address | None:
    """The Service that a URL names from inside a namespace, or None where it names no Service."""
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        return None  # check `step-settings` tells
    if ":" in (parts.hostname or ""):
        return None  # an address of IPv6
    labels = (parts.hostname or "").removesuffix(".").removesuffix(".cluster.local").split(".")
    if len(labels) == 3 and labels[2] == "svc":
        labels = labels[:2]
    if len(labels) > 2 or not labels[0] or all(label.isdigit() for label in labels):
        return None
    return _Address(url, labels[0], labels[1] if len(labels) == 2 else namespace, port, source)


def _service(world: World, address: _Address) -> list[Finding]:
    where = f"Service {address.namespace}/{address.name}"
    path = f"/api/v1/namespaces/{address.namespace}/services/{address.name}"
    found = world.cluster.get(path)
    if found is None:
        if "." in (urlsplit(address.url).hostname or "") and resolves(address.url):
            return []  # a host outside the cluster with two labels in its name
        return [
            Finding(
                f"{where} does not exist, and {address.source} is {address.url}",
                "the name or the namespace in it is another, or that part is not installed",
                f"kubectl get services -A | grep -i {address.name.split('-')[0]}",
            )
        ]
    if found["spec"].get("type") == "ExternalName":
        return []
    ports = [item["port"] for item in found["spec"].get("ports") or []]
    if address.port not in ports:
        shown = ", ".join(map(str, ports)) or "none"
        fix = f"Write {address.url.rsplit(':', 1)[0] if address.url.count(':') > 1 else address.url}:{shown.split(',')[0]}"
        return [
            Finding(f"{where} has no port {address.port}, which {address.source} names", f"its ports: {shown}", fix)
        ]
    return _endpoints(world, address, where, found["spec"].get("selector") or {})


def _endpoints(world: World, address: _Address, where: str, selector: dict[str, str]) -> list[Finding]:
    query = f"labelSelector=kubernetes.io/service-name%3D{address.name}"
    slices = world.objects(address.namespace, "endpointslices", "discovery.k8s.io/v1", query)
    for item in slices:
        for endpoint in item.get("endpoints") or []:
            if (endpoint.get("conditions") or {}).get("ready") is not False:
                return []
    labels = ",".join(f"{key}={value}" for key, value in selector.items())
    pods = (
        f"kubectl -n {address.namespace} describe pods -l {labels}   # the last lines of each tell why"
        if labels
        else ""
    )
    return [
        Finding(
            f"{where} has no ready pod behind it ({address.source})",
            "its pods are not ready, not there, or its selector matches none",
            pods or f"kubectl -n {address.namespace} describe service {address.name}   # it selects no pods by itself",
        )
    ]
