"""What every call passes before a route sees it: who may call, from which page, how much, and the JavaScript proxy.

Plain ASGI, so that streams stay streams and a hang-up reaches the route.
"""

from __future__ import annotations

import secrets
from collections.abc import MutableMapping
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from . import answers
from .desk import Desk
from .settings import Settings, is_loopback

PROXY_PATH = "/api/fal/proxy"
PROXY_HEADER = "x-fal-target-url"
PROXY_HOSTS = {"fal.run": "", "queue.fal.run": "/queue", "rest.fal.ai": "", "rest.alpha.fal.ai": ""}
"""Where the JavaScript client believes it calls -> prefix of the path here."""

MAX_BODY = 2 * 2**20
MAX_PICTURES_BODY = 64 * 2**20
"""Bytes of a body where pictures come in: read and parsed where calls are answered, others must be small."""
PICTURES = ("/edit", "/edit/stream", "/files/upload")
UPLOADS = "/storage/upload/"

OPEN = (
    ("GET", "/health"), ("GET", "/ready"), ("GET", "/playground/"), ("GET", "/files/"), ("PUT", "/storage/upload/"),
    ("GET", "/.well-known/"),
)  # fmt: skip
"""Served without a key: what monitoring asks, the page itself, pictures and announced uploads, whose addresses nobody can
guess, and the key that webhooks are signed with."""

ALLOWED_HEADERS = (
    "authorization", "content-type", "accept", "x-fal-target-url", "x-fal-request-timeout", "x-fal-runner-hint",
    "x-fal-queue-priority", "x-fal-object-lifecycle-preference", "x-fal-object-lifecycle", "x-fal-store-io",
    "x-fal-no-retry", "x-app-fal-disable-fallback", "x-fal-client", "x-fal-file-name",
)  # fmt: skip
SECURITY = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
    (b"x-frame-options", b"DENY"),
    (
        b"content-security-policy",
        b"default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; form-action 'self'",
    ),
)

Message = MutableMapping[str, Any]


class TooLarge(HTTPException):
    """The body is longer than it may be."""

    def __init__(self, limit: int) -> None:
        super().__init__(413, f"The body is larger than {limit // 2**20} MiB.")


def max_body(path: str) -> int:
    """Bytes that a body sent to an address may have."""
    return MAX_PICTURES_BODY if path.endswith(PICTURES) or path.startswith(UPLOADS) else MAX_BODY


class Gate:
    """Wraps the application.

    Args:
        app: what is behind it; its lifespan puts the desk into its state.
        settings: of the server.
    """

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        self.app, self.settings = app, settings

    @property
    def desk(self) -> Desk:
        """The queue, once the application has started."""
        desk: Desk = self.app.state.desk
        return desk

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope = {**scope, "path": scope["path"].rstrip("/") or "/"}
        headers = Headers(scope=scope)
        told = self._told(headers, send)
        refusal = self._refusal(scope, headers)
        if refusal is None and scope["path"] == PROXY_PATH and scope["method"] != "OPTIONS":
            scope, refusal = proxied(scope, headers)
        limit, length = max_body(scope["path"]), headers.get("content-length", "0")
        if refusal is None and length.isdigit() and int(length) > limit:
            refusal = answers.problem(413, "too_large", TooLarge(limit).detail)
        if scope["method"] == "OPTIONS" and refusal is None:
            refusal = Response(status_code=204)
        if refusal is not None:
            await refusal(scope, receive, told)
            return
        await self.app(scope, limited(receive, limit), told)

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        """Why a call may not pass, or None."""
        origin, host = headers.get("origin"), headers.get("host", "")
        if not self._knows_host(host):
            return answers.problem(403, "host_refused", f"This server does not go by the name {host[:100]!r}.")
        if origin is not None and not self.allows(origin, host):
            text = f"Pages of {origin[:200]} may not call this server; `--allow-origin {origin[:200]}` permits them."
            return answers.problem(403, "origin_refused", text)
        method, path = ("GET" if scope["method"] == "HEAD" else scope["method"]), scope["path"]
        is_open = path == "/" or any(method == verb and path.startswith(start) for verb, start in OPEN)
        if method == "OPTIONS" or is_open or self._knows_key(headers):
            return None
        return answers.problem(
            401, "unauthorized", "A key is needed: Authorization: Key …", {"www-authenticate": "Key"}
        )

    def _knows_host(self, host: str) -> bool:
        """A server for this machine alone answers to this machine's names only: a page cannot rename its way in."""
        if not is_loopback(self.settings.host):
            return True
        try:
            return is_loopback(urlsplit(f"//{host}").hostname or "") if host else True
        except ValueError:
            return False

    def allows(self, origin: str, host: str) -> bool:
        """Whether a page may call: one of this machine, one served here, or one named by --allow-origin."""
        if origin in self.settings.origins:
            return True
        try:
            parts = urlsplit(origin)
            return parts.netloc == host or is_loopback(parts.hostname or "")
        except ValueError:
            return False

    def _knows_key(self, headers: Headers) -> bool:
        if self.settings.key is None:
            return True
        given = headers.get("authorization", "").partition(" ")[2].strip()
        return secrets.compare_digest(given.encode(), self.settings.key.encode())

    def _told(self, headers: Headers, send: Send) -> Send:
        """``send`` that adds the headers every answer has, and counts."""
        origin = headers.get("origin")
        more = list(SECURITY)
        if origin is not None and self.allows(origin, headers.get("host", "")):
            more += [
                (b"access-control-allow-origin", origin.encode("latin-1")),
                (b"vary", b"origin"),
                (b"access-control-expose-headers", b"x-fal-request-id, x-fal-error-type, x-fal-request-timeout-type"),
                (b"access-control-allow-methods", b"GET, POST, PUT, DELETE, OPTIONS"),
                (b"access-control-allow-headers", ", ".join(ALLOWED_HEADERS).encode()),
                (b"access-control-max-age", b"600"),
            ]

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.desk.metrics.answers.labels(str(message["status"])).inc()
                message["headers"] = [*message.get("headers", ()), *more]
            await send(message)

        return told


def limited(receive: Receive, limit: int) -> Receive:
    """``receive`` that stops at a body that is longer than ``limit`` bytes."""
    total = 0

    async def counted() -> Message:
        nonlocal total
        message = await receive()
        total += len(message.get("body", b""))
        if total > limit:
            raise TooLarge(limit)
        return message

    return counted


def proxied(scope: Scope, headers: Headers) -> tuple[Scope, Response | None]:
    """The call that a client sent through the proxy route, or why it is refused."""
    target = headers.get(PROXY_HEADER)
    if target is None:
        return scope, answers.problem(400, "bad_target", f"The header {PROXY_HEADER} is missing.")
    try:
        parts = urlsplit(target)
        prefix = PROXY_HOSTS[parts.netloc]
    except (ValueError, KeyError):
        known = ", ".join(PROXY_HOSTS)
        return scope, answers.problem(400, "bad_target", f"{target[:200]!r} is at none of {known}.")
    path = f"{prefix}{parts.path.rstrip('/')}"
    return {**scope, "path": path, "raw_path": path.encode("utf-8"), "query_string": parts.query.encode("utf-8")}, None
