"""Scene -> picture. Everything is drawn here, with gradients, polygons and ellipses; no picture is read from anywhere.

Drawn at twice the size and averaged down, so edges are smooth at any resolution. Whatever stands somewhere stands on a
grid of the transformer's tokens, a letter fills one, and places and lengths go by the few :data:`ANCHORS` whatever the
picture's size: what a small network has to learn of a shape is then two sets of tokens, at four places along each side, not one
for every shift by a pixel and every length of a side.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from .lettering import ADVANCE, draw_word
from .scenes import Scene, Sign, Thing

RGB = tuple[int, int, int]

SKIES: dict[str, tuple[RGB, RGB]] = {  # time: (zenith, horizon)
    "day": ((62, 132, 214), (186, 220, 246)),
    "dawn": ((128, 150, 212), (252, 206, 190)),
    "dusk": ((70, 56, 118), (250, 146, 84)),
    "night": ((9, 13, 38), (40, 52, 100)),
}
AMBIENT: dict[str, tuple[float, float, float]] = {  # how the hour tints whatever is not sky
    "day": (1.0, 1.0, 1.0),
    "dawn": (0.98, 0.90, 0.90),
    "dusk": (0.92, 0.76, 0.72),
    "night": (0.50, 0.55, 0.72),
}
GROUND: dict[str, RGB] = {
    "grass": (104, 172, 80),
    "sand": (232, 202, 142),
    "snow": (238, 243, 250),
    "sea": (40, 116, 172),
}
PAINT: dict[str, RGB] = {
    "red": (212, 44, 44),
    "orange": (242, 136, 36),
    "yellow": (248, 214, 52),
    "green": (46, 158, 74),
    "blue": (44, 96, 214),
    "purple": (136, 60, 178),
    "pink": (246, 140, 186),
    "white": (246, 246, 246),
}
HEIGHT = {"small": 0.15, "medium": 0.25, "large": 0.38}  # of the picture's scale
DEPTH = {"small": 0.30, "medium": 0.30, "large": 0.42}  # of the ground, where a thing's foot is
HORIZON = 0.58  # of the height
PLACE = {"left": 0.21, "center": 0.5, "right": 0.79}  # of the width
ORB = {"dawn": 0.35, "day": 0.65, "dusk": 0.65, "night": 0.35}
"""Where the sun or moon stands, of the width. Were it anywhere, a small network would sometimes draw two."""
SUN: dict[str, tuple[float, RGB, float, float]] = {
    "day": (0.25, (255, 244, 190), 0.75, 0.35),
    "dawn": (0.6, (255, 232, 190), 0.4, 0.65),
    "dusk": (0.6, (255, 206, 120), 0.4, 0.65),
}
"""How far down to the horizon the sun stands, low ones above hills and most things; its colour, how much of it its glow has, and how
much white is in the sun itself. One that hardly differs from its glow is learnt badly."""
RIM = 0.95
"""A sun's radius, of half of its tokens across."""
SUPERSAMPLE = 2
TOKEN = 32
"""Pixels along one side of a transformer token."""
ANCHORS = {16: 16, 18: 16, 24: 24, 32: 24}
"""The presets' sides in tokens. Places go by the one of them that is nearest to a picture's side, counted from its top left
corner, and lengths by that of the shorter side, each of which has a scale, also in tokens."""

HOUSES = ((3, 0.18), (2, 0.36), (4, 0.18), (3, 0.36))
"""A city from left to right, over and over: height in sixteenths of the picture's scale, and how hazy."""

PUFFS = ((-1.6, -0.02, 0.6), (-0.75, -0.3, 0.85), (0.1, -0.4, 0.95), (0.9, -0.2, 0.8), (1.65, 0.0, 0.58))
"""A cloud: x and y of its discs and their radii, in sizes."""


def mix(a: RGB, b: RGB, t: float) -> RGB:
    """Linear interpolation from ``a`` (t=0) to ``b`` (t=1)."""
    return tuple(round(x + (y - x) * t) for x, y in zip(a, b, strict=True))  # type: ignore[return-value]


class Painter:
    """A canvas with the light of one scene. Coordinates are canvas pixels; ``grid`` is the step of places, ``across`` and ``down``
    are the sides that they are fractions of, ``u`` is what lengths are fractions of."""

    def __init__(self, scene: Scene, width: int, height: int, token: float = TOKEN) -> None:
        self.scene = scene
        self.w, self.h = width * SUPERSAMPLE, height * SUPERSAMPLE
        side = min(self.w, self.h)
        self.grid = grid_step(side, token * SUPERSAMPLE)
        across, down = anchors(self.w, self.h, self.grid)
        self.across, self.down = across * self.grid, down * self.grid
        self.u = ANCHORS[min(across, down)] * self.grid
        self.rng = random.Random(scene.seed)
        self.horizon = self.snap(self.down * HORIZON)
        self.earth: list[RGB] = []
        ambient = np.array(AMBIENT[scene.time])
        if scene.weather in ("rain", "snow"):
            ambient = ambient * 0.9
        self.ambient = ambient
        self.image = Image.new("RGB", (self.w, self.h))
        self.draw = ImageDraw.Draw(self.image)

    def snap(self, place: float) -> float:
        """The nearest line of the grid."""
        return line(place / self.grid) * self.grid

    def cells(self, bottom: float) -> Iterator[tuple[float, float]]:
        """Top left corners of all of the grid's cells above ``bottom``."""
        for row in range(math.ceil(bottom / self.grid)):
            for column in range(math.ceil(self.w / self.grid)):
                yield column * self.grid, row * self.grid

    def lit(self, colour: RGB, shade: float = 1.0) -> RGB:
        """``colour`` under the scene's light, times ``shade``."""
        return tuple(int(min(255, c * a * shade)) for c, a in zip(colour, self.ambient, strict=True))  # type: ignore[return-value]

    def gradient(self, top: float, bottom: float, colours: list[RGB]) -> None:
        """A smooth vertical gradient through ``colours`` from ``top`` to ``bottom``, and on with the last one below."""
        y0, y1 = round(top), round(bottom)
        position = np.arange(self.h - y0) * (len(colours) - 1) / (y1 - y0 - 1)
        table = np.array(colours, dtype=np.float64)
        rows = np.stack([np.interp(position, range(len(colours)), table[:, c]) for c in range(3)], -1)
        strip = Image.fromarray(np.rint(rows).astype(np.uint8)[:, None, :]).resize((self.w, self.h - y0))
        self.image.paste(strip, (0, y0))

    def glow(self, x: float, y: float, radius: float, colour: RGB, strength: float) -> None:
        """Blend a soft disc of light over what is there."""
        size = max(2, round(radius / 8))
        axis = np.linspace(-1, 1, 2 * size)
        fall = np.clip(1 - np.sqrt(axis[:, None] ** 2 + axis[None] ** 2), 0, 1) ** 2 * strength * 255
        mask = Image.fromarray(fall.astype(np.uint8)).resize((round(2 * radius),) * 2, Image.Resampling.BILINEAR)
        self.image.paste(colour, (round(x - radius), round(y - radius)), mask)

    def disc(self, x: float, y: float, rx: float, colour: RGB, ry: float | None = None) -> None:
        ry = rx if ry is None else ry
        self.draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=colour)

    def poly(self, points: list[tuple[float, float]], colour: RGB) -> None:
        self.draw.polygon(points, fill=colour)

    def rect(self, x0: float, y0: float, x1: float, y1: float, colour: RGB) -> None:
        self.draw.rectangle((x0, y0, x1, y1), fill=colour)

    # ---- scenery, from far to near ----

    def sky(self) -> None:
        s = self.scene
        top, low = SKIES[s.time]
        if s.weather != "clear":
            grey: RGB = {"day": (176, 184, 194), "dawn": (186, 178, 184), "dusk": (134, 112, 122), "night": (40, 44, 58)}[s.time]  # type: ignore[assignment]  # fmt: skip
            t = 0.35 if s.weather == "cloudy" else 0.8
            top, low = mix(top, grey, t), mix(low, grey, t * 0.8)
        self.gradient(0, self.horizon + 2, [top, mix(top, low, 0.4), low])
        if s.time == "night" and s.weather == "clear":
            self.stars()
        if s.weather == "clear":
            self.orb()
        else:
            self.clouds()

    def stars(self) -> None:
        for x, y in self.cells(self.horizon * 0.8):
            if self.rng.random() < 0.25:
                dx, dy = self.rng.choice(((0.3, 0.35), (0.7, 0.6)))
                self.disc(x + dx * self.grid, y + dy * self.grid, self.u * 0.0036, (226, 228, 220))

    def hang(self) -> tuple[float, float, float]:
        """Where the sun or moon hangs: its middle, and half of the whole tokens across that it fills but for :data:`RIM`."""
        time = self.scene.time
        height = 0.28 if time == "night" else SUN[time][0]
        return self.snap(self.across * ORB[time]), self.snap(self.horizon * height), self.snap(self.u * 0.07)

    def orb(self) -> None:
        time = self.scene.time
        x, y, half = self.hang()
        r = RIM * half
        if time == "night":
            self.glow(x, y, r * 4, (190, 200, 240), 0.5)
            self.disc(x, y, r, (240, 240, 222))
            for dx, dy, k in ((-0.3, -0.2, 0.22), (0.25, 0.3, 0.16), (0.3, -0.35, 0.12)):
                self.disc(x + dx * r, y + dy * r, k * r, (216, 216, 200))
            return
        _, colour, glow, white = SUN[time]
        self.glow(x, y, r * 3.5, colour, glow)
        self.disc(x, y, r, mix(colour, (255, 255, 255), white))

    def along(self, step: float) -> Iterator[tuple[int, float]]:
        """Numbered places from the left edge to the right one, ``step`` scales apart. They are the same in every picture: were they
        any, a small network would have to settle each, and mixes some up."""
        for i in range(math.ceil(self.w / (self.u * step)) + 2):
            yield i, self.snap(self.u * step * i)

    def clouds(self) -> None:
        s = self.scene
        base: RGB = {"day": (250, 252, 255), "dawn": (255, 228, 222), "dusk": (236, 150, 126), "night": (66, 76, 112)}[s.time]  # type: ignore[assignment]  # fmt: skip
        if s.weather in ("rain", "snow"):
            base = mix(base, (120, 126, 138) if s.time != "night" else (34, 38, 52), 0.6)
        size = self.u * 0.058
        for i, x in self.along(0.3125):
            y = self.snap(self.horizon * (0.2, 0.45)[i % 2])
            for shade, drop in ((0.9, 0.22), (1.0, 0.0)):
                colour = tuple(int(c * shade) for c in base)
                for dx, dy, k in PUFFS:
                    self.disc(x + dx * size, y + (dy + drop) * size, k * size, colour, k * size * 0.62)  # type: ignore[arg-type]

    def backdrop(self) -> None:
        kind = self.scene.backdrop
        haze = SKIES[self.scene.time][1]
        if kind == "mountains":
            self.mountains(haze)
        elif kind == "hills":
            self.hills(haze)
        elif kind == "city":
            self.city(haze)

    def hills(self, haze: RGB) -> None:
        green = (96, 140, 92) if self.scene.ground != "snow" else (186, 198, 214)
        tops = list(self.along(0.5))
        for height, shade, shift in ((0.15, 0.45, 0), (0.09, 0.2, 0.25)):
            for _, x in tops:
                colour = mix(self.lit(green), haze, shade)
                self.disc(
                    x + self.snap(shift * self.u), self.horizon + self.u * 0.02, self.u * 0.4, colour, self.u * height
                )

    def mountains(self, haze: RGB) -> None:
        dark = self.scene.time == "night"
        peaks = list(self.along(0.375))
        for tall, shade, shift in ((0.3, 0.5, 0), (0.19, 0.25, 0.1875)):
            rock = mix(self.lit((150, 156, 172) if dark else (98, 104, 128)), haze, shade)
            for i, left in peaks:
                x, y = left + self.snap(shift * self.u), self.horizon + 2
                height = self.u * tall * (0.8, 1.05)[i % 2]
                half = height * 1.1
                self.poly([(x - half, y), (x, y - height), (x + half, y)], rock)
                self.poly([(x, y - height), (x + half, y), (x + half * 0.2, y)], mix(rock, (30, 34, 60), 0.18))
                if not shift:
                    k = 0.3
                    snow = mix(self.lit((250, 252, 255)), haze, 0.2)
                    self.poly(
                        [
                            (x - half * k, y - height * (1 - k)),
                            (x, y - height),
                            (x + half * k, y - height * (1 - k)),
                            (x + half * k * 0.3, y - height * (1 - k * 1.25)),
                            (x - half * k * 0.3, y - height * (1 - k * 0.85)),
                        ],
                        snow,
                    )

    def city(self, haze: RGB) -> None:
        lights = self.scene.time in ("night", "dusk")
        width, cell = self.snap(self.u * 0.125), self.grid / 2
        for i, x in self.along(width / self.u):
            storeys, shade = HOUSES[i % len(HOUSES)]
            top = self.horizon - self.snap(self.u * storeys / 16)
            wall = mix(self.lit((110, 116, 138)), haze, shade)
            self.rect(x, top, x + width - 1, self.horizon + 2, wall)
            for row in range(round((self.horizon - top) / cell)):
                for k in range(round(width / cell)):
                    on = lights and (k % 2 or row % 2)
                    pane = (255, 224, 140) if on else mix(wall, (40, 46, 70), 0.35)
                    left, upper = x + cell * (k + 0.28), top + cell * (row + 0.3)
                    self.rect(left, upper, left + cell * 0.42, upper + cell * 0.5, pane)

    def ground(self) -> None:
        s = self.scene
        near = self.lit(GROUND[s.ground])
        far = mix(near, SKIES[s.time][1], 0.45 if s.ground != "sea" else 0.55)
        self.gradient(self.horizon, self.down, [far, mix(far, near, 0.7), near])
        self.earth = [self.image.getpixel((0, y)) for y in range(self.h)]  # type: ignore[misc]
        for i in range(7):
            y = self.horizon + (self.down - self.horizon) * (i + 0.5) / 7
            if s.ground == "sea":
                for _ in range(2):
                    x = self.snap(self.rng.uniform(0, self.w))
                    crest = mix(self.pixel_row(y), (255, 255, 255), 0.28)
                    self.disc(x, y, self.u * (0.03 + 0.015 * i), crest, self.u * (0.0022 + 0.0008 * i))
            else:
                tone = {"grass": (70, 130, 56), "sand": (206, 170, 110), "snow": (206, 216, 234)}[s.ground]
                x, colour = self.snap(self.rng.uniform(0, self.w)), mix(self.pixel_row(y), self.lit(tone), 0.35)
                self.disc(x, y, self.u * 0.15, colour, self.u * (0.004 + 0.0022 * i))

    def pixel_row(self, y: float) -> RGB:
        """The ground's colour at height y; it varies with nothing else."""
        return self.earth[min(self.h - 1, int(y))]

    def trees(self) -> None:
        if self.scene.trees == "none":
            return
        columns = range(1, round(self.w / self.grid))
        for column in self.rng.sample(columns, self.rng.randint(3, 5)):
            x, y, size = column * self.grid, self.horizon + self.u * 0.03, self.u * 0.16
            self.rect(x - size * 0.06, y - size * 0.4, x + size * 0.06, y, self.lit((112, 78, 52)))
            leaf = (54, 120, 62) if self.scene.trees == "round" else (36, 96, 72)
            if self.scene.ground == "snow":
                leaf = mix(leaf, (236, 242, 250), 0.3)
            if self.scene.trees == "round":
                for dx, dy, k, shade in ((0, -0.68, 0.34, 0.85), (-0.16, -0.58, 0.22, 1.0), (0.1, -0.78, 0.24, 1.12)):
                    self.disc(x + dx * size, y + dy * size, k * size, self.lit(leaf, shade))
            else:
                for k, (top, base) in enumerate(((-1.15, -0.65), (-0.9, -0.4), (-0.65, -0.12))):
                    half = size * (0.2 + 0.09 * k)
                    self.poly(
                        [(x, y + top * size), (x + half, y + base * size), (x - half, y + base * size)],
                        self.lit(leaf, 1.08 - 0.08 * k),
                    )

    def falling(self) -> None:
        s = self.scene
        if s.weather not in ("rain", "snow"):
            return
        for x, y in self.cells(self.h):
            dx, dy = self.rng.choice(((0.35, 0.2), (0.75, 0.6)))
            x, y = x + dx * self.grid, y + dy * self.grid
            if s.weather == "rain":
                colour, d = self.lit((84, 102, 138)) if s.time != "night" else (98, 114, 150), self.u * 0.026
                self.draw.line((x, y, x - d * 0.35, y + d), fill=colour, width=max(1, round(self.u * 0.0032)))
            else:
                self.disc(x, y, self.u * 0.0062, self.lit((255, 255, 255), 1.1))

    # ---- things ----

    def landscape(self) -> None:
        """All that lies behind things and signs."""
        self.sky()
        self.backdrop()
        self.ground()
        self.trees()

    def stand(self, thing: Thing) -> tuple[float, float, float]:
        """Where a thing stands: x of its middle, y of its foot, and its size."""
        foot = self.horizon + (self.down - self.horizon) * DEPTH[thing.size]
        y = self.snap(self.horizon * 0.78 if thing.kind == "balloon" else foot)
        return self.snap(self.across * PLACE[thing.place]), y, self.u * HEIGHT[thing.size]

    def thing(self, thing: Thing) -> None:
        x, y, size = self.stand(thing)
        if thing.kind != "balloon":
            self.footing(thing, x, y, size)
        DRAW[thing.kind](self, x, y, size, PAINT[thing.colour])

    def footing(self, thing: Thing, x: float, y: float, size: float) -> None:
        """A shadow on land; on the sea a small island, except under a boat."""
        if self.scene.ground == "sea":
            if thing.kind == "boat":
                self.disc(x, y, size * 0.62, mix(self.pixel_row(y), (10, 30, 70), 0.35), size * 0.07)
            else:
                self.disc(x, y + size * 0.05, size * 0.72, self.lit((196, 170, 118), 0.85), size * 0.15)
                self.disc(x, y + size * 0.015, size * 0.66, self.lit((222, 196, 140)), size * 0.11)
        else:
            self.disc(x + size * 0.08, y, size * 0.5, mix(self.pixel_row(y), (20, 24, 40), 0.3), size * 0.07)

    def window(self, x0: float, y0: float, x1: float, y1: float) -> None:
        dark = self.scene.time in ("night", "dusk")
        self.rect(x0, y0, x1, y1, (255, 226, 136) if dark else self.lit((150, 196, 226)))

    def board(self, sign: Sign) -> tuple[float, float]:
        """Where a sign stands: the left edge and the foot of its first letter. Each letter fills a cell of the grid."""
        width = len(sign.word) * self.grid
        left = self.snap(self.across * PLACE[sign.place] - width / 2)
        foot = self.snap(self.horizon + (self.down - self.horizon) * 0.36)
        return min(max(left, 0), self.w - width), foot - self.grid

    def sign(self, sign: Sign) -> None:
        """A board on two posts."""
        (left, bottom), cell = self.board(sign), self.grid
        unit, half = cell / ADVANCE, len(sign.word) * cell / 2
        x, y = left + half, bottom + cell
        box = (left - unit, bottom - cell - 2 * unit, left + 2 * half + unit, bottom + 2 * unit)
        if self.scene.ground == "sea":
            self.disc(x, y, half * 0.9, self.lit((222, 196, 140)), unit * 2)
        for dx in (-0.55, 0.55):
            self.rect(x + dx * half - unit * 0.7, bottom, x + dx * half + unit * 0.7, y, self.lit((104, 70, 44)))
        self.draw.rounded_rectangle(box, unit * 1.2, self.lit((120, 82, 50)))
        inset = unit * 0.7
        board = mix(self.lit((236, 208, 160)), (236, 208, 160), 0.5)
        inner = (box[0] + inset, box[1] + inset, box[2] - inset, box[3] - inset)
        self.draw.rounded_rectangle(inner, unit, board)
        first = left + (ADVANCE - 4) / 2 * unit
        draw_word(self.draw, sign.word, first, bottom - cell + unit / 2, unit, (44, 28, 20))


def grid_step(side: float, token: float = TOKEN) -> float:
    """The step of places, and the side of a letter's cell, in a picture with this shorter side: a token, or a sixteenth of that
    side where it is less."""
    return min(token, side / 16)


def anchors(width: float, height: float, step: float) -> tuple[int, int]:
    """The ones of :data:`ANCHORS` by which places go across and down, of two as near the shorter; ``step`` is the grid's."""
    across, down = (min(ANCHORS, key=lambda known: abs(known - length / step)) for length in (width, height))
    return across, down


def line(place: float) -> int:
    """The nearest line of the grid, ``place`` in its steps."""
    return math.floor(place + 0.5)


Draw = Callable[[Painter, float, float, float, RGB], None]


def house(p: Painter, x: float, y: float, s: float, c: RGB) -> None:
    w = s * 0.52
    p.rect(x - w, y - s * 0.58, x + w, y, p.lit(c))
    p.rect(x + w * 0.55, y - s * 0.58, x + w, y, p.lit(c, 0.86))
    p.rect(x + w * 0.4, y - s * 0.98, x + w * 0.62, y - s * 0.7, p.lit((120, 84, 76)))
    p.poly([(x - w * 1.16, y - s * 0.56), (x, y - s), (x + w * 1.16, y - s * 0.56)], p.lit((112, 66, 56)))
    p.rect(x - s * 0.1, y - s * 0.32, x + s * 0.1, y, p.lit((98, 66, 48)))
    for dx in (-0.33, 0.33):
        p.window(x + (dx - 0.09) * s, y - s * 0.46, x + (dx + 0.09) * s, y - s * 0.26)


def boat(p: Painter, x: float, y: float, s: float, c: RGB) -> None:
    p.rect(x - s * 0.02, y - s, x + s * 0.02, y - s * 0.2, p.lit((96, 72, 54)))
    p.poly(
        [(x - s * 0.05, y - s * 0.96), (x - s * 0.05, y - s * 0.28), (x - s * 0.46, y - s * 0.28)],
        p.lit((250, 248, 240)),
    )
    p.poly(
        [(x + s * 0.05, y - s * 0.9), (x + s * 0.05, y - s * 0.28), (x + s * 0.4, y - s * 0.28)], p.lit((232, 228, 218))
    )
    p.poly([(x - s * 0.6, y - s * 0.24), (x + s * 0.6, y - s * 0.24), (x + s * 0.42, y), (x - s * 0.42, y)], p.lit(c))
    p.poly(
        [
            (x - s * 0.6, y - s * 0.24),
            (x + s * 0.6, y - s * 0.24),
            (x + s * 0.56, y - s * 0.18),
            (x - s * 0.56, y - s * 0.18),
        ],
        p.lit(c, 0.8),
    )


def lighthouse(p: Painter, x: float, y: float, s: float, c: RGB) -> None:
    s = s * 1.25
    if p.scene.time in ("night", "dusk"):
        p.glow(x, y - s * 0.86, s * 0.42, (255, 240, 170), 0.85)
    wide, thin = s * 0.17, s * 0.105
    for k in range(5):
        y0, y1 = y - s * 0.76 * k / 5, y - s * 0.76 * (k + 1) / 5
        a, b = wide + (thin - wide) * k / 5, wide + (thin - wide) * (k + 1) / 5
        paint = c if k % 2 == 0 else ((250, 250, 246) if c != PAINT["white"] else (150, 150, 158))
        p.poly([(x - a, y0), (x + a, y0), (x + b, y1), (x - b, y1)], p.lit(paint))
        p.poly([(x + a * 0.45, y0), (x + a, y0), (x + b, y1), (x + b * 0.45, y1)], p.lit(paint, 0.84))
    p.rect(x - thin * 1.35, y - s * 0.79, x + thin * 1.35, y - s * 0.755, p.lit((70, 70, 82)))
    p.rect(
        x - thin * 0.8,
        y - s * 0.9,
        x + thin * 0.8,
        y - s * 0.79,
        (255, 240, 160) if p.scene.time in ("night", "dusk") else p.lit((190, 220, 236)),
    )
    p.poly([(x - thin * 1.1, y - s * 0.9), (x, y - s), (x + thin * 1.1, y - s * 0.9)], p.lit(c, 0.85))


def car(p: Painter, x: float, y: float, s: float, c: RGB) -> None:
    s = s * 1.1
    p.poly(
        [
            (x - s * 0.36, y - s * 0.4),
            (x - s * 0.22, y - s * 0.66),
            (x + s * 0.2, y - s * 0.66),
            (x + s * 0.4, y - s * 0.4),
        ],
        p.lit(c, 0.92),
    )
    p.poly(
        [
            (x - s * 0.27, y - s * 0.4),
            (x - s * 0.18, y - s * 0.6),
            (x - s * 0.02, y - s * 0.6),
            (x - s * 0.02, y - s * 0.4),
        ],
        p.lit((168, 206, 228)),
    )
    p.poly(
        [
            (x + s * 0.03, y - s * 0.4),
            (x + s * 0.03, y - s * 0.6),
            (x + s * 0.17, y - s * 0.6),
            (x + s * 0.3, y - s * 0.4),
        ],
        p.lit((168, 206, 228)),
    )
    p.draw.rounded_rectangle((x - s * 0.62, y - s * 0.42, x + s * 0.62, y - s * 0.1), s * 0.08, p.lit(c))
    for dx in (-0.34, 0.36):
        p.disc(x + dx * s, y - s * 0.1, s * 0.13, p.lit((38, 38, 44)))
        p.disc(x + dx * s, y - s * 0.1, s * 0.06, p.lit((186, 188, 194)))
    p.disc(x + s * 0.57, y - s * 0.29, s * 0.045, (255, 244, 190))


def balloon(p: Painter, x: float, y: float, s: float, c: RGB) -> None:
    top, r = y - s * 0.62, s * 0.4
    for dx in (-0.16, 0.16):
        p.draw.line(
            (x + dx * s, top + r * 0.7, x + dx * s * 0.5, y - s * 0.1),
            fill=p.lit((84, 66, 54)),
            width=max(1, round(s * 0.018)),
        )
    p.poly(
        [
            (x - r * 0.86, top + r * 0.5),
            (x + r * 0.86, top + r * 0.5),
            (x + s * 0.09, y - s * 0.14),
            (x - s * 0.09, y - s * 0.14),
        ],
        p.lit(c),
    )
    p.disc(x, top, r, p.lit(c))
    light = mix(p.lit(c), (255, 255, 255), 0.45)
    p.disc(x, top, r * 0.45, light, r)
    p.disc(x, top, r * 0.16, p.lit(c), r)
    p.rect(x - s * 0.09, y - s * 0.13, x + s * 0.09, y, p.lit((150, 104, 62)))


def ball(p: Painter, x: float, y: float, s: float, c: RGB) -> None:
    r = s * 0.46
    p.disc(x, y - r, r, p.lit(c, 0.82))
    p.disc(x - r * 0.08, y - r * 1.08, r * 0.88, p.lit(c))
    p.disc(x - r * 0.32, y - r * 1.38, r * 0.24, mix(p.lit(c), (255, 255, 255), 0.55))


def box(p: Painter, x: float, y: float, s: float, c: RGB) -> None:
    a, d = s * 0.4, s * 0.2
    p.rect(x - a - d / 2, y - 2 * a, x + a - d / 2, y, p.lit(c))
    p.poly(
        [
            (x - a - d / 2, y - 2 * a),
            (x - a + d / 2, y - 2 * a - d),
            (x + a + d / 2, y - 2 * a - d),
            (x + a - d / 2, y - 2 * a),
        ],
        mix(p.lit(c), (255, 255, 255), 0.3),
    )
    p.poly(
        [(x + a - d / 2, y), (x + a + d / 2, y - d), (x + a + d / 2, y - 2 * a - d), (x + a - d / 2, y - 2 * a)],
        p.lit(c, 0.7),
    )


def pyramid(p: Painter, x: float, y: float, s: float, c: RGB) -> None:
    p.poly([(x - s * 0.56, y), (x, y - s), (x + s * 0.56, y)], p.lit(c))
    p.poly([(x + s * 0.16, y), (x, y - s), (x + s * 0.56, y)], p.lit(c, 0.72))


def star(p: Painter, x: float, y: float, s: float, c: RGB) -> None:
    cy, points = y - s * 0.46, []
    for i in range(10):
        r, a = s * 0.54 * (1 if i % 2 == 0 else 0.44), -math.pi / 2 + i * math.pi / 5
        points.append((x + r * math.cos(a), cy + r * math.sin(a)))
    p.poly(points, p.lit(c))
    p.poly([points[0], points[1], (x, cy)], mix(p.lit(c), (255, 255, 255), 0.3))
    p.poly([points[0], points[9], (x, cy)], p.lit(c, 0.82))


def heart(p: Painter, x: float, y: float, s: float, c: RGB) -> None:
    r = s * 0.265
    for dx in (-r * 0.94, r * 0.94):
        p.disc(x + dx, y - s * 0.69, r, p.lit(c))
    p.poly([(x - r * 1.82, y - s * 0.57), (x, y - s * 0.7), (x + r * 1.82, y - s * 0.57), (x, y)], p.lit(c))
    p.disc(x - r, y - s * 0.76, r * 0.32, mix(p.lit(c), (255, 255, 255), 0.5))


def flower(p: Painter, x: float, y: float, s: float, c: RGB) -> None:
    p.rect(x - s * 0.035, y - s * 0.6, x + s * 0.035, y, p.lit((52, 132, 60)))
    p.disc(x + s * 0.15, y - s * 0.2, s * 0.14, p.lit((66, 150, 70)), s * 0.06)
    p.disc(x - s * 0.15, y - s * 0.28, s * 0.14, p.lit((66, 150, 70)), s * 0.06)
    for i in range(6):
        a = i * math.pi / 3
        p.disc(
            x + s * 0.19 * math.cos(a),
            y - s * 0.7 + s * 0.19 * math.sin(a),
            s * 0.135,
            p.lit(c, 1.0 if i % 2 else 0.88),
        )
    p.disc(x, y - s * 0.7, s * 0.115, p.lit((250, 206, 70) if c != PAINT["yellow"] else (170, 104, 46)))


def mushroom(p: Painter, x: float, y: float, s: float, c: RGB) -> None:
    p.poly(
        [(x - s * 0.13, y - s * 0.5), (x + s * 0.13, y - s * 0.5), (x + s * 0.18, y), (x - s * 0.18, y)],
        p.lit((240, 228, 206)),
    )
    p.draw.pieslice((x - s * 0.52, y - s * 0.98, x + s * 0.52, y - s * 0.02), 180, 360, fill=p.lit(c))
    p.disc(x, y - s * 0.5, s * 0.52, p.lit(c, 0.8), s * 0.07)
    dots = p.lit((252, 250, 244)) if c != PAINT["white"] else p.lit((200, 120, 110))
    for dx, dy, k in ((-0.26, -0.66, 0.075), (0.02, -0.82, 0.085), (0.27, -0.65, 0.07)):
        p.disc(x + dx * s, y + dy * s, k * s, dots)


def umbrella(p: Painter, x: float, y: float, s: float, c: RGB) -> None:
    p.rect(x - s * 0.022, y - s * 0.9, x + s * 0.022, y, p.lit((92, 72, 58)))
    for i in range(5):
        a0, a1 = x + s * (-0.55 + 0.22 * i), x + s * (-0.55 + 0.22 * (i + 1))
        paint = p.lit(c) if i % 2 == 0 else mix(p.lit(c), (255, 255, 255), 0.4)
        m0, m1 = (a0 - x) / (s * 0.55), (a1 - x) / (s * 0.55)
        rim = [
            (a0 + (a1 - a0) * t, y - s * 0.52 - s * 0.42 * math.sqrt(max(0.0, 1 - (m0 + (m1 - m0) * t) ** 2)))
            for t in (0, 0.25, 0.5, 0.75, 1)
        ]
        p.poly([*rim, (a1, y - s * 0.5), (a0, y - s * 0.5)], paint)


def rocket(p: Painter, x: float, y: float, s: float, c: RGB) -> None:
    s = s * 1.15
    for side in (-1, 1):
        p.poly(
            [(x + side * s * 0.14, y - s * 0.36), (x + side * s * 0.32, y), (x + side * s * 0.12, y - s * 0.08)],
            p.lit(c, 0.85),
        )
    p.poly(
        [
            (x - s * 0.16, y - s * 0.62),
            (x - s * 0.12, y - s * 0.8),
            (x, y - s),
            (x + s * 0.12, y - s * 0.8),
            (x + s * 0.16, y - s * 0.62),
        ],
        p.lit(c),
    )
    p.rect(
        x - s * 0.16,
        y - s * 0.63,
        x + s * 0.16,
        y - s * 0.07,
        p.lit((238, 240, 244) if c != PAINT["white"] else (206, 210, 220)),
    )
    p.rect(x + s * 0.06, y - s * 0.63, x + s * 0.16, y - s * 0.07, p.lit((206, 210, 218)))
    p.rect(x - s * 0.16, y - s * 0.2, x + s * 0.16, y - s * 0.11, p.lit(c))
    p.disc(x, y - s * 0.46, s * 0.085, p.lit((70, 76, 96)))
    p.disc(x, y - s * 0.46, s * 0.06, p.lit((150, 206, 236)))


DRAW: dict[str, Draw] = {
    "house": house,
    "boat": boat,
    "lighthouse": lighthouse,
    "car": car,
    "balloon": balloon,
    "ball": ball,
    "box": box,
    "pyramid": pyramid,
    "star": star,
    "heart": heart,
    "flower": flower,
    "mushroom": mushroom,
    "umbrella": umbrella,
    "rocket": rocket,
}


class Outliner(Painter):
    """Draws which places things cover, without their footing and glow."""

    def glow(self, x: float, y: float, radius: float, colour: RGB, strength: float) -> None:
        pass

    def outline(self, draw: Draw, x: float, y: float, size: float, colour: RGB = PAINT["white"]) -> np.ndarray:
        """Where what ``draw`` draws covers most of a pixel, bool [height, width]. What was on the canvas is gone."""
        finer, nothing = 4, (255, 0, 255)  # a colour that nothing has
        self.image = Image.new("RGB", (self.w * finer, self.h * finer), nothing)
        self.draw = ImageDraw.Draw(self.image)
        draw(self, x * finer, y * finer, size * finer, colour)
        pixels = np.asarray(self.image)
        red, green, blue = (pixels[..., i] != nothing[i] for i in range(3))  # any(-1) takes far longer
        drawn = Image.fromarray((red | green | blue).astype(np.uint8) * 255)
        return np.asarray(drawn.reduce(SUPERSAMPLE * finer)) > 127


class Bare(Painter):
    """Draws a landscape of which nothing but sky and ground is left."""

    def orb(self) -> None:
        pass

    def clouds(self) -> None:
        pass

    def backdrop(self) -> None:
        pass

    def trees(self) -> None:
        pass


CELL = 8
"""Pixels along one side of a cell of a thing's outline, and how much smaller than a picture :func:`spots` draws."""


@dataclass(frozen=True)
class Spot:
    """Where a thing, a sign, or the sun or moon lies in a picture, in pixels.

    Attributes:
        letters: of a sign, left edge and top of its first letter's cell, and the cell's side.
        outline: of all others, which cells of the picture it covers, bool [height / CELL, width / CELL].
    """

    what: Thing | Sign | Literal["orb"]
    left: float
    top: float
    right: float
    bottom: float
    letters: tuple[float, float, float] = (0, 0, 0)
    outline: np.ndarray | None = None


def spots(scene: Scene, width: int, height: int) -> list[Spot]:
    """Where :func:`render` puts sun or moon, sign and things, told by a picture of an eighth of the size, in the order in which they
    are drawn, a later one hiding earlier ones. The backdrop may hide some of a sun."""
    p = Outliner(scene, width // CELL, height // CELL, TOKEN / CELL)
    scale = CELL / SUPERSAMPLE
    found = []
    if scene.weather == "clear":
        x, y, half = p.hang()
        box = (x - half, y - half, x + half, y + half)
        found.append(Spot("orb", *(v * scale for v in box), outline=p.outline(Painter.disc, x, y, RIM * half)))
    if scene.sign is not None:
        (left, bottom), cell = p.board(scene.sign), p.grid
        word = (left, bottom - cell, cell)
        box = (left, bottom - cell, left + len(scene.sign.word) * cell, bottom + cell)
        found.append(Spot(scene.sign, *(v * scale for v in box), tuple(v * scale for v in word)))  # type: ignore[arg-type]
    for thing in scene.things:
        x, y, size = p.stand(thing)
        box = (x - 0.6 * size, y - 1.1 * size, x + 0.6 * size, y + 0.08 * size)
        found.append(
            Spot(thing, *(v * scale for v in box), outline=p.outline(DRAW[thing.kind], x, y, size, PAINT[thing.colour]))
        )
    return found


def scenery(scene: Scene, width: int, height: int) -> np.ndarray:
    """On which cells of the grid the sun or moon, clouds, the backdrop and trees show, bool [height / TOKEN, width / TOKEN]. Chance
    falls alike at every size, so a picture of an eighth of the size tells it."""
    full, bare = (kind(scene, width // CELL, height // CELL, TOKEN / CELL) for kind in (Painter, Bare))
    for painter in (full, bare):
        painter.landscape()
    apart = np.abs(np.asarray(full.image, dtype=int) - np.asarray(bare.image)).max(-1) > 12
    side = TOKEN * SUPERSAMPLE // CELL
    cells = apart.reshape(apart.shape[0] // side, side, apart.shape[1] // side, side).mean((1, 3))
    return cells > 0.05


def render(scene: Scene, width: int, height: int, token: float = TOKEN) -> Image.Image:
    """Draw ``scene``. The same scene and size give the same pixels.

    Args:
        scene: what to show.
        width, height: size of the picture in pixels.
        token: step of the grid in pixels, a token's side; less draws a small picture as a larger one's is.

    Returns:
        An RGB picture of exactly that size.
    """
    p = Painter(scene, width, height, token)
    p.landscape()
    p.falling()
    if scene.sign is not None:
        p.sign(scene.sign)
    for thing in scene.things:
        p.thing(thing)
    return p.image.reduce(SUPERSAMPLE)
