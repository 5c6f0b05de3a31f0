"""The application: routes, errors, and the gate before them."""

from __future__ import annotations

import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ..endpoints import endpoints
from ..version import __version__
from . import answers, pages, schema, uploads
from .calls import add_calls
from .desk import Desk, QueueFull
from .failures import STATUS, make_failure
from .gate import Gate
from .requests import add_requests
from .settings import Settings
from .signing import Signer
from .store import Store
from .webhooks import Webhooks

KINDS = {404: "not_found", 405: "method_not_allowed", 400: "bad_request", 413: "too_large"}


def make_app(settings: Settings, store: Store, plain_port: int | None = None) -> Gate:
    """The ASGI application; its queue opens and closes with its lifespan.

    Args:
        settings: of the server.
        store: its requests.
        plain_port: where it is served without TLS, when it is also served with it.

    Raises:
        OutputError: the key of the webhooks cannot be read or made.
    """
    app = FastAPI(
        title="flux2-local",
        version=__version__,
        lifespan=lambda app: _life(app, settings, store),
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        exception_handlers={
            RequestValidationError: _invalid,
            HTTPException: _http,
            QueueFull: _full,
            **{kind: _ours for kind, _, _ in STATUS},
        },
    )
    app.state.plain_port = plain_port
    app.state.tickets = uploads.Tickets()
    app.state.signer = Signer(settings.folder / "webhooks.key")
    app.state.routers = {name: APIRouter() for name in endpoints()}
    for name, endpoint in endpoints().items():
        add_calls(app.state.routers[name], endpoint)
        add_requests(app.state.routers[name], endpoint)
        app.include_router(app.state.routers[name])
    app.include_router(uploads.router)
    app.include_router(pages.router)
    app.openapi = lambda: schema.document(app.routes, None)  # type: ignore[method-assign]
    return Gate(app, settings)


@asynccontextmanager
async def _life(app: FastAPI, settings: Settings, store: Store) -> AsyncIterator[None]:
    webhooks = Webhooks(app.state.signer)
    desk = app.state.desk = Desk(settings, store, lambda job: webhooks.deliver(desk, job))
    await webhooks.resume(desk)
    await desk.open()
    try:
        yield
    finally:
        await webhooks.close()
        await desk.close()


async def _invalid(request: Request, error: Any) -> Response:
    return answers.invalid(error.errors())


async def _http(request: Request, error: Any) -> Response:
    detail = str(error.detail)
    if error.status_code == 404:
        detail = f"There is nothing at {request.url.path[:200]}. Endpoints: {', '.join(endpoints())}."
    return answers.problem(error.status_code, KINDS.get(error.status_code, "http_error"), detail, error.headers)


async def _full(request: Request, error: Any) -> Response:
    return answers.problem(429, "queue_full", str(error), {"Retry-After": "5"})


async def _ours(request: Request, error: Any) -> Response:
    facts = make_failure(error)
    if facts["error_type"] == "internal_error":
        traceback.print_exception(error)
    return answers.failure(facts)
