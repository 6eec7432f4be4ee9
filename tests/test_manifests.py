"""Kubernetes YAML in the repository: it renders, fits every schema, its pods are restricted, its parts fit together."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from haechi.components.deploy.inference_service import manifest
from haechi.components.deploy.kserve_settings import CONFIG_MAP, NAMESPACES
from haechi.components.shared.model_folder import ModelFolder
from haechi.components.shared.settings import ENDPOINT_CREDENTIALS, GIT_CREDENTIALS, Settings
from haechi.serving.command import add_arguments
from haechi.serving.openapi import openapi
from haechi.serving.settings import ServingSettings
from tests.rendered import (
    BASES,
    COMPONENTS,
    CRDS,
    MANIFESTS,
    OVERLAYS,
    ROOT,
    TARGETS,
    Object,
    Pod,
    find,
    identity,
    merged,
    patched,
    pods,
    reaches,
    render,
    validate,
)

FILES = sorted(path for folder in ("manifests", "pipelines/compiled") for path in (ROOT / folder).rglob("*.yaml"))
OURS = [path for path in FILES if path.is_relative_to(MANIFESTS)]
EXAMPLES = [path for path in OURS if path.is_relative_to(MANIFESTS / "examples")]
SPACES = {"haechi-serving", "mlflow", "haechi-review"}  # made here; the others belong to Kubeflow and KServe
CLUSTER_WIDE = {"ClusterRole", "ClusterRoleBinding"}
CLUSTER_WIDE |= {"ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"}
CHECKOV = ROOT / ".venv/checkov/bin/checkov"


def _documents(path: Path) -> list[Object]:
    return [entry for entry in yaml.safe_load_all(path.read_text()) if entry]


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


# ---- files


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_a_file_holds_one_object_and_a_kustomization_names_existing_files(path: Path) -> None:
    documents = _documents(path)
    assert len(documents) == 1 or path.name == "training.yaml"  # the IR and its platform settings
    for entry in documents:
        if entry.get("kind") not in ("Kustomization", "Component"):
            continue
        for name in [*entry.get("resources", []), *entry.get("components", [])]:
            assert (path.parent / name).exists(), f"{path} names {name}"


@pytest.mark.parametrize("path", OURS, ids=_name)
def test_a_file_is_named_after_the_kind_of_its_object(path: Path) -> None:
    (entry,) = _documents(path)
    kind = "Kustomization" if path.name == "kustomization.yaml" else path.stem.split("-")[0]
    assert kind.lower() in (entry["kind"].lower(), "kustomization")


@pytest.mark.parametrize("path", [path for path in OURS if path.name == "kustomization.yaml"], ids=_name)
def test_a_folder_holds_nothing_that_its_kustomization_forgets(path: Path) -> None:
    text = path.read_text()
    for other in path.parent.glob("*.yaml"):
        assert other == path or f" {other.name}\n" in text, f"{other} is in no list"


# ---- objects


@pytest.mark.parametrize("target", TARGETS)
def test_every_rendered_object_fits_its_schema(target: str) -> None:
    objects = render(target)
    assert objects
    assert len({identity(item) for item in objects}) == len(objects)
    unchecked = {item["kind"] for item in objects if validate(item) == "nothing"}
    if CRDS.is_dir():
        assert unchecked <= {"PodMonitor", "PrometheusRule"}


def test_custom_resources_were_checked() -> None:
    if not CRDS.is_dir():
        pytest.skip(f"the schemas of custom resources are not present at {CRDS}")
    runtime = find(render("base/serving"), "ServingRuntime")
    assert validate(runtime) == "definition"
    runtime["spec"]["containers"][0]["imagee"] = "x"
    with pytest.raises(Exception, match="imagee"):
        validate(runtime)


@pytest.mark.parametrize("target", TARGETS)
def test_every_object_has_the_recommended_labels_and_a_namespace_that_exists(target: str) -> None:
    for item in render(target):
        labels = item["metadata"].get("labels", {})
        assert {"app.kubernetes.io/name", "app.kubernetes.io/part-of"} <= set(labels), identity(item)
        if item["kind"] == "Namespace":
            assert {labels[f"pod-security.kubernetes.io/{mode}"] for mode in ("enforce", "audit", "warn")} == {
                "restricted"
            }
            assert item["metadata"]["name"] in SPACES
        elif item["kind"] in CLUSTER_WIDE:
            assert "namespace" not in item["metadata"]
            assert item["metadata"]["name"].startswith("haechi-"), "what is in no namespace says whose it is"
        else:
            assert item["metadata"]["namespace"] in SPACES | {"kubeflow", "kserve"}, identity(item)


@pytest.mark.parametrize("target", TARGETS)
def test_no_secret_value_is_in_an_object(target: str) -> None:
    assert [identity(item) for item in render(target) if item["kind"] == "Secret"] == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_pins_each_of_its_images_in_one_list(overlay: str) -> None:
    text = (MANIFESTS / "overlays" / overlay / "kustomization.yaml").read_text()
    listed = {entry.get("newName", entry["name"]) + f":{entry['newTag']}" for entry in _images(overlay)}
    used = {box["image"] for pod in pods(render(f"overlays/{overlay}")) for box in pod.spec["containers"]}
    assert used == listed
    assert "latest" not in text


def _images(overlay: str) -> list[Object]:
    (entry,) = _documents(MANIFESTS / "overlays" / overlay / "kustomization.yaml")
    images: list[Object] = list(entry.get("images", []))
    for name in entry["resources"]:
        if name.count("/") == 1:
            images += _images(Path(name).name)
    return images


@pytest.mark.parametrize("option", COMPONENTS)
def test_what_an_option_adds_says_so_that_it_can_be_deleted_by_that(option: str) -> None:
    plain = {identity(item) for base in BASES for item in render(f"base/{base}")}
    needed = render("components/gateway-canary") if option == "istio-auth" else []
    for item in render(f"components/{option}"):
        labels = item["metadata"]["labels"]
        if identity(item) in plain:
            assert "haechi.io/option" not in labels, identity(item)
        elif identity(item) not in map(identity, needed):
            assert labels["haechi.io/option"] == option, identity(item)


def test_keda_and_canaries_by_gateway_do_not_meet() -> None:
    # In canary mode each model has a Deployment of its own name, which no ScaledObject can know.
    for overlay in OVERLAYS:
        text = (MANIFESTS / "overlays" / overlay / "kustomization.yaml").read_text()
        assert not ("components/keda" in text and "components/gateway-canary" in text)


# ---- pods


@pytest.mark.parametrize("target", TARGETS)
def test_every_pod_is_restricted_and_has_bounds(target: str) -> None:
    for pod in pods(render(target)):
        _assert_restricted(pod)
        for volume in pod.spec["volumes"]:
            assert "emptyDir" not in volume or volume["emptyDir"].get("sizeLimit"), pod.owner
        for box in _boxes(pod):
            assert re.search(r":v?\d+[.\w-]*$", box["image"]), f"{box['image']} has no version"
            for bound in ("requests", "limits"):
                assert {"cpu", "memory", "ephemeral-storage"} <= set(box["resources"][bound]), pod.owner
            # What nobody calls has nothing to probe: it ends, and is started again.
            if box.get("ports"):
                assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(box), pod.owner
            assert "/tmp" in {mount["mountPath"] for mount in box["volumeMounts"]}, pod.owner
        if not pod.owner.startswith("ServingRuntime"):
            speaks_to_kubernetes = pod.owner.endswith("/haechi-reconciler")
            assert pod.spec.get("automountServiceAccountToken", True) is speaks_to_kubernetes, pod.owner
            assert pod.spec["enableServiceLinks"] is False


def _boxes(pod: Pod) -> list[Object]:
    boxes: list[Object] = [*pod.spec["containers"], *pod.spec.get("initContainers", [])]
    return boxes


def _assert_restricted(pod: Pod) -> None:
    """Pod Security "restricted" as the standard lists it, and beyond it a read-only root and a numeric user."""
    outer = pod.spec.get("securityContext", {})
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        assert not pod.spec.get(name), pod.owner
    volumes = {name for volume in pod.spec["volumes"] for name in volume if name != "name"}
    assert volumes <= {"configMap", "emptyDir", "persistentVolumeClaim", "projected", "secret", "csi"}, pod.owner
    for box in _boxes(pod):
        inner = {**outer, **box["securityContext"]}
        assert inner["runAsNonRoot"] is True, pod.owner
        assert inner["runAsUser"] > 0, pod.owner
        assert inner["seccompProfile"]["type"] == "RuntimeDefault", pod.owner
        assert inner["allowPrivilegeEscalation"] is False, pod.owner
        assert inner["readOnlyRootFilesystem"] is True, pod.owner
        assert inner["capabilities"] == {"drop": ["ALL"]}, pod.owner
        assert not any("hostPort" in port for port in box.get("ports", [])), pod.owner


@pytest.mark.parametrize("target", TARGETS)
def test_a_pod_finds_what_it_refers_to(target: str) -> None:
    objects = render(target)
    maps = {(i["metadata"]["namespace"], i["metadata"]["name"]): i for i in objects if i["kind"] == "ConfigMap"}
    claims = {(i["metadata"]["namespace"], i["metadata"]["name"]) for i in objects if _is(i, "PersistentVolumeClaim")}
    accounts = {(i["metadata"]["namespace"], i["metadata"]["name"]) for i in objects if _is(i, "ServiceAccount")}
    secrets = _documented_secrets()
    for pod in pods(objects):
        where = pod.namespace
        assert (where, pod.spec.get("serviceAccountName", "default")) in accounts
        for volume in pod.spec["volumes"]:
            if "persistentVolumeClaim" in volume:
                assert (where, volume["persistentVolumeClaim"]["claimName"]) in claims
            if "secret" in volume and not volume["secret"].get("optional"):
                assert (where, volume["secret"]["secretName"]) in secrets
        for box in pod.spec["containers"]:
            assert all((where, source["configMapRef"]["name"]) in maps for source in box.get("envFrom", []))
            _assert_variables(where, box.get("env", []), maps, secrets)


def _is(item: Object, kind: str) -> bool:
    return bool(item["kind"] == kind)


def _assert_variables(
    where: str, variables: list[Object], maps: dict[tuple[str, str], Object], secrets: dict[tuple[str, str], set[str]]
) -> None:
    known: set[str] = set()
    for variable in variables:
        # Kubernetes puts in only what was named before, and leaves the rest as it stands.
        assert set(re.findall(r"\$\((\w+)\)", variable.get("value", ""))) <= known, variable
        known.add(variable["name"])
        source = variable.get("valueFrom", {})
        if "secretKeyRef" in source and not source["secretKeyRef"].get("optional"):
            assert source["secretKeyRef"]["key"] in secrets[where, source["secretKeyRef"]["name"]]
        if "configMapKeyRef" in source:
            assert source["configMapKeyRef"]["key"] in maps[where, source["configMapKeyRef"]["name"]]["data"]


def _documented_secrets() -> dict[tuple[str, str], set[str]]:
    (entry,) = _documents(MANIFESTS / "examples/secrets/kustomization.yaml")
    return {
        (item["namespace"], item["name"]): _keys(MANIFESTS / "examples/secrets" / f"{item['envs'][0]}.example")
        for item in entry["secretGenerator"]
    }


def _keys(path: Path) -> set[str]:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return {line.partition("=")[0] for line in lines}


def test_the_secrets_example_makes_the_secrets_from_files_that_git_ignores(tmp_path: Path) -> None:
    source = MANIFESTS / "examples/secrets"
    for path in source.iterdir():
        shutil.copy(path, tmp_path / path.name.removesuffix(".example"))
    done = subprocess.run(["kubectl", "kustomize", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made = {
        (i["metadata"]["namespace"], i["metadata"]["name"]): set(i["data"]) for i in yaml.safe_load_all(done.stdout)
    }
    assert made == _documented_secrets()
    ignored = subprocess.run(["git", "check-ignore", "-q", str(source / "s3.env")], cwd=ROOT, check=False)
    assert ignored.returncode == 0


# ---- parts that must fit together


@pytest.mark.parametrize("target", TARGETS)
def test_services_budgets_and_scalers_meet_the_pods_that_they_mean(target: str) -> None:
    objects = render(target)
    known = list(pods(objects))
    for item in objects:
        where, spec = item["metadata"].get("namespace"), item.get("spec", {})
        if item["kind"] in ("Service", "PodDisruptionBudget"):
            selector = spec["selector"] if _is(item, "Service") else spec["selector"]["matchLabels"]
            (pod,) = (p for p in known if p.namespace == where and selector.items() <= p.labels.items())
            assert {port["targetPort"] for port in spec.get("ports", [])} <= set(pod.ports())
        if item["kind"] == "HorizontalPodAutoscaler":
            scaled = find(objects, spec["scaleTargetRef"]["kind"], spec["scaleTargetRef"]["name"], str(where))
            assert "replicas" not in scaled["spec"], "two would set it"
        if item["kind"] in ("Deployment", "StatefulSet"):
            selector = spec["selector"]["matchLabels"]
            assert [p.owner for p in known if p.namespace == where and selector.items() <= p.labels.items()] == [
                identity(item)
            ]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_has_replicas_survives_a_node(overlay: str) -> None:
    objects = render(f"overlays/{overlay}")
    (operations,) = _documents(MANIFESTS / "examples/inferenceservice-operations.yaml")
    several = [_predictor(find(objects, "ServingRuntime"), merged(_service(), operations))]
    scaled = {
        identity(find(objects, target["kind"], target["name"], str(item["metadata"]["namespace"])))
        for item in objects
        if item["kind"] == "HorizontalPodAutoscaler" and item["spec"]["minReplicas"] > 1
        for target in [item["spec"]["scaleTargetRef"]]
    }
    scaled |= {identity(item) for item in objects if item.get("spec", {}).get("replicas", 1) > 1}
    several += [pod for pod in pods(objects) if pod.owner in scaled]
    assert len(several) == (1 if overlay == "local" else 2)
    for pod in several:
        budgets = [i for i in objects if _is(i, "PodDisruptionBudget") and i["metadata"]["namespace"] == pod.namespace]
        assert any(b["spec"]["selector"]["matchLabels"].items() <= pod.labels.items() for b in budgets), pod.owner
        (spread,) = pod.spec["topologySpreadConstraints"]
        assert spread["labelSelector"]["matchLabels"].items() <= pod.labels.items(), pod.owner


def _stranger(namespace: str, labels: dict[str, str] | None = None) -> Pod:
    return Pod(namespace, labels or {})


_STEP = Pod("kubeflow", {"pipelines.kubeflow.org/v2_component": "true"})
_DETECTOR = {"app.kubernetes.io/component": "detector", "app.kubernetes.io/part-of": "haechi"}
_DNS = _stranger("kube-system", {"k8s-app": "kube-dns"})
_GATEWAY = _stranger("envoy-gateway-system", {"gateway.envoyproxy.io/owning-gateway-name": "kserve-ingress-gateway"})
_OTHER = _stranger("default")
# Everything that could call or be called: our pods, as the overlay makes them, and strangers. Stable, canary and shadow
# predictors differ in KServe's labels only.
ACTORS: dict[str, Pod | str] = {
    "step": _STEP,
    "reconciler": "Deployment/kubeflow/haechi-reconciler",
    "mlflow": "Deployment/mlflow/mlflow",
    "postgres": "StatefulSet/mlflow/mlflow-postgres",
    "cache": "CronJob/kubeflow/haechi-cache",
    "label-studio": "Deployment/haechi-review/label-studio",
    "stable": _stranger("haechi-serving", {**_DETECTOR, "app": "isvc.safety-predictor"}),
    "canary": _stranger("haechi-serving", {**_DETECTOR, "app": "isvc.safety-v-0123456789ab-predictor"}),
    "shadow": _stranger("haechi-serving", {**_DETECTOR, "app": "isvc.safety-shadow-predictor"}),
    "envoy": _GATEWAY,
    "envoy beside the Gateway": _stranger("kserve", dict(_GATEWAY.labels)),
    "istio": _stranger("kserve", {"gateway.networking.k8s.io/gateway-name": "kserve-ingress-gateway"}),
    "gateway of others": _stranger("istio-system", {"gateway.networking.k8s.io/gateway-name": "other"}),
    "kserve's controller": _stranger("kserve", {"control-plane": "kserve-controller-manager"}),
    "prometheus": _stranger("monitoring", {"app.kubernetes.io/name": "prometheus"}),
    "grafana": _stranger("monitoring", {"app.kubernetes.io/name": "grafana"}),
    "store": _stranger("minio", {"app": "minio"}),
    "pipelines": _stranger("kubeflow", {"app": "ml-pipeline"}),
    "dns": _DNS,
    "pretender": _stranger("default", dict(_STEP.labels)),
    "outside": _stranger("(no pod)"),
}
_PORTS = (22, 53, 80, 443, 3306, 5000, 5432, 6443, 8080, 8081, 8333, 8887, 8888, 9000, 9090, 9443)
# Those that a policy of ours stands before. Which stranger calls which is not ours to say.
_GUARDED = {"step", "reconciler", "cache", "mlflow", "postgres", "label-studio", "stable", "canary", "shadow"}
# TLS and SSH to anywhere: the Kubernetes API, registries of data and Git are no pods.
_ANYWHERE = {f"{name}:{port}" for name in set(ACTORS) - _GUARDED for port in (22, 443, 6443)}
_DETECTORS = {"stable:8080", "canary:8080", "shadow:8080"}
_DEPLOYS = {"dns:53", "store:9000", "mlflow:5000", "prometheus:9090"} | _DETECTORS | _ANYWHERE
_SERVED = _DETECTORS | {"stable:8081", "canary:8081", "shadow:8081"} | {"label-studio:8080"}
REACH: dict[str, set[str]] = {
    "step": _DEPLOYS | {f"pipelines:{port}" for port in (8080, 8333, 8887, 8888, 9000)} | {"label-studio:8080"},
    "reconciler": _DEPLOYS,
    "mlflow": {"dns:53", "store:9000", "postgres:5432"},
    "postgres": set(),
    "label-studio": {"dns:53", "store:9000"},
    "stable": {"dns:53", "store:9000"},
    "canary": {"dns:53", "store:9000"},
    "shadow": {"dns:53", "store:9000"},
    "envoy": _SERVED,
    "envoy beside the Gateway": _SERVED,
    "istio": _SERVED,
    "gateway of others": {"label-studio:8080"},
    "prometheus": _DETECTORS,
}  # and the others nothing


@pytest.mark.parametrize("overlay", ["staging", "production"])
@pytest.mark.parametrize("source", ACTORS)
def test_networks_are_shut_but_for_what_is_needed(overlay: str, source: str) -> None:
    objects = render(f"overlays/{overlay}")
    known = {pod.owner: pod for pod in pods(objects)}
    ends = {name: known[end] if isinstance(end, str) else end for name, end in ACTORS.items()}
    assert {
        f"{name}:{port}"
        for name, target in ends.items()
        for port in _PORTS
        if source != name and (source in _GUARDED or name in _GUARDED)
        if reaches(objects, ends[source], target, port)
    } == REACH.get(source, set())


def test_detectors_reach_the_store_of_pipelines_on_one_machine() -> None:
    store = _stranger("kubeflow", {"app": "seaweedfs"})
    # What Pipelines 2.17 ships beside its SeaweedFS, in short.
    shipped = {
        "kind": "NetworkPolicy",
        "metadata": {"name": "seaweedfs", "namespace": "kubeflow"},
        "spec": {"podSelector": {"matchLabels": store.labels}, "policyTypes": ["Ingress"]},
    }
    shipped["spec"] |= {"ingress": [{"from": [{"podSelector": {}}], "ports": [{"protocol": "TCP", "port": 8333}]}]}
    (detector,) = (pod for pod in pods(render("base/serving")) if pod.owner.startswith("ServingRuntime"))
    assert not reaches([shipped], detector, store, 8333)
    for objects in (render("overlays/local"), [*render("overlays/local"), shipped]):
        assert reaches(objects, detector, store, 8333)
        assert reaches(objects, _STEP, store, 8333)
        assert not reaches(objects, detector, store, 8888), "its filer asks for no key"
        assert not reaches(objects, _OTHER, store, 8333)


@pytest.mark.parametrize("overlay", ["staging", "production"])
def test_names_can_be_looked_up_from_every_pod_that_calls_out(overlay: str) -> None:
    objects = render(f"overlays/{overlay}")
    for pod in [_STEP, *pods(objects)]:
        assert reaches(objects, pod, _DNS, 53, "UDP") is not pod.owner.startswith(("StatefulSet", "CronJob"))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_part_is_told_the_store_that_its_network_opens(overlay: str) -> None:
    objects = render(f"overlays/{overlay}")
    steps = find(objects, "ConfigMap", "haechi-settings")["data"]
    serving = find(objects, "ConfigMap", "haechi-serving-settings")["data"]
    assert steps["HAECHI_S3_ENDPOINT"] == serving["HAECHI_S3_ENDPOINT"]
    mlflow = find(objects, "ConfigMap", "mlflow-settings")["data"]
    assert mlflow.get("MLFLOW_S3_ENDPOINT_URL", steps["HAECHI_S3_ENDPOINT"]) == steps["HAECHI_S3_ENDPOINT"]
    if any(item["kind"] == "NetworkPolicy" for item in objects):
        host, _, port = steps["HAECHI_S3_ENDPOINT"].removeprefix("http://").partition(":")
        assert reaches(objects, _STEP, _stranger(host.partition(".")[2]), int(port))
    service = find(objects, "Service", "mlflow")
    where = f"{service['metadata']['name']}.{service['metadata']['namespace']}:{service['spec']['ports'][0]['port']}"
    assert steps["MLFLOW_TRACKING_URI"] == f"http://{where}"


def test_the_settings_are_those_that_steps_and_serving_read() -> None:
    from haechi.pipelines import placement

    for overlay in OVERLAYS:
        objects = render(f"overlays/{overlay}")
        steps = find(objects, "ConfigMap", "haechi-settings")["data"]
        assert set(steps) == set(placement._SETTINGS)
        Settings.from_env(steps)
        serving = find(objects, "ConfigMap", "haechi-serving-settings")["data"]
        ServingSettings.from_env(serving)
        assert Settings.from_env(serving).s3_endpoint


@pytest.mark.filterwarnings("ignore")  # MLflow's server warns of itself
def test_mlflow_takes_its_arguments_and_the_names_it_is_called_by() -> None:
    from mlflow.cli import server
    from mlflow.server.security_utils import is_allowed_host_header

    objects = render("base/mlflow")
    (pod,) = pods(objects)
    (box,) = pod.spec["containers"]
    assert box["command"] == ["mlflow", "server"]
    server.make_context("server", list(box["args"]), resilient_parsing=True)
    allowed = find(objects, "ConfigMap")["data"]["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    uri = find(render("base/pipeline"), "ConfigMap")["data"]["MLFLOW_TRACKING_URI"]
    for host in (uri.removeprefix("http://"), "mlflow.mlflow.svc.cluster.local:5000", "localhost:15000"):
        assert is_allowed_host_header(allowed, host)
    for host in ("mlflow.evil.example", "mlflow.mlflow.svc.evil.example:5000"):
        assert not is_allowed_host_header(allowed, host)
    pinned = re.search(r"^mlflow==([\d.]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert box["image"].endswith(f":v{pinned[1]}-full")


def test_label_studio_tells_nobody_outside_that_it_runs() -> None:
    (pod,) = (pod for pod in pods(render("components/label-studio")) if pod.owner.endswith("label-studio"))
    (box,) = pod.spec["containers"]
    told = {entry["name"]: entry["value"] for entry in box["env"] if "value" in entry}
    off = {"COLLECT_ANALYTICS": "false", "LATEST_VERSION_CHECK": "false", "SENTRY_DSN": "", "FRONTEND_SENTRY_DSN": ""}
    assert off.items() <= told.items()


# ---- the InferenceService that deploy makes

_PATHS: dict[str, Object] = openapi("safety", guarded=False)["paths"]


def _service() -> Object:
    digest = "0123456789ab" + "0" * 52
    model = ModelFolder("safety", digest[:12], ("smoke", "fire"), 640, 32, {"default": 0.25}, 0.7, digest)
    return manifest("haechi-serving", "safety", model, f"s3://haechi/models/safety/{digest[:12]}")


def _predictor(runtime: Object, service: Object) -> Pod:
    """The predictor's pod as KServe puts it together: labels of both, the runtime's container, the predictor's fields."""
    spec = {name: runtime["spec"][name] for name in ("containers", "volumes")}
    scaling = ("model", "minReplicas", "maxReplicas", "scaleMetric", "scaleTarget")
    spec |= {name: value for name, value in service["spec"]["predictor"].items() if name not in scaling}
    labels = {**runtime["spec"]["labels"], **service["metadata"]["labels"], "component": "predictor"}
    labels["serving.kserve.io/inferenceservice"] = service["metadata"]["name"]
    return Pod(service["metadata"]["namespace"], labels, spec, "predictor")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kserve_serves_what_deploy_applies_with_our_runtime_and_under_our_policies(overlay: str) -> None:
    objects, service = render(f"overlays/{overlay}"), _service()
    runtime, model = find(objects, "ServingRuntime"), service["spec"]["predictor"]["model"]
    validate(service)
    assert runtime["metadata"]["namespace"] == service["metadata"]["namespace"]
    (format_,) = runtime["spec"]["supportedModelFormats"]
    assert (format_["name"], format_["autoSelect"]) == (model["modelFormat"]["name"], True)
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
    pod = _predictor(runtime, service)
    _assert_restricted(pod)
    assert [box["name"] for box in pod.spec["containers"]] == ["kserve-container"]
    budget = find(objects, "PodDisruptionBudget", "haechi-detectors")
    assert budget["spec"]["selector"]["matchLabels"].items() <= pod.labels.items()
    if any(item["metadata"]["name"] == "default-deny" for item in objects):
        assert reaches(objects, _GATEWAY, pod, 8080)
        assert not reaches(objects, _OTHER, pod, 8080)


@pytest.mark.parametrize(
    ("token", "open_paths"),
    [(False, {"/v2/health/live", "/v2/health/ready"}), (True, set(_PATHS) - {"/", "/metrics"})],
    ids=["anybody", "token"],
)
def test_the_gateway_lets_in_calls_of_the_runtime_and_keeps_its_metrics(token: bool, open_paths: set[str]) -> None:
    rules = find(render("components/istio-auth"), "AuthorizationPolicy")["spec"]["rules"]
    operations = [to["operation"] for rule in rules if token or "from" not in rule for to in rule["to"]]
    let_in = {
        path
        for path, verbs in _PATHS.items()
        if all(any(_allows(operation, verb.upper(), path) for operation in operations) for verb in verbs)
    }
    assert let_in == open_paths


def _allows(operation: Object, verb: str, path: str) -> bool:
    prefixes = [known.removesuffix("*") for known in operation["paths"] if known.endswith("*")]
    return verb in operation["methods"] and (path in operation["paths"] or path.startswith(tuple(prefixes)))


def test_the_runtime_starts_the_process_with_arguments_that_it_knows() -> None:
    (box,) = find(render("base/serving"), "ServingRuntime")["spec"]["containers"]
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser)
    known = parser.parse_args([argument.replace("{{.Name}}", "safety") for argument in box["args"]])
    assert (known.name, str(known.model), known.host) == ("safety", "/mnt/models", "0.0.0.0")
    ports = [(port["name"], port["containerPort"]) for port in box["ports"]]
    # KServe leads the Service's port 80 to the first, and takes the one with `grpc` in its name for HTTP/2.
    assert ports == [("http", known.http_port), ("grpc", known.grpc_port)]
    # KServe expands templates in the whole container: nothing else may look like one.
    assert re.findall(r"{{.*?}}", json.dumps(box)) == ["{{.Name}}"]


def test_the_reconciler_finds_its_credentials_where_it_looks_and_starts_without_them() -> None:
    (pod,) = (pod for pod in pods(render("components/reconciler")) if pod.owner.endswith("haechi-reconciler"))
    secrets = {volume["name"]: volume["secret"] for volume in pod.spec["volumes"] if "secret" in volume}
    mounts = {mount["mountPath"]: mount["name"] for mount in pod.spec["containers"][0]["volumeMounts"]}
    for folder, name in ((GIT_CREDENTIALS, "haechi-git"), (ENDPOINT_CREDENTIALS, "haechi-endpoint")):
        assert secrets[mounts[folder]] == {"secretName": name, "optional": True}


def test_no_field_of_the_service_has_two_owners() -> None:
    (operations,) = _documents(MANIFESTS / "examples/inferenceservice-operations.yaml")
    both = merged(_service(), operations)
    validate(both)
    timeout = ServingSettings().timeout
    pause = find(render("base/serving"), "ServingRuntime")["spec"]["containers"][0]["lifecycle"]["preStop"]["sleep"]
    assert both["spec"]["predictor"]["terminationGracePeriodSeconds"] > timeout + pause["seconds"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_whoever_deploys_may_ask_kserve_for_its_mode_and_for_nothing_else(overlay: str) -> None:
    objects = render(f"overlays/{overlay}")
    rule = {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["get"]}
    assert find(objects, "Role", namespace="kserve")["rules"] == [{**rule, "resourceNames": [CONFIG_MAP]}]
    bound = [item for item in objects if item["kind"] == "RoleBinding"]
    deploying, asking = (
        {
            (who["namespace"], who["name"])
            for item in bound
            if item["roleRef"]["name"] == role
            for who in item["subjects"]
            if _is(who, "ServiceAccount")
        }
        for role in ("haechi-deploy", "haechi-kserve-mode")
    )
    assert deploying == asking == {("kubeflow", "pipeline-runner"), ("kubeflow", "haechi-reconciler")}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_patch_of_the_docs_brings_all_to_the_kserve_of_the_kubeflow_platform(overlay: str) -> None:
    plain, moved = render(f"overlays/{overlay}"), patched(f"overlays/{overlay}", "namespace: kserve")
    usual, platform = NAMESPACES
    wanted = {identity(item).replace(f"/{usual}/", f"/{platform}/") for item in plain}
    assert {identity(item) for item in moved} == wanted
    assert len(moved) == len(plain)
    assert find(moved, "RoleBinding", "haechi-kserve-mode", platform)["roleRef"]["name"] == "haechi-kserve-mode"
    assert find(moved, "Role", "haechi-kserve-mode", platform)


def test_the_pipelines_service_account_may_do_what_deploy_does_and_no_more() -> None:
    objects = render("base/serving")
    role, binding = find(objects, "Role"), find(objects, "RoleBinding")
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "pipeline-runner", "namespace": "kubeflow"}]
    rights = {(r, v) for rule in role["rules"] for r in rule["resources"] for v in rule["verbs"]}
    assert {("inferenceservices", verb) for verb in ("get", "create", "patch")} <= rights
    assert not any(verb in ("deletecollection", "*") or resource == "*" for resource, verb in rights)
    assert {resource for resource, verb in rights if verb == "delete"} == {"inferenceservices"}, "for shadows"


# ---- GitOps


def test_the_compiled_pipeline_has_a_kustomization() -> None:
    entry = yaml.safe_load((ROOT / "pipelines/compiled/kustomization.yaml").read_text())
    assert set(entry["resources"]) == {"pipeline.yaml", "pipelineversion.yaml"}


def test_the_gitops_overlay_sets_the_images_of_the_pipeline_under_a_name_of_its_own() -> None:
    objects = render("overlays/production-gitops")
    version = find(objects, "PipelineVersion")
    plain = find(render("components/kfp-gitops"), "PipelineVersion")
    assert version["metadata"]["name"].startswith(plain["metadata"]["name"] + "-")
    assert version["spec"]["pipelineName"] == find(objects, "Pipeline")["metadata"]["name"]
    given, usual = (_defaults(item) for item in (version, plain))
    assert {name for name in usual if given[name] != usual[name]} == {"steps_image", "train_image"}
    registry = find(objects, "ServingRuntime")["spec"]["containers"][0]["image"].rpartition("/")[0]
    assert {given[name].rpartition("/")[0] for name in ("steps_image", "train_image")} == {registry}


def _defaults(version: Object) -> dict[str, Any]:
    parameters = version["spec"]["pipelineSpec"]["root"]["inputDefinitions"]["parameters"]
    return {name: value.get("defaultValue") for name, value in parameters.items()}


def test_the_argo_cd_example_points_at_an_overlay() -> None:
    (application,) = _documents(MANIFESTS / "examples/argocd/application.yaml")
    assert (ROOT / application["spec"]["source"]["path"] / "kustomization.yaml").is_file()
    assert "ServerSideApply=true" in application["spec"]["syncPolicy"]["syncOptions"]


@pytest.mark.parametrize("path", [p for p in EXAMPLES if p.name != "kustomization.yaml"], ids=_name)
def test_an_example_names_the_command_or_tool_that_takes_it(path: Path) -> None:
    assert re.search(r"kubectl (apply|patch) .*" + re.escape(path.name) + "|Argo CD", path.read_text())


def test_the_docs_name_every_option() -> None:
    text = (ROOT / "docs/manifests.md").read_text()
    for name in COMPONENTS:
        assert f"`{name}`" in text
    for path in re.findall(r"manifests/[\w./-]+", text):
        assert (ROOT / path.rstrip(".")).exists(), path


# ---- an auditor of others


def test_checkov_finds_nothing_that_is_not_excused_beside_the_object(tmp_path: Path) -> None:
    if not CHECKOV.exists():
        pytest.skip("checkov is not installed: make checkov does that")
    for overlay in OVERLAYS:
        objects = render(f"overlays/{overlay}")
        runtime = find(objects, "ServingRuntime")
        # checkov knows no ServingRuntime: show it the Deployment that KServe makes of it.
        (operations,) = _documents(MANIFESTS / "examples/inferenceservice-operations.yaml")
        objects.append(_as_deployment(runtime, _predictor(runtime, merged(_service(), operations))))
        (tmp_path / f"{overlay}.yaml").write_text(yaml.safe_dump_all(objects))
    command = [str(CHECKOV), "--framework", "kubernetes", "--directory", str(tmp_path), "--output", "json"]
    done = subprocess.run([*command, "--skip-download", "--quiet"], capture_output=True, text=True, check=False)
    report = json.loads(done.stdout)
    found = {f"{c['check_id']} {c['resource']}: {c['check_name']}" for c in report["results"]["failed_checks"]}
    assert found == set()
    assert report["summary"]["passed"] > 100
    assert report["summary"]["parsing_errors"] == 0


def _as_deployment(runtime: Object, pod: Pod) -> Object:
    labels = {**pod.labels, "app": "isvc.safety-predictor"}
    metadata = {"name": "safety-predictor", "namespace": pod.namespace, "labels": labels}
    metadata["annotations"] = runtime["metadata"]["annotations"]
    spec = {"serviceAccountName": "default", "automountServiceAccountToken": False, **pod.spec}
    template = {"metadata": {"labels": labels}, "spec": spec}
    selector = {"matchLabels": {"app": labels["app"]}}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata,
        "spec": {"selector": selector, "template": template},
    }
