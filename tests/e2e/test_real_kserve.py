"""deploy against KServe's own controller and webhooks, with real runtimes behind the pods that come of it.

`make e2e` runs them, and builds the controller where Go is at hand; without it they skip. KSERVE_SOURCE names another
KServe (.ci/kserve-controller).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from api_server import ApiServer, why_absent
from kserve_controller import ControllerManager, KserveController, why_no_controller
from kserve_stand_in import NEVER, Fate
from kserve_webhook import MODE, refusal
from nodes_stand_in import Endpoints, Gateway, Kubelet
from pod_network import PodNetwork
from tiny_models import tiny_model_folder

from haechi.components.deploy.inference_service import Patience
from haechi.components.deploy.job import Job
from haechi.components.deploy.kubernetes_api import MANAGER, InferenceServiceApi
from haechi.components.deploy.lease import Lease
from haechi.components.deploy.rollout import Rollout
from haechi.components.deploy.rollout_state import RolloutState
from haechi.components.deploy.swap import swap
from haechi.components.shared.errors import DeployError
from haechi.components.shared.model_folder import ModelFolder
from tests.serving_process import running

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
NAMESPACE = "haechi-serving"
PATH = f"/apis/serving.kserve.io/v1beta1/namespaces/{NAMESPACE}/inferenceservices"
# A machine that has much else to do takes seconds for what takes a tenth of one else.
PATIENCE = Patience(timeout=60, poll=0.2, blocked=5)
STEPS = Rollout(steps=(10, 100), bake=0.5, poll=0.2)
SPLITS_NOTHING = "this KServe has spec.canary, and no traffic follows it (0.20)"


@dataclass
class Place:
    """The service `entrance` in the namespace that our manifests make."""

    server: ApiServer
    kubelet: Kubelet
    gateway: Gateway
    network: PodNetwork
    models: dict[str, ModelFolder]
    folders: dict[str, Path]

    def uri(self, name: str) -> str:
        return f"s3://models/entrance/{self.models[name].version}"

    def deploy(self, name: str, patience: Patience = PATIENCE, **rollout: Any) -> str:
        api, model = InferenceServiceApi(NAMESPACE, "entrance"), self.models[name]
        way = replace(STEPS, address=self.network.address, **rollout)
        with Lease(api, "run-1", patience.lease) as lease:
            return swap(Job(api, lease, model, self.folders[name], self.uri(name), way, patience))

    def made(self, work: Callable[[], object]) -> tuple[Any, list[dict[str, Any]]]:
        """What some work returns, and the pods that it makes, those of the seconds after it too."""
        before = len(self.kubelet.made)
        result = work()
        time.sleep(3)
        return result, self.kubelet.made[before:]

    def served(self) -> set[str]:
        """The storageUris that users meet, by the service's route."""
        path = f"/apis/gateway.networking.k8s.io/v1/namespaces/{NAMESPACE}/httproutes/entrance"
        rules = self.server.get(path)["spec"]["rules"]
        names = {item["name"] for rule in rules for item in rule["backendRefs"] if item["weight"]}
        return {Endpoints(self.server, NAMESPACE).serving(name) for name in names}

    def available(self, deployment: str) -> int:
        """The pods of a Deployment that serve."""
        found = self.server.request("GET", f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments/{deployment}")
        return int((found.body.get("status") or {}).get("availableReplicas") or 0)

    def operations(self, predictor: dict[str, Any]) -> None:
        """What a person sets beside the model."""
        meta = {"name": "entrance", "namespace": NAMESPACE}
        kind = {"apiVersion": "serving.kserve.io/v1beta1", "kind": "InferenceService"}
        self.server.apply({**kind, "metadata": meta, "spec": {"predictor": predictor}}, manager="operations")

    def named(self, kind: str) -> list[str]:
        """The names of all objects of a kind that KServe made here."""
        found = self.server.kubectl("get", kind, f"--namespace={NAMESPACE}", "--output=name")
        assert found.returncode == 0, found.stderr
        return sorted(line.split("/")[1] for line in found.stdout.split())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    absent = "" if os.environ.get("HAECHI_E2E_REQUIRED") else "make e2e runs it: it takes minutes"
    absent = absent or why_absent() or why_no_controller()
    if absent:
        pytest.skip(absent)
    root = tmp_path_factory.mktemp("real-kserve")
    with ExitStack() as stack:
        server = stack.enter_context(ApiServer(root))
        stack.enter_context(ControllerManager(server))
        stack.enter_context(KserveController(server))
        _apply_manifests(server)
        models = {
            name: tiny_model_folder(root / name, ["person"], name="entrance", shift=shift)
            for shift, name in enumerate(("old", "new"))
        }
        folders = {name: root / name for name in models}
        urls = [stack.enter_context(running(folder, "--name", "entrance")).url for folder in folders.values()]
        runtimes = {f"s3://models/entrance/{models[name].version}": url for name, url in zip(models, urls, strict=True)}
        network = stack.enter_context(PodNetwork(Endpoints(server, NAMESPACE), runtimes))  # type: ignore[arg-type]
        kubelet, gateway = stack.enter_context(Kubelet(server)), stack.enter_context(Gateway(server))
        yield Place(server, kubelet, gateway, network, models, folders)


def _apply_manifests(server: ApiServer) -> None:
    """What the overlay `staging` has for the namespace that serves, and the patch that docs/manifests.md tells to apply."""
    server.make_namespace("kubeflow")
    server.make_service_account("kubeflow", "pipeline-runner")
    rendered = server.kubectl("kustomize", str(ROOT / "manifests/overlays/staging"))
    assert rendered.returncode == 0, rendered.stderr
    entries = [entry for entry in yaml.safe_load_all(rendered.stdout) if entry]
    mine = [
        entry
        for entry in entries
        if NAMESPACE in (entry["metadata"].get("namespace"), entry["metadata"]["name"]) or entry["kind"] == "Gateway"
        if not entry["apiVersion"].startswith("monitoring.coreos.com")
    ]
    mine.sort(key=lambda entry: entry["kind"] != "Namespace")
    applied = server.kubectl("apply", "--server-side", "--filename=-", given=yaml.safe_dump_all(mine))
    assert applied.returncode == 0, applied.stderr
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    meta = {"name": "haechi-s3", "namespace": NAMESPACE}
    server.apply({"apiVersion": "v1", "kind": "Secret", "metadata": meta, "stringData": keys})
    _patch_storage(server, (ROOT / "manifests/examples/clusterstoragecontainer-patch.yaml").read_text())


def _patch_storage(server: ApiServer, patch: str) -> None:
    done = server.kubectl("patch", "clusterstoragecontainer", "default", "--type=merge", f"--patch={patch}")
    assert done.returncode == 0, done.stderr


@pytest.fixture
def place(world: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """Nothing serves yet; we speak as pipeline-runner."""
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    config = str(world.server.kubeconfig("kubeflow/pipeline-runner"))
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", config)
    yield world
    world.kubelet.fates.clear()
    world.network.broken.clear()
    world.network.watch = lambda path: None
    world.server.request("DELETE", f"{PATH}/entrance")
    until(lambda: not world.named("pods") and not world.named("httproutes"))


def until(is_so: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.2)


# --- the way to the end ----------------------------------------------------------------------------------------------


def test_a_first_model_is_one_restricted_pod_that_our_policies_select(place: Place) -> None:
    _, (pod,) = place.made(lambda: place.deploy("old"))
    assert [item["name"] for item in pod["spec"]["initContainers"]] == ["storage-initializer"]
    assert pod["spec"]["containers"][0]["args"][-2:] == ["--name", "entrance"]
    namespace = place.server.get(f"/api/v1/namespaces/{NAMESPACE}")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    monitor = yaml.safe_load((ROOT / "manifests/base/monitoring/podmonitor.yaml").read_text())
    policy = place.server.get(f"/apis/networking.k8s.io/v1/namespaces/{NAMESPACE}/networkpolicies/detector")
    budget = place.server.get(f"/apis/policy/v1/namespaces/{NAMESPACE}/poddisruptionbudgets/haechi-detectors")
    wanted = [monitor["spec"]["selector"], policy["spec"]["podSelector"], budget["spec"]["selector"]]
    assert all(item["matchLabels"].items() <= pod["metadata"]["labels"].items() for item in wanted)
    assert {port["name"] for port in pod["spec"]["containers"][0]["ports"]} >= {"http"}, "the PodMonitor's"
    assert place.served() == {place.uri("old")}


def test_the_next_model_takes_over_and_the_former_comes_back(place: Place) -> None:
    place.deploy("old")
    for name in ("new", "old"):
        way, pods = place.made(partial(place.deploy, name))
        assert place.served() == {place.uri(name)}
        # A canary's pod goes on as the stable one. Where KServe splits nothing (0.20), it is proven and then replaced.
        assert len(pods) == {"canary": 1, "shadow": 2}[way], "no pod is restarted on the way"
        until(lambda: len(place.named("pods")) == 1)
        assert len(place.named("deployments")) == len(place.named("services")) == 1
        assert len(place.named("httproutes")) == 2


def test_traffic_follows_the_steps_where_kserve_splits_it(place: Place) -> None:
    place.deploy("old")
    place.gateway.history.clear()
    if place.deploy("new") == "shadow":
        pytest.skip(SPLITS_NOTHING)
    canary = f"entrance-v-{place.models['new'].version}-predictor"
    shares = [weights.get(canary) for weights in place.gateway.history["entrance"]]
    assert [share for share in shares if share is not None][:3] == [0, 10, 100]


def test_a_canary_has_its_pods_before_it_has_their_traffic(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its Deployment has one pod at first; the autoscaler that KServe makes for it brings the other."""
    place.deploy("old")
    place.operations({"minReplicas": 2})
    until(lambda: place.available("entrance-predictor") == 2)
    canary, apply, pods = f"entrance-v-{place.models['new'].version}-predictor", Job.apply, {}

    def watch(job: Job, body: dict[str, Any], state: RolloutState) -> None:
        if state.phase == "canary" and state.traffic:
            pods.setdefault(state.traffic, place.available(canary))
        apply(job, body, state)

    monkeypatch.setattr(Job, "apply", watch)
    if place.deploy("new") == "shadow":
        pytest.skip(SPLITS_NOTHING)
    assert pods == {10: 1, 100: 2}
    assert place.served() == {place.uri("new")}


def test_a_worse_canary_loses_its_traffic_before_its_pods_go(place: Place) -> None:
    place.deploy("old")
    canary, history = f"entrance-v-{place.models['new'].version}-predictor", place.gateway.history

    def go_mad(path: str) -> None:
        if canary in path and history["entrance"][-1].get(canary):
            place.network.broken[place.uri("new")] = 500

    history.clear()
    place.network.watch = go_mad
    try:
        place.deploy("new", strategy="canary")
        pytest.fail("it was not withdrawn")
    except DeployError as error:
        if "traffic does not follow it" in str(error):
            pytest.skip(SPLITS_NOTHING)
        assert "the graph went mad" in str(error)
        assert "has all traffic again" in str(error)
    until(lambda: canary not in history["entrance"][-1])
    shares = [weights[canary] for weights in history["entrance"] if canary in weights]
    assert shares == [0, 10, 0]
    assert place.served() == {place.uri("old")}
    until(lambda: place.named("deployments") == ["entrance-predictor"])


# --- each of these ends with the old model serving, and a reason ------------------------------------------------------

WORSE = [
    (NEVER, Patience(timeout=15, poll=0.2, blocked=5), r"0 of 1 pods of Deployment entrance-v-\w+-predictor serve it"),
    (Fate(load_error="NoSuchKey: model.onnx"), PATIENCE, r"storage-initializer: CrashLoopBackOff NoSuchKey"),
]


@pytest.mark.parametrize(("fate", "patience", "reason"), WORSE, ids=["never-ready", "storage"])
def test_a_model_that_does_not_load_leaves_the_former_alone(
    place: Place, fate: Fate, patience: Patience, reason: str
) -> None:
    place.deploy("old")
    place.kubelet.fates[place.uri("new")] = fate

    def deploy() -> None:
        with pytest.raises(DeployError, match=reason):
            place.deploy("new", patience)

    _, pods = place.made(deploy)
    assert [pod["metadata"]["labels"]["app"] for pod in pods] == [
        f"isvc.entrance-v-{place.models['new'].version}-predictor"
    ], "the former model's pod was not touched"
    assert place.served() == {place.uri("old")}
    until(lambda: place.named("deployments") == ["entrance-predictor"])


def test_pod_security_that_refuses_the_pod_is_named(place: Place) -> None:
    patch = '{"spec": {"container": {"securityContext": null}}}'
    shipped = (ROOT / "manifests/examples/clusterstoragecontainer-patch.yaml").read_text()
    _patch_storage(place.server, patch)
    begun = time.monotonic()
    try:
        with pytest.raises(DeployError, match=r'violates PodSecurity "restricted:latest".*"storage-initializer"'):
            place.deploy("old", Patience(timeout=300, poll=0.2, blocked=5))
        assert time.monotonic() - begun < 60, "Kubernetes has said no: nobody waits for the end of the patience"
    finally:
        _patch_storage(place.server, shipped)


# --- the stand-ins tell the truth -------------------------------------------------------------------------------------


def _service(name: str = "entrance", **spec: Any) -> dict[str, Any]:
    meta = {"name": name, "namespace": NAMESPACE, "annotations": {MODE: "Standard"}}
    predictor = {"model": {"modelFormat": {"name": "yolo-onnx"}, "storageUri": "s3://models/a"}}
    body = {"apiVersion": "serving.kserve.io/v1beta1", "kind": "InferenceService", "metadata": meta}
    return {**body, "spec": {"predictor": predictor, **spec}}


def _canary(share: int = 10, **more: Any) -> dict[str, Any]:
    model = {"modelFormat": {"name": "yolo-onnx"}, "storageUri": "s3://models/b", "name": ""}
    return {"trafficPercent": share, "predictor": {"name": "v2", "model": model, **more}}


BODIES = {
    "plain": _service(),
    "name-that-begins-with-a-digit": _service("1entrance"),
    "no-model": _service(predictor={}),
    "canary": _service(canary=[_canary()]),
    "canary-without-name": _service(canary=[_canary(name="")]),
    "two-canaries-of-one-name": _service(canary=[_canary(), _canary()]),
    "more-than-all": _service(canary=[_canary(60), _canary(60, name="v3")]),
    "canary-larger-than-stable": _service(canary=[_canary(minReplicas=2)]),
    "canary-that-scales": _service(canary=[_canary(maxReplicas=3)]),
    "canary-of-another-mode": deepcopy(_service(canary=[_canary()])),
}
BODIES["canary-of-another-mode"]["metadata"]["annotations"][MODE] = "Knative"


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_the_stand_in_refuses_what_the_webhook_refuses(place: Place, body: dict[str, Any]) -> None:
    answer = place.server.request("POST", f"{PATH}?dryRun=All", body)
    # 422 is the schema's word; 500 comes where there is no model at all, and KServe's defaulter trips.
    assert answer.status in (201, 403, 422, 500), answer.message
    assert (answer.status != 201) == bool(refusal(body, None)), (answer.message, refusal(body, None))


def test_the_stand_in_refuses_changes_as_the_webhook_does(place: Place) -> None:
    place.deploy("old")
    found = place.server.get(f"{PATH}/entrance")
    for change in ({"name": "v9"}, {"name": "v9", "model": {"storageUri": "s3://models/b"}}):
        body = deepcopy(found)
        model = body["spec"]["predictor"]["model"] | change.get("model", {})
        body["spec"]["predictor"] |= change | {"model": model}
        answer = place.server.request("PUT", f"{PATH}/entrance?dryRun=All&fieldManager={MANAGER}", body)
        assert (answer.status == 403) == bool(refusal(body, found)), answer.message
