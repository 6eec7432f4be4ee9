"""KServe: installed, a runtime for the format, models that load, and what it leaves behind."""

from __future__ import annotations

import json
from typing import Any

from .findings import CannotLook, Finding, each_object
from .inference_services import GROUP, name_of, services
from .kserve_store import way_to_store
from .world import Aim, World

__all__ = ["kserve_installed", "left_overs", "model_load", "runtime"]

_FORMAT = "yolo-onnx"


def kserve_installed(world: World) -> list[Finding]:
    """The kind InferenceService is known."""
    if world.cluster.serves(GROUP):
        return []
    fix = "Install KServe 0.20 or later (https://kserve.github.io/website), or keep target=none."
    return [Finding("the cluster knows no InferenceService", "KServe is not installed", fix)]


def runtime(world: World) -> list[Finding]:
    """A runtime for every InferenceService's format, and none that Triton takes by itself."""
    found_services = services(world)
    if not world.cluster.serves(GROUP):
        return []
    known = world.objects(world.aim.serving, "servingruntimes", f"{GROUP}/v1alpha1")
    unseen: CannotLook | None = None
    try:
        known = known + (world.cluster.collection(f"/apis/{GROUP}/v1alpha1/clusterservingruntimes") or [])
    except CannotLook as error:
        unseen = error
    known = [item for item in known if not item["spec"].get("disabled")]
    found = each_object(found_services, lambda service: _runtime(service, known, unseen is None))
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
        cause, fix = _load_cause(world, service, said)
        return [Finding(f"{name_of(service)} does not load its model: {said[:300]}", cause, fix)]

    return each_object(services(world), judge)


def left_overs(world: World) -> list[Finding]:
    """HorizontalPodAutoscalers of predictors that are gone, as KServe 0.20.0 leaves one behind for each canary."""
    namespace = world.aim.serving

    def orphaned(item: dict[str, Any]) -> bool:
        target, name = item["spec"]["scaleTargetRef"], str(item["metadata"]["name"])
        if target["kind"] != "Deployment" or target["name"] != name or not name.endswith("-predictor"):
            return False
        return world.cluster.get(f"/apis/apps/v1/namespaces/{namespace}/deployments/{name}") is None

    found = world.objects(namespace, "horizontalpodautoscalers", "autoscaling/v2")
    names = [str(item["metadata"]["name"]) for item in found if orphaned(item)]
    if not names:
        return []
    return [
        Finding(
            f"HorizontalPodAutoscalers of predictors that are gone are left in {namespace}: {len(names)}",
            "KServe 0.20.0 leaves one behind for each canary, without an owner; they scale nothing and fill the events",
            f"kubectl -n {namespace} delete hpa {' '.join(names)}",
        )
    ]


def _load_cause(world: World, service: dict[str, Any], said: str) -> tuple[str, str]:
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
        return way_to_store(world, service)
    return "the runtime or the storage initializer refuses it", (
        f"kubectl -n {namespace} logs -l serving.kserve.io/inferenceservice={service['metadata']['name']} "
        "--all-containers --tail=50"
    )


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
        return [Finding(f"{name_of(service)} has format onnx", cause, _to_our_format(service))]
    if not all_seen:
        return []
    suited = [item for item in automatic if not _unsuited(item, model)]
    if suited:
        return []
    refused = "; ".join(f"{item['metadata']['name']} {_unsuited(item, model)}" for item in automatic)
    cause = refused or f"no runtime in {namespace} or in the cluster selects itself for format {wanted!r}"
    return [Finding(f"{name_of(service)} finds no runtime", cause, own)]


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
    symptom = f"{name_of(service)} names runtime {named}"
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
