"""One request and everything that is known of it."""

from __future__ import annotations

import asyncio
import time
import uuid
from dataclasses import dataclass, field
from typing import Any, Literal

from ..endpoints import make_log
from ..errors import Cancelled
from .failures import make_failure

State = Literal["IN_QUEUE", "IN_PROGRESS", "COMPLETED"]
Priority = Literal["normal", "low"]

KEPT = (
    "id", "endpoint", "variant", "arguments", "fields", "images", "attached", "webhook", "hook", "base", "state", "logs",
    "answer", "failure", "attempts", "priority", "start_by", "created", "started", "ended",
)  # fmt: skip
"""Attributes that a job's row holds."""


@dataclass(eq=False)
class Job:
    """A request on its way through the queue.

    Attributes:
        id, endpoint, variant: which request, where.
        arguments: what the caller sent, validated; references by the names of their files.
        fields: of the library's request, with a seed.
        images: file names of the reference pictures.
        attached: whether a caller waits on the line; when it goes, so does the job.
        previews: whether steps come with pictures.
        webhook: where to report the end, or None; ``hook`` is "pending", "sent" or "failed".
        base: address of the server as the caller knows it, for URLs in the webhook.
        answer: the output; pictures are named by file.
        failure: what went wrong, as :func:`.failures.make_failure` puts it.
        attempts: how often it was begun.
        priority: "low" waits behind every "normal".
        start_by: when it must have begun, in seconds since 1970, or None.
        progress: the last report, with ``preview`` (JPEG bytes) where there is one.
    """

    endpoint: str
    variant: str
    arguments: dict[str, Any]
    fields: dict[str, Any]
    images: list[str] = field(default_factory=list)
    attached: bool = False
    previews: bool = False
    cancelling: bool = False
    webhook: str | None = None
    hook: str | None = None
    base: str = ""
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    state: State = "IN_QUEUE"
    logs: list[dict[str, Any]] = field(default_factory=list)
    answer: dict[str, Any] | None = None
    failure: dict[str, Any] | None = None
    attempts: int = 0
    priority: Priority = "normal"
    start_by: float | None = None
    created: float = field(default_factory=time.time)
    started: float | None = None
    ended: float | None = None
    position: int = 0
    progress: dict[str, Any] = field(default_factory=dict)
    preview: bytes = b""
    changed: asyncio.Event = field(default_factory=asyncio.Event, repr=False)

    @property
    def sync(self) -> bool:
        """Whether nothing of the output may be kept."""
        return bool(self.fields.get("sync_mode"))

    @property
    def done(self) -> bool:
        return self.state == "COMPLETED"

    @property
    def files(self) -> list[str]:
        """Names of every file that belongs to it."""
        pictures = [image["url"] for image in (self.answer or {}).get("images", [])]
        return [*self.images, *(name for name in pictures if not name.startswith("data:"))]

    def touch(self) -> None:
        """Wake whoever waits for a change."""
        self.changed.set()
        self.changed = asyncio.Event()

    def log(self, message: str) -> None:
        self.logs.append(make_log(message))

    def begin(self) -> None:
        self.state, self.started, self.attempts = "IN_PROGRESS", time.time(), self.attempts + 1
        self.touch()

    def end(self, answer: dict[str, Any] | None = None, failure: dict[str, Any] | None = None) -> None:
        self.state, self.answer, self.failure, self.ended = "COMPLETED", answer, failure, time.time()
        self.preview = b""
        self.touch()

    def end_cancelled(self, why: str) -> None:
        self.end(failure=make_failure(Cancelled(why)))

    def status(self, urls: dict[str, str], logs: list[dict[str, Any]] | None) -> dict[str, Any]:
        """The job's state as fal's queue tells it; ``logs`` is None where they were not asked for."""
        out: dict[str, Any] = {"status": self.state, "request_id": self.id, **urls, "logs": logs, "metrics": {}}
        if self.state == "IN_QUEUE":
            out["queue_position"] = self.position
        if self.answer is not None:
            out["metrics"] = {"inference_time": self.answer["timings"]["inference"]}
        if self.failure is not None:
            out |= {"error": self.failure["message"], "error_type": self.failure["error_type"]}
        return out

    def to_row(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in KEPT}
