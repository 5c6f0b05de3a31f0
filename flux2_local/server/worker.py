"""The server's handle on its worker process: start, send, receive, start again."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from .. import errors, frames
from .settings import Settings

STOP_SECONDS = 3.0

KILLED = -9
"""Exit code of a process that the system ended, as it does where memory runs out."""


class WorkerDied(errors.Flux2Error):
    """The worker process ended by itself."""


class Worker:
    """One worker process at a time.

    Attributes:
        plans: per variant, what would run; known once the worker is ready.
        starts: how often a process was started.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.plans: dict[str, dict[str, Any]] = {}
        self.ready = False
        self.starts = 0
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start the process and wait until its first pipeline is loaded.

        Raises:
            Flux2Error: nothing can be loaded, as :meth:`flux2_local.Flux2.load` would say.
            WorkerDied: it ended without a word.
        """
        await self.stop()
        self.starts += 1
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "flux2_local.server.generator",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        s = self.settings
        await self.send({"loading": s.loading, "models": s.models, "folder": str(s.folder / "files"), "op": "setup"})
        message, _ = await self.receive()
        if message["event"] == "failed":
            raise rebuilt(message["kind"], message["failure"]["message"])
        self.plans, self.ready = message["plans"], True

    async def send(self, message: frames.Message) -> None:
        """Send a message; one to a process that has ended is lost, and :meth:`receive` says so."""
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(frames.pack(message))
            await self._process.stdin.drain()
        except ConnectionError:
            pass

    async def receive(self) -> tuple[frames.Message, bytes]:
        """The next message.

        Raises:
            WorkerDied: there will be none.
        """
        assert self._process is not None and self._process.stdout is not None
        frame = await frames.receive(self._process.stdout)
        if frame is None:
            self.ready = False
            raise WorkerDied(obituary(await self._process.wait()))
        return frame

    async def stop(self) -> None:
        """End the process: it leaves when its input closes."""
        process, self._process, self.ready = self._process, None, False
        if process is None or process.returncode is not None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), STOP_SECONDS)
        except TimeoutError:
            process.kill()
            await process.wait()


def obituary(code: int) -> str:
    """What to say of a process that ended with ``code``, and what to do about it."""
    text = f"The worker process ended with code {code}"
    if code != KILLED:
        return f"{text}."
    return f"{text}: memory probably ran out. Let it use less with --vram, or choose a smaller model with --model."


def rebuilt(kind: str, message: str) -> Exception:
    """The worker's error as one of ours, for the command line's exit code."""
    cls = getattr(errors, kind, errors.Flux2Error)
    return errors.BudgetError(message, 0) if cls is errors.BudgetError else cls(message)
