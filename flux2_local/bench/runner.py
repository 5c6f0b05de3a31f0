"""Contenders in turn, round after round, so that a machine that slows down slows all of them down.

Each has a process of its own, so that memory is its own too and nothing that one patches reaches another. While one draws the
others wait; or, where only one of them fits into memory, each is loaded for its turn and ends with it. Loading (from the start of
the process) and the first picture (which compiles and warms up) are reported apart.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from threading import Timer
from typing import Any

import numpy as np

from .. import frames
from .contenders import Contender
from .subject import Subject
from .worker import peak_resident

Say = Callable[[str], None]
FIRST_SEED = 0
WORKER = (sys.executable, "-m", "flux2_local.bench.worker")


@dataclass(frozen=True)
class Rules:
    """How contenders are let work.

    Attributes:
        rounds: pictures of each.
        apart: load each anew for every round and end it thereafter, for models of which only one fits into memory. None leaves
            it to :func:`.measurement.measure`; else it is False.
        warm_steps: denoising steps of the first picture. None: one, and all where a contender compiles, since a step that is
            skipped or follows a skipped one may be compiled apart.
        limit: seconds that a picture may take, and loading; without end where None.
    """

    rounds: int
    apart: bool | None = None
    warm_steps: int | None = None
    limit: float | None = None


class Stopped(Exception):
    """A contender's process ended or failed; the message says with what."""


class TooSlow(Stopped):
    """It was ended because it took longer than the limit.

    Attributes:
        seconds: the limit.
        memory: peak bytes on "host", where they could be read.
    """

    def __init__(self, seconds: float, memory: dict[str, int]) -> None:
        super().__init__(f"more than {seconds:g} s for a picture, at which it was stopped")
        self.seconds, self.memory = seconds, memory


class Worker:
    """One contender's process. Use as a context manager: leaving it ends the process."""

    def __init__(self, contender: Contender, subject: Subject, limit: float | None = None) -> None:
        self.contender, self.subject, self.limit = contender, subject, limit
        self.facts: frames.Message = {}
        self.load_seconds = 0.0
        self._peak: int | None = None

    def __enter__(self) -> Worker:
        """Start and load.

        Raises:
            Stopped: it could not be loaded, or not in time.
        """
        start = time.perf_counter()
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(WORKER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors)
        try:
            self.facts, _ = self._ask({"contender": self.contender.name, "subject": asdict(self.subject)})
        except BaseException as error:
            self.__exit__()
            if isinstance(error, TooSlow):
                raise Stopped(f"loading it took more than {error.seconds:g} s, at which it was stopped") from None
            raise
        self.load_seconds = time.perf_counter() - start
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def draw(self, prompt: str, seed: int, steps: int | None = None) -> tuple[np.ndarray, frames.Message]:
        """A picture, uint8 [H, W, 3], and what the process says about it: seconds, stages, blocks skipped, plan, memory.

        Args:
            steps: of denoising; as many as the contender takes where None.

        Raises:
            Stopped: it could not be drawn.
            TooSlow: not in time.
        """
        facts, data = self._ask({"prompt": prompt, "seed": seed, "steps": steps})
        return np.frombuffer(data, np.uint8).reshape(facts["shape"]), facts

    def _ask(self, message: frames.Message) -> tuple[frames.Message, bytes]:
        assert self._process.stdin is not None and self._process.stdout is not None
        timer = Timer(self.limit, self._expire) if self.limit is not None else None
        if timer is not None:
            timer.start()
        try:
            frames.write(self._process.stdin, message)  # type: ignore[arg-type]
            answer = frames.read(self._process.stdout)  # type: ignore[arg-type]
        except OSError:
            answer = None
        finally:
            if timer is not None:
                timer.cancel()
                timer.join()
        if self._peak is not None:
            assert self.limit is not None
            raise TooSlow(self.limit, {"host": self._peak})
        if answer is None:
            raise Stopped(self._last_words(self._process.wait()))
        if "error" in answer[0]:
            raise Stopped(answer[0]["error"])
        return answer

    def _expire(self) -> None:
        self._peak = peak_resident(self._process.pid)
        self._process.kill()

    def _last_words(self, code: int) -> str:
        """How the process ended, with the last line that it printed."""
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        words = f": {lines[-1].strip()[:300]}" if lines else ""
        how = f"ended with {code} (out of memory?)" if code < 0 else f"left with {code}"
        return f"its process {how}{words}"


@dataclass(frozen=True, eq=False)
class Drawn:
    """One picture, uint8 [H, W, 3], the seconds of the whole call, and what the contender told of it (:class:`.subject.Told`)."""

    picture: np.ndarray
    seconds: float
    stages: dict[str, float] = field(default_factory=dict)
    skipped: tuple[int, int] = (0, 0)
    plan: dict[str, str] = field(default_factory=dict)


@dataclass
class Samples:
    """What was seen of one contender.

    Attributes:
        facts: of loading.
        load_seconds: from the start of its process until it is loaded.
        first_seconds, first_steps: of its first picture, which no median sees; all of the contender's steps where None.
        drawn: one picture per round, from the first round on; loading and the first picture are not in them.
        exceeded: the limit, where it was stopped there instead of drawing one more.
        memory: peak bytes on "host" and "device".
    """

    facts: dict[str, Any]
    load_seconds: float
    first_seconds: float = 0.0
    first_steps: int | None = None
    drawn: list[Drawn] = field(default_factory=list)
    exceeded: float | None = None
    memory: dict[str, int] = field(default_factory=dict)

    @property
    def pictures(self) -> list[np.ndarray]:
        return [one.picture for one in self.drawn]

    @property
    def seconds(self) -> list[float]:
        """Per round; the last is the limit where that was exceeded."""
        return [*(one.seconds for one in self.drawn), *([] if self.exceeded is None else [self.exceeded])]

    def add(self, picture: np.ndarray, facts: frames.Message) -> None:
        self.drawn.append(Drawn(picture, facts["seconds"], facts["stages"], tuple(facts["skipped"]), facts["plan"]))
        self.reached(facts["memory"])

    def reached(self, memory: dict[str, int]) -> None:
        """Take note of a peak."""
        self.memory |= {k: max(v, self.memory.get(k, 0)) for k, v in memory.items()}


@dataclass
class Outcome:
    """Samples by contender; why others did not run, or not to the end; and how many rounds are complete."""

    samples: dict[str, Samples] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    rounds: int = 0

    @contextmanager
    def noting(self, name: str, say: Say) -> Iterator[None]:
        """Where contender ``name`` fails, say so and keep what was seen of it before."""
        try:
            yield
        except Stopped as error:
            self.refused[name] = str(error)
            say(f"{name}: {error}")
            taken = self.samples.get(name)
            if taken is not None and isinstance(error, TooSlow):
                taken.exceeded = error.seconds
                taken.reached(error.memory)
            elif taken is not None and not taken.drawn:
                del self.samples[name]


def run(
    contenders: Sequence[Contender], subject: Subject, prompts: Sequence[str], rules: Rules, say: Say
) -> Generator[Outcome]:
    """Let every contender draw, prompt by prompt with the round's number as the seed. One that fails or exceeds the limit is not
    tried again, and the others go on.

    Args:
        say: told what goes on, a line each.

    Yields:
        The outcome so far, always the same object, after every picture and everything that failed. Leaving early ends all
        processes.
    """
    outcome = Outcome(refused={c.name: why for c in contenders if (why := c.obstacle(subject)) is not None})
    able = [c for c in contenders if c.name not in outcome.refused]

    def ready(contender: Contender, stack: ExitStack) -> Worker:
        worker = stack.enter_context(Worker(contender, subject, rules.limit))
        warm(worker, prompts[0], rules, outcome.samples)
        say(described(contender.name, outcome.samples[contender.name]))
        return worker

    with ExitStack() as stack:
        waiting: dict[str, Worker] = {}
        for contender in () if rules.apart else able:
            with outcome.noting(contender.name, say):
                waiting[contender.name] = ready(contender, stack)
            yield outcome
        for number in range(rules.rounds):
            if outcome.refused.keys() >= {c.name for c in able}:
                break
            for contender in (c for c in able if c.name not in outcome.refused):
                name, prompt = contender.name, prompts[number % len(prompts)]
                with outcome.noting(name, say), ExitStack() as turn:
                    worker = ready(contender, turn) if rules.apart else waiting[name]
                    outcome.samples[name].add(*worker.draw(prompt, number))
                yield outcome
            outcome.rounds = number + 1
            say(f"{subject.size}: round {outcome.rounds} of {rules.rounds}")
    yield outcome


def warm(worker: Worker, prompt: str, rules: Rules, samples: dict[str, Samples]) -> None:
    """Draw the first picture, and begin the contender's samples unless an earlier round has.

    Raises:
        Stopped: it failed, or exceeded the limit while it compiled, which says nothing about later pictures.
        TooSlow: it exceeded the limit.
    """
    compiles, whole = worker.facts["compiles"], worker.facts["steps"]
    steps = min(rules.warm_steps or (whole if compiles else 1), whole)
    first = Samples(worker.facts, worker.load_seconds, first_steps=steps)
    taken = samples.setdefault(worker.contender.name, first)
    try:
        _, facts = worker.draw(prompt, FIRST_SEED, steps if steps < whole else None)
    except TooSlow as error:
        if compiles:
            raise Stopped(f"its first picture, for which it compiles, took more than {error.seconds:g} s") from None
        taken.first_seconds = taken.first_seconds or error.seconds
        raise
    if taken is first:
        taken.first_seconds = facts["seconds"]
        taken.reached(facts["memory"])


def described(name: str, samples: Samples) -> str:
    steps = f"{samples.first_steps} step{'s' if samples.first_steps != 1 else ''}"
    return f"{name}: loaded in {samples.load_seconds:.1f} s, first picture ({steps}) in {samples.first_seconds:.1f} s"
