"""The queue and who works it off: every job's way from submission to its end."""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

from ..errors import Cancelled, OutputError
from ..files import check_room
from .failures import make_failure, told
from .jobs import Job
from .metrics import Metrics
from .pictures import Pictures
from .settings import Settings
from .store import Store
from .worker import Worker, WorkerDied

MAX_ATTEMPTS = 3
"""A request that was running when its worker died so often is given up: it is likely the cause."""

MAX_RECENT = 256
"""Ended jobs that are answered from memory."""

GRACE_SECONDS = 60.0
"""How long the answer of a sync_mode request can be asked for again after it was fetched."""

UNFETCHED_SECONDS = 3600.0
"""How long it is held when nobody fetches it."""

ROOM = 64 * 2**20
"""Bytes that must be free on the disk for a request to be taken: nothing is generated that could not be written."""

HUNG_UP = "The server stopped, and with it the line to the caller."

EXPIRY_SECONDS = 600.0
RESTART_SECONDS = 2.0


class QueueFull(Exception):
    """As many requests wait as may."""


class Desk:
    """Takes jobs in, has the worker do them one by one, and remembers how they ended.

    Args:
        settings: of the server.
        store: where jobs are kept; closed with the desk.
        on_end: called with every job that has ended.
    """

    def __init__(self, settings: Settings, store: Store, on_end: Callable[[Job], Any]) -> None:
        self.settings, self.store, self.on_end = settings, store, on_end
        self.metrics = Metrics()
        self.pictures = Pictures(settings.folder / "files")
        self.worker = Worker(settings)
        self.jobs: dict[str, Job] = {}
        self.recent: OrderedDict[str, Job] = OrderedDict()
        self.waiting: deque[Job] = deque()
        self.current: Job | None = None
        self.arrived = asyncio.Event()
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tasks: list[asyncio.Task[None]] = []

    # ---- life ----

    async def open(self) -> None:
        """Take up what a stopped server left: waiting jobs wait again, a running one runs again."""
        for job in await self.store.unfinished():
            self.jobs[job.id] = job
            if job.attached:
                job.end_cancelled(HUNG_UP)
                await self.settle(job)
            elif job.attempts >= MAX_ATTEMPTS:
                await self._give_up(job)
            else:
                job.state = "IN_QUEUE"
                self._enqueue(job)
        self.pictures.sweep(await self.store.files())
        self._tasks = [asyncio.create_task(self._work()), asyncio.create_task(self._expire())]

    async def close(self) -> None:
        """Stop working; what waits and what runs stays on the disk, unless its caller was on the line."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.worker.stop()
        job = self.current
        if job is not None and not job.done:
            if job.attached:
                job.end_cancelled(HUNG_UP)
                await self.settle(job)
            else:
                job.attempts -= 1  # it was not its fault
                await self.keep(job)
                print(f"Stopped. Request {job.id} is done when it starts again.", flush=True)
        await self.store.close()

    # ---- callers ----

    def check(self, sync: bool) -> None:
        """Make sure that a job can be taken; with ``sync`` its pictures need no room.

        Raises:
            QueueFull: as many wait as may.
            OutputError: its pictures could not be written.
        """
        if len(self.waiting) >= self.settings.queue_limit:
            raise QueueFull(f"{len(self.waiting)} requests wait already; try again when some are done.")
        if not sync:
            check_room(self.settings.folder, ROOM, "--folder")

    async def submit(self, job: Job) -> Job:
        """Put a job at the end of the queue. One that is not taken loses its reference pictures.

        Raises:
            QueueFull: as many wait as may.
            OutputError: it cannot be written down, or its pictures could not be.
        """
        try:
            self.check(job.sync)
            await self.store.add(job)
        except Exception:
            self.pictures.remove(job.images)
            raise
        self._enqueue(job)
        return job

    async def find(self, request_id: str) -> Job | None:
        """A job by its id, running, waiting or ended; None where there is none."""
        known = self.jobs.get(request_id) or self.recent.get(request_id)
        return known or await self.store.load(request_id)

    async def cancel(self, job: Job) -> None:
        """End a job: at once while it waits, within one step while it runs."""
        if job in self.waiting:
            await self._withdraw(job, make_failure(Cancelled("Cancelled before it ran.")))
        elif job is self.current:
            job.cancelling = True
            await self.worker.send({"op": "cancel", "id": job.id})

    async def fetched(self, job: Job) -> None:
        """A job's answer was handed out; of a sync_mode job nothing is kept after that."""
        if job.sync:
            self._forget_later(job, GRACE_SECONDS)
            await self._erase(job)

    async def reported(self, job: Job, hook: str) -> None:
        """A job's webhook was called ("sent") or given up ("failed")."""
        job.hook = hook
        if not job.sync:
            await self.keep(job)
        elif hook == "sent":
            await self._erase(job)

    async def _erase(self, job: Job) -> None:
        """Remove what the disk has of an ended sync_mode job, so that it does not run again; memory keeps it for a while."""
        try:
            await self.store.forget(job.id)
            self.pictures.remove(job.images)
        except OutputError as error:
            print(f"{error} Request {job.id} would run again after a restart.", file=sys.stderr, flush=True)

    def _forget_later(self, job: Job, seconds: float) -> None:
        task = asyncio.get_running_loop().create_task
        asyncio.get_running_loop().call_later(seconds, lambda: task(self._forget_or_retry(job)))

    async def _forget_or_retry(self, job: Job) -> None:
        if job.hook == "pending" and job.id in self.jobs:  # its webhook is still being called
            self._forget_later(job, GRACE_SECONDS)
            return
        try:
            await self.forget(job)
        except OutputError as error:
            print(f"{error} Request {job.id} is forgotten later.", file=sys.stderr, flush=True)
            self._forget_later(job, GRACE_SECONDS)

    async def forget(self, job: Job) -> None:
        """Remove an ended job and its files."""
        self.jobs.pop(job.id, None)
        self.recent.pop(job.id, None)
        await self.store.forget(job.id)
        self.pictures.remove(job.files)

    # ---- work ----

    def _enqueue(self, job: Job) -> None:
        """Put a job behind all of its priority and the higher one."""
        self.jobs[job.id] = job
        ahead = [n for n, other in enumerate(self.waiting, 1) if job.priority == "low" or other.priority == "normal"]
        self.waiting.insert(ahead[-1] if ahead else 0, job)
        self._renumber()
        self.arrived.set()
        if job.start_by is not None:
            task, name = asyncio.get_running_loop().create_task, job.id  # not the job: it may be long gone by then
            asyncio.get_running_loop().call_later(job.start_by - time.time(), lambda: task(self._end_late(name)))

    async def _end_late(self, request_id: str) -> None:
        """End a job whose time to begin is over, if it has not begun."""
        job = next((job for job in self.waiting if job.id == request_id), None)
        if job is not None and job.attempts == 0:
            await self._withdraw(
                job, told(504, "request_timeout", "The request was not begun within the time it gave.")
            )

    async def _withdraw(self, job: Job, failure: dict[str, Any]) -> None:
        self.waiting.remove(job)
        job.end(failure=failure)
        self._renumber()
        await self.settle(job)

    def _renumber(self) -> None:
        for number, job in enumerate(self.waiting):
            if job.position != number:
                job.position = number
                job.touch()
        self.metrics.waiting.set(len(self.waiting))

    async def _work(self) -> None:
        try:
            while True:
                if not self.worker.ready:
                    await self._start_worker()
                if not self.waiting:
                    self.arrived.clear()
                    await self.arrived.wait()
                    continue
                job = self.current = self.waiting.popleft()
                job.begin()
                self._renumber()
                await self._run(job)
                self.current = None
        except Exception as error:
            self.failed.set_exception(error)

    async def _start_worker(self) -> None:
        """Start the worker; at the server's start a failure is fatal, later it is tried again."""
        while True:
            try:
                return await self.worker.start()
            except Exception as error:
                if self.worker.starts == 1:
                    raise
                print(f"The worker did not start: {error}", file=sys.stderr, flush=True)
                await asyncio.sleep(RESTART_SECONDS)

    async def _run(self, job: Job) -> None:
        await self.keep(job)
        fields = dict(job.fields)
        if not self.settings.safety_checker:
            fields["enable_safety_checker"] = False
        order = {"op": "run", "id": job.id, "variant": job.variant, "fields": fields, "previews": job.previews}
        await self.worker.send({**order, "images": [str(self.pictures.path(name)) for name in job.images]})
        try:
            while not job.done:
                message, data = await self.worker.receive()
                self._hear(job, message, data)
        except WorkerDied as death:
            print(f"{death} It was at request {job.id}.", file=sys.stderr, flush=True)
            await self._bury(job)
        else:
            await self.settle(job)

    async def _bury(self, job: Job) -> None:
        """What becomes of a job whose worker died: it is first in the queue again, unless that was its last try."""
        if job.cancelling:
            job.end_cancelled("Cancelled while it ran.")
            await self.settle(job)
        elif job.attempts < MAX_ATTEMPTS:
            job.state = "IN_QUEUE"
            self.waiting.appendleft(job)
            self._renumber()
        else:
            await self._give_up(job)

    def _hear(self, job: Job, message: dict[str, Any], data: bytes) -> None:
        match message["event"]:
            case "log":
                job.log(message["message"])
            case "progress":
                if message["stage"] == "denoise" and message["step"]:
                    job.log(f"step {message['step']}/{message['total']}")
                job.progress, job.preview = message, data
            case "done":
                job.end(answer=message["answer"])
                return
            case "error":
                job.end(failure=message["failure"])
                return
        job.touch()

    async def _give_up(self, job: Job) -> None:
        text = f"The worker process died {job.attempts} times while it worked on this request."
        job.end(failure=told(500, "worker_died", text))
        await self.settle(job)

    async def settle(self, job: Job) -> None:
        """Keep how a job ended, and say so."""
        self.metrics.end(job)
        if job.webhook is not None:
            job.hook = "pending"
        if not job.sync:
            self.jobs.pop(job.id, None)
            self.recent[job.id] = job
            while len(self.recent) > MAX_RECENT:
                self.recent.popitem(last=False)
            await self.keep(job)
        elif job.attached:
            await self._forget_or_retry(job)
        else:
            self._forget_later(job, UNFETCHED_SECONDS)
            if job.failure is not None:
                await self._erase(job)
        self.on_end(job)

    async def keep(self, job: Job) -> None:
        """Write a job down; where that fails it goes on in memory."""
        try:
            await self.store.save(job)
        except OutputError as error:
            print(f"{error} Request {job.id} would not survive a restart.", file=sys.stderr, flush=True)

    async def _expire(self) -> None:
        """Remove what is older than --keep, and uploads whose time is up, now and then."""
        keep = math.inf if self.settings.keep is None else self.settings.keep
        while True:
            try:
                for job in await self.store.expired(time.time() - keep):
                    await self.forget(job)
                self.pictures.remove(await self.store.drop_uploads(time.time()))
            except OutputError as error:
                print(f"{error} What is too old is removed later.", file=sys.stderr, flush=True)
            await asyncio.sleep(min(EXPIRY_SECONDS, max(1.0, keep / 4)))
