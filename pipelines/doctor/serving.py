"""KServe: installed, a mode in which canaries work, a runtime for the format, and models that load."""

from __future__ import annotations

import json
from typing import Any

from .findings import CannotLook, Finding
from .world import World

__all__ = ["canary_mode", "kserve_installed", "model_load", "runtime"]

_GROUP, _GATEWAY, _KNATIVE = "serving.kserve.io", "gateway.networking.k8s.io", "serving.knative.dev"
_MODE = "serving.kserve.io/deploymentMode"
_FORMAT = "yolo-onnx"
_STANDARD = ("Standard", "RawDeployment")
_KNATIVE_MODES = ("Knative", "Serverless")
_CONFIG = ("kserve", "inferenceservice-config")


def kserve_installed(world: World) -> list[Finding]:
    """The kind InferenceService is known."""
    if world.cluster.serves(_GROUP):
        return []
    fix = "Install KServe 0.20 or later (https://kserve.github.io/website), or keep target=none."
    return [Finding("the cluster knows no InferenceService", "KServe is not installed", fix)]


def canary_mode(world: World) -> list[Finding]:
    """Canaries in a mode that splits traffic: `canaryTrafficPercent` in Knative, `spec.canary` with Gateway API."""
    config = _kserve_config(world)
    found = []
    for service in _services(world):
        found += _canary(world, service, config)
    return found


def runtime(world: World) -> list[Finding]:
    """A runtime for every InferenceService's format, and none that Triton takes by itself."""
    services = _services(world)
    if not world.cluster.serves(_GROUP):
        return []
    known = world.objects(world.aim.serving, "servingruntimes", f"{_GROUP}/v1alpha1")
    unseen: CannotLook | None = None
    try:
        known = known + (world.cluster.collection(f"/apis/{_GROUP}/v1alpha1/clusterservingruntimes") or [])
    except CannotLook as error:
        unseen = error
    known = [item for item in known if not item["spec"].get("disabled")]
    found = [finding for service in services for finding in _runtime(world, service, known, unseen is None)]
    if not _supporting(known, _FORMAT) and not found and unseen is None:
        found.append(
            Finding(
                f"namespace {world.aim.serving} has no runtime for format {_FORMAT}",
                "ServingRuntime haechi-yolo was not applied there; KServe would refuse what deploy applies",
                f"kubectl -n {world.aim.serving} apply --server-side -k manifests/base/serving",
            )
        )
    if unseen is not None and not _supporting(known, _FORMAT):
        raise CannotLook(unseen.problem, unseen.remedy, found)
    return found


def model_load(world: World) -> list[Finding]:
    """InferenceServices whose model does not load, by KServe's own report."""
    found = []
    for service in _services(world):
        status = service.get("status") or {}
        model = status.get("modelStatus") or {}
        if model.get("transitionStatus") not in ("BlockedByFailedLoad", "InvalidSpec"):
            continue
        failure = model.get("lastFailureInfo") or {}
        said = str(failure.get("message") or failure.get("reason") or "no reason was given")
        cause, fix = _load_cause(world, service, said)
        found.append(Finding(f"{_name(service)} does not load its model: {said[:300]}", cause, fix))
    return found


def _load_cause(world: World, service: dict[str, Any], said: str) -> tuple[str, str]:
    namespace, low = service["metadata"]["namespace"], said.lower()
    uri = ((service["spec"].get("predictor") or {}).get("model") or {}).get("storageUri", "its storageUri")
    if any(word in low for word in ("accessdenied", "forbidden", "403", "invalidaccesskeyid", "signaturedoesnotmatch")):
        return "the store refuses the keys of KServe's storage initializer", (
            f"kubectl -n {namespace} get secret haechi-s3 -o yaml   # AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY"
        )
    if any(word in low for word in ("nosuchkey", "nosuchbucket", "404", "not found", "no such key", "does not exist")):
        return (
            f"{uri} is not in the store that the pod asks",
            "haechi run or submit again, or name a version that is there",
        )
    if any(word in low for word in ("connect", "timeout", "timed out", "resolve", "unreachable")):
        return "the pod does not reach the store: its endpoint is wrong, or a NetworkPolicy shuts it out", (
            f"kubectl -n {namespace} annotate secret haechi-s3 --overwrite serving.kserve.io/s3-endpoint=minio.minio:9000"
        )
    return "the runtime or the storage initializer refuses it", (
        f"kubectl -n {namespace} logs -l serving.kserve.io/inferenceservice={service['metadata']['name']} "
        "--all-containers --tail=50"
    )


def _canary(world: World, service: dict[str, Any], config: dict[str, Any]) -> list[Finding]:
    spec, namespace, name = service["spec"], service["metadata"]["namespace"], service["metadata"]["name"]
    share, split = (spec.get("predictor") or {}).get("canaryTrafficPercent"), spec.get("canary")
    mode = _mode(service, config)
    found = []
    if share not in (None, 100) and mode in _STANDARD:
        found.append(
            Finding(
                f"{_name(service)} has canaryTrafficPercent {share}, and all traffic goes to the new model",
                f"its mode is {mode}; KServe honours canaryTrafficPercent in mode Knative only, and says nothing",
                f"kubectl -n {namespace} patch inferenceservice {name} --type=json "
                """-p '[{"op": "remove", "path": "/spec/predictor/canaryTrafficPercent"}]'"""
                "   # in mode Standard: spec.canary[] (KServe 0.20)",
            )
        )
    if split and mode in _KNATIVE_MODES:
        found.append(
            Finding(
                f"{_name(service)} has spec.canary, and no traffic is split",
                f"its mode is {mode}; spec.canary is of mode Standard",
                f"kubectl -n {namespace} patch inferenceservice {name} --type=json "
                """-p '[{"op": "remove", "path": "/spec/canary"}]'   # in mode Knative: canaryTrafficPercent""",
            )
        )
    if split and mode in _STANDARD:
        found += _gateway(world, service, config)
    if mode in _KNATIVE_MODES and not world.cluster.serves(_KNATIVE):
        fix = f"kubectl -n {namespace} annotate inferenceservice {name} --overwrite {_MODE}=Standard"
        found.append(Finding(f"{_name(service)} is in mode {mode}", "Knative Serving is not installed", fix))
    return found


def _gateway(world: World, service: dict[str, Any], config: dict[str, Any]) -> list[Finding]:
    """What spec.canary needs in mode Standard: Gateway API, KServe told to use it, and the Gateway that it names."""
    symptom = f"{_name(service)} has spec.canary, and no traffic is split"
    if not world.cluster.serves(_GATEWAY):
        return [
            Finding(
                symptom,
                f"the cluster has no Gateway API ({_GATEWAY}), so KServe makes no HTTPRoute",
                "Install Gateway API and a controller, then add ../../components/gateway-canary to components: of the overlay",
            )
        ]
    ingress = config.get("ingress")
    if ingress is None:
        return []
    if not ingress.get("enableGatewayApi"):
        return [
            Finding(
                symptom,
                "KServe does not use Gateway API: ingress.enableGatewayApi in its ConfigMap is not true",
                "kubectl -n kserve edit configmap inferenceservice-config   # in ingress: "
                '"enableGatewayApi": true, "kserveIngressGateway": "kserve/kserve-ingress-gateway"',
            )
        ]
    namespace, _, name = str(ingress.get("kserveIngressGateway") or "").partition("/")
    if name and world.cluster.get(f"/apis/{_GATEWAY}/v1/namespaces/{namespace}/gateways/{name}") is None:
        fix = "kubectl apply --server-side -k manifests/overlays/staging   # its component gateway-canary makes it"
        return [Finding(symptom, f"the Gateway {namespace}/{name} that KServe's ConfigMap names does not exist", fix)]
    return []


def _mode(service: dict[str, Any], config: dict[str, Any]) -> str:
    """The status is what happened, the annotation what was asked, the ConfigMap what is usual."""
    annotations = service["metadata"].get("annotations") or {}
    default = (config.get("deploy") or {}).get("defaultDeploymentMode")
    return str((service.get("status") or {}).get("deploymentMode") or annotations.get(_MODE) or default or "")


def _kserve_config(world: World) -> dict[str, Any]:
    """The parts of KServe's ConfigMap, parsed; empty where there is none or we may not see it."""
    try:
        data = world.config(*_CONFIG) or {}
    except CannotLook:
        return {}
    parsed: dict[str, Any] = {}
    for key in ("deploy", "ingress"):
        try:
            parsed[key] = json.loads(data[key])
        except (KeyError, ValueError):
            continue
    return parsed


def _runtime(world: World, service: dict[str, Any], known: list[dict[str, Any]], all_seen: bool) -> list[Finding]:
    predictor = service["spec"].get("predictor") or {}
    model = predictor.get("model") or {}
    wanted, named = (model.get("modelFormat") or {}).get("name", ""), model.get("runtime", "")
    if not model:
        return []
    namespace, name = service["metadata"]["namespace"], service["metadata"]["name"]
    own = f"kubectl -n {namespace} apply --server-side -k manifests/base/serving"
    if named:
        if any(item["metadata"]["name"] == named for item in known) or not all_seen:
            return []
        return [Finding(f"{_name(service)} names runtime {named}", "there is no such runtime, or it is disabled", own)]
    automatic = [item for item in _supporting(known, wanted) if _automatic(item, wanted)]
    if wanted == "onnx":
        taker = ", ".join(item["metadata"]["name"] for item in automatic) or "no runtime"
        fix = (
            f"kubectl -n {namespace} patch inferenceservice {name} --type=merge "
            """-p '{"spec": {"predictor": {"model": {"modelFormat": {"name": "yolo-onnx"}}}}}'"""
        )
        cause = f"for format onnx KServe selects {taker} by itself, which knows nothing of boxes; ours is {_FORMAT}"
        return [Finding(f"{_name(service)} has format onnx", cause, fix)]
    if automatic or not all_seen:
        return []
    cause = f"no runtime in {namespace} or in the cluster selects itself for format {wanted!r}"
    return [Finding(f"{_name(service)} finds no runtime", cause, own)]


def _supporting(known: list[dict[str, Any]], wanted: str) -> list[dict[str, Any]]:
    return [item for item in known if any(entry["name"] == wanted for entry in _formats(item))]


def _automatic(item: dict[str, Any], wanted: str) -> bool:
    return any(entry["name"] == wanted and entry.get("autoSelect") for entry in _formats(item))


def _formats(item: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = item["spec"].get("supportedModelFormats") or []
    return found


def _services(world: World) -> list[dict[str, Any]]:
    return world.objects(world.aim.serving, "inferenceservices", f"{_GROUP}/v1beta1")


def _name(service: dict[str, Any]) -> str:
    return f"InferenceService {service['metadata']['namespace']}/{service['metadata']['name']}"
