"""Kubeflow Pipelines: its API reached and willing, and runs whose steps did run."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..kubeflow_settings import AUDIENCE
from .findings import CannotLook, Finding, NotAsked, each_object
from .web import Answer, Unreached, fetch
from .world import World

__all__ = ["EFFECTS", "cached_steps", "pipelines_api", "steps_of_ours"]

_API = "/apis/v2beta1"
# Steps with an effect outside their outputs: where the cache answers for one of them, a green run did not do its work.
EFFECTS = frozenset({"resolve", "ingest", "label", "build", "deploy", "refuse"})
_RUNS = 20  # the newest runs that are looked at
_COMPILED = Path(__file__).parents[1] / "compiled" / "training.yaml"
_FORWARD = "kubectl -n kubeflow port-forward service/ml-pipeline 8888   # then --host http://localhost:8888"


@dataclass(frozen=True)
class _Run:
    """A run that ended well: its name, and which steps were answered from the cache, or ran."""

    name: str
    cached: tuple[str, ...]
    ran: tuple[str, ...]


def pipelines_api(world: World) -> list[Finding]:
    """The API that --host names: there, an API, and willing to take our token."""
    host = world.kubeflow.host
    try:
        health = _ask(world, "healthz")
        return _not_ours(world, host, health) or _not_ours(world, host, _list_runs(world, 1, health))
    except Unreached as error:
        return [error.finding("the Kubeflow Pipelines API", _FORWARD)]


def cached_steps(world: World) -> list[Finding]:
    """Our runs that are green although steps with an effect were answered from the cache, or although nothing ran."""
    try:
        runs = list(_runs_of_api(world))
    except NotAsked:
        return each_object(_newest_workflows(world), lambda item: _judge(_run_of_workflow(item)))
    return [finding for run in runs for finding in _judge(run)]


@functools.cache
def steps_of_ours() -> frozenset[str]:
    """The steps of the compiled pipeline."""
    with _COMPILED.open(encoding="utf-8") as file:
        spec = next(yaml.load_all(file, Loader=yaml.CSafeLoader))
    dags = [spec["root"], *spec["components"].values()]
    tasks = [task for item in dags for task in (item.get("dag") or {}).get("tasks", {}).items()]
    return frozenset(name for name, task in tasks if "dag" not in spec["components"][task["componentRef"]["name"]])


def _judge(run: _Run) -> list[Finding]:
    """Other people's runs may well come from the cache as a whole; ours are known by their steps."""
    if not steps_of_ours().issuperset(run.cached + run.ran):
        return []
    stale = [name for name in run.cached if name in EFFECTS]
    return [_stale(run, stale)] if stale or (run.cached and not run.ran) else []


def _stale(run: _Run, stale: list[str]) -> Finding:
    if stale:
        return Finding(
            f"run {run.name} succeeded, and {', '.join(stale)} never ran",
            "caching was on for steps that have an effect outside their outputs: an older or changed pipeline was "
            "submitted, or caching was switched on for the whole run",
            "haechi compile   # switches it off for every step; then haechi submit … again",
        )
    return Finding(
        f"run {run.name} succeeded, and none of its {len(run.cached)} steps ran",
        "caching was on, as an older or changed pipeline has it, and every step had the inputs of an earlier run, so "
        "Kubeflow Pipelines took that run's outputs",
        "haechi submit …   # the pipeline of today runs every step; nothing to mend where that was meant",
    )


# the API ----------------------------------------------------------------------------------------------------------


def _ask(world: World, path: str) -> Answer:
    kubeflow = world.kubeflow
    token = kubeflow.bearer()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    headers |= {"Cookie": kubeflow.cookie} if kubeflow.cookie else {}
    return fetch(f"{kubeflow.host}{_API}/{path}", headers, ca_file=kubeflow.ca_file)


def _list_runs(world: World, count: int, health: Answer) -> Answer:
    # A single-user installation refuses a namespace, a multi-user one wants it.
    multi_user = (health.json() or {}).get("multi_user")
    namespace = f"&namespace={world.aim.namespace}" if multi_user else ""
    return _ask(world, f"runs?page_size={count}&sort_by=created_at%20desc{namespace}")


def _not_ours(world: World, host: str, answer: Answer) -> list[Finding]:
    """What an answer other than the API's tells; empty for a good one."""
    # The API server wraps a refused token in a 500.
    if answer.status in (401, 407) or answer.says("Unauthenticated", "unauthenticated"):
        return [_token(world, host, answer.status)]
    if answer.status == 403:
        if answer.says("ermission") and answer.json() is not None:
            return [_forbidden(world, host)]
        return [_token(world, host, answer.status)]
    if answer.status in (301, 302, 303, 307, 308):
        to = answer.headers.get("location", "").split("?")[0]
        if not world.kubeflow.bearer() or any(word in to for word in ("login", "auth", "dex", "oauth2")):
            return [_token(world, host, answer.status)]
        return [Finding(f"{host} answers {answer.status}", f"it sends on to {to}", f"--host {to.split(_API)[0]}")]
    if answer.json() is None or answer.status == 404:
        return [
            Finding(
                f"{host} answers {answer.status}, not like the Kubeflow Pipelines API",
                "the URL leads to a page (the dashboard, a login) and not to the API behind it",
                f"--host {host}/pipeline   # the usual path behind the Kubeflow dashboard\n{_FORWARD}",
            )
        ]
    if answer.status != 200:
        said = str((answer.json() or {}).get("error") or (answer.json() or {}).get("message") or "")[:300]
        fix = "kubectl -n kubeflow logs deployment/ml-pipeline --tail=50"
        return [Finding(f"{host} answers {answer.status}: {said}", "the API server or its database fails", fix)]
    return []


def _forbidden(world: World, host: str) -> Finding:
    namespace = world.aim.namespace
    return Finding(
        f"{host} knows the token, and forbids runs in namespace {namespace}",
        "the user of the token is no contributor of that profile",
        f"kubectl -n {namespace} create rolebinding haechi --clusterrole=kubeflow-edit --user=USER   # or --namespace YOURS",
    )


def _token(world: World, host: str, status: int) -> Finding:
    from ..kubeflow_errors import token_fault

    make = (
        f"kubectl -n {world.aim.namespace} create token default-editor --audience={AUDIENCE} --duration=1h > token   "
        "# then --token-file token"
    )
    symptom, token = f"{host} does not accept us ({status})", world.kubeflow.bearer()
    if not token:
        return Finding(symptom, "a login stands before it, and no token was given", make)
    fault = token_fault(token, world.now())
    if fault:
        return Finding(symptom, fault, make)
    if token.count(".") != 2:
        return Finding(symptom, "the token is no JSON Web Token (a cut-off copy, a password, or a cookie)", make)
    cause = "time and audience of the token are right; whoever issued it is not trusted there"
    return Finding(symptom, cause, make + ", in the cluster that Kubeflow runs in")


# what ran ---------------------------------------------------------------------------------------------------------


def _runs_of_api(world: World) -> Iterator[_Run]:
    host = world.kubeflow.host
    try:
        listed = _list_runs(world, _RUNS, _ask(world, "healthz"))
        if listed.status != 200 or listed.json() is None:
            raise CannotLook(f"{host} lists no runs ({listed.status}), see check `pipelines-api`")
        for entry in (listed.json() or {}).get("runs") or []:
            if entry.get("state") == "SUCCEEDED":
                whole = _ask(world, f"runs/{entry['run_id']}").json()
                if whole is None:
                    raise CannotLook(f"{host} does not tell of run {entry['run_id']}", "Try again later.")
                tasks = (whole.get("run_details") or {}).get("task_details") or []
                yield _run_of_tasks(str(entry.get("display_name") or entry["run_id"]), tasks)
    except Unreached as error:
        raise CannotLook(f"{host} cannot be reached, see check `pipelines-api`", error.fix) from error


def _run_of_tasks(name: str, tasks: list[dict[str, Any]]) -> _Run:
    """A step answered from the cache is a task whose inner `executor` was skipped."""
    names = {str(task.get("task_id")): str(task.get("display_name")) for task in tasks}
    parents = {
        str(child.get("pod_name") or child.get("task_id")): str(task.get("display_name"))
        for task in tasks
        for child in task.get("child_tasks") or []
    }
    cached: list[str] = []
    ran: list[str] = []
    for task in tasks:
        if task.get("display_name") != "executor":
            continue
        parent = parents.get(str(task.get("task_id"))) or parents.get(str(task.get("pod_name")))
        step = parent or names.get(str(task.get("parent_task_id")), "a step")
        (cached if task.get("state") == "SKIPPED" else ran).append(step)
    return _Run(name, tuple(cached), tuple(ran))


def _newest_workflows(world: World) -> list[dict[str, Any]]:
    found = world.objects(world.aim.namespace, "workflows", "argoproj.io/v1alpha1")
    found.sort(key=lambda item: str(item["metadata"].get("creationTimestamp")), reverse=True)
    return found[:_RUNS]


def _run_of_workflow(item: dict[str, Any]) -> _Run:
    """The driver of each step leaves its decision in the Workflow, as output `cached-decision`."""
    status = item.get("status") or {}
    nodes = (status.get("nodes") or {}).values() if status.get("phase") == "Succeeded" else ()
    cached: list[str] = []
    ran: list[str] = []
    for node in nodes:
        decision = _decision(node)
        if decision:
            (cached if decision == "true" else ran).append(str(node.get("displayName")).removesuffix("-driver"))
    return _Run(item["metadata"]["name"], tuple(cached), tuple(ran))


def _decision(node: dict[str, Any]) -> str:
    parameters = {item["name"]: item.get("value") for item in (node.get("outputs") or {}).get("parameters") or []}
    if parameters.get("condition") == "false":
        return ""  # a branch not taken
    return str(parameters.get("cached-decision") or "")
