"""What a guarded runtime knows us by: an API key or a token, from files that are read anew for each request."""

from __future__ import annotations

from pathlib import Path

import requests
from requests.auth import AuthBase

from haechi.components.shared.errors import SettingsError
from haechi.components.shared.settings import ENDPOINT_CREDENTIALS

__all__ = ["REMEDY", "Credential"]

REMEDY = (
    "Put a key or token with the role `predict` as file api_key or token into {folder}: in a cluster the Secret "
    "haechi-endpoint of the namespace that deploys, elsewhere the folder that HAECHI_ENDPOINT_CREDENTIALS names."
)
_LONGEST = 8 * 1024  # what the runtime takes


class Credential(AuthBase):
    """The files `api_key` and `token` of a folder, sent as `X-API-Key` and `Authorization: Bearer`; neither need be there.

    Read for each request, so that a Secret that is rotated, or a projected token that is renewed, counts at once. As
    requests' `auth` it also keeps a .netrc from being asked.

    Args:
        folder: a mounted Secret, or any folder.
    """

    def __init__(self, folder: Path = Path(ENDPOINT_CREDENTIALS)) -> None:
        self.folder = folder

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """Add what is there to a request."""
        request.headers.update(self.headers())
        return request

    def headers(self) -> dict[str, str]:
        """The headers to send.

        Raises:
            SettingsError: a file cannot be read, or holds something else than one word.
        """
        key, token = self._read("api_key"), self._read("token")
        headers = {"X-API-Key": key, "Authorization": f"Bearer {token}" if token else ""}
        return {name: value for name, value in headers.items() if value}

    def _read(self, name: str) -> str:
        path = self.folder / name
        try:
            text = path.read_text(encoding="utf-8").strip()
        except (FileNotFoundError, NotADirectoryError):
            return ""
        except (OSError, UnicodeDecodeError) as error:
            # The text of a UnicodeDecodeError shows bytes of the file.
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise SettingsError(
                f"{path} cannot be read ({reason})", "Give this user the right to read it, or remove it."
            ) from None
        if not text or len(text) > _LONGEST or not text.isascii() or not text.isprintable() or " " in text:
            raise SettingsError(f"{path} is not one key or token", "Write the key or token alone into it.")
        return text
