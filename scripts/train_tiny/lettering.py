"""A stroke font of our own: each glyph is a few polylines on a grid 4 wide and 6 high, y pointing down."""

from __future__ import annotations

from PIL import ImageDraw

Point = tuple[float, float]

GLYPHS: dict[str, list[list[Point]]] = {
    "A": [[(0, 6), (2, 0), (4, 6)], [(0.8, 4), (3.2, 4)]],
    "B": [
        [(0, 3), (0, 0), (2.8, 0), (3.7, 0.8), (3.7, 2.2), (2.8, 3), (0, 3), (0, 6), (3, 6), (4, 5.2), (4, 3.8), (3, 3)]
    ],
    "C": [[(4, 1), (3, 0), (1, 0), (0, 1), (0, 5), (1, 6), (3, 6), (4, 5)]],
    "D": [[(0, 0), (0, 6), (2.6, 6), (4, 4.6), (4, 1.4), (2.6, 0), (0, 0)]],
    "E": [[(4, 0), (0, 0), (0, 6), (4, 6)], [(0, 3), (3, 3)]],
    "F": [[(4, 0), (0, 0), (0, 6)], [(0, 3), (3, 3)]],
    "G": [[(4, 1), (3, 0), (1, 0), (0, 1), (0, 5), (1, 6), (3, 6), (4, 5), (4, 3), (2.4, 3)]],
    "H": [[(0, 0), (0, 6)], [(4, 0), (4, 6)], [(0, 3), (4, 3)]],
    "I": [[(1, 0), (3, 0)], [(2, 0), (2, 6)], [(1, 6), (3, 6)]],
    "J": [[(1.5, 0), (4, 0)], [(3, 0), (3, 5), (2, 6), (1, 6), (0, 5), (0, 4.2)]],
    "K": [[(0, 0), (0, 6)], [(4, 0), (0, 3.4)], [(1.3, 2.5), (4, 6)]],
    "L": [[(0, 0), (0, 6), (4, 6)]],
    "M": [[(0, 6), (0, 0), (2, 3.4), (4, 0), (4, 6)]],
    "N": [[(0, 6), (0, 0), (4, 6), (4, 0)]],
    "O": [[(1, 0), (3, 0), (4, 1), (4, 5), (3, 6), (1, 6), (0, 5), (0, 1), (1, 0)]],
    "P": [[(0, 6), (0, 0), (3, 0), (4, 0.9), (4, 2.4), (3, 3.3), (0, 3.3)]],
    "Q": [[(1, 0), (3, 0), (4, 1), (4, 5), (3, 6), (1, 6), (0, 5), (0, 1), (1, 0)], [(2.4, 4.2), (4.2, 6.4)]],
    "R": [[(0, 6), (0, 0), (3, 0), (4, 0.9), (4, 2.3), (3, 3.2), (0, 3.2)], [(2, 3.2), (4, 6)]],
    "S": [[(4, 1), (3, 0), (1, 0), (0, 1), (0, 2.1), (1, 3), (3, 3), (4, 3.9), (4, 5), (3, 6), (1, 6), (0, 5)]],
    "T": [[(0, 0), (4, 0)], [(2, 0), (2, 6)]],
    "U": [[(0, 0), (0, 5), (1, 6), (3, 6), (4, 5), (4, 0)]],
    "V": [[(0, 0), (2, 6), (4, 0)]],
    "W": [[(0, 0), (0.8, 6), (2, 2.4), (3.2, 6), (4, 0)]],
    "X": [[(0, 0), (4, 6)], [(4, 0), (0, 6)]],
    "Y": [[(0, 0), (2, 3), (4, 0)], [(2, 3), (2, 6)]],
    "Z": [[(0, 0), (4, 0), (0, 6), (4, 6)]],
}

ADVANCE = 7.0
"""Distance from one glyph's left edge to the next, in grid units: as much as a glyph is high with its stroke, so that its cell is
a square."""


def draw_word(
    draw: ImageDraw.ImageDraw, word: str, left: float, top: float, unit: float, colour: tuple[int, int, int]
) -> None:
    """Draw ``word`` with its first glyph's top left corner at (left, top); one grid unit is ``unit`` pixels."""
    width = max(1, round(unit * 1.05))
    for i, letter in enumerate(word):
        x0 = left + i * ADVANCE * unit
        for line in GLYPHS[letter]:
            points = [(x0 + x * unit, top + y * unit) for x, y in line]
            draw.line(points, fill=colour, width=width, joint="curve")
            for x, y in (points[0], points[-1]):
                draw.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=colour)
