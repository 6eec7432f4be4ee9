"""`haechi submit`: uploads, runs, schedules, waiting and refusals, against a stand-in for the Pipelines API server."""

from __future__ import annotations

import json
import shlex
import shutil
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from certificates import write_certificate
from kfp_server_api import V2beta1Run
from kfp_stand_in import Fault, KfpStandIn, Refused, check, make_token

from haechi.components.shared.errors import InputError
from haechi.pipelines import kubeflow, submitting, watching
from haechi.pipelines.cli import build_parser, main
from haechi.pipelines.compiling import COMPILED
from haechi.pipelines.kubeflow import Kubeflow
from haechi.pipelines.kubeflow_errors import RunFailed, SubmitError, token_fault
from haechi.pipelines.kubeflow_settings import KubeflowSettings
from haechi.pipelines.parameters import run_parameters
from haechi.pipelines.scheduling import Schedule
from haechi.pipelines.submitting import Package
from haechi.pipelines.watching import watch

PACKAGE = Package.read()  # half a second of YAML, once
submit_training = partial(submitting.submit_training, package=PACKAGE)
schedule_training = partial(submitting.schedule_training, package=PACKAGE)
VARIABLES = ("ENDPOINT", "UI_ENDPOINT", "TOKEN", "COOKIE", "NAMESPACE", "SA_TOKEN_PATH")


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(f"KF_PIPELINES_{name}", raising=False)


@pytest.fixture
def api() -> Iterator[KfpStandIn]:
    with KfpStandIn() as stand_in:
        yield stand_in


@pytest.fixture
def team() -> Iterator[KfpStandIn]:
    """Kubeflow for many users, where alice may work in the namespace team."""
    with KfpStandIn(multi_user=True) as stand_in:
        stand_in.allow("team", "alice")
        yield stand_in


def connect(stand_in: KfpStandIn, **settings: Any) -> Kubeflow:
    return Kubeflow(KubeflowSettings(host=stand_in.host, **settings))


def alice(stand_in: KfpStandIn, **settings: Any) -> Kubeflow:
    return connect(stand_in, **{"namespace": "team", "token": make_token("alice"), **settings})


def later(package: Package, folder: Path) -> Package:
    """The pipeline as another release would compile it."""
    path = folder / "training.yaml"
    path.write_text(package.path.read_text().replace("haechi/train:0.1.0", "haechi/train:0.2.0"))
    return Package.read(path)


# runs -------------------------------------------------------------------------------------------------------------


def test_a_run_reaches_the_api_with_its_version_parameters_and_token(
    team: KfpStandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    token = tmp_path / "token"
    token.write_text(make_token("alice") + "\n")
    words = ["submit", "--host", team.host, "--namespace", "team", "--token-file", str(token), "--preset", "safety"]
    assert main([*words, "--set", "gpu_count=2", "--set", "seed=7", "--run-name", "by hand", "--json"]) == 0
    out = capsys.readouterr()
    told = json.loads(out.out)
    [run], [version] = team.runs, team.versions
    assert told["url"] == f"{team.host}/#/runs/details/{run['run_id']}"
    assert (told["id"], told["version"], told["uploaded"]) == (run["run_id"], version["name"], True)
    assert token.read_text().strip() not in out.out + out.err
    sent = run["runtime_config"]["parameters"]
    assert (sent["gpu_count"], sent["seed"], sent["name"]) == ("2", 7, "safety")
    assert run["display_name"] == "by hand"
    assert run["pipeline_version_reference"]["pipeline_version_id"] == version["pipeline_version_id"]
    assert [row["namespace"] for row in (*team.experiments, *team.pipelines, run)] == ["team"] * 3


def test_what_is_uploaded_is_the_compiled_pipeline_with_its_cluster_settings(api: KfpStandIn) -> None:
    submit_training(connect(api), {})
    [version] = api.versions
    spec, platform = version["spec"]
    assert spec["pipelineInfo"]["name"] == "training"
    assert "exec-train" in platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


def test_the_same_pipeline_is_uploaded_once_and_another_is_a_new_version(api: KfpStandIn, tmp_path: Path) -> None:
    server, package = connect(api), PACKAGE
    done = [submit_training(server, {}, package=package) for _ in range(2)]
    done.append(submit_training(server, {}, package=later(package, tmp_path)))
    assert [one.uploaded for one in done] == [True, False, True]
    assert [one.version for one in done] == [row["name"] for row in (api.versions[0], *api.versions)]
    assert len({row["name"] for row in api.versions}) == len(api.versions) == 2
    assert (len(api.pipelines), len(api.experiments), len(api.runs)) == (1, 1, 3)
    assert api.runs[2]["pipeline_version_reference"]["pipeline_version_id"] == api.versions[1]["pipeline_version_id"]


def test_a_versions_name_is_its_contents_and_no_matter_of_the_sdk(tmp_path: Path) -> None:
    text = (COMPILED / "training.yaml").read_text()
    other = tmp_path / "training.yaml"
    other.write_text("# another comment\n" + text.replace("sdkVersion: kfp-", "sdkVersion: kfp-9."))
    assert Package.read(other).version == PACKAGE.version
    other.write_text(text.replace("defaultValue: 0.7", "defaultValue: 0.6"))
    assert Package.read(other).version != PACKAGE.version


def test_an_older_version_runs_as_itself_beside_a_newer_one(api: KfpStandIn, tmp_path: Path) -> None:
    server, package = connect(api), PACKAGE
    first = submit_training(server, {}, package=package)
    submit_training(server, {}, package=later(package, tmp_path))
    submit_training(server, {}, package=package)
    assert api.runs[2]["pipeline_version_reference"] == api.runs[0]["pipeline_version_reference"]
    assert first.version == package.version


def test_a_version_is_found_on_a_later_page(api: KfpStandIn, tmp_path: Path) -> None:
    api.page = 1
    server, package = connect(api), PACKAGE
    for one in (package, later(package, tmp_path), package):
        submit_training(server, {}, package=one)
    assert len(api.versions) == 2


def test_two_who_upload_at_the_same_moment_share_the_version(api: KfpStandIn) -> None:
    server, package = connect(api), PACKAGE
    create = server.versions

    def late(pipeline_id: str) -> Any:
        # The other one's upload lands between our look and our upload.
        rows = create(pipeline_id)
        if not rows and not api.versions:
            connect(api).upload(package.path, pipeline_id, package.version, "")
        return rows

    server.versions = late  # type: ignore[method-assign]
    done = submit_training(server, {}, package=package)
    assert (done.uploaded, len(api.versions), len(api.runs)) == (False, 1, 1)


def test_a_refused_upload_that_nobody_else_made_is_an_error(api: KfpStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submitting, "_PAUSE", 0.0)
    api.faults.append(Fault("upload_version", 409, "{}"))
    with pytest.raises(SubmitError, match="did not take the version"):
        submit_training(connect(api), {})
    assert api.runs == []


def test_experiment_and_service_account_are_as_given(api: KfpStandIn) -> None:
    submit_training(connect(api), {}, experiment="night", service_account="trainer")
    submit_training(connect(api), {}, experiment="night")
    assert [row["display_name"] for row in api.experiments] == ["night"]
    assert api.runs[0]["service_account"] == "trainer"
    assert "service_account" not in api.runs[1]


def test_a_parameter_that_the_pipeline_lacks_stops_before_anything_is_sent(api: KfpStandIn) -> None:
    server = connect(api)
    with pytest.raises(InputError, match=r"'sead' is no parameter"):
        submit_training(server, {"sead": 1})
    assert [line for line in api.requests if "healthz" not in line] == []


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"run_name": "two\nlines"}, "--run-name is 'two.nlines'"),
        ({"run_name": "x" * 129}, "128 bytes at most"),
        ({"run_name": " "}, "--run-name is ' '"),
        ({"run_name": "fire 😀"}, "no emoji"),
        ({"experiment": "가" * 43}, "--experiment is"),
        ({"service_account": "No Such"}, "--service-account is 'No Such'"),
        (
            {"parameters": {"sources": [{"uri": "s3://haechi/" + "x" * 120_000}]}},
            "Name folders instead of single files",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_the_server_would_take_and_then_stumble_over_stops_before_anything_is_sent(
    given: dict[str, Any], told: str, api: KfpStandIn
) -> None:
    server = connect(api)
    with pytest.raises(InputError, match=told):
        submit_training(server, **{"parameters": {}, **given})
    if "run_name" in given:
        with pytest.raises(InputError, match=told):
            schedule_training(server, {}, Schedule(seconds=60), name=given["run_name"])
    assert [line for line in api.requests if "healthz" not in line] == []


@pytest.mark.parametrize("name", ["화재 감지 실행", "가" * 42, "quo\"te's & <b>", "{{workflow.name}}", "x" * 128])
def test_names_are_kept_as_they_are_written(name: str, api: KfpStandIn) -> None:
    submit_training(connect(api), {}, run_name=name, experiment=name)
    schedule_training(connect(api), {}, Schedule(seconds=60), name=name)
    assert {row["display_name"] for row in (*api.runs, *api.experiments, *api.recurring)} >= {name}
    assert schedule_training(connect(api), {}, Schedule(seconds=60), name=name).change == "unchanged"


def test_the_servers_own_refusal_is_told_in_its_words(api: KfpStandIn) -> None:
    with pytest.raises(SubmitError, match=r"did not start the run \(400.*input parameter seed requires type") as told:
        submit_training(connect(api), {"seed": "many"})
    assert told.value.status == 400


# schedules --------------------------------------------------------------------------------------------------------


def test_a_schedule_runs_the_newest_version_one_at_a_time_and_makes_up_for_nothing(api: KfpStandIn) -> None:
    done = schedule_training(connect(api), {"seed": 3}, Schedule(cron="0 0 3 * * *"))
    [row] = api.recurring
    assert row["pipeline_version_reference"]["pipeline_version_id"] == ""
    assert (row["max_concurrency"], row["no_catchup"], row["mode"]) == ("1", True, "ENABLE")
    assert row["trigger"] == {"cron_schedule": {"cron": "0 0 3 * * *"}}
    assert (done.change, done.name) == ("created", "training-safety")
    assert done.url == f"{api.host}/#/recurringrun/details/{row['recurring_run_id']}"
    assert api.runs == []


def test_the_same_schedule_again_changes_nothing(api: KfpStandIn) -> None:
    # Whole numbers come back from the server as floats.
    parameters = {"seed": 3, "candidates": [{"name": "a", "model": "yolo11n", "epochs": 5}]}
    done = [schedule_training(connect(api), parameters, Schedule(seconds=3600)) for _ in range(2)]
    assert [one.change for one in done] == ["created", "unchanged"]
    assert done[0].id == done[1].id


@pytest.mark.parametrize(
    "change",
    [
        {"schedule": Schedule(seconds=7200)},
        {"schedule": Schedule(cron="0 0 3 * * *")},
        {"parameters": {"seed": 4}},
        {"experiment": "night"},
        {"service_account": "trainer"},
        {"pin": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_schedule_of_that_name_takes_the_place_of_the_first(change: dict[str, Any], api: KfpStandIn) -> None:
    wanted: dict[str, Any] = {"parameters": {"seed": 3}, "schedule": Schedule(seconds=3600)}
    first = schedule_training(connect(api), **wanted)
    second = schedule_training(connect(api), **{**wanted, **change})
    assert (second.change, second.name) == ("replaced", first.name)
    assert [row["recurring_run_id"] for row in api.recurring] == [second.id] != [first.id]
    assert api.most_enabled == 1, "two never ran at a time"


def test_a_schedule_keeps_its_service_account_until_another_is_asked_for(api: KfpStandIn) -> None:
    accounts = ["trainer", "trainer", "other", "", ""]
    done = [schedule_training(connect(api), {}, Schedule(seconds=60), service_account=name) for name in accounts]
    assert [one.change for one in done] == ["created", "unchanged", "replaced", "replaced", "unchanged"]
    assert [row["service_account"] for row in api.recurring] == ["pipeline-runner"]


def test_schedules_of_other_names_stay(api: KfpStandIn) -> None:
    for name in ("safety", "entrance"):
        schedule_training(connect(api), {"name": name}, Schedule(seconds=3600))
    assert [row["display_name"] for row in api.recurring] == ["training-safety", "training-entrance"]


def test_a_refused_schedule_leaves_the_former_one_running(api: KfpStandIn) -> None:
    schedule_training(connect(api), {}, Schedule(seconds=3600))
    api.faults.append(Fault("POST /apis/v2beta1/recurringruns$", 500, "{}"))
    with pytest.raises(SubmitError, match="did not make the recurring run"):
        schedule_training(connect(api), {}, Schedule(seconds=60))
    [row] = api.recurring
    assert (row["mode"], row["trigger"]) == ("ENABLE", {"periodic_schedule": {"interval_second": "3600"}})


def test_what_a_killed_replacement_left_is_mended_by_the_next_submit(api: KfpStandIn) -> None:
    schedule_training(connect(api), {}, Schedule(seconds=3600))
    api.faults.append(Fault("DELETE", 503, "{}"))
    with pytest.raises(SubmitError, match="delete the recurring run"):
        schedule_training(connect(api), {}, Schedule(seconds=60))
    assert sorted(row["mode"] for row in api.recurring) == ["DISABLE", "ENABLE"]
    done = schedule_training(connect(api), {}, Schedule(seconds=60))
    [row] = api.recurring
    assert (row["recurring_run_id"], row["mode"], done.change) == (done.id, "ENABLE", "replaced")


def test_of_two_who_schedule_at_the_same_moment_the_newest_stays(api: KfpStandIn) -> None:
    server = connect(api)
    create = server.create_recurring

    def late(wanted: Any) -> str:
        # The other one's schedule is made between our look and ours, or right after ours.
        made = [create(wanted)]
        made.insert(int(first), create(wanted))
        return made[0]

    for first in (True, False):
        server.create_recurring = late  # type: ignore[method-assign]
        done = schedule_training(server, {"name": f"race-{first}"}, Schedule(seconds=3600))
        [row] = [row for row in api.recurring if row["display_name"] == f"training-race-{first}"]
        assert (row["recurring_run_id"], row["mode"]) == (done.id, "ENABLE")


def test_a_schedule_that_somebody_else_deletes_meanwhile_is_no_error(api: KfpStandIn) -> None:
    schedule_training(connect(api), {}, Schedule(seconds=3600))
    api.faults.append(Fault("DELETE", 404, "{}"))
    assert schedule_training(connect(api), {}, Schedule(seconds=60)).change == "replaced"


def test_a_schedule_that_somebody_stopped_goes_on(api: KfpStandIn) -> None:
    first = schedule_training(connect(api), {}, Schedule(seconds=3600))
    connect(api).enable_recurring(first.id, False)
    second = schedule_training(connect(api), {}, Schedule(seconds=3600))
    assert (second.id, second.change) == (first.id, "resumed")
    assert api.recurring[0]["mode"] == "ENABLE"


def test_a_schedule_is_refused_where_it_would_run_a_newer_version_than_this(api: KfpStandIn, tmp_path: Path) -> None:
    package = PACKAGE
    newer = later(package, tmp_path)
    for one in (package, newer):
        submit_training(connect(api), {}, package=one)
    with pytest.raises(SubmitError, match=f"newest version of training on the server is {newer.version}.*--pin"):
        schedule_training(connect(api), {}, Schedule(seconds=60), package=package)
    assert api.recurring == []
    schedule_training(connect(api), {}, Schedule(seconds=60), package=package, pin=True)
    assert (
        api.recurring[0]["pipeline_version_reference"]["pipeline_version_id"] == api.versions[0]["pipeline_version_id"]
    )


@pytest.mark.parametrize(
    ("cron", "every", "told"),
    [
        ("0 3 * * *", "", r"has 5 fields.*Write it as '0 0 3 \* \* \*'"),
        ("daily", "", "has 1 fields"),
        ("", "6", "--every is '6'"),
        ("", "0h", "--every is '0h'"),
        ("0 0 3 * * *", "6h", "one of --cron and --every"),
        ("", "", "one of --cron and --every"),
    ],
)
def test_a_schedule_that_would_mean_something_else_is_refused(cron: str, every: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        Schedule.parse(cron, every)


def test_schedules_are_read_as_written() -> None:
    assert Schedule.parse("", "6h").seconds == 21600
    assert Schedule.parse("@daily", "").cron == "@daily"


def test_the_command_line_schedules(api: KfpStandIn, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["submit", "--host", api.host, "--preset", "entrance", "--every", "1d"]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["change"] == "created"
    assert main(words) == 0
    assert "schedule  training-entrance" in capsys.readouterr().out
    assert len(api.recurring) == 1


# waiting ----------------------------------------------------------------------------------------------------------


def states(state: str, **tasks: str) -> dict[str, Any]:
    rows = [{"display_name": name.split("__")[0], "task_id": name, "state": value} for name, value in tasks.items()]
    return {"state": state, "run_details": {"task_details": rows}}


def test_waiting_tells_each_step_and_ends_well_with_a_promotion(api: KfpStandIn) -> None:
    api.progress = [
        states("RUNNING", **{"resolve": "RUNNING", "resolve-driver": "SUCCEEDED"}),
        states("RUNNING", resolve="SUCCEEDED", train__1="RUNNING", train__2="SUCCEEDED"),
        states("SUCCEEDED", resolve="SUCCEEDED", train__1="SUCCEEDED", train__2="SUCCEEDED", deploy="SUCCEEDED"),
    ]
    server, lines = connect(api), list[str]()
    ended = watch(server, submit_training(server, {}).id, PACKAGE.steps, every=0.01, tell=lines.append)
    assert (ended.decision, ended.exit_code) == ("promote", 0)
    assert [" ".join(line.split()) for line in lines] == [
        "resolve running",
        "resolve succeeded",
        "train 1 running, 1 succeeded",
        "train 2 succeeded",
        "deploy succeeded",
    ]


@pytest.mark.parametrize(
    ("last", "code", "told"),
    [
        (states("SUCCEEDED", refuse="SUCCEEDED"), 30, '"decision": "refuse"'),
        (states("SUCCEEDED", deploy="SUCCEEDED"), 0, '"decision": "promote"'),
        (states("FAILED", train="FAILED", build="SUCCEEDED"), 31, "failed in train"),
        (states("CANCELED"), 31, "was stopped"),
    ],
    ids=["refused", "promoted", "failed", "stopped"],
)
def test_the_exit_code_of_waiting_is_the_verdict(
    last: dict[str, Any], code: int, told: str, api: KfpStandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    api.progress = [last]
    assert main(["submit", "--host", api.host, "--wait", "--json"]) == code
    out = capsys.readouterr()
    assert told in out.out + out.err
    assert "/#/runs/details/r-" in out.err


def test_waiting_outlives_an_api_that_is_away_for_a_moment(api: KfpStandIn) -> None:
    server, lines = connect(api), list[str]()
    run = submit_training(server, {})
    api.faults.append(Fault("GET /apis/v2beta1/runs", 503, "no healthy upstream", times=2, content_type="text/plain"))
    api.progress = [states("SUCCEEDED", deploy="SUCCEEDED")]
    assert watch(server, run.id, ["deploy"], every=0.01, tell=lines.append).decision == "promote"
    assert sum("no answer" in line for line in lines) == 2


def test_waiting_does_not_outlive_a_token_that_is_refused(api: KfpStandIn) -> None:
    server = connect(api)
    run = submit_training(server, {})
    api.faults.append(Fault("GET /apis/v2beta1/runs", 401, "{}", times=9))
    with pytest.raises(SubmitError, match="401"):
        watch(server, run.id, [], every=0.01)


class Clock:
    """Time that passes in sleeps only."""

    def __init__(self) -> None:
        self.now, self.sleeps = 1000.0, list[float]()

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.sleeps.append(seconds)


@pytest.mark.parametrize(
    ("timeout", "sleeps"), [(2.0, [2.0]), (25.0, [10.0, 10.0, 5.0])], ids=["shorter than a pause", "longer"]
)
def test_a_wait_looks_once_more_when_its_time_is_over_and_then_ends(
    timeout: float, sleeps: list[float], api: KfpStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, clock = connect(api), Clock()
    run = submit_training(server, {}).id
    monkeypatch.setattr(watching, "time", clock)
    api.progress = [states("RUNNING") for _ in sleeps] + [states("SUCCEEDED", deploy="SUCCEEDED")]
    assert watch(server, run, [], timeout=timeout).decision == "promote"
    assert clock.sleeps == sleeps
    api.progress = [states("RUNNING")]
    with pytest.raises(RunFailed, match=f"{run} has not ended after {timeout:.0f} s.*goes on"):
        watch(server, run, [], timeout=timeout)
    assert clock.sleeps == sleeps * 2


def test_waiting_gives_an_api_up_that_is_away_for_minutes(api: KfpStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    server, clock = connect(api), Clock()
    run = submit_training(server, {}).id
    monkeypatch.setattr(watching, "time", clock)
    api.faults.append(Fault("GET /apis/v2beta1/runs", 503, "{}", times=999))
    with pytest.raises(SubmitError, match="did not tell the run"):
        watch(server, run, [])
    assert sum(clock.sleeps) == 310.0


@pytest.mark.parametrize("word", ["target=kserve:haechi-serving", "rollout.bakee=10", "candidates=[{modle: yolo11n}]"])
def test_what_a_later_step_would_refuse_is_refused_before_anything_is_asked(word: str, api: KfpStandIn) -> None:
    assert main(["submit", "--host", api.host, "--set", word]) == 2
    assert api.requests == []


@pytest.mark.parametrize(
    "words",
    [
        ["--wait", "--every", "6h"],
        ["--pin"],
        ["--timeout", "60"],
        ["--wait", "--timeout", "-1"],
        ["--wait", "--timeout", "nan"],
    ],
)
def test_words_that_mean_nothing_here_are_refused(words: list[str], api: KfpStandIn) -> None:
    assert main(["submit", "--host", api.host, *words]) == 2
    assert api.requests == []


# who may, and where it is -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "told"),
    [
        ("", "No token was sent"),
        (
            make_token("alice", audience="https://kubernetes.default.svc"),
            "for the audience https://kubernetes.default.svc",
        ),
        (make_token("alice", lives=-60), "token expired at"),
        ("opaque", "kubectl create token default-editor -n team --audience=pipelines.kubeflow.org"),
    ],
    ids=["none", "audience", "expired", "opaque"],
)
def test_a_refused_token_is_told_with_what_is_wrong_with_it(token: str, told: str, team: KfpStandIn) -> None:
    with pytest.raises(SubmitError, match=told) as error:
        submit_training(connect(team, namespace="team", token=token), {})
    assert error.value.status == 401
    assert not token or token not in str(error.value)


@pytest.mark.parametrize(("user", "namespace"), [("mallory", "team"), ("alice", "nowhere")])
def test_a_namespace_that_one_may_not_or_that_is_not_there_is_named(
    user: str, namespace: str, team: KfpStandIn
) -> None:
    with pytest.raises(SubmitError, match=f"namespace '{namespace}' exists.*kubeflow-edit") as error:
        submit_training(connect(team, namespace=namespace, token=make_token(user)), {})
    assert error.value.status == 403


def test_an_upload_that_is_refused_without_a_reason_names_the_likely_one(team: KfpStandIn) -> None:
    server = alice(team)
    server.pipeline("training", "")
    team.faults.append(Fault("upload_version", 400, '{"error_message": "Failed to create a pipeline version"}'))
    with pytest.raises(SubmitError, match="missing rights among them"):
        submit_training(server, {})


@pytest.mark.parametrize("status", [301, 302, 307])
@pytest.mark.parametrize(
    ("what", "end", "told"),
    [
        ("GET .*healthz", "", "leads to {other}. Give that address as --host"),
        (
            "GET .*healthz",
            "/login?from=",
            "leads to {other}/login instead of answering. Most likely it is the login page",
        ),
        ("POST .*/runs", "/login?from=", "did not start the run: it leads to {other}/login"),
        ("POST .*upload_version", "", "did not take the version"),
        ("GET .*/versions", "", "did not list the pipeline's versions: it leads to {other}"),
    ],
    ids=["address", "login", "run", "upload", "list"],
)
def test_a_redirection_is_told_and_nobody_else_gets_the_token_or_the_session(
    what: str,
    end: str,
    told: str,
    status: int,
    team: KfpStandIn,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("KF_PIPELINES_TOKEN", make_token("alice"))
    monkeypatch.setenv("KF_PIPELINES_COOKIE", "session=abc")
    with KfpStandIn() as other:
        team.faults.append(Fault(what, status, location=other.host + end))
        assert main(["submit", "--host", team.host, "--namespace", "team"]) == 11
        assert told.format(other=other.host) in capsys.readouterr().err
        assert other.requests == []


@pytest.mark.parametrize(
    "words",
    [["--token", make_token("alice")], ["--token-file", make_token("alice")], ["--token-file", "{two}"]],
    ids=["abbreviated", "instead of a file", "two lines"],
)
def test_a_token_in_the_wrong_place_is_never_told(
    words: list[str], team: KfpStandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "two").write_text(f"{make_token('alice')}\nother\n")
    words = [word.replace("{two}", str(tmp_path / "two")) for word in words]
    assert main(["submit", "--host", team.host, "--namespace", "team", *words]) == 2
    out = capsys.readouterr()
    assert make_token("alice").split(".")[1] not in out.out + out.err
    assert team.runs == []


def test_a_projected_token_is_read_anew_at_each_call(team: KfpStandIn, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(make_token("alice", lives=-60))
    server = alice(team, token="", token_file=str(path))
    path.write_text(make_token("alice"))
    assert submit_training(server, {}).change == "started"


def test_a_session_of_the_browser_is_as_good_as_a_token(team: KfpStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    team.cookie = "oauth2_proxy_kubeflow=abc"
    monkeypatch.setenv("KF_PIPELINES_COOKIE", team.cookie)
    assert main(["submit", "--host", team.host, "--namespace", "team"]) == 0


def test_a_login_page_is_not_taken_for_the_api(team: KfpStandIn) -> None:
    team.faults.append(Fault("healthz", 200, PAGE, content_type="text/html"))
    with pytest.raises(SubmitError, match=r"web page.*login page.*KF_PIPELINES_COOKIE"):
        alice(team)


@pytest.mark.parametrize(
    ("version", "old"), [("2.16.1", True), ("2.5.0", True), ("2.17.0", False), ("3.0.0", False), ("unknown", False)]
)
def test_a_server_that_is_too_old_is_told_before_anything_is_made(version: str, old: bool, api: KfpStandIn) -> None:
    api.version = version
    if not old:
        assert connect(api).server.version == version
        return
    with pytest.raises(SubmitError, match=f"is {version}.*2.17 or newer"):
        connect(api)
    assert api.requests == ["GET /apis/v2beta1/healthz"]


def test_an_address_without_the_api_is_told(api: KfpStandIn) -> None:
    with pytest.raises(SubmitError, match="404"):
        Kubeflow(KubeflowSettings(host=f"{api.host}/pipeline"))


def test_an_api_that_is_away_is_told_with_its_address_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(SubmitError, match=r"127\.0\.0\.1:9 cannot be reached.*port-forward"):
        Kubeflow(KubeflowSettings(host="http://127.0.0.1:9"))
    assert caplog.records == []


def test_a_name_that_does_not_resolve_is_told() -> None:
    with pytest.raises(SubmitError, match=r"kubeflow\.invalid cannot be reached"):
        Kubeflow(KubeflowSettings(host="http://kubeflow.invalid"))


PAGE = "<html><form>Log in to Your Account</form></html>"
DEEP = "[" * 100_000
ODD_ANSWERS = {
    "a page for a run": ("POST .*/runs", 200, PAGE, "did not start the run: .*web page.*KF_PIPELINES_COOKIE"),
    "a page for an upload": ("POST .*upload_version", 200, PAGE, "did not take the version .*web page"),
    "a page for a pipeline": ("GET .*names/", 200, PAGE, "did not look for the pipeline .*web page"),
    "a page for an experiment": ("GET .*experiments", 200, PAGE, "did not look for the experiment .*web page"),
    "a page for versions": ("GET .*/versions", 200, PAGE, "did not list the pipeline's versions: .*web page"),
    "nothing for a run": ("POST .*/runs", 200, "", "did not start the run: .*web page"),
    "a run without id": ("POST .*/runs", 200, "{}", "did not start the run: it tells no run_id"),
    "a run with an empty id": ("POST .*/runs", 200, '{"run_id": ""}', "it tells no run_id"),
    "a run whose id is an object": ("POST .*/runs", 200, '{"run_id": {"a": 1}}', "other JSON than the pipelines API"),
    "a run whose id is a command": ("POST .*/runs", 200, r'{"run_id": "r\u001b[31m"}', "it tells no run_id"),
    "a list for a run": ("POST .*/runs", 200, "[]", "other JSON than the pipelines API"),
    "null for a run": ("POST .*/runs", 200, "null", "other JSON than the pipelines API"),
    "a run of nested lists": ("POST .*/runs", 200, DEEP, "did not start the run: .*web page"),
    "a run of no moment": ("POST .*/runs", 200, '{"run_id": "r", "created_at": 5}', "other JSON"),
    "an error without words": ("POST .*/runs", 500, "", "did not start the run .500 Internal Server Error.[.] Submit"),
    "an error of nested lists": ("POST .*/runs", 500, DEEP, "did not start the run .500"),
    "an experiment without id": ("GET .*experiments", 200, '{"experiments": [{}]}', "it tells no experiment_id"),
    "a pipeline without id": ("GET .*names/", 200, "{}", "it tells no pipeline_id"),
    "a version without id": ("GET .*/versions", 200, '{"pipeline_versions": [{}]}', "it tells no pipeline_version_id"),
    "versions that are no list": ("GET .*/versions", 200, '{"pipeline_versions": {"a": 1}}', "other JSON"),
    "versions that are numbers": ("GET .*/versions", 200, '{"pipeline_versions": [1]}', "other JSON"),
    "a count that is a word": ("GET .*/versions", 200, '{"total_size": "many"}', "other JSON"),
    "a list for the version": ("GET .*healthz", 200, "[]", "other JSON than the pipelines API"),
    "null for the version": ("GET .*healthz", 200, "null", "other JSON than the pipelines API"),
}


@pytest.mark.parametrize(("what", "status", "body", "told"), ODD_ANSWERS.values(), ids=ODD_ANSWERS)
def test_an_answer_that_is_not_the_apis_is_no_success(
    what: str, status: int, body: str, told: str, team: KfpStandIn
) -> None:
    team.faults.append(Fault(what, status, body, times=99))
    with pytest.raises(SubmitError, match=told) as error:
        submit_training(alice(team), {})
    assert error.value.status == status


def test_a_schedule_without_id_is_no_success(api: KfpStandIn) -> None:
    api.faults.append(Fault("POST .*recurringruns", 200, "{}"))
    with pytest.raises(SubmitError, match="did not make the recurring run: it tells no recurring_run_id"):
        schedule_training(connect(api), {}, Schedule(seconds=60))
    api.faults.append(Fault("GET .*recurringruns", 200, '{"recurringRuns": [{"display_name": "training-safety"}]}'))
    with pytest.raises(SubmitError, match="did not list the recurring runs: it tells no recurring_run_id"):
        schedule_training(connect(api), {}, Schedule(seconds=60))


def test_what_a_newer_server_adds_is_no_error(api: KfpStandIn) -> None:
    api.faults.append(Fault("healthz", 200, '{"tag_name": 3, "multi_user": false, "pipeline_store": "new"}'))
    api.faults.append(Fault("POST .*/runs", 200, '{"run_id": "r-9", "state": "NEW_STATE", "news": [1], "error": null}'))
    assert submit_training(connect(api), {}).id == "r-9"


def test_a_schedule_of_odd_numbers_is_another_one(api: KfpStandIn) -> None:
    schedule_training(connect(api), {}, Schedule(seconds=60))
    api.recurring[0] |= {"max_concurrency": "some", "trigger": {"periodic_schedule": {"interval_second": "soon"}}}
    assert schedule_training(connect(api), {}, Schedule(seconds=60)).change == "replaced"


def test_words_of_the_server_cannot_steer_the_terminal(api: KfpStandIn, capsys: pytest.CaptureFixture[str]) -> None:
    api.faults.append(Fault("POST .*/runs", 400, "\x1b[31mEVIL\x1b[0m\x9b2J\u202e", content_type="text/plain"))
    assert main(["submit", "--host", api.host]) == 11
    api.progress = [states("FAILED", train="\x1b[2JGONE") | {"error": {"message": "\x1b]0;title\x07"}}]
    assert main(["submit", "--host", api.host, "--wait"]) == 31
    told = capsys.readouterr().err
    for words in (r"\x1b[31mEVIL\x1b[0m\x9b2J\u202e", r"\x1b[2jgone", r"\x1b]0;title\x07"):
        assert words in told
    assert not set("\x1b\x07\x9b\u202e") & set(told)


def slowly() -> Iterator[bytes]:
    for _ in range(400):
        time.sleep(0.05)
        yield b" "


def endlessly() -> Iterator[bytes]:
    for _ in range(1000):
        yield b"a" * 100_000


@pytest.mark.parametrize("status", [200, 500])
@pytest.mark.parametrize(
    ("body", "told"), [(slowly, "no whole answer within"), (endlessly, "over 1 MiB")], ids=["slow", "endless"]
)
def test_an_answer_without_end_is_given_up(
    body: Callable[[], Iterator[bytes]], told: str, status: int, api: KfpStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, start = connect(api), time.monotonic()
    monkeypatch.setattr(kubeflow, "_DEADLINE", 1.0 if body is slowly else 30.0)
    monkeypatch.setattr("haechi.pipelines.kubeflow_http._MOST", 1 << 20)
    api.faults.append(Fault("POST .*/runs", status, body))
    with pytest.raises(SubmitError, match=f"did not start the run: .*{told}"):
        server.start(V2beta1Run(display_name="a"))
    assert time.monotonic() - start < 15, "the slow one takes 20 s"


def test_a_list_without_end_is_given_up(api: KfpStandIn) -> None:
    api.faults.append(Fault("GET .*/versions", 200, '{"next_page_token": "more"}', times=10**6))
    with pytest.raises(SubmitError, match=r"did not list the pipeline's versions: .*page after page"):
        submit_training(connect(api), {})
    assert len(api.requests) < 200


def test_a_list_of_slow_pages_is_given_up(api: KfpStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    def page() -> Iterator[bytes]:
        clock.now += 50.0
        yield b'{"next_page_token": "more"}'

    server, clock = connect(api), Clock()
    monkeypatch.setattr(kubeflow, "time", clock)
    api.faults.append(Fault("GET .*/versions", 200, page, times=10**6))
    before = len(api.requests)
    with pytest.raises(SubmitError, match="page after page"):
        server.versions("p-1")
    assert len(api.requests) - before == 3


def test_a_server_that_takes_a_call_and_is_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubeflow, "_TIMEOUT", (0.3, 0.3))
    monkeypatch.setattr(kubeflow, "_DEADLINE", 3.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        host = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(SubmitError, match=r"cannot be reached to say its version .*read timeout=0\.3"):
            Kubeflow(KubeflowSettings(host=host))


def test_a_session_that_ends_while_waiting_ends_the_wait(api: KfpStandIn) -> None:
    server = connect(api)
    run = submit_training(server, {})
    api.faults.append(Fault("GET .*/runs/", 200, PAGE, times=99))
    with pytest.raises(SubmitError, match=f"did not tell the run {run.id}: .*web page"):
        watch(server, run.id, [], every=0.01)


@pytest.fixture
def https(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A server with a certificate that nobody knows, and the file with that certificate."""
    path = write_certificate(tmp_path / "server.pem")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"tag_name": "2.17.0"}')

        def log_message(self, *arguments: object) -> None:
            """Stay quiet."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f"https://localhost:{server.server_port}", path
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_certificate_that_nobody_knows_is_told_and_taken_with_its_authority(https: tuple[str, Path]) -> None:
    host, authority = https
    with pytest.raises(SubmitError, match=r"certificate of https://localhost.*--ca-file"):
        Kubeflow(KubeflowSettings(host=host))
    assert Kubeflow(KubeflowSettings(host=host, ca_file=str(authority))).server.version == "2.17.0"


# settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"host": "kubeflow.example"}, "--host is 'kubeflow.example', not a URL"),
        ({"host": ""}, "KF_PIPELINES_ENDPOINT"),
        ({"host": "https://user:secret@kubeflow"}, "--host holds credentials"),
        ({"host": "http://a", "ui": "b"}, "--ui is 'b'"),
        ({"host": "http://a", "namespace": ""}, "--namespace is empty"),
        ({"host": "http://a", "token_file": "/nowhere"}, "--token-file /nowhere cannot be read"),
        ({"host": "http://a", "ca_file": "/nowhere"}, "--ca-file /nowhere cannot be read"),
        ({"host": "http://a", "ca_file": "/"}, "--ca-file / cannot be read"),
        ({"host": "http://a", "token": "secret\nsecret"}, "KF_PIPELINES_TOKEN holds more than one line"),
        ({"host": "http://a", "cookie": "a=secret\r\nX: y"}, "KF_PIPELINES_COOKIE holds more than one line"),
    ],
)
def test_settings_that_cannot_be_are_named(given: dict[str, str], told: str) -> None:
    with pytest.raises(InputError, match=told) as error:
        KubeflowSettings(**given)
    assert "secret" not in str(error.value)


def test_the_environment_fills_what_is_not_given(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("projected\n")
    env = {
        "KF_PIPELINES_ENDPOINT": "http://api:8888/",
        "KF_PIPELINES_UI_ENDPOINT": "https://kubeflow.example/pipeline/",
        "KF_PIPELINES_NAMESPACE": "team",
        "KF_PIPELINES_SA_TOKEN_PATH": str(tmp_path / "token"),
        "KF_PIPELINES_COOKIE": "session=abc",
    }
    settings = KubeflowSettings.from_env(env=env)
    assert (settings.host, settings.namespace, settings.bearer()) == ("http://api:8888", "team", "projected")
    assert KubeflowSettings.from_env(env=env | {"KF_PIPELINES_TOKEN": "given"}).bearer() == "given"
    assert KubeflowSettings.from_env("http://b", "other", env=env).namespace == "other"
    assert "given" not in repr(replace(settings, token="given", token_file="")) + repr(settings.cookie == "")
    assert "abc" not in repr(settings)


def test_a_link_leads_to_the_dashboard_where_it_is_elsewhere(api: KfpStandIn) -> None:
    server = connect(api, ui="https://kubeflow.example/pipeline")
    assert submit_training(server, {}).url.startswith("https://kubeflow.example/pipeline/#/runs/details/r-")


def test_a_token_that_tells_nothing_is_not_judged() -> None:
    assert token_fault("opaque") == token_fault("a.b.c") == token_fault(make_token("x")) == ""


@pytest.mark.parametrize(
    "body",
    [{"display_nam": "x"}, {"no_catchup": "yes"}, {"mode": "SOMETIMES"}, {"trigger": {"cron": "x"}}],
    ids=str,
)
def test_the_stand_in_refuses_what_the_api_does_not_describe(body: dict[str, Any]) -> None:
    with pytest.raises(Refused):
        check("V2beta1RecurringRun", body)


def test_the_package_that_ships_is_found_after_a_move(tmp_path: Path) -> None:
    shutil.copy(COMPILED / "training.yaml", tmp_path / "training.yaml")
    moved, shipped = Package.read(tmp_path / "training.yaml"), PACKAGE
    assert (moved.version, moved.name) == (shipped.version, "training")
    assert {"resolve", "train", "deploy", "refuse"} <= set(moved.steps)


def documented() -> list[list[str]]:
    text = (Path(__file__).parents[2] / "docs" / "submitting.md").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.startswith(".venv/bin/haechi submit")]
    return [shlex.split(line)[1:] for line in lines]


def test_the_documented_commands_are_what_the_command_line_takes() -> None:
    assert len(documented()) >= 3
    for words in documented():
        arguments = build_parser().parse_args(words)
        parameters = run_parameters(arguments.preset, arguments.set)
        assert set(parameters) <= set(PACKAGE.parameters)
        if arguments.cron or arguments.every:
            Schedule.parse(arguments.cron, arguments.every)
