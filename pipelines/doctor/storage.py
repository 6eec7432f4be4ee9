"""The object store: reached, spoken to in the right protocol, with a clock and keys that it accepts, and a bucket."""

from __future__ import annotations

from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from minio.error import S3Error

from haechi.components.shared.errors import SettingsError, StorageError
from haechi.components.shared.settings import Settings
from haechi.components.shared.storage import Store

from .addresses import place_of
from .cluster import pod_settings
from .findings import CannotLook, Finding, NotAsked
from .web import Unreached, fetch, resolves
from .world import World

__all__ = ["Keys", "from_here", "look", "settings", "step_keys", "store"]

_SKEW = 300  # seconds; stores refuse signatures from 900 on


@dataclass(frozen=True)
class Keys:
    """Whose keys they are, and where each setting stands, in words."""

    whose: str
    access: str
    secret: str
    bucket: str
    endpoint: str


_HERE = Keys("this machine's", "HAECHI_S3_ACCESS_KEY", "HAECHI_S3_SECRET_KEY", "HAECHI_BUCKET", "HAECHI_S3_ENDPOINT")


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
    return look(world, world.settings, _HERE)


def step_keys(world: World) -> list[Finding]:
    """The store with the keys that step pods get from their Secret."""
    aim = world.aim
    found = pod_settings(world)
    secret = f"Secret {aim.namespace}/{aim.s3_secret}"
    names = f"ConfigMap {aim.namespace}/{aim.config_map}"
    keys = Keys(
        f"{secret}'s",
        f"access_key in {secret}",
        f"secret_key in {secret}",
        f"HAECHI_BUCKET in {names}",
        f"HAECHI_S3_ENDPOINT in {names}",
    )
    return look(world, from_here(world, found, aim.namespace), keys)


def from_here(world: World, wanted: Settings, namespace: str) -> Settings:
    """The same keys and bucket, by an address that works from here.

    Args:
        world: what to look at.
        wanted: the settings as they are in the cluster.
        namespace: in which they are.

    Raises:
        CannotLook: the endpoint's name exists in the cluster only, and this machine names no other way to the store.
    """
    if resolves(wanted.s3_endpoint):
        return wanted
    local = world.forwarded.s3_endpoint
    if local:
        return replace(wanted, s3_endpoint=local)
    place = place_of(wanted.s3_endpoint, namespace)
    if len(place) == 1:
        fix = "Run haechi doctor where that name is known, or correct the setting."
    else:
        name, where, port = place
        fix = (
            f"kubectl -n {where} port-forward service/{name} 9000:{port} & HAECHI_S3_ENDPOINT=http://127.0.0.1:9000 "
            "HAECHI_S3_ACCESS_KEY=… HAECHI_S3_SECRET_KEY=… haechi doctor"
        )
    raise CannotLook(f"{urlsplit(wanted.s3_endpoint).hostname} has no address here, so its keys were not tried", fix)


def look(world: World, wanted: Settings, keys: Keys) -> list[Finding]:
    """The store is reached, and serves these keys and this bucket.

    Args:
        world: what to look at.
        wanted: the settings to try.
        keys: where they are set.
    """
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


def _refused(wanted: Settings, keys: Keys, error: StorageError) -> Finding:
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
