"""What ``flux2-local serve`` was asked for, checked and frozen."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..request import VARIANTS, Variant

MIN_KEY = 12
"""Characters of a key that opens the server to other machines."""

UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


@dataclass(frozen=True)
class Settings:
    """How the server runs.

    Attributes:
        folder: the queue, pictures and certificates.
        host, port: where to listen; port 0 takes a free one.
        tls_port: where to listen with TLS besides, or None.
        key: what callers must present, or None.
        remote: whether other machines may be served.
        loading: arguments for :meth:`flux2_local.Flux2.load`.
        models: the model of single variants.
        keep: seconds that finished requests are kept, or None for ever.
        queue_limit: requests that may wait.
        private_urls: whether pictures and webhooks may be at private addresses.
        origins: web pages, besides those of this machine, that may call.
        safety_checker: False skips the safety check, whatever a request says.
    """

    folder: Path
    host: str = "127.0.0.1"
    port: int = 8484
    tls_port: int | None = None
    key: str | None = None
    remote: bool = False
    loading: dict[str, Any] = field(default_factory=dict)
    models: dict[Variant, str] = field(default_factory=dict)
    keep: float | None = 7 * UNITS["d"]
    queue_limit: int = 100
    private_urls: bool = False
    origins: tuple[str, ...] = ()
    safety_checker: bool = True

    def __post_init__(self) -> None:
        """Refuse to listen beyond this machine by accident.

        Raises:
            RequestError: the host is not loopback, and the flag or a long enough key is missing.
        """
        if is_loopback(self.host):
            return
        if not self.remote:
            raise RequestError(
                f"--host {self.host} would let other machines in. Say so with --allow-remote, and set a key with --api-key."
            )
        if self.key is None or len(self.key) < MIN_KEY:
            raise RequestError(
                f"--allow-remote needs a key of at least {MIN_KEY} characters: --api-key, or FLUX2_LOCAL_KEY."
            )


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine alone."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def parse_duration(text: str) -> float | None:
    """Seconds of "7d", "12h", "30m" or "90s"; None for "forever".

    Raises:
        RequestError: not such a text.
    """
    if text.strip().lower() == "forever":
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhdw])", text.strip().lower())
    if match is None:
        raise RequestError(f"--keep: {text!r} is not a time; write for example 7d, 12h, 30m or forever.")
    return float(match[1]) * UNITS[match[2]]


def parse_models(text: str | None) -> dict[Variant, str]:
    """ "standard=dev,turbo=klein-4b" -> model by variant.

    Raises:
        RequestError: not such a text.
    """
    found: dict[Variant, str] = {}
    for part in (text or "").split(","):
        name, _, model = part.strip().partition("=")
        variant = next((v for v in VARIANTS if v == name), None)
        if part.strip() and (variant is None or not model):
            raise RequestError(
                f"--variant-models: {part.strip()!r} is not VARIANT=MODEL with one of {', '.join(VARIANTS)}; "
                "write for example standard=dev,turbo=klein-4b."
            )
        if variant is not None:
            found[variant] = model
    return found
