"""fal's file storage as far as its clients use it: pictures sent ahead of the request that names them.

The JavaScript client asks where to send a file and puts it there; the Python client sends it with a token, and falls back to
the other way. Clients cut files above 90 MB in parts, which is more than a reference picture may have here.
"""

from __future__ import annotations

import asyncio
import json
import math
import secrets
import time
from collections import OrderedDict
from datetime import UTC, datetime
from pathlib import PurePath
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ..errors import OutputError, RequestError
from ..images import CONTENT_TYPES, FORMATS, SUFFIXES
from . import schema
from .addresses import file_base
from .answers import Answer
from .calls import desk_of
from .references import FETCH, form_of

TICKET_SECONDS = 3600.0
MAX_TICKETS = 1000
"""Announced uploads that are waited for at once; the oldest is given up for a new one."""

LIFECYCLE = "x-fal-object-lifecycle"

router = APIRouter(tags=["storage"])


class Announcement(BaseModel):
    """A file that is to be uploaded."""

    content_type: str = Field(max_length=200)
    file_name: str = Field("", max_length=1000)


class Places(BaseModel):
    """Where to put a file, and where it will be."""

    upload_url: str
    file_url: str


class Token(BaseModel):
    """What to present with an upload; here it is the caller's own key."""

    token: str
    token_type: str
    base_url: str
    expires_at: str


class Access(BaseModel):
    """Where an uploaded file is."""

    access_url: str


class Tickets:
    """Announced uploads: an address that nobody can guess -> the picture's name and the time it is kept until."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, tuple[str, float, float]] = OrderedDict()

    def give(self, name: str, expires: float) -> str:
        ticket = secrets.token_urlsafe(24)
        self._open[ticket] = name, expires, time.monotonic()
        while len(self._open) > MAX_TICKETS:
            self._open.popitem(last=False)
        return ticket

    def take(self, ticket: str) -> tuple[str, float]:
        """
        Raises:
            KeyError: there is none, it was used, or its hour is over.
        """
        name, expires, given = self._open.pop(ticket)
        if time.monotonic() - given > TICKET_SECONDS:
            raise KeyError(ticket)
        return name, expires


ANSWERS: dict[int | str, dict[str, Any]] = {
    **schema.PROBLEMS,
    422: {"model": schema.Invalid, "description": "Not a PNG, JPEG or WebP picture"},
    500: {"model": schema.Problem, "description": "The disk fails"},
}
BODY = {"requestBody": {"required": True, "content": {"image/*": {"schema": {"type": "string", "format": "binary"}}}}}


@router.post("/storage/upload/initiate", operation_id="initiateUpload", response_model=Places, responses=ANSWERS)
async def initiate(request: Request, body: Announcement) -> Response:
    """Announce a picture; it is then put to the address in the answer."""
    name = new_name(body.content_type, body.file_name)
    ticket = request.app.state.tickets.give(name, expiry(request))
    put = f"{str(request.base_url).rstrip('/')}/storage/upload/{ticket}"
    return Answer({"upload_url": put, "file_url": f"{file_base(request)}/files/{name}"})


@router.put(
    "/storage/upload/{ticket}", operation_id="upload", response_model=Access, responses=ANSWERS, openapi_extra=BODY
)
async def put(request: Request, ticket: str) -> Response:
    """Send an announced picture. The address is the permission."""
    try:
        name, expires = request.app.state.tickets.take(ticket)
    except KeyError:
        raise HTTPException(400, "No upload was announced for this address, or it was used or is too old.") from None
    return await receive(request, name, expires)


@router.post("/storage/auth/token", operation_id="uploadToken", response_model=Token, responses=schema.PROBLEMS)
async def token(request: Request) -> Response:
    """What the Python client presents when it uploads."""
    kind, _, key = request.headers.get("authorization", "").partition(" ")
    base = str(request.base_url).rstrip("/")
    facts = {"token": key or "any", "token_type": kind or "Key", "base_url": base}
    return Answer({**facts, "expires_at": datetime.fromtimestamp(time.time() + TICKET_SECONDS, UTC).isoformat()})


@router.post("/files/upload", operation_id="uploadAtOnce", response_model=Access, responses=ANSWERS, openapi_extra=BODY)
async def upload(request: Request) -> Response:
    """Send a picture."""
    name = new_name(request.headers.get("content-type", ""), request.headers.get("x-fal-file-name", ""))
    return await receive(request, name, expiry(request))


@router.post("/files/upload/multipart", include_in_schema=False)
@router.post("/storage/upload/initiate-multipart", include_in_schema=False)
async def multipart() -> Response:
    """What clients ask for when a file is larger than a picture may be."""
    raise too_large()


async def receive(request: Request, name: str, expires: float) -> Response:
    """Check and keep the picture in a call's body.

    Raises:
        RequestError: not a picture that an edit could use.
        OutputError: it cannot be written.
    """
    desk, data = desk_of(request), await request.body()
    if len(data) > FETCH.size:
        raise too_large()
    await asyncio.to_thread(form_of, data)
    await asyncio.to_thread(desk.pictures.write, name, data)
    try:
        await desk.store.add_upload(name, expires)
    except OutputError:
        desk.pictures.remove([name])
        raise
    return Answer({"access_url": f"{file_base(request)}/files/{name}"})


def new_name(content_type: str, file_name: str) -> str:
    """A name for a picture by what its sender says of it.

    Raises:
        RequestError: it is said to be something else.
    """
    kinds = {kind: form for form, kind in CONTENT_TYPES.items()}
    form = kinds.get(content_type.partition(";")[0].strip().lower())
    form = form or FORMATS.get(PurePath(file_name).suffix.lower())
    if form is None:
        raise RequestError(f"Files of type {content_type[:100]!r} are not taken; upload PNG, JPEG or WebP pictures.")
    return f"{secrets.token_urlsafe(24)}{SUFFIXES[form]}"


def expiry(request: Request) -> float:
    """When an upload is removed: after --keep, or sooner if the caller's lifecycle header says so; seconds since 1970.

    Raises:
        HTTPException: 400, the header cannot be read.
    """
    keep = desk_of(request).settings.keep
    try:
        wanted = json.loads(request.headers.get(LIFECYCLE, "{}")).get("expiration_duration_seconds")
        own = math.inf if wanted is None else float(wanted)
    except (ValueError, TypeError, AttributeError):
        raise HTTPException(400, f"{LIFECYCLE} is not a lifecycle as fal's clients send it.") from None
    return time.time() + min(math.inf if keep is None else keep, own)


def too_large() -> HTTPException:
    return HTTPException(413, f"The file is larger than {FETCH.size // 2**20} MiB.")
