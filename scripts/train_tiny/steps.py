"""Step distillation. ``trajectories`` records the guided transformer's own 16-step paths from noise to
picture; ``turbo`` and ``flash`` train a LoRA each to cross 2 or 4 of those steps in one (progressive distillation,
arXiv:2202.00512, with the path's chord as the velocity to learn).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
from numpy.lib.format import open_memmap
from safetensors.torch import save_file
from torch import Tensor, nn

from .captions import caption, rich
from .flow import Reader, require_guided
from .network import TEXT_TOKENS, build, rotary, velocity
from .sample import denoise, reporter, shifted
from .scenes import random_scene
from .trainer import Run, Trainer, load_ema

FINE = 16
KEPT = 2
"""Every other state of a path is kept: the nine that an 8-step schedule visits, every other of them a 4-step one."""

SHIFT = 3.0
RANK = 8
COUNTS = {(16, 16): 2400, (24, 32): 480, (32, 24): 240, (18, 32): 160, (32, 18): 160, (32, 32): 120}
SEED = 3_000_000
STEPS = {"turbo": 8, "flash": 4}


def teacher_of(run: Run) -> Flux2Transformer2DModel:
    require_guided(run)
    model = build().to(run.device)
    load_ema(run.path("guidance.safetensors"), model)
    return model.requires_grad_(False)


def path_of(run: Run, bucket: tuple[int, int]) -> Path:
    return run.path(f"paths_{bucket[0]}x{bucket[1]}.npy")


def prompt_and_guidance(index: int) -> tuple[str, float]:
    """Path ``index``'s caption and guidance scale: 2.5 for half of the paths, 1.5 to 4 for the others."""
    rng = random.Random(SEED + index)
    scene = random_scene(rng)
    words = rich(scene, rng) if rng.random() < 0.2 else caption(scene, rng)
    return words, 2.5 if rng.random() < 0.5 else rng.uniform(1.5, 4.0)


def train_trajectories(run: Run) -> None:
    teacher, reader = teacher_of(run), Reader(run)
    sigmas = shifted(FINE, SHIFT)
    taught = run.path("guidance.safetensors").stat().st_mtime
    for (height, width), whole in COUNTS.items():
        path = path_of(run, (height, width))
        if path.exists() and path.stat().st_mtime > taught:
            continue
        count = round(whole * run.share)
        part = path.with_suffix(".part")
        tokens = height * width
        rows = open_memmap(part, mode="w+", dtype=np.float16, shape=(count, FINE // KEPT + 1, tokens, 128))
        batch = max(4, 10_000 // (tokens + TEXT_TOKENS))
        for i in range(0, count, batch):
            asked = [prompt_and_guidance(j) for j in range(i, min(i + batch, count))]
            noise = torch.randn(len(asked), tokens, 128, generator=torch.Generator().manual_seed(SEED + i))
            guidance = torch.tensor([g for _, g in asked], device=run.device)
            states = denoise(
                teacher, noise.to(run.device), reader([w for w, _ in asked]), sigmas, (height, width), guidance
            )
            rows[i : i + len(asked)] = torch.stack(states[::KEPT], 1).half().cpu().numpy()
            print(f"trajectories: {height}x{width} {i + len(asked)}/{count}", flush=True)
        rows.flush()
        part.replace(path)


class Adapter(nn.Module):
    """Low-rank updates for every linear layer of the transformer; ``up`` starts at zero."""

    def __init__(self, model: Flux2Transformer2DModel) -> None:
        super().__init__()
        self.names = {layer: name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for layer, name in self.names.items():
            self.down[self.key(name)] = nn.Parameter(torch.randn(RANK, layer.in_features) / layer.in_features**0.5)
            self.up[self.key(name)] = nn.Parameter(torch.zeros(layer.out_features, RANK))

    @staticmethod
    def key(name: str) -> str:
        return name.replace(".", "/")

    def linear(self, layer: nn.Linear, x: Tensor) -> Tensor:
        key = self.key(self.names[layer])
        down, up = self.down[key].to(x.dtype), self.up[key].to(x.dtype)
        return F.linear(x, layer.weight.to(x.dtype)) + F.linear(F.linear(x, down), up)


def batches(run: Run, reader: Reader, stride: int) -> Iterator[tuple[Tensor, ...]]:
    """(state, its noise level, the chord's velocity, …) of ``stride`` kept states at a time."""
    rows = {b: np.load(path_of(run, b), mmap_mode="r") for b in COUNTS if path_of(run, b).exists()}
    sigmas = torch.tensor(shifted(FINE, SHIFT)[::KEPT], dtype=torch.float32)
    rng = random.Random()
    while True:
        bucket = rng.choices(list(rows), [COUNTS[b] for b in rows])[0]
        paths = rows[bucket]
        count = 9_000 // (paths.shape[2] + TEXT_TOKENS)
        chosen = sorted(rng.sample(range(len(paths)), min(count, len(paths))))
        start = torch.tensor([stride * rng.randrange((FINE // KEPT) // stride) for _ in chosen])
        x = torch.from_numpy(np.stack([paths[c, s] for c, s in zip(chosen, start.tolist(), strict=True)])).float()
        y = torch.from_numpy(
            np.stack([paths[c, s + stride] for c, s in zip(chosen, start.tolist(), strict=True)])
        ).float()
        target = (y - x) / (sigmas[start + stride] - sigmas[start])[:, None, None]
        asked = [prompt_and_guidance(c) for c in chosen]
        cos, sin = rotary(*bucket, TEXT_TOKENS, run.device)
        text = reader([w for w, _ in asked])
        guidance = torch.tensor([g for _, g in asked])
        yield (*(t.to(run.device) for t in (x.to(run.dtype), sigmas[start], guidance, target)), text, cos, sin)


def train_lora(run: Run, name: str) -> None:
    torch._dynamo.config.recompile_limit = 64
    teacher, reader = teacher_of(run), Reader(run)
    adapter = Adapter(teacher).to(run.device)
    trainer = Trainer(run, name, adapter, lr=2e-3, ema=0.998, decay=0.0)
    steps = STEPS[name]

    def loss(
        x: Tensor, sigma: Tensor, guidance: Tensor, target: Tensor, text: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        return F.mse_loss(velocity(teacher, x, text, sigma, guidance, (cos, sin), adapter.linear), target)

    report = reporter(run, name, trainer, reader, 2.5, shifted(steps, SHIFT), teacher, adapter.linear)
    trainer.fit(batches(run, reader, (FINE // KEPT) // steps), loss, report)


def train_turbo(run: Run) -> None:
    train_lora(run, "turbo")


def train_flash(run: Run) -> None:
    train_lora(run, "flash")


def export(run: Run, name: str, target: Path) -> None:
    """Write the averaged LoRA as diffusers writes one."""
    teacher = teacher_of(run)
    adapter = Adapter(teacher)
    load_ema(run.path(f"{name}.safetensors"), adapter)
    state = {}
    for layer in adapter.names.values():
        key = adapter.key(layer)
        state[f"transformer.{layer}.lora_A.weight"] = adapter.down[key].detach().bfloat16()
        state[f"transformer.{layer}.lora_B.weight"] = adapter.up[key].detach().bfloat16()
    save_file(state, target, {"format": "pt"})
