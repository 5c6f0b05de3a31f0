"""The judge of prompt adherence: a small classifier that reads a scene's attributes back from a picture.

It is trained on the recipe's drawings alone and never sees a generated picture, so it is independent of what it judges; its
score on drawings is the ceiling that generated pictures are held against. Words on signs are read by template matching.

    python -m benchmarks.judge --minutes 5      # trains benchmarks/judge.safetensors
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flux2_local.request import SIZES
from scripts.train_tiny.data import HELD_OUT_SEED
from scripts.train_tiny.latents import SERIES
from scripts.train_tiny.lettering import ADVANCE, draw_word
from scripts.train_tiny.render import TOKEN, grid_step, render
from scripts.train_tiny.scenes import (
    CLASSES,
    HELD_OUT_WORDS,
    PLACES,
    QUESTIONS,
    SLOT,
    USUAL,
    WORDS,
    Scene,
    Thing,
    answers,
    classes,
    random_scene,
)
from scripts.train_tiny.trainer import Run, Trainer, averaged, mixed

WEIGHTS = Path(__file__).parent / "judge.safetensors"
SIDE = 128
"""Pictures are read at SIDE×SIDE pixels, whatever their shape, which is told beside them."""

COUNTS = [len(classes(name)) for name, _ in QUESTIONS]
GRIDS = [(width // TOKEN, height // TOKEN) for width, height in SIZES.values()]
"""The presets' width and height in tokens."""
SHORTER = 256
"""Pixels along the shorter side of the drawings."""

SEED = 20_000_000
"""Of the first drawing of the judge's training; apart from the recipe's and from the held-out ones."""

PICTURES = 24_000
"""How many drawings the judge learns from."""


class Judge(nn.Module):
    """Five strided convolutions and one linear layer over what is left of the picture, 8×8."""

    def __init__(self) -> None:
        super().__init__()
        widths = (5, 32, 64, 96, 128, 128)
        self.layers = nn.ModuleList()
        for i, (a, b) in enumerate(itertools.pairwise(widths)):
            self.layers.append(nn.Conv2d(a, b, 3, stride=1 if i == 3 else 2, padding=1, bias=False))
            self.layers.append(nn.GroupNorm(8, b))
        self.squeeze = nn.Conv2d(widths[-1], 32, 1)
        self.head = nn.Linear(32 * 8 * 8, sum(COUNTS))

    def forward(self, x: Tensor) -> list[Tensor]:
        """[B, 5, SIDE, SIDE] of :func:`to_input` -> logits of every question."""
        for conv, norm in zip(self.layers[::2], self.layers[1::2], strict=True):
            x = F.silu(norm(conv(x)))
        out = self.head(F.silu(self.squeeze(x)).flatten(1))
        return list(out.float().split(COUNTS, -1))


def to_input(pictures: Sequence[Image.Image]) -> Tensor:
    """The pictures' colours in [-1, 1] and what :func:`with_sides` adds, [B, 5, SIDE, SIDE]."""
    small = [np.asarray(p.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)) for p in pictures]
    pixels = torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return with_sides(pixels, torch.tensor([[side / grid_step(min(p.size)) for side in p.size] for p in pictures]))


def with_sides(pixels: Tensor, sides: Tensor) -> Tensor:
    """[B, 3, SIDE, SIDE] and how many tokens lie across and down, [B, 2] -> [B, 5, SIDE, SIDE]. Where things stand goes by the
    picture's size."""
    planes = (sides[:, :, None, None] / 16 - 1.5).expand(-1, -1, SIDE, SIDE)
    return torch.cat([pixels, planes], 1)


@dataclass(frozen=True)
class Reading:
    """What the judge saw: a class for every attribute of the picture, and for every place's object."""

    whole: dict[str, str]
    kind: dict[str, str]
    colour: dict[str, str]
    size: dict[str, str]

    def verdicts(self, scene: Scene) -> Iterator[tuple[str, bool]]:
        """(attribute, right or wrong) for everything that ``scene`` asked for."""
        for name in CLASSES:
            yield name, self.whole[name] == getattr(scene, name)
        signs = () if scene.sign is None else (scene.sign.place,)
        asked = {thing.place for thing in scene.things}
        seen = {place for place in PLACES if self.kind[place] != "none"} - set(signs)
        yield "alone", len(seen) <= len(asked)
        for thing in scene.things:
            # An object counts wherever it is; its place is judged apart.
            place = thing.place if thing.place in seen else min(seen - asked, default=thing.place)
            yield "place", thing.place in seen
            yield "object", self.kind[place] == thing.kind
            yield "colour", place in seen and self.colour[place] == thing.colour
            yield "size", place in seen and self.size[place] == thing.size


def load(path: Path = WEIGHTS) -> Judge:
    """The trained judge.

    Raises:
        FileNotFoundError: it has not been trained.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there. Train it with: python -m benchmarks.judge")
    judge = Judge()
    judge.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return judge.eval().requires_grad_(False)


@torch.no_grad()
def read(judge: Judge, pictures: Sequence[Image.Image]) -> list[Reading]:
    logits = judge(to_input(pictures))
    readings = []
    for i in range(len(pictures)):
        found: dict[tuple[str, str | None], str] = {}
        for question, rows in zip(QUESTIONS, logits, strict=True):
            name, place = question
            values = classes(name)
            # Where there is an object at all is the kind's question; colour and size are the likeliest real ones.
            skip = 1 if place is not None and name != "kind" else 0
            found[question] = values[int(rows[i, skip:].argmax()) + skip]
        slots = {name: {place: found[name, place] for place in PLACES} for name in SLOT}
        readings.append(Reading({name: found[name, None] for name in CLASSES}, **slots))
    return readings


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
UNIT = 3.0
"""Pixels per unit of the lettering grid at which signs are read; pictures are scaled to it."""


def templates() -> Tensor:
    """Every letter as darkness [26, 1, h, w] with zero mean and unit norm, a cell with a margin around it."""
    w, h, scale = round(ADVANCE * UNIT), round(8 * UNIT), 4
    out = []
    for letter in LETTERS:
        cell = Image.new("L", (w * scale, h * scale))
        left = (w / UNIT - 4) / 2 * UNIT * scale
        draw_word(ImageDraw.Draw(cell), letter, left, UNIT * scale, UNIT * scale, (255,))  # type: ignore[arg-type]
        out.append(torch.from_numpy(np.asarray(cell.reduce(scale)).copy()).float())
    cells = torch.stack(out)[:, None]
    cells = cells - cells.mean((1, 2, 3), keepdim=True)
    return cells / cells.flatten(1).norm(dim=1)[:, None, None, None]


def read_sign(picture: Image.Image, length: int, place: str) -> str:
    """The letters on the sign at ``place``: of all positions there, the one where ``length`` cells in a row look most like
    letters, each cell read as its likeliest letter. That the sign has ``length`` letters is told, not read."""
    width, height = picture.size
    scale = UNIT * ADVANCE / grid_step(min(width, height))
    grey = picture.convert("L").resize((round(width * scale), round(height * scale)), Image.Resampling.BOX)
    dark = 1 - torch.from_numpy(np.asarray(grey).copy()).float()[None, None] / 255
    masks = templates()
    match = F.conv2d(dark, masks)
    ones = torch.ones_like(masks[:1])
    count = ones.numel()
    spread = F.conv2d(dark**2, ones) - F.conv2d(dark, ones) ** 2 / count
    match = (match / (spread.clamp_min(0) + 0.01 * count).sqrt())[0]
    best, letter = match.max(0)
    step = round(ADVANCE * UNIT)
    span = best.shape[1] - step * (length - 1)
    if span <= 0:
        return ""
    total = torch.stack([best[:, i * step : i * step + span] for i in range(length)]).sum(0)
    centre = torch.arange(span) + step * length / 2
    third = PLACES.index(place) * grey.width / 3
    total[:, (centre < third) | (centre >= third + grey.width / 3)] = -1e9
    y, x = divmod(int(total.argmax()), span)
    return "".join(LETTERS[int(letter[y, x + i * step])] for i in range(length))


def draw(seed: int) -> tuple[np.ndarray, tuple[int, int], list[int]]:
    """A small drawing of what a picture of a preset's size shows or, as often, one of any size, 16 to 32 tokens along each side; how
    many those are across and down; and what it shows."""
    rng = random.Random(seed)
    scene = random_scene(rng)
    across, down = rng.choice((rng.choice(GRIDS), (rng.randint(16, 32), rng.randint(16, 32))))
    token = SHORTER / min(across, down)
    picture = render(scene, round(across * token), round(down * token), token)
    picture = picture.resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(picture), (across, down), answers(scene)


def varied(x: Tensor) -> Tensor:
    """Slight changes of focus, light and grain, so that the judge reads shapes and colours, not the renderer's pixels."""
    soft = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    share = torch.rand(len(x), 1, 1, 1)
    x = x + share * (soft - x)
    x = x * (0.9 + 0.2 * torch.rand(len(x), 1, 1, 1)) + 0.1 * (torch.rand(len(x), 3, 1, 1) - 0.5)
    return x + 0.05 * torch.rand(len(x), 1, 1, 1) * torch.randn_like(x)


def loss_of(judge: Judge, x: Tensor, right: Tensor) -> Tensor:
    with mixed(x.device.type):
        logits = judge(x)
    return torch.stack([F.cross_entropy(row, right[:, i]) for i, row in enumerate(logits)]).mean()


def train(run: Run, pictures: int) -> None:
    """Draw, train, and write :data:`WEIGHTS`."""
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        drawn = list(pool.map(draw, range(SEED, SEED + pictures), chunksize=64))
    pixels = torch.from_numpy(np.stack([p for p, _, _ in drawn])).permute(0, 3, 1, 2)
    sides, right = torch.tensor([s for _, s, _ in drawn]), torch.tensor([a for _, _, a in drawn])
    judge = Judge().to(memory_format=torch.channels_last)
    trainer = Trainer(run, "judge", judge, lr=2e-3, muon=5e-3, ema=0.998)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            chosen = torch.randint(len(pixels), (64,))
            x = with_sides(varied(pixels[chosen].float() / 127.5 - 1), sides[chosen])
            yield x.contiguous(memory_format=torch.channels_last), right[chosen]

    trainer.fit(batches(), lambda x, y: loss_of(judge, x, y))
    with averaged(trainer):
        save_file({k: v.bfloat16().contiguous() for k, v in judge.state_dict().items()}, WEIGHTS)
    print(ceiling(load(), 400))


def held_out_scenes(count: int) -> list[Scene]:
    """Scenes that no picture shows from which the judge or the transformer learnt, wherever trees and stars are, each with at least
    one object or a sign. Words on signs are such as training has none of, or random letters."""
    scenes, seed = [], HELD_OUT_SEED + 500_000
    while len(scenes) < count:
        scene = random_scene(random.Random(seed))
        seed += 1
        if scene.sign and scene.sign.word in WORDS:
            scene = replace(scene, sign=replace(scene.sign, word=HELD_OUT_WORDS[seed % len(HELD_OUT_WORDS)]))
        if (scene.things or scene.sign) and replace(scene, seed=0) not in learnt():
            scenes.append(scene)
    return scenes


@cache
def learnt() -> set[Scene]:
    """What the pictures show from which the transformer and the judge learn, whatever the seed alone decides."""
    shown = (series.picture(row)[0] for series in SERIES.values() for row in range(series.count))
    judged = (random_scene(random.Random(SEED + row)) for row in range(PICTURES))
    return {replace(scene, seed=0) for scene in itertools.chain(shown, judged)}


def verdicts(judge: Judge, scenes: Sequence[Scene], pictures: Sequence[Image.Image]) -> dict[str, list[bool]]:
    """Right or wrong for everything that was asked for, by attribute; "sign" counts whole words of up to five letters."""
    tally: dict[str, list[bool]] = {}
    for scene, picture, reading in zip(scenes, pictures, read(judge, pictures), strict=True):
        for name, right in reading.verdicts(scene):
            tally.setdefault(name, []).append(right)
        if scene.sign is not None and len(scene.sign.word) <= 5:
            said = read_sign(picture, len(scene.sign.word), scene.sign.place)
            tally.setdefault("sign", []).append(said == scene.sign.word)
            tally.setdefault("letters", []).extend(a == b for a, b in zip(said, scene.sign.word, strict=False))
    return tally


def score(judge: Judge, scenes: Sequence[Scene], pictures: Sequence[Image.Image]) -> dict[str, float]:
    """Share of right readings per attribute, in percent."""
    return {name: 100 * sum(rights) / len(rights) for name, rights in verdicts(judge, scenes, pictures).items()}


def lone_scenes(count: int) -> list[Scene]:
    """Scenes of one object and nothing else, as a prompt means it that does not say its colour, size and place."""
    alone = (s for s in held_out_scenes(10 * count + 100) if len(s.things) == 1 and s.sign is None)
    return [
        replace(s, things=(Thing(thing.kind, USUAL[thing.kind], "medium", "center"),))
        for s in itertools.islice(alone, count)
        for thing in s.things
    ]


def lone_score(judge: Judge, scenes: Sequence[Scene], pictures: Sequence[Image.Image]) -> dict[str, float]:
    """Of :func:`lone_scenes`, percent of pictures with exactly one object ("once"), and percent of pictures with the right one in the
    middle in its usual colour ("unsaid")."""
    readings = read(judge, pictures)
    once = [sum(kind != "none" for kind in reading.kind.values()) == 1 for reading in readings]
    usual = [
        (reading.kind[thing.place], reading.colour[thing.place]) == (thing.kind, thing.colour)
        for scene, reading in zip(scenes, readings, strict=True)
        for thing in scene.things
    ]
    return {"once": 100 * sum(once) / len(once), "unsaid": 100 * sum(usual) / len(usual)}


def ceiling(judge: Judge, count: int, width: int = 512, height: int = 512) -> dict[str, float]:
    """The judge's score on drawings of held-out scenes."""
    scenes = held_out_scenes(count)
    return score(judge, scenes, [render(s, width, height) for s in scenes])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.judge", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--pictures", type=int, default=PICTURES)
    parser.add_argument("--work", type=Path, default=Path("build/judge"))
    args = parser.parse_args()
    train(Run(args.work, args.minutes), args.pictures)


if __name__ == "__main__":
    main()
