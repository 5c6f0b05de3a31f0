"""Webhooks are signed as fal signs its own, so that receivers can check that a call is this server's and unchanged."""

from __future__ import annotations

import base64
import hashlib
import time
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from ..errors import OutputError
from ..files import reason

USER = "flux2-local"
"""Where fal names the account that the request belongs to."""


class Signer:
    """An Ed25519 key of this server.

    Args:
        path: where the key is kept; it is made there if there is none.

    Raises:
        OutputError: the file cannot be read or written, or is no such key.
    """

    def __init__(self, path: Path) -> None:
        try:
            if not path.exists():
                part = path.with_suffix(".part")
                part.unlink(missing_ok=True)
                part.touch(mode=0o600)
                pem = Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
                part.write_bytes(Ed25519PrivateKey.generate().private_bytes(*pem))
                part.replace(path)
            key = load_pem_private_key(path.read_bytes(), None)
        except (OSError, ValueError) as error:
            raise OutputError(f"The key of the webhooks in {path} cannot be used: {reason(error)}.") from error
        if not isinstance(key, Ed25519PrivateKey):
            raise OutputError(
                f"The key of the webhooks in {path} is no Ed25519 key; remove it, and another one is made."
            )
        self._key = key

    def headers(self, request_id: str, body: bytes) -> dict[str, str]:
        """The headers of a call, signed now: over the request, the account, the time and the body's digest, one per line."""
        stamp = str(int(time.time()))
        message = "\n".join((request_id, USER, stamp, hashlib.sha256(body).hexdigest()))
        return {
            "X-Fal-Webhook-Request-Id": request_id,
            "X-Fal-Webhook-User-Id": USER,
            "X-Fal-Webhook-Timestamp": stamp,
            "X-Fal-Webhook-Signature": self._key.sign(message.encode("utf-8")).hex(),
        }

    def jwks(self) -> dict[str, Any]:
        """The public key as a JSON Web Key Set (RFC 7517, RFC 8037)."""
        raw = self._key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        x = base64.urlsafe_b64encode(raw).rstrip(b"=").decode("ascii")
        return {"keys": [{"kty": "OKP", "crv": "Ed25519", "alg": "EdDSA", "use": "sig", "x": x}]}
