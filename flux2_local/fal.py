"""fal's Python client, answered on this machine: ``import flux2_local.fal as fal_client``.

The functions of ``fal_client`` that a script for flux-2 uses, with the same names, arguments and answers, served in this
process by pipelines that are loaded on first use, one per endpoint. Pictures are written to a folder
(:func:`configure`), and their URLs are ``file://`` URLs; with ``sync_mode`` they are data URIs and nothing is written.
Uploads go nowhere: they become data URIs.
"""

from __future__ import annotations

import asyncio
import base64
import inspect
import io
import mimetypes
import queue
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from .endpoints import Pipelines, find_endpoint, make_call, make_log
from .errors import Cancelled, Flux2Error, RequestError
from .files import check_folder
from .request import Request, Variant
from .server.failures import make_failure

if TYPE_CHECKING:
    from PIL import Image

    from .progress import Progress

__all__ = [
    "AsyncRequestHandle",
    "Completed",
    "FalClientError",
    "FalClientHTTPError",
    "InProgress",
    "Queued",
    "Status",
    "SyncRequestHandle",
    "cancel",
    "cancel_async",
    "configure",
    "encode",
    "encode_file",
    "encode_image",
    "result",
    "result_async",
    "run",
    "run_async",
    "status",
    "status_async",
    "stream",
    "stream_async",
    "submit",
    "submit_async",
    "subscribe",
    "subscribe_async",
    "upload",
    "upload_async",
    "upload_file",
    "upload_file_async",
    "upload_image",
    "upload_image_async",
]

P = ParamSpec("P")
T = TypeVar("T")

KEPT = 1000
"""Requests that have ended and are still found by their ids; those before them only by their handles."""


class FalClientError(Flux2Error):
    """Base of what ``fal_client`` raises."""


class FalClientHTTPError(FalClientError):
    """A request that is wrong or failed; the cause says why.

    Attributes:
        message, status_code, error_type: what the server answers in its place; nothing was sent, so there is no ``response``.
    """

    def __init__(self, error: Exception) -> None:
        told = make_failure(error)
        super().__init__(told["message"])
        self.message, self.status_code, self.error_type = told["message"], told["status"], told["error_type"]
        self.response_headers: dict[str, str] = {}


class Refused(FalClientHTTPError, RequestError):
    """A request that is wrong."""

    def __init__(self, error: RequestError) -> None:
        super().__init__(error)
        self.details = error.details


class Stopped(FalClientHTTPError, Cancelled):
    """A request that was cancelled."""


def failure_of(error: Exception) -> FalClientHTTPError:
    """An error as the client raises it; still a RequestError or Cancelled where it is one."""
    if isinstance(error, RequestError):
        return Refused(error)
    return Stopped(error) if isinstance(error, Cancelled) else FalClientHTTPError(error)


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
    error_type: str | None = None


@dataclass(eq=False)
class Job:
    """One request and everything that is known of it."""

    variant: Variant
    request: Request
    notes: list[str]
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    state: str = "IN_QUEUE"
    logs: list[dict[str, Any]] = field(default_factory=list)
    answer: dict[str, Any] | None = None
    failure: FalClientHTTPError | None = None
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

    def begin(self) -> bool:
        """Start, unless it was cancelled while it waited."""
        with self.changed:
            if not self.cancelled:
                self.move("IN_PROGRESS")
            return not self.cancelled

    def fail(self, error: Exception) -> None:
        """End without an answer."""
        self.failure = failure_of(error)
        self.failure.__cause__ = error
        self.move("COMPLETED")

    def cancel(self) -> None:
        """Stop: at once while it waits, within one step while it runs."""
        with self.changed:
            self.cancelled = True
            if self.state == "IN_QUEUE":
                self.fail(Cancelled("Cancelled before it ran."))

    def status(self, with_logs: bool) -> Status:
        """Where it is now."""
        if self.state == "IN_QUEUE":
            return Queued(_worker.position(self))
        logs = list(self.logs) if with_logs else None
        if self.state == "IN_PROGRESS":
            return InProgress(logs)
        failure, metrics = self.failure, {"inference_time": self.seconds}
        if failure is None:
            return Completed(logs, metrics)
        return Completed(logs, metrics, failure.message, failure.error_type)

    def result(self) -> dict[str, Any]:
        """The answer of a job that has ended; with ``sync_mode`` it is not kept.

        Raises:
            FalClientError: it failed, or its answer has been given.
        """
        if self.failure is not None:
            raise self.failure
        answer = self.answer
        if answer is None:
            raise FalClientError(
                f"The answer of {self.id} has been given; with sync_mode it is not kept. Submit it again."
            )
        if self.request.sync_mode:
            self.answer = None
        return answer


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
            ended = [j.id for j in self.jobs.values() if j.state == "COMPLETED"]
            for old in ended[: max(0, len(ended) - KEPT)]:
                del self.jobs[old]
            self.jobs[job.id] = job
            self.waiting.put(job)
            if self.thread is None:
                self.thread = threading.Thread(target=self.loop, name="flux2-local", daemon=True)
                self.thread.start()

    def position(self, job: Job) -> int:
        waiting = [j for j in list(self.waiting.queue) if not j.cancelled]
        return waiting.index(job) if job in waiting else 0

    def loop(self) -> None:
        while True:
            job = self.waiting.get()
            if not job.begin():
                continue
            try:
                job.answer = self.work(job)
                job.move("COMPLETED")
            except Exception as error:
                job.fail(error)

    def work(self, job: Job) -> dict[str, Any]:
        request, (width, height) = job.request, job.request.size
        if not request.sync_mode:
            check_folder(self.folder, request.num_images * width * height * 3 + 2**20, "configure(folder=…)")
        for note in job.notes:
            job.log(note)
        flux = self.pipelines.get(job.variant, request.acceleration, job.log)
        start = time.perf_counter()

        def on_progress(report: Progress) -> None:
            if report.stage == "denoise" and report.step:
                job.log(f"step {report.step}/{report.total}")

        result = flux.generate(request, progress=on_progress, cancel=lambda: job.cancelled)
        job.seconds = time.perf_counter() - start
        return (result if request.sync_mode else result.kept(self.folder)).to_dict()


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
        FalClientHTTPError: no such endpoint, or wrong arguments; a RequestError too.
    """
    try:
        endpoint = find_endpoint(application)
        return Job(endpoint.variant, *make_call(endpoint, arguments))
    except RequestError as error:
        raise failure_of(error) from error


def find_job(request_id: str) -> Job:
    """A job that was submitted before.

    Raises:
        FalClientError: there is none of that id.
    """
    job = _worker.jobs.get(request_id)
    if job is None:
        raise FalClientError(f"There is no request {request_id} in this process, or not any more.")
    return job


@contextmanager
def cancelling(job: Job) -> Iterator[None]:
    """Cancel ``job`` when waiting for it is interrupted."""
    try:
        yield
    except BaseException:
        job.cancel()
        raise


@dataclass(frozen=True)
class SyncRequestHandle:
    """A submitted request."""

    request_id: str
    _job: Job = field(repr=False)

    def status(self, *, with_logs: bool = False) -> Status:
        """Where the request is now."""
        return self._job.status(with_logs)

    def iter_events(self, *, with_logs: bool = False, interval: float = 0.1) -> Iterator[Status]:
        """Every state until the request has ended, at least one per ``interval`` seconds while something changes."""
        job, before = self._job, None
        while True:
            now = (job.state, len(job.logs))
            if now != before:
                before = now
                state = job.status(with_logs)
                yield state
                if isinstance(state, Completed):
                    return
            with job.changed:
                if (job.state, len(job.logs)) == now:
                    job.changed.wait(interval)

    def get(self, *, interval: float = 0.1) -> dict[str, Any]:
        """Wait for the answer.

        Raises:
            FalClientHTTPError: the generation failed.
        """
        for _ in self.iter_events(interval=interval):
            pass
        return self._job.result()

    def cancel(self) -> None:
        """Stop the request: at once while it waits, within one step while it runs."""
        self._job.cancel()


@dataclass(frozen=True)
class AsyncRequestHandle:
    """A submitted request, for asyncio."""

    request_id: str
    _job: Job = field(repr=False)

    async def status(self, *, with_logs: bool = False) -> Status:
        """Where the request is now."""
        return self._job.status(with_logs)

    async def iter_events(self, *, with_logs: bool = False, interval: float = 0.1) -> AsyncIterator[Status]:
        """The state every ``interval`` seconds until the request has ended."""
        while True:
            state = self._job.status(with_logs)
            yield state
            if isinstance(state, Completed):
                return
            await asyncio.sleep(interval)

    async def get(self, *, interval: float = 0.1) -> dict[str, Any]:
        """As :meth:`SyncRequestHandle.get`."""
        async for _ in self.iter_events(interval=interval):
            pass
        return self._job.result()

    async def cancel(self) -> None:
        """As :meth:`SyncRequestHandle.cancel`."""
        self._job.cancel()


def submit(application: str, arguments: dict[str, Any], **_: Any) -> SyncRequestHandle:
    """Queue a request and return at once. Other keyword arguments of ``fal_client.submit`` have no meaning here.

    Raises:
        FalClientHTTPError: no such endpoint, or wrong arguments.
    """
    job = make_job(application, arguments)
    _worker.put(job)
    return SyncRequestHandle(job.id, job)


def run(application: str, arguments: dict[str, Any], **_: Any) -> dict[str, Any]:
    """Run a request and wait for its answer; interrupted, it is cancelled."""
    return subscribe(application, arguments)


def subscribe(
    application: str,
    arguments: dict[str, Any],
    *,
    with_logs: bool = False,
    on_enqueue: Callable[[str], Any] | None = None,
    on_queue_update: Callable[[Status], Any] | None = None,
    **_: Any,
) -> dict[str, Any]:
    """Run a request, telling ``on_queue_update`` every change of its state, and wait for its answer.

    A KeyboardInterrupt while waiting cancels the request.
    """
    handle = submit(application, arguments)
    with cancelling(handle._job):
        if on_enqueue is not None:
            on_enqueue(handle.request_id)
        for state in handle.iter_events(with_logs=with_logs):
            if on_queue_update is not None:
                on_queue_update(state)
        return handle.get()


def logs_after(state: Status, seen: int) -> list[dict[str, Any]]:
    """What a state logs beyond the first ``seen``, as :func:`stream` gives it."""
    return [{"log": log} for log in (getattr(state, "logs", None) or [])[seen:]]


def stream(application: str, arguments: dict[str, Any], **_: Any) -> Iterator[dict[str, Any]]:
    """Progress as dicts with ``step`` logs, then the answer; left early, the request is cancelled."""
    handle, seen = submit(application, arguments), 0
    with cancelling(handle._job):
        for state in handle.iter_events(with_logs=True):
            new = logs_after(state, seen)
            yield from new
            seen += len(new)
        yield handle.get()


def status(application: str, request_id: str, *, with_logs: bool = False) -> Status:
    """State of a submitted request."""
    return find_job(request_id).status(with_logs)


def result(application: str, request_id: str) -> dict[str, Any]:
    """Answer of a submitted request; waits for it."""
    return SyncRequestHandle(request_id, find_job(request_id)).get()


def cancel(application: str, request_id: str) -> None:
    """Stop a submitted request."""
    find_job(request_id).cancel()


async def submit_async(application: str, arguments: dict[str, Any], **_: Any) -> AsyncRequestHandle:
    """:func:`submit` for asyncio."""
    handle = submit(application, arguments)
    return AsyncRequestHandle(handle.request_id, handle._job)


async def run_async(application: str, arguments: dict[str, Any], **_: Any) -> dict[str, Any]:
    """:func:`run` for asyncio."""
    return await subscribe_async(application, arguments)


async def subscribe_async(
    application: str,
    arguments: dict[str, Any],
    *,
    with_logs: bool = False,
    on_enqueue: Callable[[str], Any] | None = None,
    on_queue_update: Callable[[Status], Any] | None = None,
    **_: Any,
) -> dict[str, Any]:
    """:func:`subscribe` for asyncio; what a callback returns is awaited where it can be."""
    handle = await submit_async(application, arguments)
    with cancelling(handle._job):
        if on_enqueue is not None and inspect.isawaitable(told := on_enqueue(handle.request_id)):
            await told
        async for state in handle.iter_events(with_logs=with_logs):
            if on_queue_update is not None and inspect.isawaitable(told := on_queue_update(state)):
                await told
        return await handle.get()


async def stream_async(application: str, arguments: dict[str, Any], **_: Any) -> AsyncIterator[dict[str, Any]]:
    """:func:`stream` for asyncio."""
    handle, seen = await submit_async(application, arguments), 0
    with cancelling(handle._job):
        async for state in handle.iter_events(with_logs=True):
            new = logs_after(state, seen)
            for log in new:
                yield log
            seen += len(new)
        yield await handle.get()


def encode(data: str | bytes, content_type: str, *_: Any, **__: Any) -> str:
    """A data URI of ``data``."""
    data = data.encode("utf-8") if isinstance(data, str) else data
    return f"data:{content_type};base64,{base64.b64encode(data).decode('ascii')}"


def encode_file(path: str | Path, **_: Any) -> str:
    """A data URI of a file."""
    return encode(Path(path).read_bytes(), mimetypes.guess_type(path)[0] or "application/octet-stream")


def encode_image(image: Image.Image, format: str = "jpeg", **_: Any) -> str:  # noqa: A002
    """A data URI of a PIL image."""
    buffer = io.BytesIO()
    image.save(buffer, format=format)
    return encode(buffer.getvalue(), f"image/{format}")


def for_asyncio(function: Callable[P, T]) -> Callable[P, Coroutine[Any, Any, T]]:
    """``function``, which is done at once, as asyncio calls it."""

    @wraps(function)
    async def call(*arguments: P.args, **options: P.kwargs) -> T:
        return function(*arguments, **options)

    return call


upload, upload_file, upload_image = encode, encode_file, encode_image  # to nowhere: `image_urls` takes data URIs
upload_async, upload_file_async = for_asyncio(upload), for_asyncio(upload_file)
upload_image_async = for_asyncio(upload_image)
status_async, cancel_async = for_asyncio(status), for_asyncio(cancel)


async def result_async(application: str, request_id: str) -> dict[str, Any]:
    """:func:`result` for asyncio."""
    return await AsyncRequestHandle(request_id, find_job(request_id)).get()
