"""The cluster's static side: that it answers, its namespaces, what step pods start with, and the rights of steps."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from haechi.components.shared.errors import SettingsError
from haechi.components.shared.settings import Settings

from .canary import uses_gateway_api
from .findings import CannotLook, Finding, each
from .world import World

__all__ = [
    "RIGHTS",
    "cluster_answers",
    "namespaces",
    "pod_settings",
    "rights",
    "step_settings",
    "whole",
]

# What deploy does in the namespace that serves; manifests/base/serving/role.yaml grants it (a test compares).
RIGHTS: tuple[tuple[str, str, str], ...] = (
    *(
        ("serving.kserve.io", "inferenceservices", verb)
        for verb in ("get", "list", "watch", "create", "patch", "delete")
    ),
    *(("coordination.k8s.io", "leases", verb) for verb in ("get", "create", "update")),
    ("apps", "deployments", "get"),
    *(("", "pods", verb) for verb in ("get", "list")),
)
# The base names its namespace in every object; an overlay names the same.
_SERVING = (
    "kubectl kustomize manifests/base/serving | sed 's/haechi-serving$/{name}/' | kubectl apply --server-side -f -"
)
_RECONCILER = "haechi-reconciler"
# Option gateway-canary adds it to the Role: without it deploy does not see whether traffic follows a canary.
_ROUTES = ("gateway.networking.k8s.io", "httproutes", "get")
_RULE = {"apiGroups": [_ROUTES[0]], "resources": [_ROUTES[1]], "verbs": ["get", "list"]}
_ADD_ROUTES = (
    f"patch role haechi-deploy --type=json -p '{json.dumps([{'op': 'add', 'path': '/rules/-', 'value': _RULE}])}'"
)


def cluster_answers(world: World) -> list[Finding]:
    """The API server is there and accepts us."""
    world.cluster.version()
    return []


def namespaces(world: World) -> list[Finding]:
    """The namespaces that runs and detectors live in."""

    def look(name: str) -> list[Finding]:
        if world.cluster.get(f"/api/v1/namespaces/{name}") is not None:
            return []
        serves = name == world.aim.serving
        fix = _SERVING.format(name=name) if serves else f"kubectl create namespace {name}"
        flag = "--serving" if serves else "--namespace"
        return [Finding(f"namespace {name} does not exist", f"it was never made, or {flag} names another", fix)]

    return each(dict.fromkeys([world.aim.namespace, world.aim.serving]), look)


def step_settings(world: World) -> list[Finding]:
    """The ConfigMap and the Secret that step pods start with: there, whole, and readable."""
    aim = world.aim
    found = []
    data = world.config(aim.namespace, aim.config_map)
    if data is None:
        cause = f"pods that name it wait in CreateContainerConfigError; {aim.namespace} has no such ConfigMap"
        found.append(
            Finding(
                f"ConfigMap {aim.namespace}/{aim.config_map} does not exist",
                cause,
                f"kubectl -n {aim.namespace} apply --server-side -f manifests/base/pipeline/configmap.yaml   "
                "# then correct the addresses in it",
            )
        )
    else:
        found += _readable(aim.namespace, aim.config_map, data)
    keys = world.secret(aim.namespace, aim.s3_secret)
    return [*found, *_step_keys(aim.namespace, aim.s3_secret, keys)]


def rights(world: World) -> list[Finding]:
    """What the steps' service account, and the reconciler's where there is one, may do with InferenceServices."""
    aim = world.aim

    def look(account: str) -> list[Finding]:
        path = f"/api/v1/namespaces/{aim.namespace}/serviceaccounts/{account}"
        if account == _RECONCILER != aim.service_account and world.cluster.get(path) is None:
            return []
        return _rights_of(world, account)

    return each(dict.fromkeys([aim.service_account, _RECONCILER]), look)


def _rights_of(world: World, name: str) -> list[Finding]:
    aim = world.aim
    account = f"system:serviceaccount:{aim.namespace}:{name}"
    wanted = (*RIGHTS, _ROUTES) if uses_gateway_api(world) else RIGHTS
    denied = [right for right in wanted if not _allowed(world, account, right)]
    if not denied:
        return []
    verbs: dict[str, list[str]] = {}
    for group, resource, verb in denied:
        verbs.setdefault(f"{resource}.{group}".rstrip("."), []).append(verb)
    what = " and ".join(f"{', '.join(some)} {resource}" for resource, some in verbs.items())
    who = "the reconciler" if name == _RECONCILER else "deploy"
    symptom = f"{account} may not {what} in namespace {aim.serving}: {who}"
    more = [f"kubectl -n {aim.serving} {_ADD_ROUTES}"] if _ROUTES in denied else []
    if denied == [_ROUTES]:
        cause = "Role haechi-deploy there lacks what option gateway-canary adds to it"
        return [Finding(f"{symptom} cannot see whether traffic follows a canary", cause, more[0])]
    bind = f"kubectl -n {aim.serving} create rolebinding {name}-{aim.namespace} --role=haechi-deploy"
    fix = [
        f"kubectl -n {aim.serving} apply -f manifests/base/serving/role.yaml",
        *more,
        f"{bind} --serviceaccount={aim.namespace}:{name}",
    ]
    cause = f"no RoleBinding there gives Role haechi-deploy to ServiceAccount {aim.namespace}/{name}"
    return [Finding(f"{symptom} will fail with 403", cause, "\n".join(fix))]


def pod_settings(world: World) -> Settings:
    """The settings that step pods get, with their keys.

    Raises:
        CannotLook: they may not be seen, or check `step-settings` found them wanting.
    """
    aim = world.aim
    data, keys = world.config(aim.namespace, aim.config_map), world.secret(aim.namespace, aim.s3_secret)
    if data is None or not keys or not (keys.get("access_key") and keys.get("secret_key")):
        raise CannotLook("the step pods' settings are not whole, see check `step-settings`")
    entries = {"HAECHI_S3_ACCESS_KEY": keys["access_key"], "HAECHI_S3_SECRET_KEY": keys["secret_key"]}
    try:
        return Settings.from_env({**data, **entries})
    except SettingsError as error:
        raise CannotLook("the step pods' settings cannot be read, see check `step-settings`") from error


def _readable(namespace: str, name: str, data: dict[str, str]) -> list[Finding]:
    where = f"ConfigMap {namespace}/{name}"
    found = []
    for key in ("HAECHI_S3_ENDPOINT", "HAECHI_S3_REGION", "HAECHI_BUCKET", "MLFLOW_TRACKING_URI"):
        if key not in data:
            cause = "step pods read it by name, and wait in CreateContainerConfigError without it"
            fix = f"""kubectl -n {namespace} patch configmap {name} -p '{{"data": {{"{key}": "…"}}}}'"""
            found.append(Finding(f"{where} has no {key}", cause, fix))
    try:
        Settings.from_env(data)
    except SettingsError as error:
        fix = f"kubectl -n {namespace} edit configmap {name}   # {error.remedy}"
        found.append(Finding(f"{where}: {error.problem}", "steps refuse such a setting when they start", fix))
    return found


def _step_keys(namespace: str, name: str, keys: dict[str, str] | None) -> list[Finding]:
    where = f"Secret {namespace}/{name}"
    make = (
        f"kubectl -n {namespace} create secret generic {name} --dry-run=client -o yaml --from-literal=access_key=… "
        "--from-literal=secret_key=… | kubectl apply -f -"
    )
    if keys is None:
        return [Finding(f"{where} does not exist", "step pods wait in CreateContainerConfigError without it", make)]
    return whole(where, keys, ("access_key", "secret_key"), "step pods read", make)


def whole(where: str, data: Mapping[str, str], wanted: Sequence[str], who: str, fix: str) -> list[Finding]:
    """A pair of keys in a Secret: both there, neither empty, and without blanks around them.

    Args:
        where: the Secret, in words.
        data: its own, decoded.
        wanted: names of the keys.
        who: reads them, with the verb.
        fix: makes the Secret anew.
    """
    missing = [key for key in wanted if key not in data]
    if missing:
        cause = f"it holds {', '.join(sorted(data)) or 'nothing'}; {who} {' and '.join(wanted)}"
        return [Finding(f"{where} has no {' and no '.join(missing)}", cause, fix)]
    empty = [key for key in wanted if not data[key].strip()]
    if empty:
        cause = "it has no value, as where an .env file was not filled in"
        return [Finding(f"{where}: {' and '.join(empty)} is empty", cause, fix)]
    padded = [key for key in wanted if data[key] != data[key].strip()]
    if padded:
        cause = "the value ends in a line break or a space, as `echo` without -n writes it, and no store accepts it"
        return [Finding(f"{where}: {' and '.join(padded)} has blanks around it", cause, fix)]
    return []


def _allowed(world: World, account: str, right: tuple[str, str, str]) -> bool:
    group, resource, verb = right
    spec: dict[str, Any] = {
        "resourceAttributes": {"namespace": world.aim.serving, "group": group, "resource": resource, "verb": verb}
    }
    kind = "SelfSubjectAccessReview"
    if world.cluster.user() != account:
        kind, spec = "SubjectAccessReview", {**spec, "user": account, "groups": _groups(world.aim.namespace)}
    path = f"/apis/authorization.k8s.io/v1/{kind.lower()}s"
    found = world.cluster.review(path, {"apiVersion": "authorization.k8s.io/v1", "kind": kind, "spec": spec})
    return bool(((found or {}).get("status") or {}).get("allowed"))


def _groups(namespace: str) -> list[str]:
    return ["system:serviceaccounts", f"system:serviceaccounts:{namespace}", "system:authenticated"]
