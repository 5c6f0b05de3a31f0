"""Draw the transformer's training pictures once and keep their latents, a file per series.

Latents are kept packed and normalised as the transformer sees them: float16 [tokens of all pictures, 128], the i-th picture
made from ``random_scene(Random(seed + i))``, so that captions can be written anew every time a picture is used.
"""

from __future__ import annotations

import os
import random
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
from numpy.lib.format import open_memmap
from torch import Tensor

from . import autoencoder
from .render import TOKEN, render
from .scenes import Scene, random_scene
from .trainer import Run

SIDES = tuple(range(16, 33))
"""The sides of pictures in tokens: 512 to 1024 pixels."""

BETWEEN = (20, 21, 22, 27, 28, 29)
"""Those of them that lie half way between two presets', where places jump from those of one to those of the other."""


@dataclass(frozen=True)
class Series:
    """Pictures from one seed on.

    Attributes:
        count: how many are drawn.
        seed: of the first one.
        grid: their height and width in tokens; None: each has any two of ``sides``.
        sides: in tokens.
    """

    count: int
    seed: int
    grid: tuple[int, int] | None = None
    sides: tuple[int, ...] = SIDES

    def picture(self, row: int) -> tuple[Scene, tuple[int, int]]:
        """What a picture shows, and its grid."""
        rng = random.Random(self.seed + row)
        scene = random_scene(rng)
        return scene, self.grid or (rng.choice(self.sides), rng.choice(self.sides))

    def starts(self, count: int) -> np.ndarray:
        """Where the tokens of ``count`` pictures begin in the file, and last where they end."""
        grids = (self.grid or self.picture(row)[1] for row in range(count))
        return np.cumsum([0, *(height * width for height, width in grids)])


SERIES = {
    "small": Series(40_000, 2_000_000, (8, 8)),
    "square": Series(16_000, 0, (16, 16)),
    "landscape_4_3": Series(6000, 1_000_000, (24, 32)),
    "portrait_4_3": Series(2000, 1_100_000, (32, 24)),
    "landscape_16_9": Series(1500, 1_200_000, (18, 32)),
    "portrait_16_9": Series(1500, 1_300_000, (32, 18)),
    "square_hd": Series(1500, 1_400_000, (32, 32)),
    "others": Series(9000, 1_500_000),
    "between": Series(8000, 1_600_000, sides=BETWEEN),
}
"""The smallest is what training begins with: what words mean can be learnt on a quarter of the tokens. Then the presets, and
pictures of any size from 512 to 1024, a few of each, so that none is learnt by heart."""


def path_of(run: Run, name: str) -> Path:
    return run.path(f"latents_{name}.npy")


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


def paint(scene: Scene, grid: tuple[int, int]) -> np.ndarray:
    """The picture, uint8 [height, width, 3]."""
    height, width = grid
    return np.array(render(scene, width * TOKEN, height * TOKEN))


def drawn(pictures: Iterable[tuple[Scene, tuple[int, int]]], pool: ProcessPoolExecutor) -> Iterator[np.ndarray]:
    """The pictures in order, a few drawn ahead."""
    ahead: deque[Future[np.ndarray]] = deque()
    for scene, grid in pictures:
        ahead.append(pool.submit(paint, scene, grid))
        if len(ahead) >= 64:
            yield ahead.popleft().result()
    for future in ahead:
        yield future.result()


def measure(run: Run, code: autoencoder.Code, pool: ProcessPoolExecutor) -> None:
    """Per-channel mean and variance of the latents, what BatchNorm's running statistics stand for."""
    total = []
    for grid, count in (((16, 16), 1024), ((24, 32), 256), ((32, 18), 256)):
        series = Series(round(count * run.share), 5_000_000, grid)
        pictures = drawn(map(series.picture, range(series.count)), pool)
        total += [encode(code, p[None]).permute(0, 2, 3, 1).reshape(-1, 128).double() for p in pictures]
    rows = torch.cat(total)
    np.save(run.path("latent_statistics.npy"), torch.stack([rows.mean(0), rows.var(0)]).float().cpu().numpy())


def train(run: Run) -> None:
    some = [paint(*SERIES["square"].picture(i)) for i in range(60)]
    code = autoencoder.Code(autoencoder.load(run), autoencoder.to_tensor(np.stack(some)))
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        if not run.path("latent_statistics.npy").exists():
            measure(run, code, pool)
        vae = load_autoencoder(replace(run, device="cpu"))  # where pictures are drawn and encoded
        mean = vae.bn.running_mean.view(1, -1, 1, 1)
        std = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps).view(1, -1, 1, 1)
        for name, series in SERIES.items():
            path = path_of(run, name)
            begun = run.path("flow.safetensors").exists()
            if path.exists() or (begun and name == "small"):
                continue
            count = round(series.count * run.share)
            starts = series.starts(count)
            part = path.with_suffix(".part")
            rows = open_memmap(part, mode="w+", dtype=np.float16, shape=(int(starts[-1]), 128))
            for i, picture in enumerate(drawn(map(series.picture, range(count)), pool)):
                z = (encode(code, picture[None]) - mean) / std
                rows[starts[i] : starts[i + 1]] = z[0].flatten(1).T.half().numpy()
                if i % 500 == 0:
                    print(f"latents: {name} {i}/{count}", flush=True)
            rows.flush()
            part.replace(path)
