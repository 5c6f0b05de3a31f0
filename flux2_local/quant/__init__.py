"""Quantized weights: the formats there are, and networks turned into them. One file per backend, one table.

``formats`` says what each format needs and weighs (and imports no torch), ``recipe`` which layers of a network are
quantized and how, ``convert`` does it, ``measure`` finds the layers that suffer most, ``disk`` keeps the result.
"""

from .formats import FORMATS, NAMES, Format, automatic, eight_bit, find
from .recipe import Recipe, recipe_for

__all__ = ["FORMATS", "NAMES", "Format", "Recipe", "automatic", "eight_bit", "find", "recipe_for"]
