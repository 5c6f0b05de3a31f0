"""Server-sent events of a job: its states for the queue, its steps and pictures for a caller on the line."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import StreamingResponse

from .answers import finite, output
from .jobs import Job

KEEP_ALIVE_SECONDS = 10.0
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


def event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(finite(data))}\n\n"


def response(events: AsyncIterator[str], job: Job) -> StreamingResponse:
    """Events as an answer."""
    headers = {**HEADERS, "x-fal-request-id": job.id}
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)


async def changes(job: Job) -> AsyncIterator[bool]:
    """True for every change of a job up to its end, the current state first; False now and then when nothing happens."""
    while True:
        changed = job.changed
        yield True
        if job.done:
            return
        while not changed.is_set():
            try:
                await asyncio.wait_for(changed.wait(), KEEP_ALIVE_SECONDS)
            except TimeoutError:
                yield False


async def states(job: Job, urls: dict[str, str], logs: bool) -> AsyncIterator[str]:
    """Every state until the end; logs are those since the last event."""
    seen, before = 0, None
    async for changed in changes(job):
        now = (job.state, job.position, len(job.logs) if logs else 0)
        if changed and now != before:
            before, new, seen = now, job.logs[seen:], len(job.logs)
            yield event(job.status(urls, new if logs else None))
        elif not changed:
            yield ": waiting\n\n"


async def steps(job: Job, base: str) -> AsyncIterator[str]:
    """Progress with previews, then the output or the failure."""
    seen = 0
    async for changed in changes(job):
        if not changed:
            yield ": working\n\n"
        elif job.failure is not None:
            yield event({"request_id": job.id, **job.failure})
        elif job.done:
            yield event(output(job, base))
        else:
            yield event(_step(job, seen))
        seen = len(job.logs)


def _step(job: Job, seen: int) -> dict[str, Any]:
    p = job.progress
    facts: dict[str, Any] = {"request_id": job.id, "status": job.state, "logs": job.logs[seen:]}
    if job.state == "IN_QUEUE":
        return {**facts, "queue_position": job.position}
    facts |= {name: p[name] for name in ("stage", "step", "total", "note") if name in p}
    if job.preview:
        url = f"data:image/jpeg;base64,{base64.b64encode(job.preview).decode('ascii')}"
        width, height = p["size"]
        facts["images"] = [{"url": url, "content_type": "image/jpeg", "width": width, "height": height}]
    return facts
