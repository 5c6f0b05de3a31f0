"""Parameters and FLOPs of every component and stage, from the architecture alone, and the seconds that streaming takes.

Parameter counts are exact: the modules are built on the meta device and counted. A FLOP is one multiplication or one addition.
Bytes are in :mod:`flux2_local.footprint`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from .model.autoencoder import Autoencoder, AutoencoderConfig
from .model.language import LanguageConfig, LanguageModel
from .model.meta import meta
from .model.transformer import Flux2Transformer, TransformerConfig

WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of one value."""


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
    """One request's size.

    Attributes:
        width, height: pixels.
        steps: of denoising.
        images: pictures, made one after another but for ``batch`` of them at once.
        batch: pictures denoised together.
        references: width and height in pixels of each reference picture, as the autoencoder gets it.
    """

    width: int = 1024
    height: int = 768
    steps: int = 28
    images: int = 1
    batch: int = 1
    references: tuple[tuple[int, int], ...] = ()


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters()) + sum(b.numel() for b in module.buffers())


@cache
def network(arch: Architecture, component: str) -> nn.Module:
    """A network as it is loaded, on the meta device (the text encoder cut to the layers that are read); not to be changed."""
    with meta():
        if component == "transformer":
            return Flux2Transformer(arch.transformer)
        if component == "text_encoder":
            return LanguageModel(arch.language, arch.text_layers)
        return Autoencoder(arch.autoencoder)


@cache
def parameters(arch: Architecture) -> dict[str, int]:
    """Values in each component as it is loaded."""
    return {name: count(network(arch, name)) for name in ("transformer", "text_encoder", "vae")}


@cache
def checkpoint_parameters(arch: Architecture) -> int:
    """Values in a model's files, about: every layer of the text encoder and its output projection, whose weights may be shared
    with the embedding's; not the vision tower of dev's."""
    found, language = parameters(arch), arch.language
    layer = (found["text_encoder"] - language.vocab_size * language.hidden_size) // max(arch.text_layers)
    unread = language.num_hidden_layers - max(arch.text_layers)
    return sum(found.values()) + unread * layer + language.vocab_size * language.hidden_size


@cache
def layer_parameters(arch: Architecture) -> dict[str, int]:
    """Values in one double and one single block of the transformer."""
    net = network(arch, "transformer")
    lists = {"double": net.transformer_blocks, "single": net.single_transformer_blocks}
    return {name: count(blocks[0]) if len(blocks) else 0 for name, blocks in lists.items()}  # type: ignore[arg-type, index]


def step_flops(arch: Architecture, work: Work) -> float:
    """FLOPs of one denoising step: linear layers on image, reference and text tokens, and attention between all."""
    t, image = arch.transformer, arch.tokens(work.width, work.height)
    image += sum(arch.tokens(*size) for size in work.references)
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


@cache
def decode_flops(arch: Architecture, width: int, height: int) -> float:
    """FLOPs of decoding one picture, counted by running the decoder on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode

    m, net = arch.multiple, network(arch, "vae")
    assert isinstance(net, Autoencoder)
    latents = torch.empty(1, net.bn.running_mean.numel(), -(-height // m), -(-width // m), device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.decode(latents)
    return float(counter.get_total_flops())


def stream_seconds(
    compute: float, sizes: tuple[int, ...], stay: tuple[int, ...], rate: float, ring: int, steps: int = 4
) -> tuple[float, float]:
    """Seconds of the first step, which brings the blocks that stay as well, and of every other one, on the average.

    The schedule of :mod:`flux2_local.offload.streamed`, event by event: copies run one after another, each begins when a buffer
    is free, and a block begins when the one before it is computed and its own copy has ended.

    Args:
        compute: seconds of a step with all weights at hand; each block takes the same share.
        sizes: bytes of every block, in the order of the calls.
        stay: numbers of those that come once.
        rate: of copying, in bytes per second.
        ring: buffers for the others.
        steps: to go through.
    """
    kept, link, now, ends = set(stay), 0.0, 0.0, []
    freed = [0.0] * ring  # when each buffer was last free, the next to be filled first
    before = 0.0  # a copy is not begun before those of the blocks called earlier have begun
    for step in range(steps):
        for number, size in enumerate(sizes):
            if number not in kept or step == 0:
                before = max(before, freed.pop(0) if number not in kept else 0.0)
                link = max(link, before) + size / rate
                now = max(now, link)
            now += compute / len(sizes)
            if number not in kept:
                freed.append(now)
        ends.append(now)
    return ends[0], (ends[-1] - ends[0]) / (steps - 1)


def blocks_that_stay(sizes: tuple[int, ...], pace: float) -> tuple[int, ...]:
    """Numbers of the blocks that stay where ``pace`` bytes per block are to be streamed, spread so that the link is busy evenly.

    Args:
        sizes: bytes of every block, in the order of the calls; each computes for about as long as the others.
        pace: a block streams as soon as the bytes due so far reach its size. 0 keeps every block, the largest size none.
    """
    due, stay = 0.0, []
    for number, size in enumerate(sizes):
        due += pace
        if due >= size:
            due = min(due - size, max(sizes))
        else:
            stay.append(number)
    return tuple(stay)
