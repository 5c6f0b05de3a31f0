"""Parameters and FLOPs of every component and stage, from the architecture alone, and the seconds that streaming takes.

Parameter counts are exact: the modules are built on the meta device and counted. A FLOP is one multiplication or one addition.
Bytes are in :mod:`flux2_local.footprint`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from torch import nn

from .model.autoencoder import Autoencoder, AutoencoderConfig
from .model.blocks import block_linears, repeated
from .model.language import LanguageConfig, LanguageModel, Remainder
from .model.meta import meta
from .model.transformer import Flux2Transformer, TransformerConfig

if TYPE_CHECKING:
    from . import quant
    from .hardware import Hardware

WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of one value."""


FULL_TOKENS_CPU = 1024
"""Tokens from which on a CPU gains little by more: its matrix library prepares the weights anew for every product, which the
tokens share. With the bundled model on one core a step at 512×512 (336 tokens) took about a tenth less per picture in a batch,
at 768×768 (656 tokens) a twentieth at most, and at 1024×1024 no less (``python -m benchmarks.bulk``)."""


ROUNDED = {"cpu": (30, 20), "cuda": (3, 0), "mps": (3, 0)}
"""Bytes moved at the rate of a copy for each value that an 8-bit layer rounds, and for each sum that it scales back. On a CPU an
estimate: CPU time of the layers of ``scripts/measure_int8.py`` on one busy core of 19 GB/s, where they took 1.5 and 1.1 ns. On a card
what the kernels read and write: 16 bit and 8, and sums are scaled in registers."""

CONVERTED = {"cpu": 215, "cuda": 55, "mps": 215}
"""Bytes moved, likewise, to make a weight int8. On the host and to keep it: klein-4B took 63 s more to load than in 16 bit on two
cores of 25 GB/s (``benchmarks/results/klein-4b-cpu-2026-11-24.json``). On a card: what the operations of
:func:`flux2_kernels.quantize_rows.reference` read and write, one after the other."""

PAGEABLE = 0.5
"""Share of the link's rate that copies from memory that is not page-locked reach: the driver copies twice. Assumed."""

CHAT, CHAT_STEP = 384, 64
"""Tokens of a chat that asks for a prompt's expansion, where there is no tokenizer to count them: an estimate. Counts are rounded
up to whole steps, so that few different ones are planned for."""

ANSWER, ANSWER_AT_MOST = 160, 512
"""Tokens of an expanded prompt: an estimate for predictions, and where it is cut."""


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
    stored: str = "bfloat16"
    """The type that the files of the transformer and the text encoder have their weights in; "" where there are several."""
    references_once: bool = False
    """Whether references attend to themselves alone, so that their keys and values are computed once, before the first step."""

    @property
    def multiple(self) -> int:
        """Pixels along one side of a token."""
        return int(2 ** (len(self.autoencoder.block_out_channels) - 1) * self.autoencoder.patch_size[0])

    def tokens(self, width: int, height: int) -> int:
        """Image tokens of a picture, its size rounded up to whole tokens."""
        return -(-width // self.multiple) * -(-height // self.multiple)

    def reference_tokens(self, work: Work) -> int:
        """Of all reference pictures."""
        return sum(self.tokens(*size) for size in work.references)

    def step_tokens(self, work: Work) -> int:
        """Image tokens that go through the transformer in every step for one picture: its own, and its references' where they
        are not read once."""
        others = 0 if self.references_once else self.reference_tokens(work)
        return self.tokens(work.width, work.height) + others


@dataclass(frozen=True)
class Work:
    """One request's size.

    Attributes:
        width, height: pixels.
        steps: of denoising.
        images: pictures, made one after another but for ``batch`` of them at once.
        batch: pictures denoised together.
        references: width and height in pixels of each reference picture, as the autoencoder gets it.
        chat: tokens that the language model reads to expand the prompt, rounded up to :data:`CHAT_STEP`; 0 where it does not.
    """

    width: int = 1024
    height: int = 768
    steps: int = 28
    images: int = 1
    batch: int = 1
    references: tuple[tuple[int, int], ...] = ()
    chat: int = 0


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters()) + sum(b.numel() for b in module.buffers())


@cache
def network(arch: Architecture, component: str) -> nn.Module:
    """A network as it is loaded, on the meta device (the text encoder cut to the layers that are read, "expansion" what is cut
    off); not to be changed."""
    with meta():
        if component == "transformer":
            return Flux2Transformer(arch.transformer)
        if component == "text_encoder":
            return LanguageModel(arch.language, arch.text_layers)
        if component == "expansion":
            return Remainder(arch.language, max(arch.text_layers))
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
    """FLOPs of one denoising step: linear layers on the tokens that go through it, and their attention to all."""
    t, image = arch.transformer, arch.step_tokens(work)
    own = image + arch.text_tokens
    all_tokens = own + arch.reference_tokens(work) if arch.references_once else own
    ends = t.width * 2 * t.in_channels * image
    return (block_flops(arch, own, all_tokens) + 2.0 * ends) * work.batch * arch.passes


def reference_flops(arch: Architecture, work: Work) -> float:
    """FLOPs of reading the references once, where the model does."""
    t, others = arch.transformer, arch.reference_tokens(work) if arch.references_once else 0
    return block_flops(arch, others, others) + 2.0 * t.width * t.in_channels * others


def block_flops(arch: Architecture, tokens: int, keys: int) -> float:
    """FLOPs of the transformer's blocks for one sequence of ``tokens`` that attend to ``keys``."""
    double, single = one_block_flops(arch, tokens, keys)
    return arch.transformer.num_layers * double + arch.transformer.num_single_layers * single


def one_block_flops(arch: Architecture, tokens: int, keys: int) -> tuple[float, float]:
    """FLOPs of a double and of a single block for one sequence of ``tokens`` that attend to ``keys``."""
    layers, attention = layer_parameters(arch), 2 * tokens * keys * arch.transformer.width
    return 2.0 * (layers["double"] / 2 * tokens + attention), 2.0 * (layers["single"] * tokens + attention)


def step_bytes(arch: Architecture, work: Work, dtype: str) -> float:
    """Bytes that the blocks' linear layers cannot but move in one step for one picture: their weights, and what goes into each and
    comes out, once; all in ``dtype``."""
    t, layers, per_token = arch.transformer, layer_parameters(arch), linears(arch, "transformer")
    tokens = arch.step_tokens(work) + arch.text_tokens
    weights = t.num_layers * layers["double"] + t.num_single_layers * layers["single"]
    return WIDTH[dtype] * (weights + tokens * (per_token.inputs + per_token.outputs)) * arch.passes


def encode_flops(arch: Architecture) -> float:
    """FLOPs of reading one prompt."""
    c, text = arch.language, arch.text_tokens
    layers = parameters(arch)["text_encoder"] - c.vocab_size * c.hidden_size
    attention = 2 * text**2 * c.num_attention_heads * c.head_dim * max(arch.text_layers)
    return 2.0 * (layers * text + attention) * arch.passes


def expand_flops(arch: Architecture, chat: int) -> float:
    """FLOPs of reading a chat of so many tokens; the answer waits for weights, not for arithmetic."""
    return (
        2.0
        * chat
        * sum(count(block) for part in ("text_encoder", "expansion") for block in repeated(network(arch, part)))
    )


@dataclass(frozen=True)
class Linears:
    """What one token meets in the linear layers of a network's blocks: weights, and values that go in and come out."""

    weights: float
    inputs: float
    outputs: float

    def seconds_beyond(self, tokens: int, hardware: Hardware, dtype: str, form: quant.Format) -> float:
        """Seconds that layers of ``form``, whose products have a rate, take for ``tokens`` beyond those of ``dtype``; below zero
        where they gain."""
        rates, (rounded, scaled) = hardware.flops, ROUNDED[hardware.kind]
        dense = rates.get(dtype, rates["float32"])
        products = 2 * self.weights * (1 / rates[form.product] - 1 / dense) + 2 * form.rotation * self.inputs / dense
        return tokens * (products + (rounded * self.inputs + scaled * self.outputs) / hardware.memory_rate)


@cache
def linears(arch: Architecture, component: str) -> Linears:
    """Of "transformer" or "text_encoder". A double block has half of its layers for the image's tokens, half for the text's."""
    rows = [
        (0.5 if name.startswith("transformer_blocks.") else 1.0, layer)
        for name, layer in block_linears(network(arch, component)).items()
    ]
    return Linears(
        sum(share * layer.weight.numel() for share, layer in rows),
        sum(share * layer.in_features for share, layer in rows),
        sum(share * layer.out_features for share, layer in rows),
    )


def full_tokens(hardware: Hardware, dtype: str) -> int:
    """Tokens from which on a step's matrix products wait for arithmetic and not for weights, so that more gain nothing: on a
    GPU the roofline's ridge, where 2 FLOPs a token and weight take as long as reading the weight."""
    if hardware.kind == "cpu":
        return FULL_TOKENS_CPU
    rate = hardware.products(dtype)
    return math.ceil(rate / hardware.memory_rate * WIDTH[dtype] / 2)


def conversion_seconds(arch: Architecture, hardware: Hardware, form: quant.Format) -> float:
    """Seconds that making and keeping the weights of ``form``, one of ours, takes when they are first loaded: on the host what
    that adds to reading the files. A card has them come while the next are read, quantizes them and sends them back; then they are
    written, at the rate that files are read at."""
    weights = sum(parameters(arch)[name] for name in ("transformer", "text_encoder"))
    making = CONVERTED[hardware.kind] / hardware.memory_rate
    if hardware.kind != "cuda":
        return making * weights
    stored = WIDTH.get(arch.stored, WIDTH["bfloat16"])
    making += (stored + form.weight_bytes) / (PAGEABLE * hardware.link_rate)
    return weights * (max(stored / hardware.disk_rate, making) + form.weight_bytes / hardware.disk_rate)


@cache
def decode_flops(arch: Architecture, width: int, height: int) -> float:
    """FLOPs of decoding one picture: convolutions, linear layers and the middle's attention."""
    net = network(arch, "vae")
    assert isinstance(net, Autoencoder)
    sides = [
        -(-n // arch.multiple) * side for n, side in zip((height, width), arch.autoencoder.patch_size, strict=True)
    ]
    places = sides[0] * sides[1]
    decoder = net.decoder
    values = places * (layer_values(decoder.conv_in) + layer_values(decoder.mid_block))
    values += 0 if net.post_quant_conv is None else places * layer_values(net.post_quant_conv)
    values += 2 * places**2 * sum(a.to_q.in_features for a in decoder.mid_block.attentions)  # type: ignore[operator, union-attr, misc]
    for level in decoder.up_blocks:
        values += places * layer_values(level.resnets)  # type: ignore[arg-type]
        for upsampler in level.upsamplers:  # type: ignore[union-attr]
            places *= 4
            values += places * layer_values(upsampler)
    return 2.0 * (values + places * layer_values(decoder.conv_out))


def layer_values(module: nn.Module) -> int:
    """Weights of its convolutions and linear layers: multiplications for each place of the result."""
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, (nn.Conv2d, nn.Linear)))


@dataclass(frozen=True)
class Stream:
    """How a network's blocks come to the device.

    Attributes:
        stay: numbers of those that come once.
        rate: bytes per second of copying from host memory.
        ring: buffers on the device for those that do not stay.
        mapped: numbers of those that are read from their files first.
        disk: bytes per second of reading files.
        ahead: blocks that are read before they are sent for.
    """

    stay: tuple[int, ...]
    rate: float
    ring: int
    mapped: tuple[int, ...] = ()
    disk: float = math.inf
    ahead: int = 2

    def moving(self, sizes: tuple[int, ...]) -> float:
        """Seconds that the link or the disk, whichever is busy longer, takes for the blocks of ``sizes`` that come in every step."""
        numbers = set(range(len(sizes))) - set(self.stay)
        return max(
            sum(sizes[n] for n in numbers) / self.rate, sum(sizes[n] for n in numbers & set(self.mapped)) / self.disk
        )


def stream_seconds(compute: float, sizes: tuple[int, ...], stream: Stream, steps: int = 4) -> tuple[float, float]:
    """Seconds of the first step, which brings the blocks that stay as well, and of every other one, on the average.

    The schedule of :mod:`flux2_local.offload.streamed`, event by event: copies run one after another, each begins when a buffer
    is free and its file is read, and a block begins when the one before it is computed and its own copy has ended. Files are read one
    after another too, each from when an earlier one's block is sent for.

    Args:
        compute: seconds of a step with all weights at hand; each block takes the same share.
        sizes: bytes of every block, in the order of the calls.
        stream: how they come.
        steps: to go through.
    """
    kept, mapped, link, disk, now, ends = set(stream.stay), set(stream.mapped), 0.0, 0.0, 0.0, []
    freed = [0.0] * stream.ring  # when each buffer was last free, the next to be filled first
    asked = [0.0] * stream.ahead  # when each of the next files was asked for
    before = 0.0  # a copy is not begun before those of the blocks called earlier have begun
    for step in range(steps):
        for number, size in enumerate(sizes):
            if number not in kept or step == 0:
                before = max(before, freed.pop(0) if number not in kept else 0.0)
                if number in mapped:
                    disk = max(disk, asked.pop(0)) + size / stream.disk
                    asked.append(before)
                link = max(link, before, disk if number in mapped else 0.0) + size / stream.rate
                now = max(now, link)
            now += compute / len(sizes)
            if number not in kept:
                freed.append(now)
        ends.append(now)
    return ends[0], (ends[-1] - ends[0]) / (steps - 1)


SHARES = 64
"""Paces of streaming that are tried for one that fits."""


def staying(sizes: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Ever fewer numbers of blocks that stay (:func:`blocks_that_stay`), beginning with all, among which to find those that fit."""
    for share in range(SHARES if sizes else 0):
        yield blocks_that_stay(sizes, max(sizes) * share / SHARES)


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
