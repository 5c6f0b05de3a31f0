"""What every contender of a run is given alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

PROMPTS = (
    "a lighthouse at dusk",
    "a red ball on the left and a blue box on the right on a green meadow by day",
    "a large yellow star in the desert at night",
    "a small white boat on the sea with mountains in the background at sunset",
    "a purple house with pine trees in the snow",
    "a pink hot air balloon above a city skyline at dawn",
    "a large green mushroom on the left in a meadow in the rain",
    'a wooden sign that says "HELLO" on a sandy beach',
)
"""What is drawn unless the caller brings prompts; also the contact sheet's."""

GUIDANCE = 2.5


@dataclass(frozen=True)
class Judged:
    """Prompts whose pictures somebody can judge, which this package cannot: ``benchmarks/speed.py`` brings them.

    Attributes:
        prompts: drawn instead of :data:`PROMPTS`, round after round from the first.
        judge: (pictures of the first rounds, uint8 [H, W, 3]) -> for each a "1" or a "0" per thing that its prompt asks for, in an
            order that is the prompt's: whether it shows it.
        ceiling: (width, height, rounds) -> the same of pictures that show everything: what the judge itself gets wrong.
    """

    prompts: Sequence[str]
    judge: Callable[[Sequence[np.ndarray]], list[str]]
    ceiling: Callable[[int, int, int], list[str]]


@dataclass(frozen=True)
class Subject:
    """The work: everything that contenders have in common.

    Attributes:
        model: a name, a hub id or a folder.
        device: torch's name of it.
        width, height: pixels.
        steps: of the standard variant.
    """

    model: str
    device: str
    width: int
    height: int
    steps: int

    @property
    def kind(self) -> str:
        """ "cuda", "cpu" or "mps"."""
        return self.device.split(":")[0]

    @property
    def size(self) -> str:
        return f"{self.width}×{self.height}"


@dataclass(frozen=True)
class Told:
    """What a contender says of a picture.

    Attributes:
        stages: seconds each, where they are known.
        skipped: how many times a double and a single block were left out.
        plan: of ours, what was decided for this picture.
    """

    stages: dict[str, float] = field(default_factory=dict)
    skipped: tuple[int, int] = (0, 0)
    plan: dict[str, str] = field(default_factory=dict)


Draw = Callable[[str, int, int | None], "tuple[np.ndarray, Told]"]
"""(prompt, seed, steps; None: as many as the contender takes) -> a picture, uint8 [H, W, 3], and what there is to say of it."""


@dataclass(frozen=True)
class Loaded:
    """A contender ready to draw.

    Attributes:
        draw: makes one picture and waits for the device.
        facts: what runs, for the record: ``dtype`` of activations, ``steps``, whether it ``compiles`` while it draws its first
            picture, and ``products``: what the transformer's linear layers multiply in, where that is not ``dtype``.
    """

    draw: Draw
    facts: dict[str, Any] = field(default_factory=dict)
