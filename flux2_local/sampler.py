"""The denoising loop: Euler steps along the velocity field from noise to a picture's latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .cache import StepCache
from .model.ops import Rotary
from .model.transformer import Flux2Transformer, Kept, Modulation
from .presets import CachePolicy
from .schedule import Schedule

OnStep = Callable[[int, Tensor, Tensor], None]
"""Called after each step with its number from 1, the new latents and the picture's estimate, both [B, N, C]."""


@dataclass(frozen=True)
class Prepared:
    """What is computed before the first step and is the same for all pictures of a request: a :class:`Modulation` per step, and the
    references' keys and values where they are computed once."""

    table: list[Modulation]
    kept: list[Kept] | None


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
        together: whether guidance's two passes run as one of a batch twice as large.
        once: whether the references' keys and values are computed once, and not their tokens in every step.
        prepared: what :func:`prepare` gave for others that differ in their prompts and noise alone; None has it made.
    """

    text: Tensor
    negative: Tensor | None
    guidance: float
    embedded: bool
    references: Tensor | None
    rotary: Rotary
    together: bool = False
    once: bool = False
    prepared: Prepared | None = None


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
def prepare(transformer: Flux2Transformer, schedule: Schedule, conditions: Conditions) -> Prepared:
    """What :func:`denoise` would compute before its first step."""
    c = conditions
    guidance = c.guidance if c.embedded else None
    table = modulations(transformer, schedule, guidance, c.rotary.cos.device)
    kept = read_references(transformer, c, guidance) if c.references is not None and c.once else None
    return Prepared(table, kept)


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
    prepared = c.prepared or prepare(transformer, schedule, c)
    table, kept = prepared.table, prepared.kept
    rotary, references = (c.rotary, c.references) if kept is None else (own_rows(c), None)
    contexts = passes(transformer, c, len(noise))
    references = None if references is None else references.expand(len(noise), -1, -1)
    sigmas = torch.from_numpy(schedule.sigmas).to(device)
    x, count = noise, noise.shape[1]
    levels = tuple(float(s) for s in schedule.sigmas)
    caches = [None if policy is None else [StepCache(policy, levels) for _ in context] for context in contexts]
    for i, mod in enumerate(table):
        tokens = x if references is None else torch.cat([x, references], 1)
        tokens = tokens.to(transformer.dtype)
        if len(contexts[0]) > len(noise):
            tokens = torch.cat([tokens, tokens])
        velocities = [
            transformer(tokens, context, mod, rotary, count, own, kept)
            for context, own in zip(contexts, caches, strict=True)
        ]
        velocity, *unguided = (part for v in velocities for part in v.split(len(noise)))
        if unguided:
            velocity = unguided[0] + c.guidance * (velocity - unguided[0])
        estimate = x.float() - sigmas[i] * velocity
        x = (x.float() + (sigmas[i + 1] - sigmas[i]) * velocity).to(velocity.dtype)
        on_step(i + 1, x, estimate)
    return x


def passes(transformer: Flux2Transformer, conditions: Conditions, batch: int) -> list[Tensor]:
    """The texts that a step's evaluations read, embedded: the prompts [B, L, D] and the empty ones, or one [2·B, L, D] of both."""
    given = [text for text in (conditions.text, conditions.negative) if text is not None]
    contexts = [transformer.context(text).expand(batch, -1, -1) for text in given]
    return [torch.cat(contexts)] if conditions.together else contexts


def read_references(transformer: Flux2Transformer, conditions: Conditions, guidance: float | None) -> list[Kept]:
    """The references' keys and values in every block."""
    assert conditions.references is not None
    clean = torch.zeros((), device=conditions.references.device, dtype=transformer.schedule_dtype)
    mod = transformer.modulation(clean, guidance)
    tokens = conditions.references.to(transformer.dtype)
    first = len(conditions.rotary.cos) - tokens.shape[1]
    return transformer.keys_and_values(tokens, mod, conditions.rotary.rows(first, first + tokens.shape[1]))


def own_rows(conditions: Conditions) -> Rotary:
    """The rotary tables without the references' rows."""
    assert conditions.references is not None
    return conditions.rotary.rows(0, len(conditions.rotary.cos) - conditions.references.shape[1])
