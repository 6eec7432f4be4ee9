"""Who may call, where no gateway or mesh decides: API keys, JSON Web Tokens, or both.

`Authorization: Bearer <key or token>` or `x-api-key: <key>`, as HTTP headers or gRPC metadata. Every refusal reads the
same, so that it tells neither what is configured nor what was nearly right; the server's log has the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from haechi.components.shared.errors import AccessError

from .api_keys import ApiKeys, Caller
from .service import Access, Open, Role
from .settings import ServingSettings

if TYPE_CHECKING:  # cryptography is loaded only where tokens are taken
    from .oidc import Tokens

__all__ = ["Guard", "access_of"]

_MAX_CREDENTIAL = 8 * 1024


def access_of(settings: ServingSettings) -> Access:
    """Who may call by the settings; everybody may predict where they name neither keys nor an issuer.

    Raises:
        SettingsError: the file of keys is unusable, or an address is none.
    """
    if not settings.api_keys and not settings.oidc_issuer:
        return Open()
    keys = ApiKeys(Path(settings.api_keys)) if settings.api_keys else None
    tokens = None
    if settings.oidc_issuer:
        from .oidc import Tokens

        tokens = Tokens(settings.oidc_issuer, settings.oidc_audience, settings.oidc_jwks, settings.oidc_roles_claim)
    return Guard(keys, tokens)


class Guard:
    """Access for those who present a key or a token.

    Args:
        keys: API keys, if any are taken.
        tokens: checks tokens, if any are taken.
    """

    def __init__(self, keys: ApiKeys | None = None, tokens: Tokens | None = None) -> None:
        self._keys = keys
        self._tokens = tokens

    async def check(self, headers: Mapping[str, str], role: Role) -> str:
        """The caller's name.

        Raises:
            AccessError: unknown, or not allowed.
        """
        caller = await self._caller(_credential(headers))
        if caller is None:
            raise AccessError("the caller is not known", "Send a valid key or token as `Authorization: Bearer ...`.")
        if role not in caller.roles and Role.ADMIN not in caller.roles:
            raise AccessError(f"this wants the role {role}", "Ask whoever gave you the key or token.", known=True)
        return caller.name

    async def _caller(self, credential: str) -> Caller | None:
        if not credential or len(credential) > _MAX_CREDENTIAL:
            return None
        # A token has two dots, a key of ours none.
        if self._tokens and credential.count(".") == 2:
            return await self._tokens.find(credential)
        return self._keys.find(credential) if self._keys else None


def _credential(headers: Mapping[str, str]) -> str:
    scheme, _, value = headers.get("authorization", "").partition(" ")
    return value.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "").strip()
