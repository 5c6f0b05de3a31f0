"""What a person sees while a command works: lines and one bar, on standard error."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    from ..batch.run import Batch
    from ..pipeline import Flux2
    from ..progress import Progress

WORDS = {
    "expand": "expanding the prompt",
    "encode": "reading the prompt",
    "references": "reading the pictures",
    "decode": "decoding",
    "safety": "checking",
}

TELL_SECONDS = 10.0
"""Between two lines about a batch where no terminal shows one that changes."""


class Display:
    """Shows loading and progress; a context manager that leaves the terminal clean, however it is left.

    Args:
        show: False for silence.
    """

    def __init__(self, show: bool) -> None:
        self.show = show
        self.bar: Bar | None = None
        self.task: TaskID | None = None
        self.start = time.perf_counter()

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def say(self, text: str) -> None:
        if self.show:
            print(text, file=sys.stderr, flush=True)

    def say_loading(self, model: str | None) -> None:
        if model is not None:
            self.say(f"loading {model} …")

    def say_model(self, flux: Flux2) -> None:
        """Which model runs, where and how, and what to know about it."""
        plan = flux.plan
        seconds = time.perf_counter() - self.start
        self.say(
            f"{flux.checkpoint.preset.title} ({plan.variant}, {plan.acceleration}) on {plan.device} in {plan.dtype}, "
            f"loaded in {seconds:.1f} s"
        )
        for note in flux.notes:
            self.say(f"note: {note}")

    def __call__(self, report: Progress) -> None:
        """A progress callback."""
        if not self.show or not sys.stderr.isatty():
            return
        if self.bar is None:
            self.bar = make_bar()
            self.bar.start()
            self.task = self.bar.add_task("", total=None)
        assert self.task is not None
        if report.stage == "denoise" and report.step:
            self.bar.update(self.task, description="denoising", completed=report.step, total=report.total)
        elif report.stage in WORDS:
            self.bar.update(self.task, description=WORDS[report.stage])


def make_bar() -> Bar:
    """Steps, speed and time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    class Speed(TextColumn):
        def render(self, task):  # type: ignore[no-untyped-def]
            from rich.text import Text

            if not task.speed:
                return Text("")
            return Text(f"{task.speed:.2f} it/s" if task.speed >= 1 else f"{1 / task.speed:.2f} s/it")

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Speed(""),
        TimeRemainingColumn(compact=True),
        console=Console(stderr=True),
        transient=True,
    )


class Meter:
    """Done, rate, time left and failures, on standard error: one line that changes, or a line now and then."""

    def __init__(self, show: bool) -> None:
        self.show, self.live, self.told = show, sys.stderr.isatty(), time.perf_counter()
        self.reported = 0

    def __call__(self, batch: Batch) -> None:
        if not self.show:
            return
        for failure in batch.failures[self.reported :]:
            self.say(f"line {failure.line}, picture {failure.number}: {failure.reason}")
        self.reported = len(batch.failures)
        if self.live:
            print(f"\r\x1b[K{progress_line(batch)}", end="", file=sys.stderr, flush=True)
        elif time.perf_counter() - self.told >= TELL_SECONDS:
            self.told = time.perf_counter()
            self.say(progress_line(batch))

    def say(self, text: str) -> None:
        print(f"\r\x1b[K{text}" if self.live else text, file=sys.stderr, flush=True)


def progress_line(batch: Batch) -> str:
    """One line about a running batch."""
    failed = f", {len(batch.failures)} failed" if batch.failures else ""
    left = f", {duration(batch.left / batch.rate)} left" if batch.made and batch.left else ""
    return f"{batch.before + batch.made} of {batch.job.count} done{failed}, {speed(batch.rate)}{left}"


def speed(rate: float) -> str:
    return f"{rate:.2f} pictures/s" if rate >= 1 else f"{1 / rate:.1f} s/picture" if rate else "0 pictures/s"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    for size, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
