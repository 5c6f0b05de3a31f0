"""The decoder once more, on whole pictures and on what the transformer makes of them.

A transformer's latents are not quite a picture's: what it leaves wrong shows as a weave in the sky. Half of the latents here
are its estimates of a picture from a little noise, of which the decoder is to make that picture.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .autoencoder import NOISE, loss_of, reporter, to_tensor
from .captions import caption
from .flow import SQUARE, Reader
from .latents import BUCKETS, draw, load_autoencoder, path_of
from .network import TEXT_TOKENS, build, rotary, velocity
from .sample import unpacked
from .scenes import random_scene
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
    rows, (_, seed0) = np.load(path_of(run, SQUARE), mmap_mode="r"), BUCKETS[SQUARE]
    tables = rotary(*SQUARE, TEXT_TOKENS, run.device)
    while True:
        chosen = sorted(rng.sample(range(len(rows)), BATCH[run.device]))
        x0 = torch.from_numpy(rows[chosen]).to(run.device).float()
        text = reader([caption(random_scene(random.Random(seed0 + i)), rng) for i in chosen])
        sigma = MOST * torch.rand(len(x0), device=run.device)
        noisy = x0 + sigma[:, None, None] * (torch.randn_like(x0) - x0)
        with torch.no_grad():
            away = velocity(model, noisy.bfloat16(), text, sigma, torch.ones_like(sigma), tables)
        estimated = torch.rand_like(sigma)[:, None, None] < 0.5
        z = unpacked(vae, torch.where(estimated, noisy - sigma[:, None, None] * away, x0), SQUARE)
        z = z + NOISE * torch.randn_like(z) * ~estimated[..., None]
        yield to_tensor(np.stack([draw((seed0 + i, *SQUARE)) for i in chosen])).to(run.device), z
