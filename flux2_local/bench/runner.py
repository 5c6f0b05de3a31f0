"""Contenders in turn, round after round, so that a machine that slows down slows all of them down.

Each has a process of its own, so that memory is its own too and nothing that one patches reaches another. While one draws the
others wait. Loading (from the start of the process) and the first picture (which compiles and warms up) are reported apart.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from .. import frames
from .contenders import Contender
from .subject import Subject

Say = Callable[[str], None]
FIRST_SEED = 0


class Stopped(Exception):
    """A contender's process ended or failed; the message says with what."""


class Worker:
    """One contender's process. Use as a context manager: leaving it ends the process."""

    def __init__(self, contender: Contender, subject: Subject) -> None:
        self.contender, self.subject = contender, subject
        self.facts: frames.Message = {}
        self.load_seconds = 0.0

    def __enter__(self) -> Worker:
        """Start and load.

        Raises:
            Stopped: it could not be loaded.
        """
        start = time.perf_counter()
        command = [sys.executable, "-m", "flux2_local.bench.worker"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        try:
            self.facts, _ = self._ask({"contender": self.contender.name, "subject": asdict(self.subject)})
        except BaseException:
            self.__exit__()
            raise
        self.load_seconds = time.perf_counter() - start
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def draw(self, prompt: str, seed: int) -> tuple[np.ndarray, frames.Message]:
        """A picture, uint8 [H, W, 3], and what the process says about it: seconds, stages, memory.

        Raises:
            Stopped: it could not be drawn.
        """
        facts, data = self._ask({"prompt": prompt, "seed": seed})
        return np.frombuffer(data, np.uint8).reshape(facts["shape"]), facts

    def _ask(self, message: frames.Message) -> tuple[frames.Message, bytes]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            frames.write(self._process.stdin, message)  # type: ignore[arg-type]
            answer = frames.read(self._process.stdout)  # type: ignore[arg-type]
        except OSError:
            answer = None
        if answer is None:
            code = self._process.wait()
            raise Stopped(
                f"its process ended with {code} (out of memory?)" if code < 0 else f"its process left with {code}"
            )
        if "error" in answer[0]:
            raise Stopped(answer[0]["error"])
        return answer


@dataclass
class Samples:
    """What was seen of one contender.

    Attributes:
        seconds: per round, whole calls without loading and first picture.
        stages: seconds per stage and round, where the contender tells them.
        pictures: per round, uint8 [H, W, 3].
        facts: of loading.
        load_seconds, first_seconds: from the start of its process until it is loaded, and of its first picture.
        memory: peak bytes on "host" and "device".
    """

    facts: dict[str, Any]
    load_seconds: float
    first_seconds: float
    seconds: list[float] = field(default_factory=list)
    stages: list[dict[str, float]] = field(default_factory=list)
    pictures: list[np.ndarray] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)

    def add(self, picture: np.ndarray, facts: frames.Message) -> None:
        self.seconds.append(facts["seconds"])
        self.stages.append(facts["stages"])
        self.pictures.append(picture)
        self.memory = {k: max(v, self.memory.get(k, 0)) for k, v in facts["memory"].items()}


@dataclass(frozen=True)
class Outcome:
    """Samples by contender, and for the others why they did not run."""

    samples: dict[str, Samples]
    refused: dict[str, str]


def run(
    contenders: Sequence[Contender], subject: Subject, prompts: Sequence[str], rounds: int, apart: bool, say: Say
) -> Outcome:
    """Let every contender draw ``rounds`` pictures, prompt by prompt with the round's number as the seed.

    Args:
        apart: start each anew for every round, for models of which only one fits into memory.
        say: told what goes on, a line each.
    """
    samples: dict[str, Samples] = {}
    refused = {c.name: reason for c in contenders if (reason := c.obstacle(subject)) is not None}
    able = [c for c in contenders if c.name not in refused]

    def failed(name: str, error: Stopped) -> None:
        refused[name] = str(error)
        samples.pop(name, None)
        say(f"{name}: {error}")

    with ExitStack() as stack:
        waiting: dict[str, Worker] = {}
        for contender in () if apart else able:
            try:
                worker = stack.enter_context(Worker(contender, subject))
                samples[contender.name] = warm(worker, prompts[0])
                waiting[contender.name] = worker
                say(described(contender.name, samples[contender.name]))
            except Stopped as error:
                failed(contender.name, error)
        for number in range(rounds):
            for contender in (c for c in able if c.name not in refused):
                name, prompt = contender.name, prompts[number % len(prompts)]
                try:
                    if apart:
                        with Worker(contender, subject) as worker:
                            first = warm(worker, prompts[0])
                            samples.setdefault(name, first).add(*worker.draw(prompt, number))
                    else:
                        samples[name].add(*waiting[name].draw(prompt, number))
                except Stopped as error:
                    failed(name, error)
            say(f"{subject.size}: round {number + 1} of {rounds}")
    return Outcome(samples, refused)


def warm(worker: Worker, prompt: str) -> Samples:
    """The first picture, which no median sees."""
    _, facts = worker.draw(prompt, FIRST_SEED)
    return Samples(worker.facts, worker.load_seconds, facts["seconds"])


def described(name: str, samples: Samples) -> str:
    return f"{name}: loaded in {samples.load_seconds:.1f} s, first picture in {samples.first_seconds:.1f} s"
