"""What a picture shows as a whole, which the transformer's middle must know, and what lies on which of its tokens, by which its error
counts too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .network import CONFIG
from .render import ANCHORS, CELL, HORIZON, PLACE, TOKEN, anchors, grid_step, line, scenery, spots
from .scenes import CLASSES, COLOURS, KINDS, Scene, Sign, Thing, answers

SIGN, ORB = len(KINDS) + 1, len(KINDS) + 2
"""The numbers of a sign and of the sun or moon among kinds; 0 is landscape."""

PLAIN = -1
"""The number among colours of what has none of its own."""

PARTS = 16
"""Into how many parts each side of a picture is divided to compare pictures of different sizes."""

LETTERS = 1 + 26
POSE = 3
CELLS = TOKEN // CELL
SIDES = list(ANCHORS)
SCENE = [len(values) for values in CLASSES.values()]
"""How many answers there are to each question about a whole scene."""


class Layout(NamedTuple):
    """What lies on every token.

    Attributes:
        kind: [B, N], 0 for landscape.
        colour: of a thing, [B, N], else :data:`PLAIN`.
        pose: of the token's middle in the box of what lies there, x and y, -1 to 1 within it, and the logarithm of the box's height in
            tokens, [B, N, 3].
        letters: under the token's left and right half, [B, N, 2], 0 for none.
        outline: which of its cells things, sun or moon cover, [B, N, 16].
        scenery: whether the landscape has more than sky and ground there, [B, N], 1 or 0.
        nearness: to each of the places across, and to the horizon, [B, N, 4], of :func:`nearness`.
        part: of :data:`PARTS` by as many, in which the token lies, [B, N].
    """

    kind: Tensor
    colour: Tensor
    pose: Tensor
    letters: Tensor
    outline: Tensor
    scenery: Tensor
    nearness: Tensor
    part: Tensor


class Teller(nn.Module):
    """Tells from a hidden state in the middle of the network what the picture shows as a whole, and what lies on the token: nothing
    but landscape, a kind of thing, a sign, the sun or moon, its colour, where in it the token lies, the letters under the token's left
    and right half, its outline, and whether the landscape has more than sky and ground there. In strong noise nothing shows yet, and
    the prompt must have been read to tell. :meth:`placed` tells which preset's places the picture has, and how far the token lies from
    each is asked too: what stands where goes by both."""

    def __init__(self) -> None:
        super().__init__()
        width = CONFIG["num_attention_heads"] * CONFIG["attention_head_dim"]
        self.layer = nn.Linear(width, ORB + 1 + POSE + 2 * LETTERS)
        self.colour = nn.Linear(width, len(COLOURS))
        self.outline = nn.Linear(width, CELLS * CELLS)
        self.scene = nn.Linear(width, sum(SCENE))
        self.sides = nn.Linear(width, 2 * len(SIDES))
        self.landscape = nn.Linear(width, 1)
        self.near = nn.Linear(width, len(PLACE) + 1)

    def forward(self, hidden: Tensor, weight: Tensor, shown: Tensor, lies: Layout) -> Tensor:
        """How wrong it is; ``weight`` is what telling each token's kind counts, [B, N], ``shown`` is of :func:`shown`."""
        hidden = F.layer_norm(hidden.float(), hidden.shape[-1:])
        seen = cross_entropies(self.scene(hidden), SCENE, shown[:, : len(SCENE)])
        k, p, a, b = self.layer(hidden).split([ORB + 1, POSE, LETTERS, LETTERS], -1)
        there, board, own = lies.kind > 0, lies.kind == SIGN, lies.colour != PLAIN
        wrong = mean(F.cross_entropy(k.transpose(1, 2), lies.kind, reduction="none"), weight)
        paint = F.cross_entropy(self.colour(hidden).transpose(1, 2), lies.colour, reduction="none", ignore_index=PLAIN)
        painted = mean(paint, own)
        away = mean((p - lies.pose).square().mean(-1), there)
        drawn = F.binary_cross_entropy_with_logits(self.outline(hidden), lies.outline, reduction="none").mean(-1)
        shaped = mean(drawn, there & ~board)
        spelt = sum(
            mean(F.cross_entropy(x.transpose(1, 2), lies.letters[..., i], reduction="none"), board) / 2
            for i, x in enumerate((a, b))
        )
        behind = F.binary_cross_entropy_with_logits(self.landscape(hidden)[..., 0], lies.scenery)
        near = F.mse_loss(self.near(hidden), lies.nearness)
        return near + wrong + painted + away + spelt + shaped + seen + behind

    def placed(self, hidden: Tensor, shown: Tensor) -> Tensor:
        """How wrong it is on the preset's sides of ``shown``. A picture's size shows only in where its last tokens lie."""
        hidden = F.layer_norm(hidden.float(), hidden.shape[-1:])
        return cross_entropies(self.sides(hidden), [len(SIDES)] * 2, shown[:, len(SCENE) :])


def mean(x: Tensor, weight: Tensor) -> Tensor:
    """The weighted mean, 0 where nothing counts."""
    return (weight * x).sum() / weight.sum().clamp(min=1)


def cross_entropies(logits: Tensor, counts: list[int], right: Tensor) -> Tensor:
    """The sum of cross entropies of questions with so many answers each, which all tokens [B, N, sum of counts] answer alike."""
    views = logits.transpose(1, 2).split(counts, 1)
    return torch.stack(
        [
            F.cross_entropy(view, answer[:, None].expand(-1, view.shape[2]))
            for view, answer in zip(views, right.unbind(1), strict=True)
        ]
    ).sum()


def shown(scenes: Sequence[Scene], grids: Sequence[tuple[int, int]]) -> Tensor:
    """Time, weather, ground, backdrop and trees of every scene, and by which presets' sides places go across and down in a picture of
    so many tokens (height, width), as classes, [B, 7]."""
    rows = []
    for scene, (height, width) in zip(scenes, grids, strict=True):
        sides = anchors(width, height, grid_step(min(height, width), 1))
        rows.append([*answers(scene)[: len(CLASSES)], *map(SIDES.index, sides)])
    return torch.tensor(rows)


def layout(scenes: list[Scene], bucket: tuple[int, int]) -> Layout:
    """What lies where in pictures of so many tokens (height, width)."""
    height, width = bucket
    kind = np.zeros((len(scenes), height, width), np.int64)
    colour = np.full_like(kind, PLAIN)
    pose = np.zeros((len(scenes), height, width, POSE), np.float32)
    letters = np.zeros((len(scenes), height, width, 2), np.int64)
    near = torch.from_numpy(nearness(height, width)).flatten(0, 1)
    outline = np.zeros((len(scenes), height * CELLS, width * CELLS), bool)
    behind = np.zeros((len(scenes), height, width), np.float32)
    for i, scene in enumerate(scenes):
        behind[i] = scenery(scene, width * TOKEN, height * TOKEN)
        for spot in spots(scene, width * TOKEN, height * TOKEN):
            left, top, right, bottom = (v / TOKEN for v in (spot.left, spot.top, spot.right, spot.bottom))
            rows = slice(max(0, round(top)), min(height, max(round(bottom), round(top) + 1)))
            columns = slice(max(0, round(left)), min(width, max(round(right), round(left) + 1)))
            its = np.zeros((height, width), bool)
            its[rows, columns] = True
            if spot.outline is not None:
                outline[i] |= spot.outline
                its |= spot.outline.reshape(height, CELLS, width, CELLS).any((1, 3))
            y, x = (at + 0.5 for at in np.nonzero(its))
            kind[i, its] = number(spot.what)
            colour[i, its] = COLOURS.index(spot.what.colour) if isinstance(spot.what, Thing) else PLAIN
            across, down = 2 * (x - left) / (right - left) - 1, 2 * (y - top) / (bottom - top) - 1
            pose[i, its] = np.stack([across, down, np.full_like(x, np.log(bottom - top))], -1)
            if isinstance(spot.what, Sign):
                start, upper, side = (v / TOKEN for v in spot.letters)
                row = int(upper + side / 2)
                for half in (0, 1):
                    middle = np.arange(columns.start, columns.stop) + 0.25 + half / 2
                    index = np.floor((middle - start) / side).astype(int)
                    under = [ord(spot.what.word[n]) - 64 if 0 <= n < len(spot.what.word) else 0 for n in index]
                    letters[i, row, columns, half] = under
    cells = outline.reshape(len(scenes), height, CELLS, width, CELLS).transpose(0, 1, 3, 2, 4)
    return Layout(
        torch.from_numpy(kind).flatten(1),
        torch.from_numpy(colour).flatten(1),
        torch.from_numpy(pose).flatten(1, 2),
        torch.from_numpy(letters).flatten(1, 2),
        torch.from_numpy(cells.astype(np.float32)).flatten(3).flatten(1, 2),
        torch.from_numpy(behind).flatten(1),
        near.expand(len(scenes), -1, -1),
        parts(height, width).expand(len(scenes), -1),
    )


def parts(height: int, width: int) -> Tensor:
    """In which part of a picture of so many tokens each token lies, [N]."""
    row, column = torch.arange(height) * PARTS // height, torch.arange(width) * PARTS // width
    return (row[:, None] * PARTS + column).flatten()


def nearness(height: int, width: int) -> np.ndarray:
    """How far right of each place, and how far below the horizon, tokens' middles lie in a picture of so many, in quarters of its
    scale, from -1 to 1, [height, width, 4]."""
    step = grid_step(min(height, width), 1)
    across, down = anchors(width, height, step)
    scale = ANCHORS[min(across, down)]
    y, x = (np.mgrid[:height, :width] + 0.5) / step
    lines = [x - line(across * at) for at in PLACE.values()] + [y - line(down * HORIZON)]
    return np.stack(lines, -1).clip(-scale / 4, scale / 4).astype(np.float32) * 4 / scale


def number(what: Thing | Sign | Literal["orb"]) -> int:
    """Among kinds."""
    if isinstance(what, Thing):
        return 1 + KINDS.index(what.kind)
    return SIGN if isinstance(what, Sign) else ORB


def around(kind: Tensor, count: int) -> Tensor:
    """Indices [B, count] of some of a picture's tokens: of its sign and then of its things and its sun all, as far as they fit, and
    of the rest any."""
    score = torch.rand(kind.shape, device=kind.device) + (kind > 0) + (kind == SIGN)
    return score.topk(count, 1).indices.sort(1).values
