"""The stand-in for KServe behaves as KServe does: what tests of deploy rely on."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from api_server import ApiServer
from kserve_stand_in import NEVER, SOURCE, Fate, KserveStandIn
from kserve_webhook import MODE, KserveWebhook

pytestmark = pytest.mark.e2e

GOOD, NEXT = "s3://models/good", "s3://models/next"


def service(namespace: str, uri: str, **more: Any) -> dict[str, Any]:
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": "entrance", "namespace": namespace, "annotations": {MODE: "Standard"}},
        "spec": {"predictor": {"model": model(uri)}, **more},
    }


def model(uri: str) -> dict[str, Any]:
    return {"modelFormat": {"name": "yolo-onnx"}, "storageUri": uri}


def canary(uri: str, share: int = 0, **more: Any) -> dict[str, Any]:
    # The full CRD asks for the container's name, which it does not for the stable predictor.
    return {"trafficPercent": share, "predictor": {"name": "v2", "model": model(uri) | {"name": ""}, **more}}


def status_of(cluster: ApiServer, namespace: str) -> dict[str, Any]:
    path = f"/apis/serving.kserve.io/v1beta1/namespaces/{namespace}/inferenceservices/entrance"
    status: dict[str, Any] = cluster.get(path).get("status", {})
    return status


def conditions(status: dict[str, Any]) -> dict[str, str]:
    return {item["type"]: item["status"] for item in status.get("conditions", [])}


def until(is_so: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def ready(cluster: ApiServer, namespace: str, kserve: KserveStandIn) -> str:
    """A namespace where GOOD is served."""
    cluster.apply(service(namespace, GOOD))
    until(lambda: conditions(status_of(cluster, namespace)).get("Ready") == "True")
    return namespace


def test_a_service_becomes_ready(cluster: ApiServer, ready: str, kserve: KserveStandIn) -> None:
    status = status_of(cluster, ready)
    assert conditions(status) == {"Ready": "True", "PredictorReady": "True", "IngressReady": "True", "Stopped": "False"}
    assert status["modelStatus"]["transitionStatus"] == "UpToDate"
    assert status["url"] == f"http://entrance-{ready}.example.com"
    assert status["address"]["url"] == f"http://entrance-predictor.{ready}.svc.cluster.local"
    assert kserve.serving("entrance-predictor") == GOOD


@pytest.mark.parametrize(
    ("fate", "looks_at", "transition"),
    [
        (NEVER, "old", "UpToDate"),
        (NEVER, "new", "InProgress"),
        (Fate(load_error="no such key"), "new", "BlockedByFailedLoad"),
    ],
)
def test_old_pods_keep_a_service_ready_while_new_ones_are_not(
    cluster: ApiServer, ready: str, kserve: KserveStandIn, fate: Fate, looks_at: str, transition: str
) -> None:
    kserve.fates[NEXT], kserve.looks_at = fate, looks_at
    cluster.apply(service(ready, NEXT))
    until(lambda: status_of(cluster, ready)["modelStatus"]["transitionStatus"] == transition)
    until(lambda: status_of(cluster, ready)["observedGeneration"] == 2)
    assert conditions(status_of(cluster, ready))["Ready"] == "True"
    assert kserve.serving("entrance-predictor") == GOOD
    deployment = kserve.deployment("entrance-predictor")
    assert deployment is not None
    assert deployment["spec"]["template"]["metadata"]["annotations"][SOURCE] == NEXT


def test_the_progress_deadline_ends_it(cluster: ApiServer, ready: str, kserve: KserveStandIn) -> None:
    kserve.fates[NEXT], kserve.progress_deadline = NEVER, 0.2
    cluster.apply(service(ready, NEXT))
    until(lambda: conditions(status_of(cluster, ready))["PredictorReady"] == "False")
    reasons = {item["type"]: item.get("reason") for item in status_of(cluster, ready)["conditions"]}
    assert reasons["PredictorReady"] == "ProgressDeadlineExceeded"


def test_pods_may_crash_after_they_were_ready(cluster: ApiServer, ready: str, kserve: KserveStandIn) -> None:
    kserve.fates[NEXT] = Fate(ready_after=0.1, fails_after=0.5)
    cluster.apply(service(ready, NEXT))
    until(lambda: kserve.serving("entrance-predictor") == NEXT)
    until(lambda: conditions(status_of(cluster, ready))["Ready"] == "False")
    assert status_of(cluster, ready)["modelStatus"]["transitionStatus"] == "BlockedByFailedLoad"


def test_a_canary_is_ready_with_a_pod_of_its_own(cluster: ApiServer, ready: str, kserve: KserveStandIn) -> None:
    kserve.fates[NEXT] = NEVER
    cluster.apply(service(ready, GOOD, canary=[canary(NEXT)]))
    until(lambda: conditions(status_of(cluster, ready)).get("CanaryPredictorReady") == "False")
    del kserve.fates[NEXT]
    until(lambda: conditions(status_of(cluster, ready))["CanaryPredictorReady"] == "True")
    (found,) = status_of(cluster, ready)["canaryStatuses"]
    assert found == {"name": "v2", "ready": True, "trafficPercent": 0, "modelStatus": {"transitionStatus": ""}}
    assert status_of(cluster, ready)["observedGeneration"] == 1, "of the Deployment, which no canary changes"


def test_a_canary_is_promoted_without_a_new_rollout(cluster: ApiServer, ready: str, kserve: KserveStandIn) -> None:
    cluster.apply(service(ready, GOOD, canary=[canary(NEXT, minReplicas=1)]))
    until(lambda: kserve.serving("entrance-v2-predictor") == NEXT)
    cluster.apply(service(ready, NEXT, predictor={"name": "v2", "model": model(NEXT)}))
    until(lambda: kserve.deployment("entrance-predictor") is None)
    until(lambda: "canaryStatuses" not in status_of(cluster, ready))
    promoted = kserve.deployment("entrance-v2-predictor")
    assert promoted is not None
    assert promoted["metadata"]["generation"] == 1
    assert conditions(status_of(cluster, ready))["Ready"] == "True"


def test_a_controller_that_sleeps_says_nothing(cluster: ApiServer, namespace: str, kserve: KserveStandIn) -> None:
    kserve.asleep = True
    cluster.apply(service(namespace, GOOD))
    time.sleep(0.3)
    assert status_of(cluster, namespace) == {}
    kserve.asleep = False
    until(lambda: status_of(cluster, namespace))


def test_a_deleted_service_takes_its_deployment_along(cluster: ApiServer, ready: str, kserve: KserveStandIn) -> None:
    path = f"/apis/serving.kserve.io/v1beta1/namespaces/{ready}/inferenceservices/entrance"
    assert cluster.request("DELETE", path).status == 200
    until(lambda: kserve.deployment("entrance-predictor") is None)


REFUSED = [
    ([canary(NEXT, minReplicas=2)], "must not exceed"),
    ([canary(NEXT, maxReplicas=3)], "must not set maxReplicas"),
    ([{"trafficPercent": 0, "predictor": {"model": model(NEXT) | {"name": ""}}}], "name is required"),
    ([canary(NEXT, 60), canary(NEXT, 60, name="v3")], "must be <= 100"),
]


@pytest.mark.parametrize(("entries", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_the_webhook_refuses_what_kserve_refuses(
    cluster: ApiServer, namespace: str, webhook: KserveWebhook, entries: list[dict[str, Any]], message: str
) -> None:
    body = service(namespace, GOOD, canary=entries)
    path = f"/apis/serving.kserve.io/v1beta1/namespaces/{namespace}/inferenceservices"
    found = cluster.request("POST", path, body)
    assert found.status == 403
    assert "denied the request" in found.message
    assert message in found.message


def test_the_webhook_writes_the_deployment_mode(cluster: ApiServer, namespace: str, webhook: KserveWebhook) -> None:
    body = service(namespace, GOOD)
    del body["metadata"]["annotations"]
    assert cluster.apply(body)["metadata"]["annotations"] == {MODE: "Standard"}
