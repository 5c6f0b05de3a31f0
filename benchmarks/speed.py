"""``flux2-local bench`` of the bundled model, with adherence beside the other figures of quality.

    python -m benchmarks.speed                     # all of `flux2-local bench --help`
    python -m benchmarks.speed --rounds 20         # four times the default's pictures to judge

The prompts are those of ``benchmarks/quality.py``, of scenes that neither the model nor the judge was trained on, from the
first. A few pictures say little about adherence: the result has how many things they were asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image

from flux2_local.bench.subject import Judged
from flux2_local.cli import main as run
from flux2_local.cli.bench import app
from scripts.train_tiny.render import render
from scripts.train_tiny.scenes import Scene

from . import judge
from .quality import prompts

SCENES = 200
reader = cache(judge.load)


def verdicts(scenes: Sequence[Scene], pictures: Sequence[Image.Image]) -> list[str]:
    """For each picture a "1" per thing asked for that the judge finds, and a "0" per other. Letters count as their words alone."""
    found = (judge.verdicts(reader(), [scene], [picture]) for scene, picture in zip(scenes, pictures, strict=True))
    return ["".join("01"[right] for name, row in rows.items() if name != "letters" for right in row) for rows in found]


def judged() -> Judged:
    """Held-out scenes with their prompts and the judge."""
    scenes = judge.held_out_scenes(SCENES)

    def repeated(rounds: int) -> list[Scene]:
        return [scenes[i % SCENES] for i in range(rounds)]

    def read(pictures: Sequence[np.ndarray]) -> list[str]:
        return verdicts(repeated(len(pictures)), [Image.fromarray(picture) for picture in pictures])

    def ceiling(width: int, height: int, rounds: int) -> list[str]:
        asked = repeated(rounds)
        return verdicts(asked, [render(scene, width, height) for scene in asked])

    return Judged(prompts(scenes), read, ceiling)


if __name__ == "__main__":
    run(app, judged())
