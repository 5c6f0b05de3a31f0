"""fal's Python client, answered on this machine: ``import flux2_local.fal as fal_client``.

The calls of ``fal_client`` that a script for flux-2 uses, with the same names, arguments and answers, served in this
process by pipelines that are loaded on first use, one per endpoint. Pictures are written to a folder
(:func:`configure`), and their URLs are ``file://`` URLs; with ``sync_mode`` they are data URIs and nothing is written.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .endpoints import Pipelines, find_endpoint, make_call, make_log
from .errors import Cancelled, Flux2Error

if TYPE_CHECKING:
    from .progress import Progress
    from .request import Variant

__all__ = [
    "Completed",
    "FalClientError",
    "InProgress",
    "Queued",
    "Status",
    "SyncRequestHandle",
    "cancel",
    "configure",
    "result",
    "run",
    "run_async",
    "status",
    "stream",
    "submit",
    "submit_async",
    "subscribe",
    "subscribe_async",
]


class FalClientError(Flux2Error):
    """What ``fal_client`` raises for a request that failed; the cause says why."""


@dataclass(frozen=True)
class Status:
    """Base of the three states."""


@dataclass(frozen=True)
class Queued(Status):
    """Waiting; ``position`` requests are before it."""

    position: int


@dataclass(frozen=True)
class InProgress(Status):
    """Running; ``logs`` are dicts with ``message``, ``level``, ``source`` and ``timestamp``, or None if not asked for."""

    logs: list[dict[str, Any]] | None


@dataclass(frozen=True)
class Completed(Status):
    """Ended. ``metrics`` has ``inference_time`` in seconds; ``error`` says what went wrong, if anything."""

    logs: list[dict[str, Any]] | None
    metrics: dict[str, Any]
    error: str | None = None


OnUpdate = Callable[[Status], Any]


@dataclass
class Job:
    """One request and everything that is known of it."""

    application: str
    variant: Variant
    fields: dict[str, Any]
    notes: list[str]
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    state: str = "IN_QUEUE"
    logs: list[dict[str, Any]] = field(default_factory=list)
    answer: dict[str, Any] | None = None
    error: BaseException | None = None
    seconds: float = 0.0
    cancelled: bool = False
    changed: threading.Condition = field(default_factory=threading.Condition)

    def log(self, message: str) -> None:
        with self.changed:
            self.logs.append(make_log(message))
            self.changed.notify_all()

    def move(self, state: str) -> None:
        with self.changed:
            self.state = state
            self.changed.notify_all()


class Worker:
    """One thread that works the jobs off in order, and the pipelines it has loaded."""

    def __init__(self) -> None:
        self.folder = Path("outputs")
        self.jobs: dict[str, Job] = {}
        self.waiting: queue.Queue[Job] = queue.Queue()
        self.pipelines = Pipelines({})
        self.thread: threading.Thread | None = None
        self.lock = threading.Lock()

    def put(self, job: Job) -> None:
        with self.lock:
            self.jobs[job.id] = job
            self.waiting.put(job)
            if self.thread is None:
                self.thread = threading.Thread(target=self.loop, name="flux2-local", daemon=True)
                self.thread.start()

    def position(self, job: Job) -> int:
        waiting = [j.id for j in list(self.waiting.queue)]
        return waiting.index(job.id) if job.id in waiting else 0

    def loop(self) -> None:
        while True:
            job = self.waiting.get()
            if job.cancelled:
                job.error = Cancelled("Cancelled before it ran.")
            else:
                job.move("IN_PROGRESS")
                try:
                    job.answer = self.work(job)
                except BaseException as error:
                    job.error = error
            job.move("COMPLETED")

    def work(self, job: Job) -> dict[str, Any]:
        for note in job.notes:
            job.log(note)
        flux = self.pipelines.get(job.variant, job.fields.get("acceleration"), job.log)
        start = time.perf_counter()

        def on_progress(report: Progress) -> None:
            if report.stage == "denoise" and report.step:
                job.log(f"step {report.step}/{report.total}")

        result = flux.generate(progress=on_progress, cancel=lambda: job.cancelled, **job.fields)
        job.seconds = time.perf_counter() - start
        if not job.fields.get("sync_mode"):
            result = result.kept(self.folder)
        return result.to_dict()


_worker = Worker()


def configure(folder: str | Path | None = None, **loading: Any) -> None:
    """Where pictures go, and arguments for :meth:`flux2_local.Flux2.load` (``model``, ``vram``, ``device``, …).

    Pipelines loaded so far are let go of.
    """
    if folder is not None:
        _worker.folder = Path(folder)
    _worker.pipelines = Pipelines(loading or _worker.pipelines.loading)


def make_job(application: str, arguments: dict[str, Any]) -> Job:
    """A job for an endpoint. As over HTTP, unknown keys are ignored, and so are the fields that turbo and flash fix.

    Raises:
        RequestError: no such endpoint, or wrong arguments.
    """
    endpoint = find_endpoint(application)
    fields, notes = make_call(endpoint, arguments)
    return Job(application, endpoint.variant, fields, notes)


@dataclass(frozen=True)
class SyncRequestHandle:
    """A submitted request."""

    request_id: str

    def _job(self) -> Job:
        job = _worker.jobs.get(self.request_id)
        if job is None:
            raise FalClientError(f"There is no request {self.request_id} in this process.")
        return job

    def status(self, *, with_logs: bool = False) -> Status:
        """Where the request is now."""
        job = self._job()
        if job.state == "IN_QUEUE":
            return Queued(_worker.position(job))
        logs = list(job.logs) if with_logs else None
        if job.state == "IN_PROGRESS":
            return InProgress(logs)
        return Completed(logs, {"inference_time": job.seconds}, None if job.error is None else str(job.error))

    def iter_events(self, *, with_logs: bool = False, interval: float = 0.1) -> Iterator[Status]:
        """Every state until the request has ended, at least one per ``interval`` seconds while something changes."""
        job, before = self._job(), None
        while True:
            now = (job.state, len(job.logs))
            if now != before:
                before = now
                state = self.status(with_logs=with_logs)
                yield state
                if isinstance(state, Completed):
                    return
            with job.changed:
                if (job.state, len(job.logs)) == now:
                    job.changed.wait(interval)

    def get(self) -> dict[str, Any]:
        """Wait for the answer.

        Raises:
            Flux2Error: what the generation raised.
        """
        for _ in self.iter_events():
            pass
        job = self._job()
        if job.error is not None:
            raise job.error
        assert job.answer is not None
        return job.answer

    def cancel(self) -> None:
        """Stop the request: at once while it waits, within one step while it runs."""
        self._job().cancelled = True


def submit(application: str, arguments: dict[str, Any], **_: Any) -> SyncRequestHandle:
    """Queue a request and return at once. Other keyword arguments of ``fal_client.submit`` have no meaning here.

    Raises:
        RequestError: no such endpoint, or wrong arguments.
    """
    job = make_job(application, arguments)
    _worker.put(job)
    return SyncRequestHandle(job.id)


def run(application: str, arguments: dict[str, Any], **_: Any) -> dict[str, Any]:
    """Run a request and wait for its answer."""
    return submit(application, arguments).get()


def subscribe(
    application: str,
    arguments: dict[str, Any],
    *,
    with_logs: bool = False,
    on_enqueue: Callable[[str], Any] | None = None,
    on_queue_update: OnUpdate | None = None,
    **_: Any,
) -> dict[str, Any]:
    """Run a request, telling ``on_queue_update`` every change of its state, and wait for its answer.

    A KeyboardInterrupt while waiting cancels the request.
    """
    handle = submit(application, arguments)
    if on_enqueue is not None:
        on_enqueue(handle.request_id)
    try:
        for state in handle.iter_events(with_logs=with_logs):
            if on_queue_update is not None:
                on_queue_update(state)
    except BaseException:
        handle.cancel()
        raise
    return handle.get()


def stream(application: str, arguments: dict[str, Any], **_: Any) -> Iterator[dict[str, Any]]:
    """Progress as dicts with ``step`` logs, then the answer."""
    handle = submit(application, arguments)
    seen = 0
    for state in handle.iter_events(with_logs=True):
        logs = getattr(state, "logs", None) or []
        for log in logs[seen:]:
            yield {"log": log}
        seen = len(logs)
    yield handle.get()


def status(application: str, request_id: str, *, with_logs: bool = False) -> Status:
    """State of a submitted request."""
    return SyncRequestHandle(request_id).status(with_logs=with_logs)


def result(application: str, request_id: str) -> dict[str, Any]:
    """Answer of a submitted request; waits for it."""
    return SyncRequestHandle(request_id).get()


def cancel(application: str, request_id: str) -> None:
    """Stop a submitted request."""
    SyncRequestHandle(request_id).cancel()


async def run_async(application: str, arguments: dict[str, Any], **_: Any) -> dict[str, Any]:
    """:func:`run` for asyncio."""
    return await asyncio.to_thread(run, application, arguments)


async def submit_async(application: str, arguments: dict[str, Any], **_: Any) -> SyncRequestHandle:
    """:func:`submit` for asyncio; the handle's own calls block."""
    return await asyncio.to_thread(submit, application, arguments)


async def subscribe_async(application: str, arguments: dict[str, Any], **options: Any) -> dict[str, Any]:
    """:func:`subscribe` for asyncio; callbacks run in another thread."""
    return await asyncio.to_thread(lambda: subscribe(application, arguments, **options))


async def stream_async(application: str, arguments: dict[str, Any], **_: Any) -> AsyncIterator[dict[str, Any]]:
    """:func:`stream` for asyncio."""
    events = stream(application, arguments)
    while (event := await asyncio.to_thread(next, events, None)) is not None:
        yield event
