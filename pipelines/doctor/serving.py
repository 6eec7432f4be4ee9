"""KServe: installed, a mode in which canaries work, a runtime for the format, and models that load."""

from __future__ import annotations

import json
from typing import Any

from .findings import CannotLook, Finding, each_object
from .world import Aim, World

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
    return each_object(_services(world), lambda service: _canary(world, service, config))


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
    found = each_object(services, lambda service: _runtime(service, known, unseen is None))
    if not _supporting(known, _FORMAT) and not found and unseen is None:
        found.append(
            Finding(
                f"namespace {world.aim.serving} has no runtime for format {_FORMAT}",
                "ServingRuntime haechi-yolo was not applied there; KServe would refuse what deploy applies",
                _own_runtime(world.aim.serving),
            )
        )
    if unseen is not None and not _supporting(known, _FORMAT):
        raise CannotLook(unseen.problem, unseen.remedy, found)
    return found


def model_load(world: World) -> list[Finding]:
    """InferenceServices whose model does not load, by KServe's own report."""

    def judge(service: dict[str, Any]) -> list[Finding]:
        model = (service.get("status") or {}).get("modelStatus") or {}
        if model.get("transitionStatus") not in ("BlockedByFailedLoad", "InvalidSpec"):
            return []
        failure = model.get("lastFailureInfo") or {}
        said = str(failure.get("message") or failure.get("reason") or "no reason was given")
        cause, fix = _load_cause(service, said)
        return [Finding(f"{_name(service)} does not load its model: {said[:300]}", cause, fix)]

    return each_object(_services(world), judge)


def _load_cause(service: dict[str, Any], said: str) -> tuple[str, str]:
    namespace, low = service["metadata"]["namespace"], said.lower()
    uri = _model(service).get("storageUri", "its storageUri")
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


def _runtime(service: dict[str, Any], known: list[dict[str, Any]], all_seen: bool) -> list[Finding]:
    model = _model(service)
    wanted, named = (model.get("modelFormat") or {}).get("name", ""), model.get("runtime", "")
    if not model:
        return []
    namespace = service["metadata"]["namespace"]
    own = _own_runtime(namespace)
    if named:
        return _named_runtime(service, model, known, own) if all_seen or _by_name(known, named) else []
    automatic = [item for item in known if _automatic(item, wanted)]
    if wanted == "onnx":
        taker = ", ".join(item["metadata"]["name"] for item in automatic) or "no runtime"
        cause = f"for format onnx KServe selects {taker} by itself, which knows nothing of boxes; ours is {_FORMAT}"
        return [Finding(f"{_name(service)} has format onnx", cause, _to_our_format(service))]
    if not all_seen:
        return []
    suited = [item for item in automatic if not _unsuited(item, model)]
    if suited:
        return []
    refused = "; ".join(f"{item['metadata']['name']} {_unsuited(item, model)}" for item in automatic)
    cause = refused or f"no runtime in {namespace} or in the cluster selects itself for format {wanted!r}"
    return [Finding(f"{_name(service)} finds no runtime", cause, own)]


def _own_runtime(namespace: str) -> str:
    """How our runtime comes into a namespace, and the settings that it starts with into one that is not ours."""
    files = "manifests/base/serving"
    settings = (
        f"kubectl -n {namespace} create -f {files}/configmap.yaml || true   # if there is none; correct its addresses"
    )
    runtime = f"kubectl -n {namespace} apply --server-side -f {files}/servingruntime.yaml   # its image as your overlay has it"
    return runtime if namespace == Aim.serving else f"{settings}\n{runtime}"


def _named_runtime(
    service: dict[str, Any], model: dict[str, Any], known: list[dict[str, Any]], own: str
) -> list[Finding]:
    """A runtime that the InferenceService names is there, and takes its format and protocol."""
    named, wanted = model["runtime"], (model.get("modelFormat") or {}).get("name", "")
    item = _by_name(known, named)
    symptom = f"{_name(service)} names runtime {named}"
    if item is None:
        return [Finding(symptom, "there is no such runtime, or it is disabled", own)]
    if not _supporting([item], wanted):
        takes = ", ".join(entry["name"] for entry in _formats(item)) or "no format"
        fix = _to_our_format(service) if _supporting([item], _FORMAT) else own
        return [Finding(symptom, f"that runtime takes {takes}, and the model's format is {wanted!r}", fix)]
    unsuited = _unsuited(item, model)
    return [Finding(symptom, f"{named} {unsuited}", own)] if unsuited else []


def _unsuited(item: dict[str, Any], model: dict[str, Any]) -> str:
    """Why KServe does not give a runtime of the right format this model; empty where it does."""
    spec, protocol = item["spec"], model.get("protocolVersion")
    spoken = spec.get("protocolVersions") or []
    if protocol and spoken and protocol not in spoken:
        return f"speaks protocol {', '.join(spoken)}, and the model's protocolVersion is {protocol}"
    if spec.get("multiModel"):
        return (
            "is for many models in one pod (multiModel: true, as ModelMesh has it), not for an InferenceService's own"
        )
    return ""


def _model(service: dict[str, Any]) -> dict[str, Any]:
    """The predictor's model, also where it is written the former way, `predictor.onnx`; KServe turns that into `model`."""
    predictor = service["spec"].get("predictor") or {}
    if predictor.get("onnx") and not predictor.get("model"):
        return {**predictor["onnx"], "modelFormat": {"name": "onnx"}}
    found: dict[str, Any] = predictor.get("model") or {}
    return found


def _to_our_format(service: dict[str, Any]) -> str:
    namespace, name = service["metadata"]["namespace"], service["metadata"]["name"]
    patch = f"kubectl -n {namespace} patch inferenceservice {name} --type="
    if (service["spec"].get("predictor") or {}).get("model"):
        body = {"spec": {"predictor": {"model": {"modelFormat": {"name": _FORMAT}}}}}
        return f"{patch}merge -p '{json.dumps(body)}'"
    move = {"op": "move", "from": "/spec/predictor/onnx", "path": "/spec/predictor/model"}
    add = {"op": "add", "path": "/spec/predictor/model/modelFormat", "value": {"name": _FORMAT}}
    return f"{patch}json -p '{json.dumps([move, add])}'"


def _by_name(known: list[dict[str, Any]], name: str) -> dict[str, Any] | None:
    return next((item for item in known if item["metadata"]["name"] == name), None)


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
