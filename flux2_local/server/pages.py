"""What the server has besides fal's contract: the page, pictures, history, health, metrics and documents."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import FileResponse, Response

from ..endpoints import endpoints
from ..request import SIZES
from ..version import __version__
from . import answers, schema
from .addresses import file_base
from .answers import Answer, address
from .calls import desk_of
from .jobs import Job

PAGE = Path(__file__).parent / "playground"
ASSETS = {".js": "text/javascript", ".css": "text/css", ".html": "text/html", ".svg": "image/svg+xml"}

router = APIRouter(tags=["server"])


@router.get("/health", operation_id="health")
async def health() -> dict[str, str]:
    """Whether the server answers."""
    return {"status": "ok", "version": __version__}


@router.get("/ready", operation_id="ready", responses={503: {"description": "A model is still being loaded"}})
async def ready(request: Request) -> Response:
    """Whether a model is loaded and its worker waits for requests."""
    up = desk_of(request).worker.ready
    return Answer({"status": "ready" if up else "loading"}, 200 if up else 503)


@router.get("/metrics", operation_id="metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """Figures for Prometheus."""
    desk = desk_of(request)
    desk.metrics.busy.set(int(desk.current is not None))
    desk.metrics.starts.set(desk.worker.starts)
    return Response(desk.metrics.text(), media_type="text/plain; version=0.0.4")


@router.head("/files/{name}", include_in_schema=False)
@router.get(
    "/files/{name}",
    operation_id="file",
    response_class=Response,
    responses={404: schema.PROBLEMS[404], 416: {}, 206: {}},
)
async def file(request: Request, name: str) -> Response:
    """A picture. Ranges are served."""
    pictures = desk_of(request).pictures
    try:
        path, kind = pictures.path(name), pictures.kind(name)
    except (KeyError, OSError):
        return answers.problem(404, "not_found", "There is no such picture, or not any more.")
    headers = {"Cache-Control": "private, max-age=31536000, immutable"}
    return FileResponse(path, media_type=kind, headers=headers)


@router.get("/.well-known/jwks.json", operation_id="webhookKeys")
async def keys(request: Request) -> Response:
    """The key that webhooks are signed with."""
    return Answer(request.app.state.signer.jwks())


@router.get("/api/info", operation_id="info")
async def info(request: Request) -> Response:
    """What is served: endpoints with the schema of their bodies, and what runs behind each variant."""
    desk = desk_of(request)
    served = [
        {
            "name": e.name,
            "title": e.title,
            "description": e.description,
            "variant": e.variant,
            "edits": e.edits,
            "schema": schema.properties(e),
            "plan": desk.worker.plans.get(e.variant),
        }
        for e in endpoints().values()
    ]
    waiting = {"waiting": len(desk.waiting), "limit": desk.settings.queue_limit, "busy": desk.current is not None}
    return Answer(
        {"version": __version__, "endpoints": served, "sizes": SIZES, "queue": waiting, "ready": desk.worker.ready}
    )


@router.get("/api/history", operation_id="history", responses={422: {"model": schema.Invalid}})
async def history(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=100)] = 30,
    before: Annotated[
        float, Query(description="Seconds since 1970; only what ended earlier.", allow_inf_nan=False)
    ] = 0,
) -> Response:
    """Requests that have ended, newest first."""
    jobs = await desk_of(request).store.history(limit, before or time.time() + 1)
    return Answer({"requests": [entry(job, file_base(request)) for job in jobs]})


@router.delete(
    "/api/history/{request_id}", operation_id="forget", status_code=204, response_class=Response,
    responses={404: schema.PROBLEMS[404], 400: schema.PROBLEMS[400]},
)  # fmt: skip
async def forget(request: Request, request_id: str) -> Response:
    """Remove an ended request and its pictures."""
    desk = desk_of(request)
    job = await desk.find(request_id)
    if job is None:
        return answers.problem(404, "not_found", "There is no such request.")
    if not job.done:
        return answers.problem(400, "not_completed", "The request has not ended; cancel it first.")
    await desk.forget(job)
    return Response(status_code=204)


def entry(job: Job, base: str) -> dict[str, Any]:
    """One line of the history."""
    arguments = dict(job.arguments)
    if job.images:
        arguments["image_urls"] = [address(name, base) for name in job.images]
    return {
        "request_id": job.id,
        "endpoint": job.endpoint,
        "arguments": arguments,
        "ended": job.ended,
        "error": job.failure and job.failure["message"],
        "output": answers.output(job, base) if job.answer else None,
    }


@router.get("/api/openapi/queue/openapi.json", operation_id="openapiOfEndpoint", responses=schema.PROBLEMS)
async def openapi(request: Request, endpoint_id: str) -> Response:
    """The OpenAPI document of one endpoint, in fal's queue form."""
    endpoint = endpoints().get(endpoint_id)
    if endpoint is None:
        return answers.problem(404, "not_found", f"Endpoints: {', '.join(endpoints())}.")
    return Answer(schema.document(request.app.state.routers[endpoint_id].routes, endpoint))


@router.get("/", include_in_schema=False)
async def page() -> Response:
    """The playground."""
    return FileResponse(PAGE / "index.html", headers={"Cache-Control": "no-cache"})


@router.get("/playground/{name}", include_in_schema=False)
async def asset(name: str) -> Response:
    """A part of the playground."""
    path = PAGE / name
    if "/" in name or "\\" in name or path.suffix not in ASSETS or not path.is_file():
        return answers.problem(404, "not_found", "There is no such file.")
    return FileResponse(path, media_type=ASSETS[path.suffix], headers={"Cache-Control": "no-cache"})
