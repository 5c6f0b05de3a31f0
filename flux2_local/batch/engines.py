"""Who makes the pictures: this process, or one process per device."""

from __future__ import annotations

import queue
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import tee
from typing import TYPE_CHECKING, Any

from .. import errors
from ..errors import Cancelled, Flux2Error
from ..result import ImageFile, Result, Timings
from ..server import frames
from ..version import __version__
from .job import Picture
from .manifest import Record

if TYPE_CHECKING:
    from ..pipeline import Flux2

Made = tuple[Picture, "Result | Flux2Error"]
AHEAD = 4
"""Pictures per process that may be under way or waiting for an earlier one."""

TRIES = 3
WAIT_SECONDS = 0.2


def facts_of(flux: Flux2) -> Record:
    """What decides the pixels of a loaded model: what must be the same in one batch, and what may move last bits."""
    import torch

    plan = flux.plan
    return {
        "fixed": {
            "version": __version__,
            "model": flux.checkpoint.source,
            "variant": flux.settings.variant,
            "acceleration": flux.settings.acceleration,
            "dtype": plan.dtype,
            "weights": plan.transformer.format,
            "lora": [f"{a.path}={a.strength}" for a in flux.settings.adapters],
        },
        "machine": {
            "device": flux.hardware.name,
            "torch": torch.__version__,
            "threads": torch.get_num_threads() if flux.hardware.kind == "cpu" else None,
            "vae_tile": plan.vae_tile,
            "attention": plan.attention,
            "ops": plan.ops,
            "compile": plan.compile,
        },
    }


def in_this_process(flux: Flux2, cancel: Callable[[], bool]) -> Callable[[Iterator[Picture]], Iterator[Made]]:
    """An engine that uses one loaded model."""

    def engine(pictures: Iterator[Picture]) -> Iterator[Made]:
        kept, read = tee(pictures)
        results = flux.generate_many((p.request for p in read), return_errors=True, cancel=cancel)
        return zip(kept, results, strict=True)

    return engine


class Process:
    """A worker process with a model on one device. It writes no files: it may die at any moment.

    Attributes:
        facts: as :func:`facts_of`, once started.
    """

    def __init__(self, loading: dict[str, Any]) -> None:
        self.loading = loading
        self.facts: Record = {}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Load the model.

        Raises:
            Flux2Error: as :meth:`flux2_local.Flux2.load`, or the process ended without a word.
        """
        self._process = subprocess.Popen(
            [sys.executable, "-m", "flux2_local.batch.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        answer = self.ask(self.loading)
        if answer is None:
            raise Flux2Error(f"The process for {self.loading['device']} ended while it loaded the model.")
        if "error" in answer[0]:
            raise rebuilt(answer[0])
        self.facts = answer[0]

    def ask(self, message: frames.Message) -> tuple[frames.Message, bytes] | None:
        """Send a message and wait for its answer; None when the process has ended."""
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(frames.pack(message))
            self._process.stdin.flush()
            return frames.read(self._process.stdout)  # type: ignore[arg-type]
        except (OSError, ValueError):
            return None

    def make(self, picture: Picture) -> Result | Flux2Error:
        """Make a picture; the error in its place where it cannot be made.

        Raises:
            Flux2Error: what no picture could be made under.
        """
        answer = self.ask(picture.request.model_dump(mode="json"))
        if answer is None:
            raise ConnectionError
        told, data = answer
        if "error" in told:
            if told["ends"]:
                raise rebuilt(told)
            return rebuilt(told)
        width, height = told["size"]
        image = ImageFile(data, width, height, told["content_type"], told["file_name"], told["settings"])
        return Result((image,), Timings(), told["seed"], (told["nsfw"],), told["prompt"])

    def stop(self) -> None:
        """End the process at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


class Pool:
    """One process per device; an engine, and a context manager that ends them all.

    Pictures are handed to whichever process is free and given back in the job's order, so that the folder does not show
    how many there were.
    """

    def __init__(self, devices: list[str], loading: dict[str, Any], cancel: Callable[[], bool]) -> None:
        self.processes = [Process({**loading, "device": device}) for device in devices]
        self.cancel, self.closing, self.lost = cancel, False, 0
        self.free: queue.Queue[Process] = queue.Queue()
        self.threads = ThreadPoolExecutor(len(devices))

    def __enter__(self) -> Pool:
        """Load the model everywhere at the same time.

        Raises:
            Flux2Error: as :meth:`flux2_local.Flux2.load`.
        """
        try:
            for started in [self.threads.submit(p.start) for p in self.processes]:
                self.wait(started)
        except BaseException:
            self.__exit__()
            raise
        for process in self.processes:
            self.free.put(process)
        return self

    def __exit__(self, *error: object) -> None:
        self.closing = True
        for process in self.processes:
            process.stop()
        self.threads.shutdown(cancel_futures=True)

    @property
    def facts(self) -> Record:
        return self.processes[0].facts

    def __call__(self, pictures: Iterator[Picture]) -> Iterator[Made]:
        under_way: deque[tuple[Picture, Future[Result | Flux2Error]]] = deque()
        for picture in pictures:
            under_way.append((picture, self.threads.submit(self.make, picture)))
            if len(under_way) >= AHEAD * len(self.processes):
                first, future = under_way.popleft()
                yield first, self.wait(future)
        for last, future in under_way:
            yield last, self.wait(future)

    def make(self, picture: Picture) -> Result | Flux2Error:
        """Have a free process make a picture; one that dies is started again and the picture is tried again."""
        process = self.free.get()
        try:
            for _ in range(TRIES):
                try:
                    return process.make(picture)
                except ConnectionError:
                    if self.closing:
                        break
                    self.lost += 1
                    process.stop()
                    process.start()
            return Flux2Error(f"The process that made it died {TRIES} times.")
        finally:
            self.free.put(process)

    def wait(self, future: Future[Any]) -> Any:
        """A future's result, giving the caller the chance to stop.

        Raises:
            Cancelled: the cancel callback returned True.
        """
        while True:
            if self.cancel():
                raise Cancelled("Cancelled by the caller.")
            try:
                return future.result(WAIT_SECONDS)
            except TimeoutError:
                if future.done():
                    raise


def rebuilt(told: frames.Message) -> Flux2Error:
    """A process's error as one of ours."""
    cls = getattr(errors, told["error"], Flux2Error)
    return errors.BudgetError(told["message"], 0) if cls is errors.BudgetError else cls(told["message"])
