"""`haechi submit` against the real API server of Kubeflow Pipelines 2.17, and what that makes of the pipeline."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import kfp_server_api
import pytest
import yaml
from api_server import ApiServer
from kfp_server import KfpServer, why_absent

from haechi.components.shared.settings import Settings
from haechi.pipelines.cli import main
from haechi.pipelines.compiling import COMPILED
from haechi.pipelines.kubeflow import Kubeflow
from haechi.pipelines.kubeflow_errors import SubmitError
from haechi.pipelines.kubeflow_settings import AUDIENCE, KubeflowSettings
from haechi.pipelines.scheduling import Schedule
from haechi.pipelines.submitting import Package, schedule_training, submit_training

pytestmark = pytest.mark.e2e
Start = Callable[..., KfpServer]


@pytest.fixture(scope="module")
def start(cluster: ApiServer, s3_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts servers that end with the module."""
    absent = why_absent()
    if absent:
        pytest.skip(absent)
    running: list[KfpServer] = []

    def begin(**options: bool) -> KfpServer:
        bucket = f"kfp-{uuid.uuid4().hex[:8]}"
        server = KfpServer(tmp_path_factory.mktemp("kfp"), cluster, replace(s3_settings, bucket=bucket), **options)
        server.start()
        running.append(server)
        return server

    yield begin
    for server in running:
        server.stop()


@pytest.fixture(scope="module")
def single(start: Start) -> KfpServer:
    """Pipelines alone, for a single user."""
    return start()


@pytest.fixture(scope="module")
def many(start: Start) -> KfpServer:
    """Pipelines as Kubeflow runs it."""
    return start(multi_user=True)


@pytest.fixture(scope="module")
def objects(start: Start) -> KfpServer:
    """Pipelines with --pipelinesStoreKubernetes."""
    return start(objects=True)


def made(cluster: ApiServer, kind: str, namespace: str, name: str) -> list[dict[str, Any]]:
    """The Workflows or ScheduledWorkflows that Pipelines made under a name."""
    group = "argoproj.io/v1alpha1" if kind == "workflows" else "kubeflow.org/v1beta1"
    rows = cluster.get(f"/apis/{group}/namespaces/{namespace}/{kind}")["items"]
    return [row for row in rows if name in json.dumps(row["metadata"])]


def connect(server: KfpServer, **settings: Any) -> Kubeflow:
    return Kubeflow(KubeflowSettings(host=server.host, **settings))


def later(folder: Path) -> Package:
    """The pipeline as another release would compile it."""
    path = folder / "training.yaml"
    path.write_text((COMPILED / "training.yaml").read_text().replace("haechi/train:0.1.0", "haechi/train:0.2.0"))
    return Package.read(path)


def test_a_submit_becomes_a_workflow_that_retries_trainings_for_days(
    single: KfpServer, cluster: ApiServer, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["submit", "--host", single.host, "--preset", "safety", "--set", "gpu_count=1", "--set", "seed=7"]
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    [workflow] = made(cluster, "workflows", "kubeflow", told["id"])
    templates = {entry["name"]: entry for entry in workflow["spec"]["templates"]}
    [train] = [task for task in templates["comp-for-loop-1"]["dag"]["tasks"] if task["name"] == "train"]
    given = {entry["name"]: entry.get("value") for entry in train["arguments"]["parameters"]}
    assert (given["retry-max-count"], given["retry-backoff-max-duration"]) == ("10", "1209600")
    strategy = templates["retry-system-container-impl"]["retryStrategy"]
    assert strategy["backoff"]["maxDuration"] == "{{inputs.parameters.retry-backoff-max-duration}}"
    assert "retryPolicy" not in strategy, "Argo's default, OnFailure: a pod that is deleted is not retried"


def test_claim_requests_and_training_anew_reach_the_workflow_and_no_step_is_cached(
    single: KfpServer, cluster: ApiServer, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["submit", "--host", single.host, "--cache-claim", "frames", "--no-cache", "--set", "train_cpu=8", "--json"]
    assert main(words) == 0
    [workflow] = made(cluster, "workflows", "kubeflow", json.loads(capsys.readouterr().out)["id"])
    values = {entry["name"]: entry["value"] for entry in workflow["spec"]["arguments"]["parameters"]}
    claims = [mount["pvcMount"][0] for mount in map(json.loads, values.values()) if "pvcMount" in mount]
    assert [claim["pvcNameParameter"]["runtimeValue"]["constant"] for claim in claims] == ["frames", "frames"]
    [resources] = [
        json.loads(value)["resources"] for value in values.values() if '"--function_to_execute","train"' in value
    ]
    assert "train_cpu" in resources["resourceCpuRequest"] and "gpu_count" in resources["accelerator"]["resourceCount"]
    text = json.dumps(workflow["spec"]).replace("\\", "")
    assert '"retrain":true' in text and '"train_cpu":"8"' in text
    assert "enableCache" not in text, "what is not set is off"


@pytest.mark.parametrize("name", ["화재 감지, 밤", "가" * 42, "x" * 128, "quo\"te's & <b>", "{{workflow.name}}"])
def test_names_are_kept_as_they_are_written(name: str, single: KfpServer) -> None:
    api = connect(single)
    run = submit_training(api, {}, run_name=name, experiment=name)
    assert api.run(run.id).display_name == name
    for change in ("created", "unchanged"):
        assert schedule_training(api, {}, Schedule(seconds=3600), name=name, pin=True).change == change


def test_of_many_who_schedule_at_the_same_moment_one_stays(single: KfpServer) -> None:
    def schedule(_: int) -> str:
        return schedule_training(connect(single), {"name": "race"}, Schedule(seconds=3600), pin=True).id

    connect(single).pipeline("training", "")
    with ThreadPoolExecutor(4) as pool:
        ids = set(pool.map(schedule, range(4)))
    [row] = connect(single).recurring_runs("training-race")
    assert row.mode == "ENABLE" and row.recurring_run_id in ids


def test_the_same_pipeline_is_one_version_however_often_it_is_submitted(single: KfpServer, tmp_path: Path) -> None:
    api = connect(single)
    done = [submit_training(api, {}, package=package) for package in (None, None, later(tmp_path), None)]
    assert [one.uploaded for one in done][1:] == [False, True, False]
    names = [version.name for version in api.versions(api.pipeline("training", ""))]
    assert len(names) == len(set(names))
    assert done[0].version == done[3].version != done[2].version
    assert api.server.version == "2.17.0"


def test_one_schedule_of_a_name_is_one_scheduled_workflow_that_takes_the_newest_version(
    start: Start, cluster: ApiServer, tmp_path: Path
) -> None:
    api = connect(start())
    hourly, nightly = Schedule(seconds=3600), Schedule(cron="0 0 3 * * *")
    parameters = {"seed": 3, "name": "continuous", "candidates": [{"name": "a", "model": "yolo11n", "epochs": 5}]}
    changes = [schedule_training(api, parameters, schedule).change for schedule in (hourly, hourly, nightly, nightly)]
    assert changes == ["created", "unchanged", "replaced", "unchanged"]
    as_trainer = [schedule_training(api, parameters, nightly, service_account="trainer").change for _ in range(2)]
    assert as_trainer == ["replaced", "unchanged"]
    [scheduled] = made(cluster, "scheduledworkflows", "kubeflow", "continuous")
    spec = scheduled["spec"]
    assert (spec["enabled"], spec["maxConcurrency"], spec["noCatchup"]) == (True, 1, True)
    assert spec["trigger"]["cronSchedule"]["cron"] == "0 0 3 * * *"
    assert spec["serviceAccount"] == "trainer"
    assert not spec.get("pipelineVersionId")
    time.sleep(1.0)  # the server tells which version is newer by the second
    newer = later(tmp_path)
    submit_training(api, {}, package=newer)
    with pytest.raises(SubmitError, match=f"newest version of training on the server is {newer.version}"):
        schedule_training(api, parameters, hourly)
    assert schedule_training(api, parameters, hourly, pin=True).change == "replaced"
    [pinned] = made(cluster, "scheduledworkflows", "kubeflow", "continuous")
    assert pinned["spec"].get("pipelineVersionId") or pinned["spec"]["workflow"]["spec"]


@pytest.mark.parametrize(
    ("parameters", "told"),
    [({"seed": "many"}, "input parameter seed requires type"), ({"classes": "fire"}, "classes requires type list")],
)
def test_a_value_of_another_type_is_refused_in_the_servers_words(
    parameters: dict[str, Any], told: str, single: KfpServer
) -> None:
    with pytest.raises(SubmitError, match=told) as error:
        submit_training(connect(single), parameters)
    assert error.value.status == 400


def test_a_cron_that_the_scheduler_cannot_read_is_refused_and_the_former_schedule_goes_on(single: KfpServer) -> None:
    api = connect(single)
    before = schedule_training(api, {"name": "kept"}, Schedule(seconds=3600), pin=True)
    with pytest.raises(SubmitError, match="not a supported format"):
        schedule_training(api, {"name": "kept"}, Schedule(cron="0 0 33 * * *"), pin=True)
    [row] = api.recurring_runs("training-kept")
    assert (row.recurring_run_id, row.mode) == (before.id, "ENABLE")


# many users -------------------------------------------------------------------------------------------------------


@pytest.fixture
def profile(cluster: ApiServer) -> str:
    """A namespace whose default-editor may do everything with pipelines, and whose default-viewer may look."""
    name = cluster.make_namespace(f"team-{uuid.uuid4().hex[:8]}")
    for account, verbs in (("default-editor", ["*"]), ("default-viewer", ["get", "list"])):
        cluster.make_service_account(name, account)
        rule = {"apiGroups": ["pipelines.kubeflow.org"], "resources": ["*"], "verbs": verbs}
        meta, group = {"name": account, "namespace": name}, "rbac.authorization.k8s.io"
        cluster.apply({"apiVersion": f"{group}/v1", "kind": "Role", "metadata": meta, "rules": [rule]})
        subject = {"kind": "ServiceAccount", "name": account, "namespace": name}
        binding = {"apiVersion": f"{group}/v1", "kind": "RoleBinding", "metadata": meta, "subjects": [subject]}
        cluster.apply(binding | {"roleRef": {"apiGroup": group, "kind": "Role", "name": account}})
    return name


def token(cluster: ApiServer, namespace: str, account: str = "default-editor", audience: str = AUDIENCE) -> str:
    """A real token, as `kubectl create token` gets it."""
    path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"
    wanted = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"audiences": [audience]}}
    answer = cluster.request("POST", path, wanted)
    assert answer.status == 201, answer.message
    return str(answer.body["status"]["token"])


def test_a_token_for_pipelines_runs_and_schedules_in_its_namespace(
    many: KfpServer, cluster: ApiServer, profile: str, tmp_path: Path
) -> None:
    path = tmp_path / "token"
    path.write_text(token(cluster, profile))
    words = ["submit", "--host", many.host, "--namespace", profile, "--token-file", str(path)]
    assert main(words) == 0
    assert main([*words, "--every", "6h"]) == 0
    assert len(made(cluster, "workflows", profile, "training")) == 1
    assert len(made(cluster, "scheduledworkflows", profile, "training")) == 1


@pytest.mark.parametrize(
    ("audience", "told"),
    [
        (
            "https://kubernetes.default.svc",
            "for the audience https://kubernetes.default.svc, not pipelines.kubeflow.org",
        ),
        ("", "No token was sent"),
    ],
    ids=["audience", "none"],
)
def test_a_token_for_another_audience_is_refused_with_that_reason(
    audience: str, told: str, many: KfpServer, cluster: ApiServer, profile: str
) -> None:
    bearer = token(cluster, profile, audience=audience) if audience else ""
    with pytest.raises(SubmitError, match=told) as error:
        submit_training(connect(many, namespace=profile, token=bearer), {})
    assert error.value.status == 401
    assert not bearer or bearer not in str(error.value)


@pytest.mark.parametrize("namespace", ["kubeflow", "nowhere"])
def test_a_namespace_that_is_not_ones_own_or_not_there_is_refused(
    namespace: str, many: KfpServer, cluster: ApiServer, profile: str
) -> None:
    with pytest.raises(SubmitError, match=f"namespace '{namespace}' exists") as error:
        submit_training(connect(many, namespace=namespace, token=token(cluster, profile)), {})
    assert error.value.status == 403


def test_one_who_may_only_look_cannot_submit(many: KfpServer, cluster: ApiServer, profile: str, tmp_path: Path) -> None:
    viewer = connect(many, namespace=profile, token=token(cluster, profile, "default-viewer"))
    with pytest.raises(SubmitError, match="did not create the pipeline 'training'") as error:
        submit_training(viewer, {})
    assert error.value.status == 403
    submit_training(connect(many, namespace=profile, token=token(cluster, profile)), {})
    # Of an upload the server tells no reason.
    with pytest.raises(SubmitError, match="missing rights among them"):
        submit_training(viewer, {}, package=later(tmp_path))


# pipelines as objects ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pipeline.yaml", "pipelineversion.yaml"])
def test_the_compiled_objects_are_taken_by_the_cluster_as_they_are(name: str, cluster: ApiServer) -> None:
    body = yaml.safe_load((COMPILED / name).read_text())
    body["metadata"]["namespace"] = cluster.make_namespace(f"gitops-{uuid.uuid4().hex[:8]}")
    kept = cluster.apply(body)
    assert {key: kept["spec"][key] for key in body["spec"]} == body["spec"]


def test_an_object_with_an_unknown_field_is_refused(cluster: ApiServer) -> None:
    body = yaml.safe_load((COMPILED / "pipelineversion.yaml").read_text())
    body["metadata"]["namespace"] = cluster.make_namespace(f"gitops-{uuid.uuid4().hex[:8]}")
    body["spec"]["pipelinesSpec"] = body["spec"].pop("pipelineSpec")
    with pytest.raises(AssertionError, match="pipelinesSpec"):
        cluster.apply(body)


def test_pipelines_from_git_run_and_are_scheduled_beside_those_that_are_submitted(
    objects: KfpServer, cluster: ApiServer
) -> None:
    for name in ("pipeline.yaml", "pipelineversion.yaml"):
        body = yaml.safe_load((COMPILED / name).read_text())
        body["metadata"]["namespace"] = "kubeflow"
        cluster.apply(body, manager="argocd")
    api = connect(objects)
    assert api.server.store == "kubernetes"
    [version] = api.versions(api.pipeline("training", ""))
    assert version.name == body["metadata"]["name"]
    wanted = kfp_server_api.V2beta1Run(
        display_name="from git",
        experiment_id=api.experiment("training"),
        pipeline_version_reference=kfp_server_api.V2beta1PipelineVersionReference(
            pipeline_id=version.pipeline_id, pipeline_version_id=version.version_id
        ),
    )
    assert len(made(cluster, "workflows", "kubeflow", api.start(wanted))) == 1

    time.sleep(1.0)  # the server tells which version is newer by the second
    done = submit_training(api, {"seed": 5})
    assert done.uploaded and not submit_training(api, {"seed": 6}).uploaded
    assert [row.name for row in api.versions(version.pipeline_id)] == [done.version, version.name]
    assert schedule_training(api, {"name": "from-git"}, Schedule(seconds=3600)).change == "created"

    # What the manifests say of an object: a changed pipeline needs a new name.
    body["spec"]["pipelineSpec"]["root"]["inputDefinitions"]["parameters"]["seed"]["defaultValue"] = 9
    with pytest.raises(AssertionError, match="immutable"):
        cluster.apply(body, manager="argocd")
    body["metadata"]["name"] = body["spec"]["displayName"] = "training-0-1-0-production-2"
    cluster.apply(body, manager="argocd")
    deadline = time.monotonic() + 120  # the server learns of objects by watching
    while body["metadata"]["name"] not in [row.name for row in api.versions(version.pipeline_id)]:
        assert time.monotonic() < deadline
        time.sleep(0.2)
