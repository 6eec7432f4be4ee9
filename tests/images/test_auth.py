"""Who may call: API keys in a file that changes, and tokens of a real issuer on loopback that rotates, lies and goes away."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import jwt
import numpy as np
import pytest
import tritonclient.grpc
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from tritonclient.utils import InferenceServerException

from haechi.components.shared.errors import AccessError, SettingsError
from haechi.serving import api_keys, oidc
from haechi.serving.api_keys import ApiKeys, Caller, new_key
from haechi.serving.auth import Guard, access_of
from haechi.serving.oidc import Tokens
from haechi.serving.service import Open, Role
from haechi.serving.settings import ServingSettings
from tests.serving_process import Running, running
from tests.tiny_models import paint, shade, tiny_model_folder

SCENE = paint({(2, 3): shade(0, 0.9)})
PLAIN = {"HAECHI_SERVING_ENGINE": "onnxruntime", "HAECHI_SERVING_BATCH": "1", "HAECHI_SERVING_WATCH": "0"}


# API keys ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is looked at on each call."""
    monkeypatch.setattr(api_keys, "_LOOK_SECONDS", 0.0)


def test_a_key_is_its_holders_and_no_other_is(tmp_path: Path) -> None:
    first, second = new_key("gate", [Role.PREDICT]), new_key("boss", [Role.ADMIN, Role.PREDICT])
    (tmp_path / "keys").write_text(f"{first[1]}\n\n{second[1]}\n")
    keys = ApiKeys(tmp_path / "keys")
    assert keys.find(first[0]) == Caller("gate", frozenset([Role.PREDICT]))
    assert keys.find(second[0]) == Caller("boss", frozenset(Role))
    digest = json.loads(first[1])["sha256"]
    for wrong in ("", first[0][:-1], first[0] + "x", first[0].upper(), digest, first[1], "ключ", "\udcff"[:0]):
        assert keys.find(wrong) is None
    assert first[0] not in (tmp_path / "keys").read_text()
    assert len(first[0]) > 43 and first[0] != new_key("gate", [Role.PREDICT])[0]


def kubernetes(folder: Path, name: str, text: str) -> None:
    """Write as the kubelet does: a folder with the time in its name, and `..data` renamed over."""
    fresh = folder / f"..{time.monotonic_ns()}"
    fresh.mkdir()
    (fresh / name).write_text(text)
    (folder / "..next").symlink_to(fresh.name)
    (folder / "..next").replace(folder / "..data")
    if not (folder / name).is_symlink():
        (folder / name).symlink_to(f"..data/{name}")


@pytest.mark.parametrize("write", [lambda folder, name, text: (folder / name).write_text(text), kubernetes])
@pytest.mark.usefixtures("impatient")
def test_keys_rotate_without_a_restart(tmp_path: Path, write: Callable[[Path, str, str], object]) -> None:
    old, new = new_key("gate", [Role.PREDICT]), new_key("gate", [Role.PREDICT])
    write(tmp_path, "keys", old[1])
    keys = ApiKeys(tmp_path / "keys")
    assert keys.find(old[0]) and not keys.find(new[0])
    write(tmp_path, "keys", f"{old[1]}\n{new[1]}\n")
    assert keys.find(old[0]) and keys.find(new[0])
    write(tmp_path, "keys", new[1])
    assert not keys.find(old[0]) and keys.find(new[0])


BROKEN = [
    ("", "holds no API key"),
    ("\n \n", "holds no API key"),
    ("{", "line 1 .* is no API key"),
    ("[]", "line 1 .* is no API key"),
    ('{"name": "a", "sha256": "00", "roles": ["predict"]}', "line 1"),
    ('{"name": "a", "sha256": "' + "0" * 64 + '", "roles": []}', "line 1"),
    ('{"name": "a", "sha256": "' + "0" * 64 + '", "roles": ["root"]}', "line 1"),
    ('{"name": "", "sha256": "' + "0" * 64 + '", "roles": ["predict"]}', "line 1"),
    ('{"name": "a\\n", "sha256": "' + "0" * 64 + '", "roles": ["predict"]}', "line 1"),
    ('{"name": "a", "sha256": "' + "g" * 64 + '", "roles": ["predict"]}', "line 1"),
    ('{"name": "a", "sha256": 7, "roles": ["predict"]}', "line 1"),
    ("[" * 100_000, "line 1"),
    ("haechi_the-key-itself", "line 1"),
    ("\udcff", "cannot be read"),
]


@pytest.mark.parametrize(("text", "problem"), BROKEN)
@pytest.mark.usefixtures("impatient")
def test_a_broken_file_keeps_the_former_keys_and_says_so_once(
    tmp_path: Path, text: str, problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    data = text.encode(errors="surrogateescape")
    (tmp_path / "broken").write_bytes(data)
    with pytest.raises(SettingsError, match=problem):
        ApiKeys(tmp_path / "broken")

    key, line = new_key("gate", [Role.PREDICT])
    (tmp_path / "keys").write_text(line)
    keys = ApiKeys(tmp_path / "keys")
    (tmp_path / "keys").write_bytes(data)
    assert keys.find(key) and keys.find(key)
    assert [record.message for record in caplog.records if "go on" in record.message].__len__() == 1
    assert "the-key-itself" not in caplog.text
    (tmp_path / "keys").unlink()
    assert keys.find(key), "missing for a moment"
    (tmp_path / "keys").write_text(new_key("gate", [Role.PREDICT])[1])
    assert not keys.find(key)


def test_the_file_is_looked_at_once_a_second(tmp_path: Path) -> None:
    key, line = new_key("gate", [Role.PREDICT])
    (tmp_path / "keys").write_text(line)
    keys = ApiKeys(tmp_path / "keys")
    (tmp_path / "keys").write_text(new_key("gate", [Role.PREDICT])[1])
    assert keys.find(key)
    time.sleep(1.1)
    assert not keys.find(key)


def test_the_command_shows_a_key_once_and_prints_its_line(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "haechi.serving.api_keys", "gate", "--role", "predict", "--role", "admin"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    (tmp_path / "keys").write_text(done.stdout)
    assert ApiKeys(tmp_path / "keys").find(done.stderr.split()[-1]) == Caller("gate", frozenset(Role))


# Tokens ------------------------------------------------------------------------------------------------------------


class Issuer:
    """An OpenID Connect issuer: discovery, keys, and tokens as it would sign them. Other attributes make it misbehave."""

    def __init__(self) -> None:
        self.keys: dict[str, Any] = {"one": rsa.generate_private_key(65537, 2048)}
        self.asked: list[str] = []
        self.change: Callable[[dict[str, Any]], dict[str, Any]] = lambda document: document
        self.wait = 0.0
        issuer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                issuer.asked.append(self.path)
                time.sleep(issuer.wait)
                body = json.dumps(issuer.change(issuer.document(self.path))).encode()
                self.send_response(200)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def document(self, path: str) -> dict[str, Any]:
        if path.endswith("openid-configuration"):
            return {"issuer": self.url, "jwks_uri": f"{self.url}/keys"}
        return {"keys": [public(name, key) for name, key in self.keys.items()]}

    def token(self, kid: str | None = "one", key: Any = None, algorithm: str = "RS256", **claims: Any) -> str:
        now = int(time.time())
        told = {"iss": self.url, "aud": "haechi", "sub": "robot", "exp": now + 600, "iat": now, "roles": ["predict"]}
        told = {name: value for name, value in (told | claims).items() if value is not None}
        return jwt.encode(told, key or self.keys[kid or "one"], algorithm, headers={"kid": kid} if kid else {})

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def public(name: str, key: Any) -> dict[str, Any]:
    kinds = {rsa.RSAPrivateKey: "RS256", ec.EllipticCurvePrivateKey: "ES256", ed25519.Ed25519PrivateKey: "EdDSA"}
    algorithm = next(value for kind, value in kinds.items() if isinstance(key, kind))
    entry: dict[str, Any] = jwt.get_algorithm_by_name(algorithm).to_jwk(key.public_key(), as_dict=True)
    entry.pop("key_ops", None)
    return {**entry, "kid": name, "use": "sig"}


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    issuer = Issuer()
    try:
        yield issuer
    finally:
        with contextlib.suppress(OSError):
            issuer.close()


def ask(tokens: Tokens, *many: str) -> list[Caller | None]:
    async def scene() -> list[Caller | None]:
        return [await tokens.find(token) for token in many]

    return asyncio.run(scene())


ROBOT = Caller("robot", frozenset([Role.PREDICT]))


def test_tokens_of_the_issuers_keys_are_taken_whatever_their_kind(issuer: Issuer) -> None:
    issuer.keys["two"] = ec.generate_private_key(ec.SECP256R1())
    issuer.keys["three"] = ed25519.Ed25519PrivateKey.generate()
    many = [issuer.token(), issuer.token("two", algorithm="ES256"), issuer.token("three", algorithm="EdDSA")]
    assert ask(Tokens(issuer.url, "haechi"), *many) == [ROBOT] * 3
    assert issuer.asked == ["/.well-known/openid-configuration", "/keys"], "fetched once"
    issuer.asked.clear()
    assert ask(Tokens(issuer.url, "haechi", f"{issuer.url}/keys"), many[0]) == [ROBOT]
    assert issuer.asked == ["/keys"], "a given address wants no discovery"


@pytest.mark.parametrize(
    ("claim", "claims", "roles"),
    [
        ("roles", {"roles": ["admin", "other", 7, None]}, {"admin"}),
        ("roles", {"roles": "predict admin"}, {"predict", "admin"}),
        ("roles", {"roles": "superadmin"}, set()),
        ("roles", {"roles": {"predict": True}}, set()),
        ("roles", {"roles": None}, set()),
        ("realm_access.roles", {"realm_access": {"roles": ["predict"]}}, {"predict"}),
        ("realm_access.roles", {"realm_access": ["roles"]}, set()),
        ("https://haechi.example/roles", {"https://haechi.example/roles": ["predict"]}, {"predict"}),
    ],
)
def test_roles_come_from_the_claim(issuer: Issuer, claim: str, claims: dict[str, Any], roles: set[str]) -> None:
    caller = ask(Tokens(issuer.url, "haechi", roles_claim=claim), issuer.token(**claims))[0]
    assert caller and caller.roles == roles


NOW = int(time.time())


@pytest.mark.parametrize(
    ("claims", "taken"),
    [
        ({"exp": NOW - 3600}, False),
        ({"exp": None}, False),
        ({"exp": "soon"}, False),
        ({"nbf": NOW + 3600}, False),
        ({"iat": NOW + 3600}, False),
        ({"nbf": NOW + 10}, True),  # clocks may differ
        ({"iat": None}, True),
        ({"aud": "other"}, False),
        ({"aud": ["other", "haechi"]}, True),
        ({"aud": None}, False),
        ({"iss": "http://elsewhere"}, False),
        ({"iss": None}, False),
        ({"sub": None}, False),
        ({"sub": "x" * 9000}, True),  # the header's own bound is the guard's
    ],
)
def test_claims_are_checked(issuer: Issuer, claims: dict[str, Any], taken: bool) -> None:
    assert bool(ask(Tokens(issuer.url, "haechi"), issuer.token(**claims))[0]) is taken


def by_hand(header: dict[str, Any], claims: dict[str, Any], sign: Callable[[bytes], bytes]) -> str:
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in (header, claims)]
    signed = b".".join(parts)
    return (signed + b"." + base64.urlsafe_b64encode(sign(signed)).rstrip(b"=")).decode()


def test_a_token_that_others_could_have_made_is_refused(issuer: Issuer) -> None:
    claims = jwt.decode(issuer.token(), options={"verify_signature": False})
    pem = (
        issuer.keys["one"]
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    good = issuer.token()
    head, body, signature = good.split(".")
    forged = [
        by_hand({"alg": "none", "kid": "one"}, claims, lambda data: b""),
        by_hand({"alg": "NONE", "kid": "one"}, claims, lambda data: b""),
        # The public key as a shared secret: the classic confusion.
        by_hand({"alg": "HS256", "kid": "one"}, claims, lambda data: hmac.digest(pem, data, hashlib.sha256)),
        by_hand({"alg": ["RS256"], "kid": "one"}, claims, lambda data: b"x"),
        by_hand({"kid": "one"}, claims, lambda data: b"x"),
        by_hand({"alg": "RS256", "kid": {"a": 1}}, claims, lambda data: b"x"),
        issuer.token(key=rsa.generate_private_key(65537, 2048)),
        issuer.token(algorithm="RS512"),  # not the algorithm of that key
        issuer.token(algorithm="ES256", key=ec.generate_private_key(ec.SECP256R1())),
        f"{head}.{body}.",
        f"{head}.{body}.{signature[:-4]}AAAA",
        f"{head}.{base64.urlsafe_b64encode(json.dumps(claims | {'roles': ['admin']}).encode()).decode()}.{signature}",
        "..",
        "a.b.c",
        "é.é.é",
        "." * 2 + "x" * 5000,
        by_hand({"alg": "RS256", "kid": "one", "crit": ["b64"], "b64": False}, claims, lambda data: b"x"),
    ]
    tokens = Tokens(issuer.url, "haechi")
    assert ask(tokens, *forged) == [None] * len(forged)
    assert ask(tokens, good) == [ROBOT]


def test_a_token_need_not_name_the_only_key(issuer: Issuer) -> None:
    assert ask(Tokens(issuer.url, "haechi"), issuer.token(kid=None)) == [ROBOT]
    issuer.keys["two"] = rsa.generate_private_key(65537, 2048)
    assert ask(Tokens(issuer.url, "haechi"), issuer.token(kid=None)) == [None]


def test_a_short_key_is_no_key(issuer: Issuer) -> None:
    issuer.keys["one"] = rsa.generate_private_key(65537, 1024)
    with pytest.warns(jwt.InsecureKeyLengthWarning):
        token = issuer.token()
    assert ask(Tokens(issuer.url, "haechi"), token) == [None]


def test_keys_that_are_of_no_use_are_passed_over(issuer: Issuer) -> None:
    spare = public("three", rsa.generate_private_key(65537, 2048))
    odd = [
        {"kty": "oct", "k": "AAAA", "kid": "one"},
        {"kty": "RSA", "kid": "one"},
        {"kty": "what", "kid": "one"},
        {**spare, "kid": "one", "use": "enc"},
        "text",
        None,
    ]
    issuer.change = lambda told: {"keys": [*told["keys"], *odd]} if "keys" in told else told
    assert ask(Tokens(issuer.url, "haechi"), issuer.token()) == [ROBOT]


def test_a_new_key_is_fetched_when_it_is_named_and_not_too_often(
    issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = Tokens(issuer.url, "haechi", f"{issuer.url}/keys")
    stranger = rsa.generate_private_key(65537, 2048)

    async def scene() -> None:
        assert await tokens.find(issuer.token())
        issuer.keys["two"] = rsa.generate_private_key(65537, 2048)
        assert not await tokens.find(issuer.token("two")), "a moment after the last fetch"
        monkeypatch.setattr(oidc, "_PAUSE_SECONDS", 0.3)
        await asyncio.sleep(0.35)
        assert await tokens.find(issuer.token("two"))
        issuer.asked.clear()
        many = [issuer.token(f"made-up-{number}", stranger) for number in range(50)]
        begun = time.monotonic()
        assert await asyncio.gather(*map(tokens.find, many)) == [None] * 50
        assert len(issuer.asked) <= 1 + (time.monotonic() - begun) / 0.3

    asyncio.run(scene())


def test_a_withdrawn_key_is_forgotten_with_the_tokens_that_it_signed(
    issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oidc, "_PAUSE_SECONDS", 0.0)
    tokens = Tokens(issuer.url, "haechi")
    old = issuer.token()

    async def scene() -> None:
        assert await tokens.find(old)
        issuer.keys = {"two": rsa.generate_private_key(65537, 2048)}
        assert await tokens.find(old), "known already"
        monkeypatch.setattr(oidc, "_FRESH_SECONDS", 0.0)
        assert await tokens.find(issuer.token("two"))
        assert not await tokens.find(old)

    asyncio.run(scene())


def test_while_the_issuer_is_away_known_keys_go_on_and_unknown_ones_are_refused_at_once(
    issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oidc, "_PAUSE_SECONDS", 0.2)
    monkeypatch.setattr(oidc, "_FRESH_SECONDS", 0.1)
    tokens, never = Tokens(issuer.url, "haechi"), Tokens("http://127.0.0.1:9", "haechi")
    other = issuer.token("two", rsa.generate_private_key(65537, 2048))

    async def scene() -> None:
        assert await tokens.find(issuer.token())
        issuer.close()
        await asyncio.sleep(0.3)
        begun = time.monotonic()
        for number in range(20):
            assert await tokens.find(issuer.token(sub=f"robot{number}")), "known, though not fresh"
            assert not await tokens.find(other)
            assert not await never.find(other)
        assert time.monotonic() - begun < 2

    asyncio.run(scene())


def test_a_slow_issuer_holds_nobody_for_long_and_never_the_loop(
    issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oidc, "_FETCH_SECONDS", 0.5)
    issuer.wait = 2.0
    tokens = Tokens(issuer.url, "haechi")

    async def scene() -> None:
        begun, beats = time.monotonic(), 0
        waiting = asyncio.gather(*(tokens.find(issuer.token(sub=str(number))) for number in range(20)))
        while not waiting.done():
            await asyncio.sleep(0.01)
            beats += 1
        assert await waiting == [None] * 20
        assert time.monotonic() - begun < 1.5 and beats > 10
        assert len(issuer.asked) == 1, "twenty callers, one fetch"
        begun = time.monotonic()
        assert await tokens.find(issuer.token()) is None
        assert time.monotonic() - begun < 0.6

    asyncio.run(scene())


@pytest.mark.parametrize(
    "change",
    [
        lambda told: {"keys": [{"a": "b" * 300_000}]},
        lambda told: {**told, "issuer": "http://elsewhere"},
        lambda told: {**told, "jwks_uri": "file:///etc/passwd"},
        lambda told: {**told, "jwks_uri": 7},
        lambda told: [],
        lambda told: {},
        lambda told: {**told, "keys": 7},
        lambda told: {**told, "keys": []},
    ],
)
def test_a_document_that_cannot_be_used_gives_no_key(
    issuer: Issuer, change: Callable[[Any], Any], caplog: pytest.LogCaptureFixture
) -> None:
    issuer.change = change
    assert ask(Tokens(issuer.url, "haechi"), issuer.token()) == [None]
    assert "cannot be fetched" in caplog.text


def test_a_checked_token_is_remembered_until_it_ends_and_not_without_bound(
    issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oidc, "_REMEMBERED", 3)
    monkeypatch.setattr(oidc, "_LEEWAY", 0.0)
    tokens = Tokens(issuer.url, "haechi")
    short = issuer.token(exp=int(time.time()) + 2)

    async def scene() -> None:
        assert await tokens.find(short)
        decode, calls = jwt.decode, 0

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return decode(*args, **kwargs)

        monkeypatch.setattr(jwt, "decode", counted)
        assert await tokens.find(short) and calls == 0
        await asyncio.sleep(2.1)
        assert not await tokens.find(short) and calls == 1
        for number in range(10):
            assert await tokens.find(issuer.token(sub=str(number)))
        assert len(tokens._known) <= 3

    asyncio.run(scene())


# Both, and the process ---------------------------------------------------------------------------------------------


def test_every_refusal_reads_the_same(issuer: Issuer, tmp_path: Path) -> None:
    key, line = new_key("gate", [Role.PREDICT])
    (tmp_path / "keys").write_text(line)
    guard = Guard(ApiKeys(tmp_path / "keys"), Tokens(issuer.url, "haechi"))
    wrong = [
        {},
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": "Bearer wrong"},
        {"authorization": f"Basic {key}"},
        {"authorization": f"Bearer {issuer.token(aud='other')}"},
        {"authorization": f"Bearer {issuer.token(exp=1)}"},
        {"authorization": f"Bearer {issuer.token(sub='x' * 9000)}"},
        {"x-api-key": "wrong"},
        {"x-api-key": "x" * 100_000},
    ]

    async def scene() -> set[str]:
        told = set()
        for headers in wrong:
            with pytest.raises(AccessError) as caught:
                await guard.check(headers, Role.PREDICT)
            assert caught.value.http_status == 401
            told.add(str(caught.value))
        assert await guard.check({"authorization": f"bearer  {key} "}, Role.PREDICT) == "gate"
        assert await guard.check({"x-api-key": key}, Role.PREDICT) == "gate"
        assert await guard.check({"authorization": f"Bearer {issuer.token()}"}, Role.PREDICT) == "robot"
        assert await guard.check({"x-api-key": issuer.token(roles=["admin"])}, Role.PREDICT) == "robot"
        for headers in ({"x-api-key": key}, {"authorization": f"Bearer {issuer.token()}"}):
            with pytest.raises(AccessError, match="wants the role admin") as caught:
                await guard.check(headers, Role.ADMIN)
            assert caught.value.http_status == 403
        return told

    assert len(asyncio.run(scene())) == 1


def test_settings_choose_who_may_call(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(new_key("gate", [Role.PREDICT])[1])
    assert isinstance(access_of(ServingSettings()), Open)
    assert isinstance(access_of(ServingSettings(api_keys=str(tmp_path / "keys"))), Guard)
    for wrong in (
        ServingSettings(api_keys=str(tmp_path / "absent")),
        ServingSettings(oidc_issuer="ftp://id", oidc_audience="a"),
        ServingSettings(oidc_issuer="https://id", oidc_audience="a", oidc_jwks="/keys"),
    ):
        with pytest.raises(SettingsError):
            access_of(wrong)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, Issuer, str]]:
    folder = tmp_path_factory.mktemp("guarded")
    tiny_model_folder(folder / "model", ["person"])
    key, line = new_key("gate", [Role.PREDICT])
    (folder / "keys").write_text(line)
    issuer = Issuer()
    env = {
        **PLAIN,
        "HAECHI_SERVING_API_KEYS": str(folder / "keys"),
        "HAECHI_SERVING_OIDC_ISSUER": issuer.url,
        "HAECHI_SERVING_OIDC_AUDIENCE": "haechi",
        "HAECHI_SERVING_OIDC_ROLES_CLAIM": "realm_access.roles",
    }
    try:
        with running(folder / "model", env=env) as server:
            yield server, issuer, key
    finally:
        issuer.close()


OPEN = ("GET /", "GET /v2/health/live", "GET /v2/health/ready", "GET /v2", "GET /v2/models/tiny/ready")
PREDICT = (
    "GET /v1/models",
    "GET /v1/models/tiny",
    "GET /v2/models/tiny",
    "POST /v1/models/tiny:predict",
    "POST /v2/models/tiny/infer",
)
ADMIN = (
    "POST /v2/repository/index",
    "POST /v2/repository/models/tiny/load",
    "POST /v2/repository/models/tiny/unload",
)


def test_each_address_wants_its_role(guarded: tuple[Running, Issuer, str]) -> None:
    server, issuer, key = guarded
    callers = {
        "nobody": {},
        "stranger": {"authorization": "Bearer haechi_wrong"},
        "camera": {"x-api-key": key},
        "robot": {"authorization": f"Bearer {issuer.token(realm_access={'roles': ['predict']})}"},
        "roleless": {"authorization": f"Bearer {issuer.token()}"},
        "boss": {"authorization": f"Bearer {issuer.token(realm_access={'roles': ['admin']})}"},
    }
    allowed = {
        OPEN: set(callers),
        PREDICT: {"camera", "robot", "boss"},
        ADMIN: {"boss"},
    }
    with httpx.Client(base_url=server.url) as client:
        for addresses, may in allowed.items():
            for address, (who, headers) in ((a, c) for a in addresses for c in callers.items()):
                method, path = address.split()
                told = client.request(method, path, headers=headers, content=SCENE if method == "POST" else None)
                expected = 401 if who in ("nobody", "stranger") else 403
                denied = told.status_code in (401, 403)
                assert denied == (who not in may), (address, who, told.status_code, told.text)
                if denied:
                    assert told.status_code == expected and list(told.json()) == ["error"]
                    assert ("www-authenticate" in told.headers) == (expected == 401)
                else:
                    assert told.status_code < 500


def test_a_stranger_is_refused_before_its_body_is_taken(guarded: tuple[Running, Issuer, str]) -> None:
    server, _, _ = guarded
    with socket.create_connection(("127.0.0.1", server.http), timeout=3) as wire:
        wire.sendall(b"POST /v1/models/tiny:predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
        assert wire.recv(65536).startswith(b"HTTP/1.1 401")


def test_grpc_asks_the_same_of_its_callers(guarded: tuple[Running, Issuer, str]) -> None:
    server, issuer, key = guarded
    robot = issuer.token(realm_access={"roles": ["predict"]})
    client = tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{server.grpc}")
    tensor = tritonclient.grpc.InferInput("images", [1, 32, 32, 3], "UINT8")
    tensor.set_data_from_numpy(np.zeros((1, 32, 32, 3), np.uint8))
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("tiny")
    for headers in ({"authorization": f"Bearer {robot}"}, {"x-api-key": key}):
        assert client.infer("tiny", [tensor], headers=headers)
        assert client.get_model_metadata("tiny", headers=headers).name == "tiny"
    for headers, code in (
        ({}, "UNAUTHENTICATED"),
        ({"authorization": "Bearer wrong"}, "UNAUTHENTICATED"),
        ({"authorization": f"Bearer {issuer.token()}"}, "PERMISSION_DENIED"),
    ):
        for work in (client.infer, client.get_model_metadata):
            words: tuple[Any, ...] = ("tiny", [tensor]) if work == client.infer else ("tiny",)
            with pytest.raises(InferenceServerException) as caught:
                work(*words, headers=headers)
            assert caught.value.status() == f"StatusCode.{code}"
    client.close()


def test_keys_that_cannot_be_read_end_the_start_with_their_reason(tmp_path: Path) -> None:
    tiny_model_folder(tmp_path / "model", ["person"])
    env = {**os.environ, "HAECHI_SERVING_API_KEYS": str(tmp_path / "absent")}
    words = [sys.executable, "-m", "haechi.serving", "--model", str(tmp_path / "model"), "--http-port", "0"]
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    assert done.returncode == SettingsError.exit_code and "absent cannot be read" in done.stderr
