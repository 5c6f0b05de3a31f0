"""The denoising loop: Euler steps along the velocity field from noise to a picture's latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .cache import StepCache
from .model.ops import Rotary
from .model.transformer import Flux2Transformer, Modulation
from .presets import CachePolicy
from .schedule import Schedule

OnStep = Callable[[int, Tensor, Tensor], None]
"""Called after each step with its number from 1, the new latents and the picture's estimate, both [B, N, C]."""


@dataclass(frozen=True)
class Conditions:
    """What a denoising run is conditioned on.

    Attributes:
        text: prompt embeddings [1 or B, L, joint]; with classifier-free guidance the empty prompt's follow in ``negative``.
        negative: the empty prompt's embeddings, or None.
        guidance: the guidance scale.
        embedded: whether the network itself reads the guidance scale.
        references: reference tokens [1, R, C], or None.
        rotary: tables for text, picture and references.
        table: a :class:`Modulation` per step, where others were denoised with the same before; None makes it.
    """

    text: Tensor
    negative: Tensor | None
    guidance: float
    embedded: bool
    references: Tensor | None
    rotary: Rotary
    table: list[Modulation] | None = None


@torch.inference_mode()
def modulations(
    transformer: Flux2Transformer, schedule: Schedule, guidance: float | None, device: torch.device
) -> list[Modulation]:
    """One :class:`Modulation` per step. Timesteps are rounded as the pipelines round them, to the type of the parts that read them."""
    table = []
    for sigma in schedule.sigmas[:-1]:
        timestep = (torch.tensor(sigma, device=device) * 1000).to(transformer.schedule_dtype)
        table.append(transformer.modulation(timestep / 1000, guidance))
    return table


@torch.inference_mode()
def denoise(
    transformer: Flux2Transformer,
    noise: Tensor,
    schedule: Schedule,
    conditions: Conditions,
    on_step: OnStep,
    policy: CachePolicy | None = None,
) -> Tensor:
    """Walk from ``noise`` to the latents.

    Args:
        transformer: on the device.
        noise: tokens [B, N, C] in the sampler's dtype.
        schedule: noise levels.
        conditions: prompt, guidance and references; broadcast over B.
        on_step: told after every step; may raise to stop.
        policy: when steps may be skipped, each picture's by itself; None computes all.

    Returns:
        [B, N, C], the dtype of ``noise``.
    """
    c, device = conditions, noise.device
    table = c.table or modulations(transformer, schedule, c.guidance if c.embedded else None, device)
    context = transformer.context(c.text).expand(len(noise), -1, -1)
    negative = None if c.negative is None else transformer.context(c.negative).expand(len(noise), -1, -1)
    references = None if c.references is None else c.references.expand(len(noise), -1, -1)
    sigmas = torch.from_numpy(schedule.sigmas).to(device)
    x, count = noise, noise.shape[1]
    levels = tuple(float(s) for s in schedule.sigmas)
    own, other = (None if policy is None else [StepCache(policy, levels) for _ in noise] for _ in range(2))
    for i, mod in enumerate(table):
        tokens = x if references is None else torch.cat([x, references], 1)
        tokens = tokens.to(transformer.dtype)
        velocity = transformer(tokens, context, mod, c.rotary, count, own)
        if negative is not None:
            unguided = transformer(tokens, negative, mod, c.rotary, count, other)
            velocity = unguided + c.guidance * (velocity - unguided)
        estimate = x.float() - sigmas[i] * velocity
        x = (x.float() + (sigmas[i + 1] - sigmas[i]) * velocity).to(velocity.dtype)
        on_step(i + 1, x, estimate)
    return x
