"""The queue's calls about one request: status, status stream, result, cancel."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..endpoints import Endpoint
from . import answers, events, schema
from .addresses import file_base, queue_urls
from .calls import desk_of
from .jobs import Job

UNKNOWN = "There is no request {} here, or not any more."


def add_requests(router: APIRouter, endpoint: Endpoint) -> None:
    """Register the calls below an endpoint; fal's clients leave a sub-path such as /turbo out of them."""
    root = f"/queue/{endpoint.name}/requests/{{request_id}}"
    name = schema.name_of(endpoint)
    common: dict[str, Any] = {"tags": [endpoint.name]}
    found: dict[int | str, Any] = {**schema.PROBLEMS, 202: {"model": schema.QueueStatus, "description": "Not done yet"}}
    stopped: dict[int | str, Any] = {n: {"model": schema.CancelStatus} for n in (202, 400, 404)}
    router.get(
        f"{root}/status", operation_id=f"status{name}", response_model=schema.QueueStatus, responses=found, **common
    )(status)
    router.get(
        f"{root}/status/stream", operation_id=f"statusStream{name}", response_class=Response,
        responses={**schema.PROBLEMS, **schema.EVENTS}, **common,
    )(status_stream)  # fmt: skip
    router.get(root, operation_id=f"result{name}", response_model=schema.Output, responses=schema.CALLS, **common)(
        result
    )
    router.get(f"{root}/response", include_in_schema=False)(result)
    router.put(
        f"{root}/cancel", operation_id=f"cancel{name}", response_model=schema.CancelStatus,
        responses={**schema.PROBLEMS, **stopped}, status_code=202, **common,
    )(cancel)  # fmt: skip


async def _find(request: Request, request_id: str) -> Job | Response:
    """A job that the queue's calls may speak of, or the answer that there is none."""
    job = await desk_of(request).find(request_id)
    return job or answers.problem(404, "not_found", UNKNOWN.format(request_id[:64]))


async def status(request: Request, request_id: str, logs: bool = False) -> Response:
    """Where a request is; 202 until it has ended."""
    job = await _find(request, request_id)
    if isinstance(job, Response):
        return job
    facts = job.status(queue_urls(request, job), job.logs if logs else None)
    return answers.Answer(facts, 200 if job.done else 202, {"x-fal-request-id": job.id})


async def status_stream(request: Request, request_id: str, logs: bool = False) -> Response:
    """Every change of a request's state as server-sent events."""
    job = await _find(request, request_id)
    if isinstance(job, Response):
        return job
    return events.response(events.states(job, queue_urls(request, job), logs), job)


async def result(request: Request, request_id: str) -> Response:
    """The output of a request that has ended."""
    job = await _find(request, request_id)
    if isinstance(job, Response):
        return job
    if not job.done:
        return answers.problem(400, "not_completed", "Request is still in progress", {"x-fal-request-id": job.id})
    answer = answers.result(job, file_base(request))
    await desk_of(request).fetched(job)
    return answer


async def cancel(request: Request, request_id: str) -> Response:
    """Stop a request: at once while it waits, within one step while it runs."""
    desk = desk_of(request)
    job = await desk.find(request_id)
    if job is None:
        return answers.Answer({"status": "NOT_FOUND"}, 404)
    if job.done:
        return answers.Answer({"status": "ALREADY_COMPLETED"}, 400)
    await desk.cancel(job)
    return answers.Answer({"status": "CANCELLATION_REQUESTED"}, 202)
