"""KServe's mode and canaries: whether what an InferenceService asks for splits any traffic."""

from __future__ import annotations

import json
from typing import Any

from haechi.components.deploy.kserve_settings import CONFIG_MAP, MODE, NAMESPACES, Sections, kserve_settings, told_mode
from haechi.components.deploy.readiness import predictor_name

from .findings import CannotLook, Finding, each_object
from .inference_services import name_of, services
from .world import World

__all__ = ["canary_mode", "uses_gateway_api"]

_GATEWAY, _KNATIVE = "gateway.networking.k8s.io", "serving.knative.dev"
_STANDARD = ("Standard", "RawDeployment")
_KNATIVE_MODES = ("Knative", "Serverless")


def canary_mode(world: World) -> list[Finding]:
    """Canaries in a mode that splits traffic: `canaryTrafficPercent` in Knative, `spec.canary` with Gateway API."""
    place, config = _kserve_config(world)
    return each_object(services(world), lambda service: _canary(world, service, place, config))


def uses_gateway_api(world: World) -> bool:
    """Whether KServe makes HTTPRoutes, by its ConfigMap; not where we may not see that."""
    return bool(_kserve_config(world)[1].get("ingress", {}).get("enableGatewayApi"))


def _canary(world: World, service: dict[str, Any], place: str, config: Sections) -> list[Finding]:
    spec, namespace, name = service["spec"], service["metadata"]["namespace"], service["metadata"]["name"]
    share, split = (spec.get("predictor") or {}).get("canaryTrafficPercent"), spec.get("canary")
    mode = told_mode(service, config)
    found = []
    if share not in (None, 100) and mode in _STANDARD:
        found.append(
            Finding(
                f"{name_of(service)} has canaryTrafficPercent {share}, and all traffic goes to the new model",
                f"its mode is {mode}; KServe honours canaryTrafficPercent in mode Knative only, and says nothing",
                f"{_without(service, '/spec/predictor/canaryTrafficPercent')}   # in mode Standard: spec.canary[] (KServe 0.20)",
            )
        )
    if split and mode in _KNATIVE_MODES:
        found.append(
            Finding(
                f"{name_of(service)} has spec.canary, and no traffic is split",
                f"its mode is {mode}; spec.canary is of mode Standard",
                f"{_without(service, '/spec/canary')}   # in mode Knative: canaryTrafficPercent",
            )
        )
    if split and mode in _STANDARD:
        found += _gateway(world, service, place, config)
    if mode in _KNATIVE_MODES and not world.cluster.serves(_KNATIVE):
        fix = f"kubectl -n {namespace} annotate inferenceservice {name} --overwrite {MODE}=Standard"
        if (service.get("status") or {}).get("deploymentMode"):
            fix = (
                "Install Knative Serving; or, since KServe changes the mode of no service that it has taken up, set "
                "defaultDeploymentMode in its ConfigMap to Standard and make the service anew:\n"
                f"kubectl -n {namespace} delete inferenceservice {name}   # then haechi promote"
            )
        found.append(Finding(f"{name_of(service)} is in mode {mode}", "Knative Serving is not installed", fix))
    return found


def _gateway(world: World, service: dict[str, Any], place: str, config: Sections) -> list[Finding]:
    """What spec.canary needs in mode Standard: Gateway API, KServe told to use it, and the Gateway that it names."""
    symptom = f"{name_of(service)} has spec.canary, and no traffic is split"
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
                f"kubectl -n {place} edit configmap {CONFIG_MAP}   # in ingress: "
                f'"enableGatewayApi": true, "kserveIngressGateway": "{place}/kserve-ingress-gateway"',
            )
        ]
    namespace, _, name = str(ingress.get("kserveIngressGateway") or "").partition("/")
    if name and world.cluster.get(f"/apis/{_GATEWAY}/v1/namespaces/{namespace}/gateways/{name}") is None:
        fix = (
            "kubectl apply --server-side -f manifests/components/gateway-canary/gateway.yaml   # "
            "kserve/kserve-ingress-gateway, with HTTPS; or correct kserveIngressGateway in KServe's ConfigMap"
        )
        return [Finding(symptom, f"the Gateway {namespace}/{name} that KServe's ConfigMap names does not exist", fix)]
    return _unrouted(world, service, symptom)


def _unrouted(world: World, service: dict[str, Any], symptom: str) -> list[Finding]:
    """A canary that is ready, has a share, and is in no rule of the HTTPRoute: KServe 0.20.0 knows the field and no more."""
    namespace, name = service["metadata"]["namespace"], service["metadata"]["name"]
    told = (service.get("status") or {}).get("canaryStatuses") or []
    ready = {item["name"] for item in told if item.get("ready")}
    canaries = [item for item in service["spec"]["canary"] if item.get("trafficPercent")]
    wanted = {
        predictor_name(name, item["predictor"]["name"]) for item in canaries if item["predictor"]["name"] in ready
    }
    if not wanted:
        return []
    route = world.cluster.get(f"/apis/{_GATEWAY}/v1/namespaces/{namespace}/httproutes/{name}") or {"spec": {}}
    rules = route["spec"].get("rules") or []
    backends = {backend["name"] for rule in rules for backend in rule.get("backendRefs") or []}
    if wanted <= backends:
        return []
    return [
        Finding(
            symptom,
            f"HTTPRoute {namespace}/{name} leads to {', '.join(sorted(backends)) or 'nothing'} alone: KServe 0.20.0 has "
            "spec.canary and splits nothing, later releases do",
            "Upgrade KServe; until then take the canary away, and let deploy replace the model in place:\n"
            + _without(service, "/spec/canary"),
        )
    ]


def _without(service: dict[str, Any], path: str) -> str:
    """How a field is taken away."""
    meta, patch = service["metadata"], json.dumps([{"op": "remove", "path": path}])
    return f"kubectl -n {meta['namespace']} patch inferenceservice {meta['name']} --type=json -p '{patch}'"


def _kserve_config(world: World) -> tuple[str, Sections]:
    """Where KServe's settings stand, and their sections; none where there are none or we may not see them."""

    def read(namespace: str, name: str) -> dict[str, str] | None:
        try:
            return world.config(namespace, name)
        except CannotLook:
            return None

    return kserve_settings(read) or (NAMESPACES[0], {})
