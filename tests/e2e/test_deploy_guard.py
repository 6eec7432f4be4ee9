"""The option deploy-guard on a real API server: steps change of an InferenceService what deploy changes, and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from api_server import ApiServer
from canary_world import STEPS, Models, Place, until

from haechi.components.deploy.kubernetes_api import MANAGER

pytestmark = pytest.mark.e2e

OPTION = Path(__file__).resolve().parents[2] / "manifests" / "components" / "deploy-guard"
RUNNER = "kubeflow/pipeline-runner"
GUARD = "/apis/admissionregistration.k8s.io/v1/{}/haechi-deploy-guard"
PARTS = {
    "validatingadmissionpolicy": GUARD.format("validatingadmissionpolicies"),
    "validatingadmissionpolicybinding": GUARD.format("validatingadmissionpolicybindings"),
}
MODEL = {"name": "", "modelFormat": {"name": "yolo-onnx"}, "storageUri": "s3://haechi/models/safety/1"}
# What a step that was taken over could want, as a change of `spec`.
EVIL: list[dict[str, Any]] = [
    {"predictor": {"containers": [{"name": "kserve-container", "image": "evil:1"}]}},
    {"predictor": {"initContainers": [{"name": "first", "image": "evil:1"}]}},
    {"predictor": {"workerSpec": {"containers": [{"name": "worker", "image": "evil:1"}]}}},
    {"predictor": {"model": {"image": "evil:1"}}},
    {"predictor": {"model": {"command": ["sh", "-c", "env"]}}},
    {"predictor": {"model": {"args": ["--config", "/etc/passwd"]}}},
    {"predictor": {"model": {"lifecycle": {"postStart": {"exec": {"command": ["env"]}}}}}},
    {"predictor": {"model": {"livenessProbe": {"exec": {"command": ["env"]}}}}},
    {"predictor": {"model": {"runtime": "kserve-tritonserver"}}},
    {"predictor": {"model": {"storageUri": "oci://registry.invalid/evil:1"}}},
    {"predictor": {"model": {"storageUri": "https://registry.invalid/evil.onnx"}}},
    {"predictor": {"triton": {"name": ""}}},
    {"transformer": {"containers": [{"name": "kserve-container", "image": "evil:1"}]}},
    {"canary": [{"trafficPercent": 1, "predictor": {"name": "v2", "model": {**MODEL, "image": "evil:1"}}}]},
    {"canary": [{"trafficPercent": 1, "predictor": {"name": "v2", "model": MODEL, "serviceAccountName": "other"}}]},
    {"canary": [{"trafficPercent": 1, "predictor": {"name": "v2", "model": MODEL, "triton": {"name": ""}}}]},
    {"canary": [{"trafficPercent": 1, "predictor": {"name": "v2", "model": {**MODEL, "storageUri": "hf://evil/1"}}}]},
]
# What people may have set when a shadow is made, and what a step may not set afterwards.
THEIRS: list[dict[str, Any]] = [
    {"predictor": {"serviceAccountName": "reader"}},
    {"predictor": {"volumes": [{"name": "keys", "secret": {"secretName": "haechi-s3"}}]}},
    {"predictor": {"model": {"env": [{"name": "HAECHI_S3_ENDPOINT", "value": "https://evil.invalid"}]}}},
    {"predictor": {"model": {"volumeMounts": [{"name": "keys", "mountPath": "/keys"}]}}},
]


@pytest.fixture
def guard(cluster: ApiServer, namespace: str) -> Iterator[None]:
    """The policy at work; gone afterwards, since it is for the whole cluster."""
    for name, path in PARTS.items():
        body, query = yaml.safe_load((OPTION / f"{name}.yaml").read_text()), "?fieldManager=test&fieldValidation=Strict"
        found = cluster.request("PATCH", path + query, body, kind="application/apply-patch+yaml")
        assert found.status in (200, 201), found.message
    until(lambda: "no program of its own" in _create(cluster, namespace, EVIL[0]))
    yield
    for path in PARTS.values():
        cluster.request("DELETE", path)
    until(lambda: not _create(cluster, namespace, EVIL[0]))


def _with(change: dict[str, Any], name: str = "safety") -> dict[str, Any]:
    spec: dict[str, Any] = copy.deepcopy(change)
    given = spec.setdefault("predictor", {})
    given["model"] = {**MODEL, **given.get("model", {})}
    meta = {"name": name}
    return {"apiVersion": "serving.kserve.io/v1beta1", "kind": "InferenceService", "metadata": meta, "spec": spec}


def _path(namespace: str) -> str:
    return f"/apis/serving.kserve.io/v1beta1/namespaces/{namespace}/inferenceservices"


def _create(cluster: ApiServer, namespace: str, change: dict[str, Any], user: str = RUNNER) -> str:
    """Why it may not be made; empty where it may."""
    found = cluster.request("POST", _path(namespace) + "?dryRun=All", _with(change, "safety-shadow"), user)
    return "" if found.status == 201 else found.message


def _update(cluster: ApiServer, namespace: str, change: dict[str, Any], user: str = RUNNER) -> str:
    query = f"?fieldManager={MANAGER}&force=true&dryRun=All"
    path = f"{_path(namespace)}/safety{query}"
    found = cluster.request("PATCH", path, _with(change), user, "application/apply-patch+yaml")
    return "" if found.status == 200 else found.message


def test_a_step_that_was_taken_over_brings_no_program_into_the_serving_namespace(
    cluster: ApiServer, namespace: str, guard: None
) -> None:
    assert cluster.request("POST", _path(namespace), _with({})).status == 201
    for change in EVIL:
        for said in (_create(cluster, namespace, change), _update(cluster, namespace, change)):
            assert "haechi-deploy-guard' denied" in said.replace('"', "'"), (change, said)
    for change in THEIRS:
        assert "nothing of the pod but its model" in _update(cluster, namespace, change), change
        assert _create(cluster, namespace, change) == "", "a shadow has what people gave the service"
    good = {"canary": [{"trafficPercent": 1, "predictor": {"name": "v2", "model": MODEL}}]}
    assert _update(cluster, namespace, good) == ""
    assert _update(cluster, namespace, {"predictor": {"model": {"storageUri": "s3://haechi/models/safety/2"}}}) == ""


def test_people_are_not_bound_and_what_they_set_stays(cluster: ApiServer, namespace: str, guard: None) -> None:
    theirs = {
        "predictor": {"model": {"image": "own:1", "env": [{"name": "A", "value": "b"}]}, "serviceAccountName": "a"}
    }
    assert cluster.request("POST", _path(namespace), _with(theirs)).status == 201
    # An apply that names the model only leaves all of that alone, and passes.
    assert _update(cluster, namespace, {"predictor": {"model": {"storageUri": "s3://haechi/models/safety/2"}}}) == ""
    other = {"predictor": {"model": {"image": "evil:1"}}}
    assert "nothing of the pod but its model" in _update(cluster, namespace, other)
    assert _update(cluster, namespace, other, user="admin") == ""


def test_deploy_goes_all_its_ways_under_the_guard(place: Place, models: Models, guard: None) -> None:
    assert place.deploy(models.old) == "rolling"
    place.apply_as("operations", {"predictor": {"minReplicas": 2, "serviceAccountName": "reader"}})
    assert place.deploy(models.new) == "canary"
    until(lambda: place.only(models.new))
    place.kserve.gateway = False
    assert place.deploy(models.old, replace(STEPS, strategy="shadow")) == "shadow"
    assert place.names() == models.uri(models.old)
