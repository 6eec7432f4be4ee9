"""JSON Web Tokens of an OpenID Connect issuer: who presents one, and the issuer's keys, fetched beside the event loop."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
import urllib.error
import urllib.request
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import jwt

from haechi.components.shared.errors import SettingsError

from .api_keys import Caller
from .service import Role

__all__ = ["Tokens"]

# Signatures of key pairs only: with HS256 whoever can check a token can make one, and `none` is no signature.
_ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
_LEEWAY = 30.0  # seconds that clocks may differ
_REMEMBERED = 1024  # tokens whose signature need not be checked again
_REMEMBERED_SECONDS = 60.0
_MAX_KEYS = 64
_MAX_BYTES = 256 * 1024
_FETCH_SECONDS = 3.0
_FRESH_SECONDS = 300.0  # after that keys are fetched again in the background, so that withdrawn ones go
_PAUSE_SECONDS = 10.0  # between two fetches, whatever is asked for

_log = logging.getLogger(__name__)


class _Refused(Exception):
    """A token that is not taken, and why; for the log, never for the caller."""


@dataclass(frozen=True)
class _Known:
    """A token that was checked, and when that ends (time.time)."""

    caller: Caller
    until: float


class Tokens:
    """Checks tokens of one issuer.

    The issuer's keys are fetched when the first token comes, again where a token names an unknown one (at most every
    ten seconds, all callers waiting for one fetch), and every five minutes in the background. While the issuer is away
    the keys at hand go on.

    Args:
        issuer, audience: what tokens must say.
        jwks: address of the keys; empty for what the issuer's discovery document names.
        roles_claim: claim that lists the roles, or is a text of words; with dots for one inside of others.

    Raises:
        SettingsError: an address is not http(s).
    """

    def __init__(self, issuer: str, audience: str, jwks: str = "", roles_claim: str = "roles") -> None:
        for address in filter(None, (issuer, jwks)):
            if urlsplit(address).scheme not in ("https", "http") or not urlsplit(address).hostname:
                raise SettingsError(f"{address!r} is no address of an issuer or its keys", "Give an https:// URL.")
        self._issuer, self._audience, self._jwks, self._roles_claim = issuer, audience, jwks, roles_claim
        self._keys: dict[str, jwt.PyJWK] = {}
        self._known: OrderedDict[bytes, _Known] = OrderedDict()
        self._fetching: asyncio.Task[None] | None = None
        self._fetched = self._begun = self._told = float("-inf")

    async def find(self, token: str) -> Caller | None:
        """Whose token this is, or None; at most `_FETCH_SECONDS` where its key has to be fetched, else at once."""
        digest = hashlib.sha256(token.encode()).digest()
        known = self._known.get(digest)
        if known and time.time() < known.until:
            return known.caller
        try:
            claims = self._claims(token, await self._key(token))
            caller = Caller(str(claims["sub"])[:200], _roles(claims, self._roles_claim))
        except (_Refused, jwt.PyJWTError, ValueError, TypeError, RecursionError) as error:
            self._tell(error)
            return None
        self._remember(digest, _Known(caller, min(time.time() + _REMEMBERED_SECONDS, float(claims["exp"]))))
        return caller

    def _claims(self, token: str, key: jwt.PyJWK) -> dict[str, Any]:
        claims: dict[str, Any] = jwt.decode(
            token,
            key,
            algorithms=list(_ALGORITHMS),
            audience=self._audience,
            issuer=self._issuer,
            leeway=_LEEWAY,
            options={"require": ["exp", "iss", "aud", "sub"], "enforce_minimum_key_length": True},
        )
        return claims

    async def _key(self, token: str) -> jwt.PyJWK:
        header = jwt.get_unverified_header(token)
        if header.get("alg") not in _ALGORITHMS:
            raise _Refused("its algorithm is not allowed")
        name = header.get("kid", "")
        if time.monotonic() - self._fetched > _FRESH_SECONDS:
            self._fetch()
        if (key := self._named(name)) is None and (fetching := self._fetch()):
            await asyncio.wait([fetching], timeout=_FETCH_SECONDS)
            key = self._named(name)
        if key is None:
            raise _Refused("its key is not known")
        return key

    def _named(self, name: str) -> jwt.PyJWK | None:
        # A token need not name its key where there is only one.
        return next(iter(self._keys.values())) if not name and len(self._keys) == 1 else self._keys.get(name)

    def _tell(self, error: Exception) -> None:
        # Some of the reasons, so that strangers cannot fill the log.
        if time.monotonic() - self._told > _PAUSE_SECONDS:
            self._told = time.monotonic()
            _log.warning("a token was refused: %s", error)

    def _remember(self, digest: bytes, known: _Known) -> None:
        self._known[digest] = known
        self._known.move_to_end(digest)
        if len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)

    def _fetch(self) -> asyncio.Task[None] | None:
        """The fetch that runs, a new one, or None where the last one began a moment ago."""
        if self._fetching and not self._fetching.done():
            return self._fetching
        if time.monotonic() - self._begun < _PAUSE_SECONDS:
            return None
        self._begun = time.monotonic()
        self._fetching = asyncio.create_task(self._refresh())
        return self._fetching

    async def _refresh(self) -> None:
        try:
            keys = await asyncio.to_thread(_fetch_keys, self._issuer, self._jwks)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            _log.warning("the keys of %s cannot be fetched, %d go on: %s", self._issuer, len(self._keys), error)
            return
        if keys.keys() != self._keys.keys():
            _log.warning("%s has %d keys now", self._issuer, len(keys))
        # A token whose key was withdrawn is checked again, and refused.
        self._known.clear()
        self._keys, self._fetched = keys, time.monotonic()


def _roles(claims: Mapping[str, Any], claim: str) -> frozenset[Role]:
    value: Any = claims.get(claim)
    if value is None:
        value = claims
        for part in claim.split("."):
            value = value.get(part) if isinstance(value, dict) else None
    words = value.split() if isinstance(value, str) else value if isinstance(value, list) else []
    return frozenset(role for role in Role if str(role) in words)


def _fetch_keys(issuer: str, address: str) -> dict[str, jwt.PyJWK]:
    """The issuer's keys for signatures, by name; those that we cannot use are passed over. Blocks."""
    until = time.monotonic() + _FETCH_SECONDS
    if not address:
        told = _get(issuer.rstrip("/") + "/.well-known/openid-configuration", until)
        if told.get("issuer") != issuer:
            raise ValueError(f"its discovery document is of issuer {str(told.get('issuer'))[:200]!r}")
        address = told["jwks_uri"]
    keys: dict[str, jwt.PyJWK] = {}
    for entry in _get(address, until)["keys"][:_MAX_KEYS]:
        if isinstance(entry, dict) and entry.get("use", "sig") == "sig":
            try:
                key = jwt.PyJWK(entry)
            except jwt.PyJWTError:
                continue
            if key.algorithm_name in _ALGORITHMS:
                keys[str(entry.get("kid", ""))] = key
    if not keys:
        raise ValueError(f"{address} holds no key for signatures")
    return keys


def _get(address: str, until: float) -> dict[str, Any]:
    """A JSON object from a server that may be slow and may send too much."""
    if urlsplit(address).scheme not in ("https", "http"):
        raise ValueError(f"{address[:200]!r} is not http(s)")
    parts: list[bytes] = []
    with urllib.request.urlopen(address, timeout=_FETCH_SECONDS) as answer:  # noqa: S310 - checked above
        while part := answer.read1(65536):
            parts.append(part)
            if sum(map(len, parts)) > _MAX_BYTES:
                raise ValueError(f"{address} sends more than {_MAX_BYTES} bytes")
            if time.monotonic() > until:
                raise TimeoutError(f"{address} took longer than {_FETCH_SECONDS:g} s")
    value = json.loads(b"".join(parts))
    if not isinstance(value, dict):
        raise ValueError(f"{address} does not answer with a JSON object")
    return value
