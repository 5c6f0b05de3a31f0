"""Telling a caller's own address how a request ended."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from ..errors import OutputError, RequestError
from .answers import output
from .desk import Desk
from .jobs import Job
from .outgoing import Call, Limits, exchange
from .settings import is_loopback
from .signing import Signer

DELAYS = (0.0, 1.0, 5.0, 30.0, 120.0, 300.0, 600.0, 900.0, 1200.0, 1800.0, 2244.0)
"""Seconds before each try: as at fal, ten repetitions in two hours."""

LIMITS = Limits(seconds=15, size=2**20)


class Webhooks:
    """Calls that are under way; what is left when the server stops goes on when it starts again.

    Args:
        signer: signs each call.
    """

    def __init__(self, signer: Signer) -> None:
        self.signer = signer
        self._tasks: set[asyncio.Task[None]] = set()

    def deliver(self, desk: Desk, job: Job) -> None:
        """Start calling a job's webhook, if it has one."""
        if job.webhook is not None:
            task = asyncio.get_running_loop().create_task(self._deliver(desk, job))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def resume(self, desk: Desk) -> None:
        """Go on with what a stopped server left."""
        for job in await desk.store.unreported():
            self.deliver(desk, job)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _deliver(self, desk: Desk, job: Job) -> None:
        assert job.webhook is not None
        private = desk.settings.private_urls or is_loopback(desk.settings.host)
        limits = Limits(LIMITS.seconds, LIMITS.size, private)
        body = json.dumps(payload(job)).encode("ascii")
        for delay in DELAYS:
            await asyncio.sleep(delay)
            headers = {"Content-Type": "application/json", **self.signer.headers(job.id, body)}
            try:
                if await desk.find(job.id) is None:  # it was deleted
                    return
                status, _ = await asyncio.to_thread(exchange, Call(job.webhook, "POST", body, headers), limits)
            except (RequestError, OutputError):
                continue
            if 200 <= status < 300:
                await desk.reported(job, "sent")
                return
        await desk.reported(job, "failed")


def payload(job: Job) -> dict[str, Any]:
    """What the webhook is told, as fal tells it."""
    facts: dict[str, Any] = {"request_id": job.id, "gateway_request_id": job.id}
    if job.failure is not None:
        detail = {"detail": job.failure["detail"]}
        return {**facts, "status": "ERROR", "error": job.failure["message"], "payload": detail}
    return {**facts, "status": "OK", "error": None, "payload": output(job, job.base)}
