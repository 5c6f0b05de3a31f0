"""What a person sees while a command works: lines and one bar, on standard error."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    from ..pipeline import Flux2
    from ..progress import Progress

WORDS = {
    "expand": "expanding the prompt",
    "encode": "reading the prompt",
    "references": "reading the pictures",
    "decode": "decoding",
    "safety": "checking",
}


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
