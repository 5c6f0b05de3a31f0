"""Models of any size with random weights, for measuring where no weights are at hand; nothing is saved."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from flux2_kernels import place_of
from torch import Tensor, nn

from flux2_local import load, weights
from flux2_local.hardware import probe
from flux2_local.latents import image_positions, text_positions
from flux2_local.load import DTYPES, Source
from flux2_local.model import kernels
from flux2_local.model.meta import meta
from flux2_local.model.native import NATIVE
from flux2_local.model.ops import Ops
from flux2_local.model.transformer import Flux2Transformer, TransformerConfig
from flux2_local.plan import ComponentPlan
from flux2_local.presets import BUNDLED, families
from flux2_local.quant.convert import backend
from flux2_local.quant.recipe import Recipe
from scripts import random_model

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
    config: TransformerConfig,
    ops: Ops,
    dtype: torch.dtype,
    device: torch.device,
    home: torch.device | None = None,
    seed: int = 0,
) -> Flux2Transformer:
    """Built on the meta device and drawn on ``device``, a tensor at a time, to stay there or at ``home``."""
    with meta():
        net = Flux2Transformer(config, ops)
    draw = drawer(device, seed)
    for name, like in list(net.named_parameters()):
        weights.assign(net, name, draw(like, dtype).to(home or device))
    return net.eval().requires_grad_(False)


def drawer(device: torch.device, seed: int = 0) -> Callable[[Tensor, torch.dtype], Tensor]:
    """(tensor of the shape wanted, type) -> a weight on ``device``: normal numbers, and ones for a norm's; linear layers have
    no bias."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(like: Tensor, dtype: torch.dtype) -> Tensor:
        empty = torch.empty(like.shape, dtype=dtype, device=device)
        return empty.fill_(1) if like.ndim < 2 else empty.normal_(0, SPREAD, generator=generator)

    return draw


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


SIZES = (*families(), "tiny")
"""Models whose folders :func:`folder` makes; the bundled one's size is for trying things out."""

FULL = ("dev", "klein-9b", "klein-4b")
"""Published models, the largest first."""


def folder(size: str, path: Path) -> Path:
    """A model's folder with all that a few hundred megabytes hold: everything but the weights of its two large networks."""
    if size == "tiny":
        shutil.copytree(BUNDLED, path)
    else:
        random_model.frame(size, path, seed=0)
    return path


@contextmanager
def drawn() -> Iterator[None]:
    """Inside, a transformer's and a text encoder's weights are drawn where the library would read them."""
    with mock.patch.object(load, "fill", fill_random):
        yield


@torch.no_grad()
def fill_random(network: nn.Module, held: ComponentPlan, dtype: str, source: Source, device: torch.device) -> str:
    """What :func:`flux2_local.load.fill` does, with numbers drawn on ``device`` a layer at a time, to stay there if the network is
    resident, or on the host."""
    draw, home = drawer(device), device if held.placement == "resident" else torch.device("cpu")
    quantized: tuple[str, ...] = ()
    if held.format not in DTYPES:
        recipe = Recipe(held.format, keep=held.keep)
        for name, layer in recipe.layers(network).items():
            made = backend(recipe.form).quantize(draw(layer.weight, DTYPES[dtype]), recipe.form, DTYPES[dtype], device)
            network.set_submodule(name, made.to(home))
            quantized += (f"{name}.",)
    kind = DTYPES[dtype if quantized else held.format]
    for name, value in (*network.named_parameters(), *network.named_buffers()):
        if not name.startswith(quantized or "\0"):
            weights.assign(network, name, draw(value, kind).to(home))
    return ""


def prompt_embedding(config: TransformerConfig, tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[1, tokens, joint], numbers of variance 1."""
    drawn_here = torch.randn(1, tokens, config.joint_attention_dim, generator=torch.Generator().manual_seed(1))
    return drawn_here.to(device, dtype)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Root of the mean squared difference over that of ``wanted``."""
    apart = (found.double() - wanted.double()).square().mean() / wanted.double().square().mean()
    return math.sqrt(float(apart))
