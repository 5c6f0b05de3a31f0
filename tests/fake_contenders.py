"""Contenders that draw nothing, for testing the loop around them. As a program it is their process, and with arguments
``flux2-local bench`` of them."""

from __future__ import annotations

import os
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np

from flux2_local import frames
from flux2_local.bench import worker
from flux2_local.bench.subject import Loaded, Subject, Told

if TYPE_CHECKING:
    from flux2_local.bench.contenders import Contender

FLOOR = 0.01
"""Seconds that a picture takes at least."""


def build(
    subject: Subject, name: str, seconds: float = FLOOR, loading: float = 0.0, compiles: bool = False, dies: int = 0
) -> Loaded:
    """A contender whose pictures have its seed's colour.

    Args:
        seconds: of a picture.
        loading: seconds of loading.
        compiles: whether it says so.
        dies: the round whose picture it dies in; never in its first.
    """
    note(f"{name} begins")
    time.sleep(loading)

    def draw(prompt: str, seed: int, steps: int | None = None) -> tuple[np.ndarray, Told]:
        note(f"{name} draws {seed} in {steps}")
        if dies and seed == dies:
            print("a last word", file=sys.stderr, flush=True)
            os._exit(3)
        time.sleep(seconds)
        return np.full((16, 16, 3), seed, np.uint8), Told({"denoise": seconds})

    return Loaded(draw, {"dtype": "float32", "steps": subject.steps, "compiles": compiles})


def note(line: str) -> None:
    """What a test reads to know what went on, and in which process."""
    with Path(os.environ["FAKE_LOG"]).open("a") as log:
        log.write(f"{os.getpid()} {line}\n")


FAKES = {
    name: partial(build, name=name, **how)
    for name, how in {
        "quick": {},
        "steady": {},
        "slow": {"seconds": 60.0},
        "slow to load": {"loading": 60.0},
        "slow to compile": {"seconds": 60.0, "compiles": True},
        "compiling": {"compiles": True},
        "mortal": {"dies": 1},
    }.items()
}
PROCESS = (sys.executable, __file__)


def contenders() -> dict[str, Contender]:
    from flux2_local.bench.contenders import Contender

    return {name: Contender(name, "ours", f"a fake, {name}", build) for name, build in FAKES.items()}


def bench() -> None:
    """The command, with nobody but the fakes."""
    from flux2_local.bench import runner
    from flux2_local.bench.contenders import CONTENDERS
    from flux2_local.cli import main
    from flux2_local.cli.bench import app

    runner.WORKER = PROCESS
    CONTENDERS.clear()
    CONTENDERS.update(contenders())
    main(app)


if __name__ == "__main__":
    if sys.argv[1:]:
        bench()
    # The real table imports torch, for which a test would wait longer than for anything else.
    table = {name: SimpleNamespace(build=build) for name, build in FAKES.items()}
    sys.modules["flux2_local.bench.contenders"] = SimpleNamespace(CONTENDERS=table)  # type: ignore[assignment]
    frames.work(worker.serve)
