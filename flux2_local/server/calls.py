"""The calls of each endpoint: run, stream and submit."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ..endpoints import Endpoint, make_call
from . import answers, events, schema
from .addresses import file_base, own_bases, queue_urls
from .desk import Desk
from .jobs import Job
from .references import collect

PRIORITY = "x-fal-queue-priority"
START_TIMEOUT = "x-fal-request-timeout"
LONGEST_TIMEOUT = 30 * 86400.0
"""Seconds; an event loop's timers go no further."""


def desk_of(request: Request) -> Desk:
    desk: Desk = request.app.state.desk
    return desk


async def make_job(request: Request, endpoint: Endpoint, **facts: Any) -> Job:
    """A job from a call's body, with its pictures fetched and its seed drawn.

    Raises:
        RequestError: a field is wrong, or a picture cannot be had.
        HTTPException: 400, a header of the queue cannot be read.
        QueueFull, OutputError: it would not be taken; asked before a picture is fetched.
    """
    desk, terms = desk_of(request), waiting_terms(request)
    arguments: dict[str, Any] = await request.json()
    asked, notes = make_call(endpoint, arguments)
    desk.check(asked.sync_mode)
    fields = asked.model_dump(exclude_unset=True)
    urls = list(fields.pop("images", ()))
    images = await collect(urls, desk.pictures, own_bases(request), desk.settings.private_urls) if urls else []
    shown = {**fields, "image_urls": images} if images else dict(fields)
    fields["seed"] = asked.seeded().seed
    job = Job(endpoint.name, endpoint.variant, shown, fields, images, base=file_base(request), **terms, **facts)
    if not desk.settings.safety_checker and asked.enable_safety_checker:
        notes.append("the safety checker is off on this server")
    for note in notes:
        job.log(note)
    return job


def waiting_terms(request: Request) -> dict[str, Any]:
    """How a request wants to wait: its priority, and when it must have begun.

    Raises:
        HTTPException: 400, the limit is not a number of seconds.
    """
    low = request.headers.get(PRIORITY, "").lower() == "low"
    limit = request.headers.get(START_TIMEOUT)
    if limit is None:
        return {"priority": "low" if low else "normal"}
    try:
        seconds = float(limit)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < LONGEST_TIMEOUT:
        raise HTTPException(400, f"{START_TIMEOUT}: {limit[:50]!r} is not a number of seconds.")
    return {"priority": "low" if low else "normal", "start_by": time.time() + seconds}


def add_calls(router: APIRouter, endpoint: Endpoint) -> None:
    """Register an endpoint's run, stream and submit."""
    body = schema.input_model(endpoint)
    name = schema.name_of(endpoint)

    async def run(request: Request, body: BaseModel) -> Response:
        """Generate and answer when it is done. A caller that hangs up stops the work."""
        desk = desk_of(request)
        job = await desk.submit(await make_job(request, endpoint, attached=True))
        await _ended_or_gone(request, desk, job)
        return answers.result(job, file_base(request))

    async def stream(request: Request, body: BaseModel) -> Response:
        """Generate, sending every step with a preview as a server-sent event; the last event is the output."""
        desk = desk_of(request)
        job = await desk.submit(await make_job(request, endpoint, attached=True, previews=True))
        return events.response(_until_gone(desk, job, file_base(request)), job)

    async def submit(
        request: Request, body: BaseModel, fal_webhook: Annotated[str | None, Query(max_length=2000)] = None
    ) -> Response:
        """Queue a request and answer at once."""
        if fal_webhook is not None and not fal_webhook.startswith(("http://", "https://")):
            found = {"loc": ["query", "fal_webhook"], "msg": "not an http or https URL", "type": "url_scheme"}
            return answers.invalid([{**found, "input": fal_webhook}])
        desk = desk_of(request)
        job = await desk.submit(await make_job(request, endpoint, webhook=fal_webhook))
        return answers.Answer(job.status(queue_urls(request, job), None), headers={"x-fal-request-id": job.id})

    for call in (run, stream, submit):
        call.__annotations__["body"] = body
    post = partial(router.post, tags=[endpoint.name])
    output, status, calls = schema.Output, schema.QueueStatus, schema.CALLS
    streamed = {**calls, **schema.EVENTS}
    post(f"/{endpoint.name}", operation_id=f"run{name}", response_model=output, responses=calls)(run)
    post(f"/{endpoint.name}/stream", operation_id=f"stream{name}", response_class=Response, responses=streamed)(stream)
    post(f"/queue/{endpoint.name}", operation_id=f"submit{name}", response_model=status, responses=calls)(submit)


async def _ended_or_gone(request: Request, desk: Desk, job: Job) -> None:
    """Wait for a job's end; cancel it when the caller hangs up first."""
    gone = asyncio.create_task(_hang_up(request))
    try:
        while not job.done:
            change = asyncio.create_task(job.changed.wait())
            await asyncio.wait((change, gone), return_when=asyncio.FIRST_COMPLETED)
            change.cancel()
            if gone.done() and not job.done:
                await desk.cancel(job)
                return await _end(job)
    finally:
        gone.cancel()


async def _end(job: Job) -> None:
    async for _ in events.changes(job):
        pass


async def _hang_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _until_gone(desk: Desk, job: Job, base: str) -> AsyncIterator[str]:
    """A job's steps; when the caller hangs up, the job is cancelled."""
    try:
        async for step in events.steps(job, base):
            yield step
    finally:
        if not job.done:
            await asyncio.shield(desk.cancel(job))
