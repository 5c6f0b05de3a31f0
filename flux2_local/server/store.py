"""Requests on the disk: one SQLite file, written from one thread, so that neither a crash nor a restart loses one."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from ..errors import OutputError
from .jobs import Job

T = TypeVar("T")

SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    state TEXT NOT NULL,
    hook TEXT,
    ended REAL,
    row TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS jobs_by_state ON jobs (state);
CREATE INDEX IF NOT EXISTS jobs_by_end ON jobs (ended);
CREATE TABLE IF NOT EXISTS uploads (name TEXT PRIMARY KEY, expires REAL NOT NULL);
"""


class Store:
    """Jobs by id, and uploaded pictures by name. Its methods are coroutines; the work is done in the store's own thread.

    Raises:
        OutputError: the file cannot be used, or another server uses it; and by every method: it cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self._thread = ThreadPoolExecutor(1, "store")
        try:
            self._base = self._thread.submit(_open, path).result()
        except sqlite3.Error as error:
            self._thread.shutdown()
            raise OutputError(
                f"The queue in {path} cannot be used ({error}). If another `flux2-local serve` runs on this folder, stop it "
                "or name another one with --folder."
            ) from error

    async def _do(self, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work, self._base)
        except sqlite3.Error as error:
            raise OutputError(f"The queue on the disk cannot be used: {error}.") from error

    async def add(self, job: Job) -> None:
        """Write a new job down, behind all others."""
        await self._write("INSERT INTO jobs (state, hook, ended, row, id) VALUES (?, ?, ?, ?, ?)", job)

    async def save(self, job: Job) -> None:
        """Write down how a job is now; one that was forgotten stays so."""
        await self._write("UPDATE jobs SET state = ?, hook = ?, ended = ?, row = ? WHERE id = ?", job)

    async def _write(self, statement: str, job: Job) -> None:
        values = (job.state, job.hook, job.ended, json.dumps(job.to_row()), job.id)
        await self._do(lambda base: base.execute(statement, values))

    async def load(self, request_id: str) -> Job | None:
        """A job, or None."""
        found = await self._select("WHERE id = ?", (request_id,))
        return found[0] if found else None

    async def unfinished(self) -> list[Job]:
        """Jobs that wait or ran when the server stopped, in order."""
        return await self._select("WHERE state != 'COMPLETED' ORDER BY number", ())

    async def unreported(self) -> list[Job]:
        """Ended jobs whose webhook is still to be called."""
        return await self._select("WHERE hook = 'pending' AND state = 'COMPLETED' ORDER BY number", ())

    async def history(self, limit: int, before: float) -> list[Job]:
        """The latest ended jobs, newest first."""
        return await self._select("WHERE ended < ? ORDER BY ended DESC LIMIT ?", (before, limit))

    async def _select(self, where: str, values: tuple[object, ...]) -> list[Job]:
        def select(base: sqlite3.Connection) -> list[str]:
            return [row for (row,) in base.execute(f"SELECT row FROM jobs {where}", values)]

        return [Job(**json.loads(row)) for row in await self._do(select)]

    async def forget(self, request_id: str) -> None:
        await self._do(lambda base: base.execute("DELETE FROM jobs WHERE id = ?", (request_id,)) and None)

    async def expired(self, before: float) -> list[Job]:
        """Jobs that ended before a time."""
        return await self._select("WHERE ended < ? AND (hook IS NULL OR hook != 'pending')", (before,))

    async def add_upload(self, name: str, expires: float) -> None:
        """Remember an uploaded picture until a time (seconds since 1970, may be infinite)."""
        await self._do(
            lambda base: base.execute("INSERT OR REPLACE INTO uploads VALUES (?, ?)", (name, expires)) and None
        )

    async def drop_uploads(self, before: float) -> list[str]:
        """Forget the uploaded pictures whose time was up before a time; returns their names."""
        return await self._do(
            lambda base: [n for (n,) in base.execute("DELETE FROM uploads WHERE expires < ? RETURNING name", (before,))]
        )

    async def files(self) -> set[str]:
        """Names of all files that are some job's or were uploaded."""
        uploads = await self._do(lambda base: [name for (name,) in base.execute("SELECT name FROM uploads")])
        return {*uploads, *(name for job in await self._select("", ()) for name in job.files)}

    async def close(self) -> None:
        await self._do(lambda base: base.close())
        self._thread.shutdown()


def _open(path: Path) -> sqlite3.Connection:
    base = sqlite3.connect(path, isolation_level=None, timeout=0.2)
    base.execute("PRAGMA locking_mode = EXCLUSIVE")
    base.execute("PRAGMA journal_mode = WAL")
    base.execute("PRAGMA synchronous = NORMAL")
    base.executescript(SCHEMA)
    return base
