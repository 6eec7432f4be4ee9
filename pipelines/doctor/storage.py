"""The object store: reached, spoken to in the right protocol, with a clock and keys that it accepts, and a bucket."""

from __future__ import annotations

from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from minio.error import S3Error

from haechi.components.shared.errors import SettingsError, StorageError
from haechi.components.shared.settings import Settings
from haechi.components.shared.storage import Store

from .cluster import place_of, pod_settings, service_answers, whole
from .findings import CannotLook, Finding, NotAsked, each
from .web import Unreached, fetch, resolves
from .world import World

__all__ = ["kserve_keys", "settings", "step_keys", "store"]

_SKEW = 300  # seconds; stores refuse signatures from 900 on
_AWS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
_ANNOTATION = "serving.kserve.io/"


@dataclass(frozen=True)
class _Keys:
    """Whose keys they are, and where they are set."""

    whose: str
    access: str
    secret: str
    bucket: str
    endpoint: str


_HERE = _Keys("this machine's", "HAECHI_S3_ACCESS_KEY", "HAECHI_S3_SECRET_KEY", "HAECHI_BUCKET", "HAECHI_S3_ENDPOINT")


def settings(world: World) -> list[Finding]:
    """The environment's settings can be read."""
    try:
        world.read_settings()
    except SettingsError as error:
        return [
            Finding(error.problem, "every verb and every step refuses such a setting", f"export …   # {error.remedy}")
        ]
    return []


def store(world: World) -> list[Finding]:
    """The store that this machine's settings name."""
    if not world.settings.s3_endpoint:
        raise NotAsked("HAECHI_S3_ENDPOINT is not set and no `haechi up` runs in the workdir")
    return _look(world, world.settings, _HERE)


def step_keys(world: World) -> list[Finding]:
    """The store with the keys that step pods get from their Secret."""
    aim = world.aim
    found = pod_settings(world)
    secret = f"Secret {aim.namespace}/{aim.s3_secret}"
    names = f"ConfigMap {aim.namespace}/{aim.config_map}"
    keys = _Keys(
        f"{secret}'s",
        f"access_key in {secret}",
        f"secret_key in {secret}",
        f"HAECHI_BUCKET in {names}",
        f"HAECHI_S3_ENDPOINT in {names}",
    )
    return _look(world, _from_here(world, found), keys)


def kserve_keys(world: World) -> list[Finding]:
    """The keys of KServe's storage initializer: attached to the predictors' service accounts, whole, and accepted."""
    namespace = world.aim.serving
    services = world.objects(namespace, "inferenceservices", "serving.kserve.io/v1beta1")
    accounts = {str((item["spec"].get("predictor") or {}).get("serviceAccountName") or "default") for item in services}
    without_keys: list[str] = []

    def look(account: str) -> list[Finding]:
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}"
        listed = (world.cluster.get(path) or {}).get("secrets") or []
        attached = [str(item.get("name")) for item in listed]
        name = "haechi-s3" if "haechi-s3" in attached or not attached else attached[0]
        found = world.cluster.get(f"/api/v1/namespaces/{namespace}/secrets/{name}")
        if found is None and not attached:
            without_keys.append(account)
            return []
        return _kserve_secret(world, account, name, found, attached)

    judged = each(sorted(accounts) or ["default"], look)
    if without_keys and not judged and len(without_keys) == len(accounts or {"default"}):
        reason = "its pods have a workload identity, or nothing is served"
        raise NotAsked(f"{namespace} has no Secret haechi-s3: {reason}")
    return judged


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
    return wrong or _elsewhere(world, name, annotations) or _with_kserve_keys(world, namespace, name, data, annotations)


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


def _with_kserve_keys(
    world: World, namespace: str, name: str, data: dict[str, str], annotations: dict[str, str]
) -> list[Finding]:
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
    keys = _Keys(f"{secret}'s", f"{_AWS[0]} in {secret}", f"{_AWS[1]} in {secret}", "HAECHI_BUCKET", place)
    return _look(world, _from_here(world, wanted), keys)


def _from_here(world: World, wanted: Settings) -> Settings:
    """The same keys and bucket, by an address that works from here.

    Raises:
        CannotLook: the endpoint's name exists in the cluster only, and this machine names no other way to the store.
    """
    if resolves(wanted.s3_endpoint):
        return wanted
    local = world.forwarded.s3_endpoint
    if local:
        return replace(wanted, s3_endpoint=local)
    parts = urlsplit(wanted.s3_endpoint)
    service, _, namespace = (parts.hostname or "").partition(".")
    raise CannotLook(
        f"{parts.hostname} has no address here, so its keys were not tried",
        f"kubectl -n {namespace.split('.')[0] or 'NAMESPACE'} port-forward service/{service} 9000:{parts.port or 80} & "
        "HAECHI_S3_ENDPOINT=http://127.0.0.1:9000 haechi doctor",
    )


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
    if "://" not in endpoint:
        return []
    cause = "KServe puts the scheme before it by itself, from s3-usehttps"
    return [
        Finding(f"Secret {namespace}/{name} names the store as {endpoint}", cause, _annotate(namespace, name, endpoint))
    ]


def _look(world: World, wanted: Settings, keys: _Keys) -> list[Finding]:
    try:
        answer = fetch(wanted.s3_endpoint + "/", verb="HEAD")
    except Unreached as error:
        return [error.finding("the object store", f"# the setting is {keys.endpoint}")]
    skewed = _clock(world, wanted.s3_endpoint, answer.headers.get("date", ""))
    if skewed:
        return skewed  # every signature would be refused, whatever the keys
    try:
        bucket = Store(wanted)
        next(bucket.list("models/"), None)  # a listing answers with a code; a HEAD would only say 403
    except StorageError as error:
        return [_refused(wanted, keys, error)]
    return []


def _clock(world: World, endpoint: str, date: str) -> list[Finding]:
    try:
        skew = world.now() - parsedate_to_datetime(date).timestamp()
    except ValueError:
        return []
    if abs(skew) < _SKEW:
        return []
    how = "ahead of" if skew > 0 else "behind"
    return [
        Finding(
            f"the clock here is {abs(skew):.0f} s {how} that of the object store at {endpoint}",
            "requests are signed with the time, and stores refuse them from 15 minutes on (RequestTimeTooSkewed)",
            "timedatectl set-ntp true   # on the machine whose clock is wrong; in a VM also after it slept",
        )
    ]


def _refused(wanted: Settings, keys: _Keys, error: StorageError) -> Finding:
    code = error.__cause__.code if isinstance(error.__cause__, S3Error) else ""
    symptom = f"the object store at {wanted.s3_endpoint} refuses {keys.whose} keys ({code})"
    if code == "InvalidAccessKeyId":
        return Finding(symptom, "it knows no such access key", f"Correct {keys.access}.")
    if code == "SignatureDoesNotMatch":
        cause = "the access key is known, the secret key is another (or a proxy before the store changes the host)"
        return Finding(symptom, cause, f"Correct {keys.secret}.")
    if code == "RequestTimeTooSkewed":
        return Finding(symptom, "the clocks differ by more than 15 minutes", "timedatectl set-ntp true")
    if code in ("AccessDenied", "AllAccessDisabled"):
        anonymous = not wanted.s3_access_key
        cause = "no keys are set" if anonymous else f"the key may not list bucket {wanted.bucket!r}"
        fix = (
            f"export {keys.access}=… {keys.secret}=…"
            if anonymous
            else "mc admin policy attach STORE readwrite --user=KEY"
        )
        return Finding(symptom, cause, fix)
    if code == "NoSuchBucket":
        return Finding(
            f"bucket {wanted.bucket!r} does not exist at {wanted.s3_endpoint}",
            "nobody made it, or the setting names another",
            f"mc mb STORE/{wanted.bucket}   # or correct {keys.bucket}",
        )
    return Finding(error.problem, "the store answers otherwise than S3 does", error.remedy)
