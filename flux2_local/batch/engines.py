"""Who makes the pictures: this process, one process per device, or (:mod:`.cluster`) workers of a Ray cluster."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import chain, tee
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from .. import errors, frames, many
from ..errors import Cancelled, Flux2Error, PlanError
from ..progress import Reporter
from ..request import Request
from ..result import ImageFile, Result, Timings
from ..version import __version__
from .job import Picture
from .manifest import Record

if TYPE_CHECKING:
    from ..pipeline import Flux2

Made = tuple[Picture, "Result | Flux2Error"]
Answer = tuple[frames.Message, bytes]
"""What a worker says about one picture, with its file."""

T = TypeVar("T")
AHEAD = 4
"""Groups per worker that may be under way or waiting for an earlier one."""

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


class ThisProcess:
    """An engine that uses one loaded model."""

    def __init__(self, flux: Flux2, cancel: Callable[[], bool] = lambda: False) -> None:
        self.flux, self.report, self.facts = flux, Reporter(cancelled=cancel), facts_of(flux)

    def batch(self, request: Request) -> int:
        return batch_of(self.flux, request)

    def __call__(self, groups: Iterator[list[Picture]]) -> Iterator[Made]:
        kept, read = tee(groups)
        given = ([many.checked(self.flux, p.request.given(), self.report) for p in group] for group in read)
        return zip(chain.from_iterable(kept), many.results(self.flux, given), strict=True)


def batch_of(flux: Flux2, request: Request) -> int:
    """How many pictures like this one ``flux`` takes through the stages together."""
    try:
        return many.gathered(flux._plan_for(request, []))
    except PlanError:
        return 1


class Worker(Protocol):
    """A model somewhere else. It writes no files: it may die at any moment.

    Attributes:
        facts: as :func:`facts_of`, once started.
    """

    facts: Record

    def start(self) -> None:
        """Load the model, for the first time or again.

        Raises:
            Flux2Error: as :meth:`flux2_local.Flux2.load`, or it ended without a word.
        """

    def batch(self, request: Request) -> int:
        """As :func:`batch_of`.

        Raises:
            ConnectionError: it died.
            Flux2Error: what no picture could be made under.
        """

    def make(self, group: list[Picture]) -> list[Result | Flux2Error]:
        """Make pictures that are denoised together; an error in place of each that cannot be made.

        Raises:
            ConnectionError: it died.
            Flux2Error: what no picture could be made under.
        """

    def stop(self) -> None:
        """End it at once."""


class Process:
    """A worker that is a process of this machine.

    Args:
        loading: arguments of :meth:`flux2_local.Flux2.load`.
        threads: processor threads that it may use; as many as it likes where None.
    """

    def __init__(self, loading: dict[str, Any], threads: int | None = None) -> None:
        self.loading, self.threads = loading, threads
        self.facts: Record = {}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        own = {} if self.threads is None else {"OMP_NUM_THREADS": str(self.threads)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "flux2_local.batch.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **own},
        )
        try:
            told, _ = self.ask(self.loading)[0]
        except ConnectionError:
            name = self.loading["device"]
            raise Flux2Error(f"The process for {name} ended while it loaded the model.") from None
        self.facts = told

    def ask(self, message: frames.Message, answers: int = 1) -> list[Answer]:
        """Send a message and wait for its answers.

        Raises:
            ConnectionError: the process has ended.
            Flux2Error: what it ends with.
        """
        found: list[Answer] = []
        answer: Answer | None = None
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        try:
            frames.write(self._process.stdin, message)  # type: ignore[arg-type]
            while len(found) < answers:
                answer = frames.read(self._process.stdout)  # type: ignore[arg-type]
                if answer is None or answer[0].get("ends"):
                    break
                found.append(answer)
        except (OSError, ValueError) as error:
            raise ConnectionError from error
        if answer is None:
            raise ConnectionError
        if answer[0].get("ends"):
            raise rebuilt(answer[0])
        return found

    def batch(self, request: Request) -> int:
        told: int = self.ask({"batch": request.model_dump(mode="json")})[0][0]["batch"]
        return told

    def make(self, group: list[Picture]) -> list[Result | Flux2Error]:
        requests = [picture.request.model_dump(mode="json") for picture in group]
        return [unpacked(*answer) for answer in self.ask({"requests": requests}, len(group))]

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def processes(devices: list[str], loading: dict[str, Any], threads: int | None = None) -> list[Process]:
    """A process per device."""
    return [Process({**loading, "device": device}, threads) for device in devices]


class Pool:
    """An engine of several workers, and a context manager that ends them all.

    Groups are handed to whichever worker is free and given back in the job's order, so that the folder does not show how
    many there were. A worker that dies is started again and its group is made again; one that cannot start takes no part any more.

    Args:
        workers: at least one.
        cancel: asked now and then; True stops.
        gradual: begin when the first worker is ready, and let the others join when they are.

    Attributes:
        facts: of the first worker that was ready; the others must agree on what is fixed.
        lost: how often a worker died.
        left: workers that have not failed to start again.
    """

    def __init__(
        self, workers: Sequence[Worker], cancel: Callable[[], bool] = lambda: False, gradual: bool = False
    ) -> None:
        self.workers, self.cancel, self.gradual = workers, cancel, gradual
        self.closing, self.lost, self.facts = False, 0, cast("Record", {})
        self.starting: list[Future[None]] = []
        self.turn = threading.Lock()
        self.left, self.problem = len(workers), cast("Flux2Error | None", None)
        self.free: queue.Queue[Worker | None] = queue.Queue()
        self.batches: dict[Hashable, int] = {}
        self.threads = ThreadPoolExecutor(len(workers))

    def __enter__(self) -> Pool:
        """Load the model everywhere at the same time.

        Raises:
            Flux2Error: as :meth:`flux2_local.Flux2.load`.
        """
        self.starting = [self.threads.submit(self.join, worker) for worker in self.workers]
        try:
            while not (all if not self.gradual else any)(future.done() for future in self.starting):
                self.pause()
            self.check()
        except BaseException:
            self.__exit__()
            raise
        return self

    def join(self, worker: Worker) -> None:
        """Start a worker and let it take part.

        Raises:
            Flux2Error: as :meth:`Worker.start`, or it would draw other pictures than the first.
        """
        worker.start()
        with self.turn:
            self.facts = self.facts or worker.facts
        first, own = self.facts["fixed"], worker.facts["fixed"]
        if unlike := [f"{name} {first[name]} and {own[name]}" for name in first if first[name] != own[name]]:
            raise PlanError(
                f"Two workers would not draw the same: {', '.join(unlike)}. Insist on --dtype and --quantize."
            )
        self.free.put(worker)

    def check(self) -> None:
        """Make sure that no worker has failed to start.

        Raises:
            Flux2Error: what the first of them said.
        """
        for future in self.starting:
            if future.done() and (error := future.exception()) is not None:
                raise error

    def __exit__(self, *error: object) -> None:
        self.closing = True
        for worker in self.workers:
            worker.stop()
        self.free.put(None)
        self.threads.shutdown(cancel_futures=True)

    def batch(self, request: Request) -> int:
        if request.images:
            return 1  # it is alone in its group
        key = many.kind(request)
        if key not in self.batches:
            try:
                self.batches[key] = self.wait(self.threads.submit(self.ask, lambda worker: worker.batch(request)))
            except ConnectionError:
                raise Flux2Error(f"The worker that planned a picture died {TRIES} times.") from None
        return self.batches[key]

    def __call__(self, groups: Iterator[list[Picture]]) -> Iterator[Made]:
        under_way: deque[tuple[list[Picture], Future[list[Result | Flux2Error]]]] = deque()
        for group in groups:
            under_way.append((group, self.threads.submit(self.make, group)))
            if len(under_way) >= AHEAD * len(self.workers):
                first, future = under_way.popleft()
                yield from zip(first, self.wait(future), strict=True)
        for last, future in under_way:
            yield from zip(last, self.wait(future), strict=True)

    def make(self, group: list[Picture]) -> list[Result | Flux2Error]:
        """Have a free worker make a group."""
        try:
            return self.ask(lambda worker: worker.make(group))
        except ConnectionError:
            return [Flux2Error(f"The worker that made it died {TRIES} times.")] * len(group)

    def ask(self, question: Callable[[Worker], T]) -> T:
        """What a free worker answers; one that dies is started again, and whichever is free then is asked.

        Raises:
            ConnectionError: it died :data:`TRIES` times.
            Flux2Error: as the worker, or none is left.
        """
        for _ in range(TRIES):
            worker, works = self.free.get(), True
            if worker is None:  # for good, so that whoever waits sees it
                self.free.put(None)
                break
            try:
                return question(worker)
            except ConnectionError:
                works = self.closing or self.started_again(worker)
            finally:
                if works:
                    self.free.put(worker)
        raise self.problem or ConnectionError

    def started_again(self, worker: Worker) -> bool:
        """Whether a worker that died could be started again."""
        self.lost += 1
        worker.stop()
        try:
            worker.start()
        except Flux2Error as error:
            with self.turn:
                self.left -= 1
                if not self.left:
                    self.problem = error
                    self.free.put(None)
            return False
        return True

    def wait(self, future: Future[Any]) -> Any:
        """A future's result, giving the caller the chance to stop.

        Raises:
            Cancelled: the cancel callback returned True.
        """
        while not future.done():
            self.pause([future])
        return future.result()

    def pause(self, futures: Sequence[Future[Any]] = ()) -> None:
        """Wait a little, or for a future.

        Raises:
            Cancelled: the cancel callback returned True.
            Flux2Error: a worker could not start.
        """
        if self.cancel():
            raise Cancelled("Cancelled by the caller.")
        self.check()
        wait(futures or self.starting, WAIT_SECONDS)


def unpacked(told: frames.Message, data: bytes) -> Result | Flux2Error:
    """What a worker process answered about a picture.

    Raises:
        Flux2Error: what no picture could be made under.
    """
    if "error" in told:
        if told["ends"]:
            raise rebuilt(told)
        return rebuilt(told)
    width, height = told["size"]
    image = ImageFile(data, width, height, told["content_type"], told["file_name"], told["settings"])
    return Result((image,), Timings(), told["seed"], (told["nsfw"],), told["prompt"])


def rebuilt(told: frames.Message) -> Flux2Error:
    """A process's error as one of ours."""
    cls = getattr(errors, told["error"], Flux2Error)
    return errors.BudgetError(told["message"], 0) if cls is errors.BudgetError else cls(told["message"])
