"""Stage 1: the autoencoder. 16× downsampling and 2×2 patches, so one transformer token covers 32×32 pixels."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
from PIL import Image
from torch import Tensor, nn

from .data import HELD_OUT_SEED, crops
from .render import render
from .scenes import random_scene
from .trainer import Run, Trainer, averaged

CONFIG = {
    "block_out_channels": (16, 32, 64, 96, 96),
    "down_block_types": ("DownEncoderBlock2D",) * 5,
    "up_block_types": ("UpDecoderBlock2D",) * 5,
    "layers_per_block": 1,
    "latent_channels": 32,
    "norm_num_groups": 8,
    "mid_block_add_attention": False,  # so that nothing depends on the picture's size
    "sample_size": 512,
}
BATCH = {"cpu": 3, "cuda": 16}
"""Crops per step. On a CPU time is short, and many small steps learn more in it than few large ones."""

KL_WEIGHT = 2e-3  # per value; the KL term of a picture is divided by its number of pixel values


class Doubled(nn.Module):
    """A decoder's upsampling, as expand and reshape: its backward is a plain sum, a quarter faster in training, and right
    when compiled (on a CPU, torch 2.13 loses the gradient of everything before a compiled nearest-neighbour upsampling)."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, output_size: int | None = None) -> Tensor:
        b, c, h, w = x.shape
        x = x.permute(0, 2, 3, 1)[:, :, None, :, None].expand(b, h, 2, w, 2, c)
        return self.conv(x.reshape(b, 2 * h, 2 * w, c).permute(0, 3, 1, 2))


def build() -> AutoencoderKLFlux2:
    """A fresh autoencoder. Its posterior starts narrow: with the usual unit width the first signal drowns in noise."""
    vae = AutoencoderKLFlux2(**CONFIG).to(memory_format=torch.channels_last)
    for block in vae.decoder.up_blocks:
        if block.upsamplers is not None:
            block.upsamplers[0] = Doubled(block.upsamplers[0].conv)
    assert vae.quant_conv is not None
    with torch.no_grad():
        vae.quant_conv.bias[CONFIG["latent_channels"] :] -= 6
    return vae


def to_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1], channels last in memory."""
    x = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return x.contiguous(memory_format=torch.channels_last)


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def loss_of(vae: AutoencoderKLFlux2, x: Tensor, half: Tensor) -> Tensor:
    """Reconstruction + colour differences + edges + KL. ``half`` (0 or 1) decodes the latents at half size against the halved picture,
    which makes latents smooth functions of place (the equivariance idea of arXiv:2502.09509)."""
    with torch.autocast(x.device.type, torch.bfloat16):
        posterior = vae.encode(x).latent_dist
        z = posterior.mean + posterior.std * torch.randn_like(posterior.mean)
        if half.shape[0] == 2:
            z, x = F.avg_pool2d(z, 2), F.avg_pool2d(x, 2)
        y = vae.decode(z).sample
    y = y.float()
    kl = posterior.kl().float().mean() / (x.shape[1] * x.shape[2] * x.shape[3])
    detail = sum((a - b).abs().mean() for a, b in zip(edges(y), edges(x), strict=True))
    colour = ((y - y.roll(1, 1)) - (x - x.roll(1, 1))).abs().mean()  # brightness alone is learnt first
    return (y - x).abs().mean() + 3 * F.mse_loss(y, x) + 2 * colour + 0.5 * detail + KL_WEIGHT * kl


def batches(run: Run, trainer: Trainer) -> Iterator[tuple[Tensor, Tensor]]:
    """Small crops for most of the time, whole ones afterwards (GroupNorm sees more of a picture)."""
    pixels = crops(run.path("crops.npy"), 5000, run.seed)
    rng = random.Random()
    batch = BATCH[run.device]
    while True:
        size, count = (128, 2 * batch) if trainer.progress() < 0.7 else (256, batch)
        x, y = rng.randrange(257 - size), rng.randrange(257 - size)
        chosen = pixels[sorted(rng.sample(range(len(pixels)), count)), y : y + size, x : x + size]
        yield to_tensor(chosen).to(run.device), torch.zeros(2 if rng.random() < 0.25 else 1)


def held_out(count: int, width: int = 512, height: int = 512) -> Tensor:
    scenes = [random_scene(random.Random(HELD_OUT_SEED + i), signs=0.4) for i in range(count)]
    return to_tensor(np.stack([np.asarray(render(s, width, height)) for s in scenes]))


@torch.no_grad()
def reconstruct(vae: AutoencoderKLFlux2, x: Tensor) -> Tensor:
    return torch.cat([vae.decode(vae.encode(one[None]).latent_dist.mean).sample for one in x]).clamp(-1, 1)


def psnr(x: Tensor, y: Tensor) -> float:
    """Mean over pictures of the peak signal-to-noise ratio, dB; pixel range [-1, 1]."""
    mse = (x - y).float().square().flatten(1).mean(1)
    return float((10 * torch.log10(4 / mse)).mean())


def save_pair(run: Run, name: str, x: Tensor, y: Tensor) -> None:
    both = torch.cat([torch.cat(list(x), 2), torch.cat(list(y), 2)], 1)
    pixels = ((both.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    Image.fromarray(pixels).save(run.path(name))


def train(run: Run) -> None:
    vae = build().to(run.device)
    trainer = Trainer(run, "autoencoder", vae, lr=2e-3, ema=0.999)
    test = held_out(16).to(run.device)

    def report(step: int) -> None:
        with averaged(trainer):
            y = reconstruct(vae, test)
        print(f"autoencoder: step {step} held-out PSNR {psnr(test, y):.2f} dB", flush=True)
        save_pair(run, "autoencoder.png", test[:4], y[:4])

    trainer.fit(batches(run, trainer), lambda x, half: loss_of(vae, x, half), report)
