"""Settings of the runtime from the environment (`HAECHI_SERVING_*` and two `OTEL_*`), checked before anything starts."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from haechi.components.shared.errors import SettingsError

from .backends import ENGINES, PRECISIONS, BackendOptions

__all__ = ["ServingSettings"]

_PREFIX = "HAECHI_SERVING_"
# What Kubernetes tells pods of a Service whose name begins like our settings, such as `haechi-serving`.
_SERVICE_LINK = re.compile(r"_(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT(_[0-9]+_(TCP|UDP|SCTP)(_[A-Z]+)?)?)$")
_OTLP = "http/protobuf"


@dataclass(frozen=True)
class ServingSettings:
    """What the runtime may use. Each field is read from `HAECHI_SERVING_<FIELD>` unless said otherwise.

    Attributes:
        engine: `onnxruntime`, `openvino`, or `auto` for the fastest that gives the golden boxes.
        precision: of the network, `fp32`, `bf16`, or `auto` for the lowest that gives the golden boxes.
        threads: compute threads of one run of the network; 0 chooses by the CPUs that the container may use.
        workers: requests worked on at the same time; 0 chooses likewise.
        queue: requests that may wait beyond those; one more is refused at once.
        timeout: seconds that a request may take.
        max_body: bytes of one request's body or message.
        max_pixels: larger images are refused from their header.
        batch: images of several requests that one run of the network may take; 1 switches that off, 0 switches it on
            where a measurement at start shows that it helps.
        batch_wait: milliseconds that a run waits for more images.
        watch: seconds between looks at the model folder for another version; 0 for none.
        log_share: share of good requests that get an access log line, 0 to 1; all others always do.
        api_keys: file of hashed API keys; empty for none.
        oidc_issuer, oidc_audience, oidc_jwks: of the JSON Web Tokens that are taken; empty for none.
        oidc_roles_claim: claim of a token that lists `predict` and `admin`; with dots for one inside of others.
        sample_share: share of images, drawn evenly, that are kept as samples; 0 keeps none.
        sample_uncertain: the same among images with a detection near its limit.
        sample_hourly: samples an hour and camera at most; 0 for any number.
        sample_service: name under `predictions/` where samples go; empty takes the model's.
        otlp_endpoint: the collector that traces go to, from OTEL_EXPORTER_OTLP_ENDPOINT; empty for no tracing.
        otlp_protocol: how it is spoken to, from OTEL_EXPORTER_OTLP_PROTOCOL.
    """

    engine: str = "auto"
    precision: str = "auto"
    threads: int = 0
    workers: int = 0
    queue: int = 32
    timeout: float = 30.0
    max_body: int = 64 * 2**20
    max_pixels: int = 40_000_000
    batch: int = 0
    batch_wait: float = 2.0
    watch: float = 1.0
    log_share: float = 1.0
    api_keys: str = ""
    oidc_issuer: str = ""
    oidc_audience: str = ""
    oidc_jwks: str = ""
    oidc_roles_claim: str = "roles"
    sample_share: float = 0.0
    sample_uncertain: float = 0.0
    sample_hourly: int = 60
    sample_service: str = ""
    otlp_endpoint: str = field(default="", metadata={"env": "OTEL_EXPORTER_OTLP_ENDPOINT"})
    otlp_protocol: str = field(default=_OTLP, metadata={"env": "OTEL_EXPORTER_OTLP_PROTOCOL"})

    def __post_init__(self) -> None:
        self._check(self.engine in ENGINES, "engine", f"one of {', '.join(ENGINES)}")
        self._check(self.precision in PRECISIONS, "precision", f"one of {', '.join(PRECISIONS)}")
        for name in ("threads", "workers", "queue", "batch", "batch_wait", "watch", "sample_hourly"):
            self._check(getattr(self, name) >= 0, name, "0 or more")
        for name in ("timeout", "max_body", "max_pixels"):
            self._check(getattr(self, name) > 0, name, "more than 0")
        for name in ("log_share", "sample_share", "sample_uncertain"):
            self._check(0 <= getattr(self, name) <= 1, name, "a share from 0 to 1")
        if bool(self.oidc_issuer) != bool(self.oidc_audience):
            raise SettingsError(
                f"only one of {_PREFIX}OIDC_ISSUER and {_PREFIX}OIDC_AUDIENCE is set", "Set both, or neither."
            )
        if self.otlp_endpoint and self.otlp_protocol != _OTLP:
            raise SettingsError(
                f"OTEL_EXPORTER_OTLP_PROTOCOL is {self.otlp_protocol!r}",
                f"Set it to {_OTLP}, with the collector's port for that (4318 as a rule).",
            )

    @property
    def backend(self) -> BackendOptions:
        """How the network may be run."""
        return BackendOptions(self.engine, self.precision, self.threads)

    def _check(self, good: bool, name: str, wanted: str) -> None:
        if not good:
            raise SettingsError(f"{_PREFIX}{name.upper()} is {getattr(self, name)!r}", f"Set it to {wanted}.")

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> ServingSettings:
        """Read the settings from `env` (default: the process's environment); an empty variable counts as unset.

        Raises:
            SettingsError: a value is malformed, or a variable of this prefix is none of ours.
        """
        env = os.environ if env is None else env
        known = {entry.metadata.get("env", f"{_PREFIX}{entry.name.upper()}"): entry for entry in fields(cls)}
        stray = sorted(
            name for name in env if name.startswith(_PREFIX) and name not in known and not _SERVICE_LINK.search(name)
        )
        if stray:
            raise SettingsError(f"{stray[0]} is no setting of the runtime", f"There are {', '.join(sorted(known))}.")
        values: dict[str, Any] = {
            entry.name: _typed(name, env[name], type(entry.default)) for name, entry in known.items() if env.get(name)
        }
        return cls(**values)


def _typed(name: str, text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise SettingsError(f"{name} is {text!r}", "Set it to a number.") from None
