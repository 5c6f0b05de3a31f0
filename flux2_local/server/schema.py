"""The API's schema, made from the library's own request and result: bodies, answers and OpenAPI documents."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from typing import Any

from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ConfigDict, Field, create_model
from starlette.routing import BaseRoute

from ..endpoints import Endpoint
from ..request import MAX_REFERENCES, STANDARD_ONLY, Request
from ..result import ImageFile, Result, Timings
from ..version import __version__

LENIENT = ConfigDict(extra="ignore")
EXAMPLE = (
    "A cinematic portrait of a weathered sailor with white beard, golden hour lighting, dramatic shadows on face, shallow "
    "depth of field, photorealistic"
)
MAX_PROMPT = 20_000
"""Characters; far more than any text encoder reads."""


@cache
def input_model(endpoint: Endpoint) -> type[BaseModel]:
    """The body that an endpoint takes."""
    words = descriptions(Request)
    more: dict[str, Any] = {"examples": [EXAMPLE], "min_length": 1, "max_length": MAX_PROMPT}
    fields: dict[str, Any] = {"prompt": (str, Field(description=words["prompt"], **more))}
    if endpoint.edits:
        text = "The pictures to change or combine: http(s) URLs or data URIs."
        fields["image_urls"] = (list[str], Field(description=text, min_length=1, max_length=MAX_REFERENCES))
    for name, info in Request.model_fields.items():
        if name in ("prompt", "images") or (name in STANDARD_ONLY and endpoint.variant != "standard"):
            continue
        info = copy.copy(info)
        info.description = words[name]
        fields[name] = (info.annotation, info)
    return create_model(f"{name_of(endpoint)}Input", __config__=LENIENT, **fields)


def name_of(endpoint: Endpoint) -> str:
    """A class name for an endpoint."""
    return endpoint.title.replace(" ", "")


def descriptions(owner: type) -> dict[str, str]:
    """What the docstring of a class says about each attribute."""
    found: dict[str, str] = {}
    current = ""
    text = (owner.__doc__ or "").partition("Attributes:")[2]
    for line in text.splitlines():
        name, colon, rest = line.strip().partition(": ")
        if (
            colon
            and line.startswith(" " * 8)
            and not line.startswith(" " * 9)
            and name.replace(", ", "").isidentifier()
        ):
            for current in name.split(", "):
                found[current] = rest
        elif line.strip() and current:
            found[current] += f" {line.strip()}"
    return {k: v[0].upper() + v[1:] for k, v in found.items()}


class Image(BaseModel):
    """A picture that was made."""

    url: str = Field(
        description=descriptions(ImageFile).get("url", "Where the picture is, or the picture as a data URI.")
    )
    content_type: str
    file_name: str
    file_size: int = Field(description="Bytes.")
    width: int
    height: int


SECONDS: dict[str, Any] = dict.fromkeys(Timings().to_dict(), (float, ...))
TimingsOut = create_model("Timings", __doc__=Timings.__doc__, **SECONDS)


class Output(BaseModel):
    """What an endpoint answers."""

    images: list[Image] = Field(description=descriptions(Result)["images"])
    timings: TimingsOut  # type: ignore[valid-type]
    seed: int = Field(description=descriptions(Result)["seed"])
    has_nsfw_concepts: list[bool] = Field(description=descriptions(Result)["has_nsfw_concepts"])
    prompt: str = Field(description=descriptions(Result)["prompt"])


class Log(BaseModel):
    """One line of a request's log."""

    message: str
    level: str
    source: str
    timestamp: str


class QueueStatus(BaseModel):
    """Where a request is."""

    status: str = Field(json_schema_extra={"enum": ["IN_QUEUE", "IN_PROGRESS", "COMPLETED"]})
    request_id: str = Field(description="The request id.")
    response_url: str
    status_url: str
    cancel_url: str
    logs: list[Log] | None = Field(description="Null where they were not asked for.")
    metrics: dict[str, float]
    queue_position: int | None = Field(None, description="Requests before this one, while it waits.")
    error: str | None = Field(None, description="What went wrong, when it has ended.")
    error_type: str | None = None


class CancelStatus(BaseModel):
    """What a cancellation came to."""

    status: str = Field(json_schema_extra={"enum": ["CANCELLATION_REQUESTED", "ALREADY_COMPLETED", "NOT_FOUND"]})


class Detail(BaseModel):
    """What is wrong with one field."""

    loc: list[str | int]
    msg: str
    type: str
    ctx: dict[str, Any] | None = None
    input: Any = None
    url: str | None = None


class Invalid(BaseModel):
    """A body that cannot be served."""

    detail: list[Detail]


class Problem(BaseModel):
    """Any other error."""

    detail: Any
    error_type: str


PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "Not possible in this state, or not readable"},
    401: {"model": Problem, "description": "No key, or a wrong one"},
    403: {"model": Problem, "description": "A page or host that may not call"},
    404: {"model": Problem, "description": "No such request or endpoint"},
    413: {"model": Problem, "description": "Too large"},
}
CALLS: dict[int | str, dict[str, Any]] = {
    **PROBLEMS,
    422: {"model": Invalid, "description": "A field is missing or wrong"},
    429: {"model": Problem, "description": "The queue is full"},
    499: {"model": Problem, "description": "Cancelled"},
    500: {"model": Problem, "description": "The model, the memory or the disk fails"},
    504: {"model": Problem, "description": "Not begun within the time that the caller gave"},
}


EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"description": "Server-sent events", "content": {"text/event-stream": {"schema": {"type": "string"}}}}
}


def document(routes: Sequence[BaseRoute], endpoint: Endpoint | None) -> dict[str, Any]:
    """The OpenAPI document of one endpoint's routes in fal's queue form, or of all routes.

    In the queue form, paths are those below ``/queue``, which is what the server is given as.
    """
    title = "flux2-local" if endpoint is None else endpoint.title
    made = get_openapi(title=title, version=__version__, routes=routes, openapi_version="3.1.0")
    if endpoint is None:
        return made
    paths = {p.removeprefix("/queue"): item for p, item in made["paths"].items() if p.startswith("/queue/")}
    facts = {"endpointId": endpoint.name, "category": "image-to-image" if endpoint.edits else "text-to-image"}
    made["info"]["x-fal-metadata"] = facts
    return {**made, "paths": paths, "servers": [{"url": "/queue"}]}


def properties(endpoint: Endpoint) -> dict[str, Any]:
    """JSON schema of an endpoint's body, for the page's form."""
    return input_model(endpoint).model_json_schema()
