"""API keys: who presents one, told by a file of hashes that may change while we run; and a command that makes them.

A line of the file is `{"name": "gate-cameras", "sha256": "<hex>", "roles": ["predict"]}`. Two lines may bear one name,
so that a key is rotated by adding the new one, changing the client, and removing the old one.

A plain SHA-256 is sound because keys are 256 random bits: there is no dictionary to try, and 2^256 keys are too many
to hash, however fast. Slow hashes are for passwords that people choose, and would let anybody burn our CPU.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import json
import logging
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from haechi.components.shared.errors import SettingsError

from .service import Role

__all__ = ["ApiKeys", "Caller", "new_key"]

_LOOK_SECONDS = 1.0
_FORM = "Write one line for each key, as `python -m haechi.serving.api_keys NAME` makes them."

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Caller:
    """Who calls, and what it may do."""

    name: str
    roles: frozenset[Role]


class ApiKeys:
    """The keys of a file, read again when it changes: a mounted Secret's too, which Kubernetes swaps by a symlink.

    Args:
        path: the file.

    Raises:
        SettingsError: it cannot be read, holds no key, or is malformed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pepper = secrets.token_bytes(32)
        self._looked = time.monotonic()
        self._stamp = _stamp(path)
        self._callers = self._read()

    def find(self, key: str) -> Caller | None:
        """Whose key this is, or None."""
        self._look()
        return self._callers.get(self._place(hashlib.sha256(key.encode()).digest()))

    def _place(self, digest: bytes) -> bytes:
        # Under a secret of this process, so that the time of the look-up tells nothing of the digests in the file.
        return hmac.digest(self._pepper, digest, "sha256")

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._callers = self._read()
        except SettingsError as error:
            _log.warning("the former %d API keys go on: %s", len(self._callers), error)
        else:
            _log.warning("%s was read again: %d API keys", self._path, len(self._callers))

    def _read(self) -> dict[bytes, Caller]:
        try:
            lines = self._path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"the API keys in {self._path} cannot be read ({error})", _FORM) from error
        entries = [self._entry(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        if not entries:
            raise SettingsError(f"{self._path} holds no API key", _FORM)
        return {self._place(digest): caller for digest, caller in entries}

    def _entry(self, number: int, line: str) -> tuple[bytes, Caller]:
        try:
            entry = json.loads(line)
            name, digest, roles = entry["name"], bytes.fromhex(entry["sha256"]), frozenset(map(Role, entry["roles"]))
            if not isinstance(name, str) or not name.isprintable() or not name or len(digest) != 32 or not roles:
                raise ValueError("a name, 64 hex digits and at least one role are wanted")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            # The error's own text could hold a part of the line.
            raise SettingsError(
                f"line {number} of {self._path} is no API key ({type(error).__name__})", _FORM
            ) from None
        return digest, Caller(name, roles)


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def new_key(name: str, roles: Sequence[Role]) -> tuple[str, str]:
    """A fresh key for its holder, and its line for the file."""
    key = f"haechi_{secrets.token_urlsafe(32)}"
    digest = hashlib.sha256(key.encode()).hexdigest()
    return key, json.dumps({"name": name, "sha256": digest, "roles": [str(role) for role in roles]})


def main(words: Sequence[str] | None = None) -> int:
    """`python -m haechi.serving.api_keys NAME [--role ROLE ...]`: the line on standard output, the key on error."""
    parser = argparse.ArgumentParser("haechi.serving.api_keys", description="make an API key of the serving runtime")
    parser.add_argument("name", help="who gets it; what logs call the caller")
    parser.add_argument("--role", action="append", choices=[str(role) for role in Role], help="default: predict")
    arguments = parser.parse_args(words)
    key, line = new_key(arguments.name, [Role(role) for role in arguments.role or [Role.PREDICT]])
    sys.stdout.write(line + "\n")
    sys.stderr.write(f"The key of {arguments.name}, shown this once:\n{key}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
