"""Noise levels: from 1 (noise) to 0 (picture), as the pipelines choose them.

The arithmetic is float32 in the order of diffusers' FlowMatchEulerDiscreteScheduler, so levels agree bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .presets import Recipe


@dataclass(frozen=True)
class Schedule:
    """Noise levels of one denoising run.

    Attributes:
        sigmas: steps + 1 float32 values, the last one 0.
        kind: how they were chosen, for people.
    """

    sigmas: np.ndarray
    kind: str

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1


def empirical_mu(tokens: int, steps: int) -> float:
    """Exponent of the dynamic shift. Source: ``compute_empirical_mu`` of BFL's flux2 ``sampling.py``.

    The jump between 4300 and 4301 tokens is in the original.
    """
    long = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return float(long)
    short = 8.73809524e-05 * tokens + 1.89833333
    slope = (long - short) / 190.0
    return float(slope * steps + (long - 200.0 * slope))


def shifted(sigmas: np.ndarray, mu: float) -> np.ndarray:
    """exp(mu) / (exp(mu) + 1/σ - 1), in float32."""
    shift = math.exp(mu)
    return np.asarray(shift / (shift + (1 / sigmas - 1) ** 1.0), dtype=np.float32)


def make_schedule(recipe: Recipe, steps: int, tokens: int) -> Schedule:
    """The noise levels of ``recipe`` for a picture of ``tokens`` image tokens in ``steps`` steps."""
    uniform = np.linspace(1.0, 1 / steps, steps)
    if recipe.published is not None and recipe.published[0] == tokens and len(recipe.published[1]) == steps:
        levels = shifted(np.array(recipe.published[1]).astype(np.float32), empirical_mu(tokens, steps))
        kind = "as published, shifted again by size"
    elif recipe.schedule == "shift":
        levels = shifted(uniform.astype(np.float32), math.log(recipe.shift))
        kind = f"constant shift {recipe.shift:g}"
    else:
        mu = empirical_mu(tokens, steps)
        levels = shifted(uniform.astype(np.float32), mu)
        kind = f"shift {math.exp(mu):.2f}, from size and steps"
    return Schedule(np.append(levels, np.float32(0)), kind)
