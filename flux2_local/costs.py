"""Bytes and FLOPs of every component and stage, from the architecture alone.

Parameter counts are exact: the modules are built on the meta device and counted. Activations are counted from the largest
tensors alive at once in :mod:`flux2_local.model`. A FLOP is one multiplication or one addition.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import nn

from .model.autoencoder import Autoencoder, AutoencoderConfig
from .model.blocks import block_linears
from .model.language import LanguageConfig, LanguageModel
from .model.transformer import Flux2Transformer, TransformerConfig

if TYPE_CHECKING:
    from .hardware import Hardware

WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of one value."""


FULL_TOKENS_CPU = 1024
"""Tokens from which on a CPU gains little by more: its matrix library prepares the weights anew for every product, which the
tokens share. With the bundled model on one core a step at 512×512 (336 tokens) took about a tenth less per picture in a batch,
at 768×768 (656 tokens) a twentieth at most, and at 1024×1024 no less (``python -m benchmarks.bulk``)."""


@dataclass(frozen=True)
class Architecture:
    """The shapes of one model's three networks, and how its prompts are read."""

    transformer: TransformerConfig
    language: LanguageConfig
    autoencoder: AutoencoderConfig
    text_layers: tuple[int, ...]
    text_tokens: int
    passes: int = 1
    """Transformer evaluations per step: 2 with classifier-free guidance."""

    @property
    def multiple(self) -> int:
        """Pixels along one side of a token."""
        return int(2 ** (len(self.autoencoder.block_out_channels) - 1) * self.autoencoder.patch_size[0])

    def tokens(self, width: int, height: int) -> int:
        """Image tokens of a picture, its size rounded up to whole tokens."""
        return -(-width // self.multiple) * -(-height // self.multiple)


@dataclass(frozen=True)
class Work:
    """One request's size: pixels, steps, how many pictures at once, and tokens of reference pictures."""

    width: int = 1024
    height: int = 768
    steps: int = 28
    batch: int = 1
    reference_tokens: int = 0


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters()) + sum(b.numel() for b in module.buffers())


@cache
def parameters(arch: Architecture) -> dict[str, int]:
    """Values in each component as it is loaded (the text encoder cut to the layers that are read)."""
    with torch.device("meta"):
        return {
            "transformer": count(Flux2Transformer(arch.transformer)),
            "text_encoder": count(LanguageModel(arch.language, arch.text_layers)),
            "vae": count(Autoencoder(arch.autoencoder)),
        }


@cache
def block_parameters(arch: Architecture) -> dict[str, int]:
    """Weights in the block linears of each component: those that a format may hold in fewer bytes."""
    with torch.device("meta"):
        nets = {
            "transformer": Flux2Transformer(arch.transformer),
            "text_encoder": LanguageModel(arch.language, arch.text_layers),
        }
    return {name: sum(layer.weight.numel() for layer in block_linears(net).values()) for name, net in nets.items()}


def weight_bytes(arch: Architecture, dtype: str, per_weight: float | None = None) -> dict[str, int]:
    """Bytes of each component's weights in ``dtype``, with the block linears at ``per_weight`` bytes where that is given.

    Layers that calibration keeps in ``dtype`` are counted as quantized: they are few.
    """
    blocks = {} if per_weight is None else block_parameters(arch)
    saved = 0.0 if per_weight is None else WIDTH[dtype] - per_weight
    return {name: int(n * WIDTH[dtype] - blocks.get(name, 0) * saved) for name, n in parameters(arch).items()}


@cache
def layer_parameters(arch: Architecture) -> dict[str, int]:
    """Values in the transformer's repeated parts: one double block, one single block, and everything once per schedule."""
    with torch.device("meta"):
        net = Flux2Transformer(arch.transformer)
    modulations = (net.double_stream_modulation_img, net.double_stream_modulation_txt, net.single_stream_modulation)
    once = (net.time_guidance_embed, *modulations, net.norm_out)
    return {
        "double": count(net.transformer_blocks[0]) if len(net.transformer_blocks) else 0,
        "single": count(net.single_transformer_blocks[0]) if len(net.single_transformer_blocks) else 0,
        "schedule": sum(count(m) for m in once),
    }


def step_flops(arch: Architecture, work: Work) -> float:
    """FLOPs of one denoising step: linear layers on image, reference and text tokens, and attention between all."""
    t, image = arch.transformer, arch.tokens(work.width, work.height) + work.reference_tokens
    text = arch.text_tokens
    layers = layer_parameters(arch)
    double = t.num_layers * layers["double"] / 2 * (image + text)
    single = t.num_single_layers * layers["single"] * (image + text)
    ends = t.width * 2 * t.in_channels * image
    attention = 2 * (image + text) ** 2 * t.width * (t.num_layers + t.num_single_layers)
    return 2.0 * (double + single + ends + attention) * work.batch * arch.passes


def encode_flops(arch: Architecture) -> float:
    """FLOPs of reading one prompt."""
    c, text = arch.language, arch.text_tokens
    layers = parameters(arch)["text_encoder"] - c.vocab_size * c.hidden_size
    attention = 2 * text**2 * c.num_attention_heads * c.head_dim * max(arch.text_layers)
    return 2.0 * (layers * text + attention) * arch.passes


def full_tokens(hardware: Hardware, dtype: str) -> int:
    """Tokens from which on a step's matrix products wait for arithmetic and not for weights, so that more gain nothing: on a
    GPU the roofline's ridge, where 2 FLOPs a token and weight take as long as reading the weight."""
    if hardware.kind == "cpu":
        return FULL_TOKENS_CPU
    rate = hardware.flops.get(dtype, hardware.flops["float32"])
    return math.ceil(rate / hardware.memory_rate * WIDTH[dtype] / 2)


@cache
def decode_flops(arch: Architecture, width: int, height: int) -> float:
    """FLOPs of decoding one picture, counted by running the decoder on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode

    m = arch.multiple
    with torch.device("meta"):
        net = Autoencoder(arch.autoencoder)
        latents = torch.empty(1, net.bn.running_mean.numel(), -(-height // m), -(-width // m))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.decode(latents)
    return float(counter.get_total_flops())


def step_activations(arch: Architecture, work: Work, dtype: str) -> int:
    """Bytes alive at the widest point of a step: the residual stream, a block's packed projection (3 + 2·mlp widths), the
    input of its output projection (1 + mlp) and q and k, for every token."""
    t = arch.transformer
    tokens = arch.tokens(work.width, work.height) + work.reference_tokens + arch.text_tokens
    widths = 2 + 3 + 2 * t.mlp_ratio + 1 + t.mlp_ratio + 3
    return int(tokens * widths * t.width * WIDTH[dtype] * work.batch)


def decode_activations(arch: Architecture, work: Work, dtype: str) -> int:
    """Bytes alive at the widest point of decoding one picture: three tensors of the second-last level's channels at full
    size (its upsampled input, the convolution's output and a normalised copy)."""
    widths = tuple(reversed(arch.autoencoder.decoder_block_out_channels or arch.autoencoder.block_out_channels))
    widest = widths[-2] if len(widths) > 1 else widths[-1]
    return 3 * widest * work.width * work.height * WIDTH[dtype]
