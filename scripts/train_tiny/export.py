"""Last stage: the trained parts in the hub layout, in bfloat16, with a model card."""

from __future__ import annotations

import json
import shutil

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from . import flow, language, network, steps, tokenizer
from .latents import load_autoencoder
from .trainer import Run, load_ema

MAX_BYTES = 24_000_000


def half(module: nn.Module) -> nn.Module:
    """bfloat16, except for the autoencoder's statistics."""
    statistics = {k: v.clone() for k, v in module.state_dict().items() if k.startswith("bn.")}
    module.to(torch.bfloat16)
    for name, value in statistics.items():
        module.get_submodule("bn")._buffers[name.removeprefix("bn.")] = value
    return module


def train(run: Run) -> None:
    """Write ``run.out`` afresh; a LoRA whose training has not begun is left out.

    Raises:
        ValueError: the guided transformer is of a former state.
    """
    flow.require_guided(run)
    out = run.out
    card = (out / "README.md").read_text("utf-8") if (out / "README.md").exists() else None
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)

    fast = tokenizer.load(run.work)
    fast.save_pretrained(out / "tokenizer")
    torch.manual_seed(0)  # of the vision tower, which nothing trains: one export is like the next
    text = language.load(run)
    half(text).save_pretrained(out / "text_encoder")

    net = network.build()
    load_ema(run.path("guidance.safetensors" if run.path("guidance.safetensors").exists() else "flow.safetensors"), net)
    half(net).save_pretrained(out / "transformer")
    half(load_autoencoder(run).to(memory_format=torch.contiguous_format)).save_pretrained(out / "vae")
    FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True).save_pretrained(out / "scheduler")
    for name in steps.STEPS:
        if run.path(f"{name}.safetensors").exists():
            steps.export(run, name, out / f"{name}.safetensors")
    index = {
        "_class_name": "Flux2Pipeline",
        "_diffusers_version": "0.42.1",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Mistral3ForConditionalGeneration"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "Flux2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLFlux2"],
    }
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    if card is not None:
        (out / "README.md").write_text(card, "utf-8")
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    print(f"export: {size / 1e6:.1f} MB in {out}")
    assert size <= MAX_BYTES, f"the bundled model may weigh {MAX_BYTES / 1e6:.0f} MB"
