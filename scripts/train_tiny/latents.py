"""Stage 5: draw the transformer's training pictures once and keep their latents, a file per picture size.

Latents are kept packed and normalised as the transformer sees them: float16 [pictures, height·width, 128], the i-th row
made from ``random_scene(Random(seed0 + i))``, so that captions can be written anew every time a picture is used.
"""

from __future__ import annotations

import os
import random
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
from numpy.lib.format import open_memmap
from torch import Tensor

from . import autoencoder
from .render import TOKEN, render
from .scenes import random_scene
from .trainer import Run

BUCKETS = {  # (height, width) in tokens: pictures, first seed
    (8, 8): (40_000, 2_000_000),
    (16, 16): (16_000, 0),
    (24, 32): (6000, 1_000_000),
    (32, 24): (2000, 1_100_000),
    (18, 32): (1500, 1_200_000),
    (32, 18): (1500, 1_300_000),
    (32, 32): (1500, 1_400_000),
    (16, 24): (800, 1_500_000),
    (24, 16): (800, 1_600_000),
    (20, 26): (600, 1_700_000),
    (27, 19): (600, 1_800_000),
    (24, 24): (600, 1_900_000),
    (28, 28): (500, 2_100_000),
    (16, 32): (400, 2_200_000),
    (32, 16): (400, 2_300_000),
}
"""The smallest size is what training begins with: what words mean can be learnt on a quarter of the tokens."""


def path_of(run: Run, bucket: tuple[int, int]) -> Path:
    return run.path(f"latents_{bucket[0]}x{bucket[1]}.npy")


def load_autoencoder(run: Run) -> AutoencoderKLFlux2:
    """The autoencoder with its BatchNorm statistics."""
    vae = autoencoder.load(run).eval().requires_grad_(False).to(run.device)
    stats = run.path("latent_statistics.npy")
    if stats.exists():
        mean, var = np.load(stats)
        vae.bn.running_mean.copy_(torch.from_numpy(mean))
        vae.bn.running_var.copy_(torch.from_numpy(var))
    return vae


def patchify(z: Tensor) -> Tensor:
    """[B, 32, 2h, 2w] -> [B, 128, h, w], the pipelines' order: channel, row in patch, column in patch."""
    b, c, h, w = z.shape
    return z.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, c * 4, h // 2, w // 2)


@torch.no_grad()
def encode(code: autoencoder.Code, pixels: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] -> patchified latents before normalisation, float32."""
    return patchify(code(autoencoder.to_tensor(pixels)))


def draw(task: tuple[int, int, int]) -> np.ndarray:
    seed, height, width = task
    return np.asarray(render(random_scene(random.Random(seed)), width * TOKEN, height * TOKEN))


def drawn(tasks: list[tuple[int, int, int]], pool: ProcessPoolExecutor) -> Iterator[np.ndarray]:
    """The tasks' pictures in order, a few drawn ahead."""
    ahead: deque[Future[np.ndarray]] = deque()
    for task in tasks:
        ahead.append(pool.submit(draw, task))
        if len(ahead) >= 64:
            yield ahead.popleft().result()
    for future in ahead:
        yield future.result()


def measure(run: Run, code: autoencoder.Code, pool: ProcessPoolExecutor) -> None:
    """Per-channel mean and variance of the latents, what BatchNorm's running statistics stand for."""
    total = []
    for height, width, count in ((16, 16, 1024), (24, 32, 256), (32, 18, 256)):
        pictures = drawn([(5_000_000 + i, height, width) for i in range(round(count * run.share))], pool)
        total += [encode(code, p[None]).permute(0, 2, 3, 1).reshape(-1, 128).double() for p in pictures]
    rows = torch.cat(total)
    np.save(run.path("latent_statistics.npy"), torch.stack([rows.mean(0), rows.var(0)]).float().cpu().numpy())


def train(run: Run) -> None:
    code = autoencoder.Code(autoencoder.load(run), autoencoder.samples(run, 200))
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        if not run.path("latent_statistics.npy").exists():
            measure(run, code, pool)
        vae = load_autoencoder(replace(run, device="cpu"))  # where pictures are drawn and encoded
        mean = vae.bn.running_mean.view(1, -1, 1, 1)
        std = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps).view(1, -1, 1, 1)
        for (height, width), (whole, seed0) in BUCKETS.items():
            path = path_of(run, (height, width))
            if path.exists():
                continue
            count = round(whole * run.share)
            part = path.with_suffix(".part")
            rows = open_memmap(part, mode="w+", dtype=np.float16, shape=(count, height * width, 128))
            pictures = drawn([(seed0 + i, height, width) for i in range(count)], pool)
            for i in range(0, count, 8):
                z = (encode(code, np.stack(list(islice(pictures, 8)))) - mean) / std
                rows[i : i + len(z)] = z.flatten(2).transpose(1, 2).half().numpy()
                if i % 800 == 0:
                    print(f"latents: {height}x{width} {i}/{count}", flush=True)
            rows.flush()
            part.replace(path)
