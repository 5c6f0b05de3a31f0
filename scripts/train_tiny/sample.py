"""Pictures from a transformer in training: a contact sheet of fixed prompts at every checkpoint."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
from PIL import Image
from torch import Tensor, nn

from .latents import load_autoencoder
from .network import TEXT_TOKENS, rotary, velocity
from .trainer import Run, Trainer, averaged

Linear = Callable[[nn.Linear, Tensor], Tensor]

GUIDED = 0.9
"""The noise level above which guidance does nothing (after arXiv:2404.07724). There it would draw everywhere what may be anywhere:
trees in every column, one object twice."""

PROMPTS = (
    "a lighthouse at dusk",
    "a red ball on the left and a blue box on the right on a green meadow by day",
    "a large yellow star in the desert at night",
    'a wooden sign that says "HELLO" on a snowy field at dawn',
    "a small white boat on the sea with mountains in the background at sunset",
    "a purple house with pine trees in the rain",
    "a pink hot air balloon on the right above a city skyline",
    'a sign saying "FROG" on the left and a green mushroom on the right',
)


def guided(yes: Tensor, no: Tensor, sigma: Tensor, scale: Tensor) -> Tensor:
    """Two-pass guidance: the velocity [B, N, C] from those with the prompt and with the empty one, at noise levels [B]."""
    return no + torch.where(sigma > GUIDED, 1.0, scale)[:, None, None] * (yes - no)


def shifted(steps: int, shift: float) -> list[float]:
    """Noise levels from 1 to 0: ``steps`` + 1 values, uniform ones shifted towards noise."""
    u = np.linspace(1, 0, steps + 1)
    return list(shift * u / (1 + (shift - 1) * u))


@torch.no_grad()
def denoise(
    model: Flux2Transformer2DModel,
    x: Tensor,
    text: Tensor,
    sigmas: Sequence[float],
    grid: tuple[int, int],
    guidance: float | Tensor | None,
    empty: Tensor | None = None,
    linear: Linear | None = None,
) -> list[Tensor]:
    """Euler steps through ``sigmas``; all states, first to last. With ``guidance`` None, two-pass guidance of 2.5."""
    tables = rotary(*grid, TEXT_TOKENS, str(x.device))
    states = [x]
    for s, t in itertools.pairwise(sigmas):
        sigma = torch.full((len(x),), float(s), device=x.device)
        scale = (
            guidance if isinstance(guidance, Tensor) else torch.full_like(sigma, 1.0 if guidance is None else guidance)
        )
        v = velocity(model, x.to(text.dtype), text, sigma, scale, tables, linear)
        if guidance is None and empty is not None:
            no = velocity(model, x.to(text.dtype), empty.expand(len(x), -1, -1), sigma, scale, tables)
            v = guided(v, no, sigma, torch.full_like(sigma, 2.5))
        x = x + (t - s) * v
        states.append(x)
    return states


def unpacked(vae: AutoencoderKLFlux2, packed: Tensor, grid: tuple[int, int]) -> Tensor:
    """Packed normalised latents [B, h·w, 128] -> the autoencoder's own [B, 32, 2h, 2w]."""
    h, w = grid
    z = packed.transpose(1, 2).unflatten(2, grid)
    std = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
    z = z * std.view(1, -1, 1, 1) + vae.bn.running_mean.view(1, -1, 1, 1)
    z = z.reshape(-1, 32, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(-1, 32, 2 * h, 2 * w)
    return z.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def decode(vae: AutoencoderKLFlux2, packed: Tensor, grid: tuple[int, int]) -> np.ndarray:
    """Packed normalised latents -> uint8 pictures [B, H, W, 3]."""
    x = torch.cat([vae.decode(one[None]).sample for one in unpacked(vae, packed, grid)])
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def reporter(
    run: Run,
    name: str,
    trainer: Trainer,
    reader: Callable[[list[str]], Tensor],
    guidance: float | None,
    sigmas: Sequence[float] | None = None,
    model: Flux2Transformer2DModel | None = None,
    linear: Linear | None = None,
    grid: tuple[int, int] = (16, 16),
) -> Callable[[int], None]:
    """A callback that writes ``<name>.png``: the prompts of :data:`PROMPTS` from the averaged weights, ``grid`` tokens each."""
    vae = load_autoencoder(run)
    text, empty = reader(list(PROMPTS)), reader([""])
    noise = torch.randn(len(PROMPTS), grid[0] * grid[1], 128, generator=torch.Generator().manual_seed(1)).to(run.device)
    net = model if model is not None else trainer.model
    levels = sigmas or shifted(20, 4.0)

    def report(step: int) -> None:
        with averaged(trainer):
            x = denoise(net, noise, text, levels, grid, guidance, empty, linear)[-1]
        pictures = decode(vae, x, grid)
        rows = [np.concatenate(list(part), 1) for part in (pictures[:4], pictures[4:])]
        Image.fromarray(np.concatenate(rows)).reduce(grid[0] // 8).save(run.path(f"{name}.png"))
        print(f"{name}: step {step}: samples in {name}.png", flush=True)

    return report
