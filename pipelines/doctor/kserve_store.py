"""The object store as KServe's storage initializer asks it: with the keys of a service account, by a Secret's annotations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from haechi.components.shared.errors import SettingsError
from haechi.components.shared.settings import Settings

from .addresses import place_of, service_answers
from .cluster import whole
from .findings import CannotLook, Finding, NotAsked, each
from .storage import Keys, from_here, look
from .web import resolves
from .world import World

__all__ = ["kserve_keys", "way_to_store"]

_AWS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
_ANNOTATION = "serving.kserve.io/"


def kserve_keys(world: World) -> list[Finding]:
    """The keys of KServe's storage initializer: attached to the predictors' service accounts, whole, and accepted."""
    namespace = world.aim.serving
    services = world.objects(namespace, "inferenceservices", "serving.kserve.io/v1beta1")
    accounts = {_account(item) for item in services}
    without_keys: list[str] = []

    def look_at(account: str) -> list[Finding]:
        name, attached = _secret_of(world, account)
        found = world.cluster.get(f"/api/v1/namespaces/{namespace}/secrets/{name}")
        if found is None and not attached:
            without_keys.append(account)
            return []
        return _kserve_secret(world, account, name, found, attached)

    judged = each(sorted(accounts) or ["default"], look_at)
    if without_keys and not judged and len(without_keys) == len(accounts or {"default"}):
        reason = "its pods have a workload identity, or nothing is served"
        raise NotAsked(f"{namespace} has no Secret haechi-s3: {reason}")
    return judged


def way_to_store(world: World, service: dict[str, Any]) -> tuple[str, str]:
    """Cause and fix where an InferenceService's pod does not reach the store: another address, or a way that is shut.

    Args:
        world: what to look at.
        service: the InferenceService.
    """
    namespace = world.aim.serving
    try:
        named = _endpoints(world)
    except CannotLook:
        named = []
    try:
        name, _ = _secret_of(world, _account(service))
        found = world.cluster.get(f"/api/v1/namespaces/{namespace}/secrets/{name}")
    except CannotLook:
        name, found = "haechi-s3", None
    url = _kserve_url(found["metadata"].get("annotations") or {}) if found else ""
    for place, config, other in named[:1]:
        if url and place_of(url, namespace) != place_of(other, place):
            cause = f"the pod asks {url}, by Secret {name}; HAECHI_S3_ENDPOINT of ConfigMap {place}/{config} is {other}"
            return cause, f"{_annotate(namespace, name, other)}   # if the ConfigMap is right"
    asked = url or (named[0][2] if named else "the store")
    at = place_of(asked, namespace)
    look_there = f"kubectl -n {at[1]} get pods,networkpolicies\n" if len(at) == 3 else ""
    return (
        f"nothing answers the pod at {asked}: the store is away, or a NetworkPolicy shuts the pod out",
        f"{look_there}kubectl -n {namespace} get networkpolicies",
    )


def _account(service: dict[str, Any]) -> str:
    return str((service["spec"].get("predictor") or {}).get("serviceAccountName") or "default")


def _secret_of(world: World, account: str) -> tuple[str, list[str]]:
    """The Secret that KServe takes for a service account, and all that the account lists."""
    path = f"/api/v1/namespaces/{world.aim.serving}/serviceaccounts/{account}"
    attached = [str(item.get("name")) for item in (world.cluster.get(path) or {}).get("secrets") or []]
    return "haechi-s3" if "haechi-s3" in attached or not attached else attached[0], attached


def _kserve_secret(
    world: World, account: str, name: str, found: dict[str, Any] | None, attached: list[str]
) -> list[Finding]:
    namespace = world.aim.serving
    data = world.secret(namespace, name)
    if found is None or data is None:
        cause = f"ServiceAccount {account} lists it"
        return [Finding(f"Secret {namespace}/{name} does not exist", cause, _make(world, name))]
    annotations = found["metadata"].get("annotations") or {}
    wrong = _attached(namespace, account, name, attached)
    wrong += whole(f"Secret {namespace}/{name}", data, _AWS, "KServe reads", _make(world, name))
    wrong += _annotations(namespace, name, annotations) or _protocol(world, name, annotations)
    return wrong or _elsewhere(world, name, annotations) or _with_kserve_keys(world, name, data, annotations)


def _protocol(world: World, name: str, annotations: dict[str, str]) -> list[Finding]:
    """KServe asks the store by the protocol by which steps ask the same host: seen also from where it has no address."""
    namespace = world.aim.serving
    host, scheme = annotations.get(f"{_ANNOTATION}s3-endpoint"), _scheme(annotations)
    for place, config, url in _endpoints(world):
        other, _, at = url.rstrip("/").partition("://")
        if host and at == host and other != scheme:
            fix = (
                f"kubectl -n {namespace} annotate secret {name} --overwrite {_ANNOTATION}s3-usehttps="
                f"{int(other == 'https')}   # if {other} is right"
            )
            cause = (
                f"KServe asks {host} by {scheme}, from s3-usehttps; HAECHI_S3_ENDPOINT of ConfigMap {place}/{config} "
                f"says {other}"
            )
            return [Finding(f"Secret {namespace}/{name} and the settings name two protocols for one store", cause, fix)]
    return []


def _elsewhere(world: World, name: str, annotations: dict[str, str]) -> list[Finding]:
    """KServe asks a store that the settings name, or one that has an address here, or a Service that is there.

    Raises:
        CannotLook: it asks another Service, of which our way to the settings' store proves nothing.
    """
    namespace, url, named = world.aim.serving, _kserve_url(annotations), _endpoints(world)
    same = any(place_of(url, namespace) == place_of(other, where) for where, _, other in named)
    if not named or same or resolves(url):
        return []
    where, config, other = named[0]
    told = f"HAECHI_S3_ENDPOINT of ConfigMap {where}/{config} is {other}"
    fix = f"{_annotate(namespace, name, other)}   # if the ConfigMap is right"
    source = f"{_ANNOTATION}s3-endpoint of Secret {namespace}/{name}"
    found = service_answers(world, url, namespace, source)
    if found:
        return [replace(item, cause=f"{item.cause}; {told}", fix=f"{fix}\n{item.fix}") for item in found]
    raise CannotLook(f"{source} is {url}, {told}: whether they are one store was not tried", fix)


def _endpoints(world: World) -> list[tuple[str, str, str]]:
    """Namespace, ConfigMap and URL where settings in the cluster say where the store is."""
    aim = world.aim
    places = ((aim.serving, "haechi-serving-settings"), (aim.namespace, aim.config_map))
    named = [
        (place, config, (world.config(place, config) or {}).get("HAECHI_S3_ENDPOINT", "")) for place, config in places
    ]
    return [entry for entry in named if entry[2]]


def _annotate(namespace: str, name: str, url: str) -> str:
    scheme, _, host = url.rstrip("/").partition("://")
    return (
        f"kubectl -n {namespace} annotate secret {name} --overwrite {_ANNOTATION}s3-endpoint={host or '…'} "
        f"{_ANNOTATION}s3-usehttps={int(scheme == 'https')}"
    )


def _kserve_url(annotations: dict[str, str]) -> str:
    return f"{_scheme(annotations)}://{annotations.get(f'{_ANNOTATION}s3-endpoint') or 's3.amazonaws.com'}"


def _scheme(annotations: dict[str, str]) -> str:
    return "http" if annotations.get(f"{_ANNOTATION}s3-usehttps") == "0" else "https"


def _with_kserve_keys(world: World, name: str, data: dict[str, str], annotations: dict[str, str]) -> list[Finding]:
    namespace = world.aim.serving
    serving = world.config(namespace, "haechi-serving-settings") or {}
    wanted = Settings(
        s3_endpoint=_kserve_url(annotations),
        s3_access_key=data[_AWS[0]],
        s3_secret_key=data[_AWS[1]],
        s3_region=annotations.get(f"{_ANNOTATION}s3-region", "us-east-1"),
        bucket=serving.get("HAECHI_BUCKET") or "haechi",
    )
    secret = f"Secret {namespace}/{name}"
    place = f"{_ANNOTATION}s3-endpoint on {secret}"
    keys = Keys(f"{secret}'s", f"{_AWS[0]} in {secret}", f"{_AWS[1]} in {secret}", "HAECHI_BUCKET", place)
    return look(world, from_here(world, wanted, namespace), keys)


def _attached(namespace: str, account: str, name: str, attached: list[str]) -> list[Finding]:
    if name in attached:
        return []
    return [
        Finding(
            f"ServiceAccount {namespace}/{account} does not list Secret {name}",
            "KServe's storage initializer finds its keys through the service account, and asks the store without any",
            f"""kubectl -n {namespace} patch serviceaccount {account} -p '{{"secrets": [{{"name": "{name}"}}]}}'""",
        )
    ]


def _make(world: World, name: str) -> str:
    """How KServe's Secret is made anew, telling where the store is as the settings of detectors do."""
    namespace = world.aim.serving
    url = (world.config(namespace, "haechi-serving-settings") or {}).get("HAECHI_S3_ENDPOINT", "")
    return (
        f"kubectl -n {namespace} create secret generic {name} --dry-run=client -o yaml "
        f"{' '.join(f'--from-literal={key}=…' for key in _AWS)} | kubectl apply -f -\n{_annotate(namespace, name, url)}"
    )


def _annotations(namespace: str, name: str, annotations: dict[str, str]) -> list[Finding]:
    endpoint = annotations.get(f"{_ANNOTATION}s3-endpoint", "")
    symptom = f"Secret {namespace}/{name} names the store as"
    if "://" in endpoint:
        cause = "KServe puts the scheme before it by itself, from s3-usehttps"
        return [Finding(f"{symptom} {endpoint}", cause, _annotate(namespace, name, endpoint))]
    url = _kserve_url(annotations)
    try:
        Settings(s3_endpoint=url)
    except SettingsError:
        cause = "s3-endpoint takes a host, or host:port, and nothing else"
        return [Finding(f"{symptom} {url}", cause, _annotate(namespace, name, f"{_scheme(annotations)}://"))]
    return []
