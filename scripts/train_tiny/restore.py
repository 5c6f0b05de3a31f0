"""Checkpoints from an exported folder, so that training goes on from a model whose checkpoints are gone.

The optimizer's moments start anew. The transformer is the guided one: at a guidance scale of 1 it is what ``flow`` trains.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Mistral3ForConditionalGeneration

from . import steps
from .trainer import Run, load_state, save_state

STEP = 100
"""The step that restored checkpoints say they are at: late enough for the average to keep what was learnt, and early enough for it to
follow what is learnt on a slow machine."""


def keep(run: Run, name: str, weights: dict[str, Tensor]) -> None:
    """Write ``weights`` as a stage's checkpoint; one that is there already stays."""
    path = run.path(f"{name}.safetensors")
    if path.exists():
        print(f"restore: {path} is there already", flush=True)
        return
    state = {f"{kind}.{k}": v.detach().float().clone() for kind in ("model", "ema") for k, v in weights.items()}
    save_state(path, state, {"step": STEP, "seen": 0})
    print(f"restore: {path}", flush=True)


def parameters(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters())


def adapter_weights(run: Run, path: Path) -> dict[str, Tensor]:
    """A LoRA file's matrices under the names of :class:`steps.Adapter`."""
    sides = {"lora_A": "down", "lora_B": "up"}
    weights = {}
    for name, tensor in load_file(path).items():
        layer, side, _ = name.removeprefix("transformer.").rsplit(".", 2)
        weights[f"{sides[side]}.{steps.Adapter.key(layer)}"] = tensor
    return weights


def train(run: Run) -> None:
    """Read ``run.out``, write ``run.work``."""
    folder = run.out
    if not run.path("tokenizer").exists():
        shutil.copytree(folder / "tokenizer", run.path("tokenizer"))
    vae = AutoencoderKLFlux2.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    for stage, parts in (("encoder", ("encoder", "quant_conv")), ("decoder", ("decoder", "post_quant_conv"))):
        keep(run, stage, {n: p for n, p in vae.named_parameters() if n.split(".")[0] in parts})
    statistics = torch.stack([vae.bn.running_mean, vae.bn.running_var]).float().numpy()
    if not run.path("latent_statistics.npy").exists():
        np.save(run.path("latent_statistics.npy"), statistics)
    text = Mistral3ForConditionalGeneration.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    keep(run, "language", parameters(text))
    transformer = Flux2Transformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32)
    keep(run, "flow", parameters(transformer))
    keep(run, "guidance", parameters(transformer))
    for name in steps.STEPS:
        if (folder / f"{name}.safetensors").exists():
            keep(run, name, adapter_weights(run, folder / f"{name}.safetensors"))


def train_blend(run: Run) -> None:
    """Put the mean of the guided transformer and of the exported one, from which it went on, in its checkpoint's place.

    What training for a new kind of picture costs in the old kind, the mean mostly has not lost, and it has most of what was gained
    (arXiv:2109.01903).
    """
    path = run.path("guidance.safetensors")
    state, facts = load_state(path)
    exported = Flux2Transformer2DModel.from_pretrained(run.out / "transformer", torch_dtype=torch.float32)
    for name, p in exported.named_parameters():
        for kind in ("model", "ema"):
            state[f"{kind}.{name}"] = (state[f"{kind}.{name}"] + p.detach()) / 2
    save_state(path, state, facts)
    print(f"blend: {path}", flush=True)
