"""Transformers of any size with random weights, for measuring where no weights are at hand; nothing is saved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from flux2_kernels import place_of
from torch import Tensor

from flux2_local.hardware import probe
from flux2_local.latents import image_positions, text_positions
from flux2_local.load import DTYPES
from flux2_local.model import kernels
from flux2_local.model.meta import meta
from flux2_local.model.native import NATIVE
from flux2_local.model.ops import Ops
from flux2_local.model.transformer import Flux2Transformer, TransformerConfig

SPREAD = 0.02
"""Standard deviation of the weights, that of the usual initialisation of transformers."""

SMALL = TransformerConfig(num_attention_heads=4, num_layers=1, num_single_layers=2, joint_attention_dim=1024)
"""The scaled-down family's middle: hidden 512 in heads of 128 as the real ones', one double block for two single ones."""


def small(width: int = SMALL.width, depth: int = 1) -> TransformerConfig:
    """One of the scaled-down family: hidden ``width``, ``depth`` double and 2·``depth`` single blocks."""
    heads = width // SMALL.attention_head_dim
    return with_blocks(replace(SMALL, num_attention_heads=heads), depth, 2 * depth)


def with_blocks(config: TransformerConfig, double: int, single: int) -> TransformerConfig:
    return replace(config, num_layers=double, num_single_layers=single)


def transformer(
    config: TransformerConfig, ops: Ops, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Flux2Transformer:
    """Built on the meta device and filled where it is to work, so that the host never holds it."""
    with meta():
        net = Flux2Transformer(config, ops)
    net.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for weight in net.parameters():
            if weight.ndim == 1:  # of an RMSNorm; linear layers have no bias
                weight.fill_(1)
            else:
                weight.normal_(0, SPREAD, generator=generator)
    return net.eval().requires_grad_(False)


def step(net: Flux2Transformer, grid: tuple[int, int], text: int, seed: int = 0) -> Callable[[], Tensor]:
    """A denoising step for one picture of ``grid`` tokens (rows, columns) and ``text`` text tokens, at noise level 0.5.

    Returns:
        What computes it, [1, tokens, channels]; on a card it returns before the card has finished.
    """
    config, dtype, device = net.config, net.dtype, net.x_embedder.weight.device
    generator = torch.Generator(device).manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    with torch.inference_mode():
        positions = torch.cat([text_positions(text), image_positions(*grid)]).to(device)
        count = grid[0] * grid[1]
        latents, context = noise(1, count, config.in_channels), net.context(noise(1, text, config.joint_attention_dim))
        mod = net.modulation(torch.tensor(0.5, device=device), 4.0 if config.guidance_embeds else None)
        rotary = net.rotary(positions)

    @torch.inference_mode()
    def call() -> Tensor:
        return net(latents, context, mod, rotary, count)

    return call


def fast(device: torch.device, config: TransformerConfig) -> tuple[torch.dtype, Ops]:
    """The 16-bit type that the device runs fast (float32 where it runs none), and the operations that a plan would take there."""
    dtype = probe(str(device)).fast_dtypes[0]
    place = place_of(device)
    if kernels.reason_against(place, dtype, config) is None:
        return DTYPES[dtype], kernels.fused(device, DTYPES[dtype], config)
    return DTYPES[dtype], NATIVE
