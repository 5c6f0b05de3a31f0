"""The decoder once more, on whole pictures and on what the transformer makes of them.

A transformer's latents are not quite a picture's: what it leaves wrong shows as a weave in the sky. Half of the latents here
are its estimates of a picture from a little noise, of which the decoder is to make that picture.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .autoencoder import NOISE, loss_of, reporter, to_tensor
from .captions import caption
from .flow import Reader
from .latents import SERIES, load_autoencoder, paint, path_of
from .network import TEXT_TOKENS, build, rotary, velocity
from .sample import unpacked
from .trainer import Run, Trainer, load_ema

BATCH = {"cpu": 2, "cuda": 16}

MOST = 0.5
"""The highest noise level of which an estimate is taken: the picture's things are still where they were."""


def train(run: Run) -> None:
    vae = load_autoencoder(run)
    for part in (vae.decoder, vae.post_quant_conv):
        part.requires_grad_(True)
    trainer = Trainer(run, "decoder", vae, lr=5e-4, muon=2e-3, ema=0.995)
    trainer.fit(batches(run), lambda x, z: loss_of(vae, x, z), reporter(run, trainer, vae))


def batches(run: Run) -> Iterator[tuple[Tensor, Tensor]]:
    """Pictures of 512² and their latents as the decoder gets them: with a little noise, or estimated from more."""
    model = build().to(run.device)
    load_ema(run.path("flow.safetensors"), model)
    model.requires_grad_(False)
    vae, reader, rng = load_autoencoder(run), Reader(run), random.Random()
    square = SERIES["square"]
    rows = np.load(path_of(run, "square"), mmap_mode="r").reshape(-1, math.prod(square.grid), 128)
    tables = rotary(*square.grid, TEXT_TOKENS, run.device)
    while True:
        chosen = sorted(rng.sample(range(len(rows)), BATCH[run.device]))
        x0 = torch.from_numpy(rows[chosen]).to(run.device).float()
        scenes = [square.picture(i)[0] for i in chosen]
        text = reader([caption(scene, rng) for scene in scenes])
        sigma = MOST * torch.rand(len(x0), device=run.device)
        noisy = x0 + sigma[:, None, None] * (torch.randn_like(x0) - x0)
        with torch.no_grad():
            away = velocity(model, noisy.to(run.dtype), text, sigma, torch.ones_like(sigma), tables)
        estimated = torch.rand_like(sigma)[:, None, None] < 0.5
        z = unpacked(vae, torch.where(estimated, noisy - sigma[:, None, None] * away, x0), square.grid)
        z = z + NOISE * torch.randn_like(z) * ~estimated[..., None]
        yield to_tensor(np.stack([paint(scene, square.grid) for scene in scenes])).to(run.device), z
