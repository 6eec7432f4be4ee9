"""The rights of overlay `staging` on a real API server: people, CI and steps may do what they must, and no more."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import crds
import pytest
import yaml
from api_server import ApiServer

from haechi.components.deploy.kserve_settings import CONFIG_MAP, NAMESPACES
from haechi.components.deploy.kubernetes_api import Forbidden, InferenceServiceApi
from haechi.components.deploy.observe import observe
from haechi.components.deploy.target import Target
from haechi.pipelines.doctor.checks import CHECKS
from haechi.pipelines.doctor.cluster import RIGHTS
from haechi.pipelines.doctor.examine import examine
from haechi.pipelines.doctor.world import Aim, World

pytestmark = pytest.mark.e2e

OVERLAY = Path(__file__).resolve().parents[2] / "manifests" / "overlays" / "staging"
# Service accounts in the place of the groups, as a CI would have them: `name` here, `group` in the manifests.
USERS = {"haechi-viewers": "viewer", "haechi-operators": "operator"}
VIEWER, OPERATOR, RUNNER, RECONCILER = (
    f"kubeflow/{name}" for name in ("viewer", "operator", "pipeline-runner", "haechi-reconciler")
)
MODEL = {"modelFormat": {"name": "yolo-onnx"}, "storageUri": "s3://haechi/models/safety/0123456789ab"}
_CONFIG = (NAMESPACES[0], CONFIG_MAP)
SERVICE = "/apis/serving.kserve.io/v1beta1/namespaces/haechi-serving/inferenceservices"


@pytest.fixture(scope="module")
def place(cluster: ApiServer) -> Iterator[ApiServer]:
    """The overlay as it is applied, with something of each kind that doctor looks into; gone afterwards."""
    anything = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    crds.load(cluster, [crds._definition("argoproj.io", "Workflow", {"v1alpha1": anything})])
    for name in ("kubeflow", "kserve", "minio"):
        cluster.make_namespace(name)
    for name in USERS.values():
        cluster.make_service_account("kubeflow", name)
    done = cluster.kubectl("kustomize", str(OVERLAY))
    rendered = [_with_users(item) for item in yaml.safe_load_all(done.stdout)]
    rendered.sort(key=lambda item: item["kind"] != "Namespace")
    _kubectl(cluster, rendered, "apply", "--server-side", "--filename=-")
    # As docs/manifests.md says for the store's namespace.
    accounts = [f"--serviceaccount=kubeflow:{name}" for name in USERS.values()]
    store = ("--namespace=minio", "create", "rolebinding", "haechi-view-parts", "--clusterrole=haechi-view-parts")
    done = cluster.kubectl(*store, *accounts)
    assert done.returncode == 0, done.stderr
    _plant(cluster)
    yield cluster
    ours = [item for item in rendered if item["kind"] != "Namespace"]
    _kubectl(cluster, ours, "delete", "--wait=false", "--ignore-not-found", "--filename=-")
    for path in (SERVICE + "/safety", "/api/v1/namespaces/kubeflow/pods/train", "/api/v1/nodes/n1"):
        cluster.request("DELETE", path)
    for namespace, name in (("kubeflow", "haechi-s3"), ("haechi-serving", "haechi-s3"), ("haechi-review", "other")):
        cluster.request("DELETE", f"/api/v1/namespaces/{namespace}/secrets/{name}")
    cluster.request("DELETE", "/api/v1/namespaces/{}/configmaps/{}".format(*_CONFIG))


def _with_users(item: dict[str, Any]) -> dict[str, Any]:
    for who in item.get("subjects", []):
        if who["kind"] == "Group":
            name = USERS[who.pop("name")]
            who.pop("apiGroup")
            who |= {"kind": "ServiceAccount", "name": name, "namespace": "kubeflow"}
    return item


def _kubectl(cluster: ApiServer, items: list[dict[str, Any]], *arguments: str) -> None:
    done = cluster.kubectl(*arguments, given=yaml.safe_dump_all(items))
    assert done.returncode == 0, done.stderr


def _plant(cluster: ApiServer) -> None:
    """What makes doctor read on: Secrets, a pod that waits, a canary that is ready and whose Gateway is named."""
    keys = {key: base64.b64encode(b"of-the-test").decode() for key in ("access_key", "secret_key")}
    aws = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), keys["access_key"])
    for namespace, name, data in (
        ("kubeflow", "haechi-s3", keys),
        ("haechi-serving", "haechi-s3", aws),
        ("haechi-review", "other", keys),
    ):
        meta = {"name": name, "namespace": namespace}
        cluster.apply({"apiVersion": "v1", "kind": "Secret", "metadata": meta, "data": data})
    ingress = {"enableGatewayApi": True, "kserveIngressGateway": "kserve/kserve-ingress-gateway"}
    meta = {"namespace": _CONFIG[0], "name": _CONFIG[1]}
    data = {"deploy": json.dumps({"defaultDeploymentMode": "Standard"}), "ingress": json.dumps(ingress)}
    cluster.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": data})
    second = {"name": "b", "model": {**MODEL, "name": "b"}}
    spec = {"predictor": {"model": MODEL}, "canary": [{"predictor": second, "trafficPercent": 10}]}
    body = {"apiVersion": "serving.kserve.io/v1beta1", "kind": "InferenceService", "metadata": {"name": "safety"}}
    assert cluster.request("POST", SERVICE, {**body, "spec": spec}).status == 201
    ready = {"status": {"canaryStatuses": [{"name": "b", "ready": True, "trafficPercent": 10}]}}
    found = cluster.request("PATCH", f"{SERVICE}/safety/status", ready, kind="application/merge-patch+json")
    assert found.status == 200, found.message
    cluster.request("POST", "/api/v1/nodes", {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"}})
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "train"}}
    pod["spec"] = {"containers": [{"name": "main", "image": "registry.invalid/train:1"}]}
    assert cluster.request("POST", "/api/v1/namespaces/kubeflow/pods", pod).status == 201
    waiting = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes"}
    status = {"status": {"phase": "Pending", "conditions": [waiting]}}
    path = "/api/v1/namespaces/kubeflow/pods/train/status"
    assert cluster.request("PATCH", path, status, kind="application/merge-patch+json").status == 200


def refused(place: ApiServer, user: str) -> dict[str, str]:
    """check → the API server's words, where doctor as that user was refused."""
    aim = Aim(kubeconfig=str(place.kubeconfig(user)), workdir=Path("/nonexistent"))
    results = examine(World(aim, env={}), checks={n: c for n, c in CHECKS.items() if c.area != "machine"}).results
    return {result.check: result.unseen for result in results if "forbidden" in result.unseen}


def test_an_operators_doctor_is_refused_nothing(place: ApiServer) -> None:
    assert refused(place, OPERATOR) == {}


def test_a_viewers_doctor_is_refused_the_keys_and_nothing_else(place: ApiServer) -> None:
    found = refused(place, VIEWER)
    assert set(found) == {"step-settings", "step-keys", "step-mlflow", "kserve-keys"}
    for said in found.values():
        assert re.search(r'secrets "haechi-(s3|mlflow)" is forbidden', said), said


@pytest.mark.parametrize("user", [VIEWER, OPERATOR])
@pytest.mark.parametrize(
    ("namespace", "right"),
    [("", ("", "nodes", "list")), ("", ("serving.kserve.io", "clusterservingruntimes", "list"))],
)
def test_what_doctor_does_without_in_silence_is_granted(
    place: ApiServer, user: str, namespace: str, right: tuple[str, str, str]
) -> None:
    assert allowed(place, user, namespace, right)
    assert place.request("GET", "/api/v1/namespaces/{}/configmaps/{}".format(*_CONFIG), user=user).status == 200


def test_without_a_role_doctor_is_refused_all_over(place: ApiServer) -> None:
    found = set(refused(place, place.make_service_account("kubeflow", "nobody")))
    assert {"namespaces", "pending", "quota", "runtime", "canary-mode", "rights", "service-endpoints"} <= found


@pytest.mark.parametrize("user", [VIEWER, OPERATOR, RUNNER, RECONCILER])
def test_whoever_looks_or_deploys_may_see_what_serves(
    place: ApiServer, speak_as: Callable[[str], None], user: str
) -> None:
    speak_as(user)
    seen = observe(Target("kserve", namespace="haechi-serving", name="safety"), Path("/nonexistent"))
    assert (seen.version, seen.canary, seen.traffic) == ("0123456789ab", "0123456789ab", 10)


@pytest.mark.parametrize("user", [OPERATOR, RUNNER, RECONCILER])
def test_whoever_deploys_has_all_of_deploys_rights_and_may_ask_kserve_for_its_mode(
    place: ApiServer, speak_as: Callable[[str], None], user: str
) -> None:
    assert [right for right in RIGHTS if not allowed(place, user, "haechi-serving", right)] == []
    speak_as(user)
    api = InferenceServiceApi("haechi-serving", "safety")
    assert json.loads((api.config_map(*_CONFIG) or {})["deploy"]) == {"defaultDeploymentMode": "Standard"}
    assert api.route() is None, "staging has canaries, so routes may be read"
    with pytest.raises(Forbidden):
        api.config_map(_CONFIG[0], "other")


def allowed(place: ApiServer, user: str, namespace: str, right: tuple[str, str, str]) -> bool:
    group, resource, verb = right
    what = {"namespace": namespace, "group": group, "resource": resource, "verb": verb}
    kind = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview"}
    path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
    found = place.request("POST", path, {**kind, "spec": {"resourceAttributes": what}}, user)
    return bool(found.body["status"]["allowed"])


@pytest.mark.parametrize("user", [VIEWER, OPERATOR, RUNNER, RECONCILER])
@pytest.mark.parametrize(
    ("namespace", "right"),
    [
        ("haechi-serving", ("", "secrets", "list")),
        ("haechi-serving", ("", "pods", "create")),
        ("haechi-serving", ("", "pods/exec", "create")),
        ("haechi-serving", ("", "serviceaccounts/token", "create")),
        ("haechi-serving", ("serving.kserve.io", "servingruntimes", "patch")),
        ("haechi-serving", ("serving.kserve.io", "inferenceservices", "deletecollection")),
        ("haechi-serving", ("rbac.authorization.k8s.io", "rolebindings", "create")),
        ("haechi-review", ("", "secrets", "get")),
        ("mlflow", ("", "secrets", "get")),
        ("mlflow", ("apps", "deployments", "patch")),
        ("kserve", ("", "configmaps", "patch")),
        ("kserve", ("", "configmaps", "list")),
        ("default", ("", "pods", "list")),
    ],
)
def test_nobody_may_do_more(place: ApiServer, user: str, namespace: str, right: tuple[str, str, str]) -> None:
    assert not allowed(place, user, namespace, right)


@pytest.mark.parametrize("right", [right for right in RIGHTS if right[2] not in ("get", "list", "watch")])
def test_a_viewer_changes_nothing(place: ApiServer, right: tuple[str, str, str]) -> None:
    assert not allowed(place, VIEWER, "haechi-serving", right)
