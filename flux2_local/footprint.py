"""Bytes of each network's weights, part by part, and of what is alive beside them while a stage runs.

Counted, not estimated: networks are built on the meta device, and stages are run there under a counter of live tensors. What
fused attention allocates is its result and its sums; Triton kernels allocate their results only. What is kept from one stage to the
next is added up from its shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from flux2_kernels import Place
from torch import Tensor, nn

from . import attention, costs, quant
from .costs import WIDTH, Architecture, Work
from .counting import Peak, Workspaces, remembered
from .hardware import Hardware, Kind
from .model.autoencoder import Autoencoder
from .model.blocks import SCHEDULE, repeated
from .model.language import Layer, Past
from .model.meta import meta
from .model.native import NATIVE
from .model.ops import REFERENCE, Input, Ops, Pair, Quantizer, Rotary, Rows, sdpa
from .model.transformer import TABLES as SCHEDULES
from .model.transformer import Flux2Transformer, Kept, Modulation
from .offload.streamed import HOSTED, RING
from .offload.tensors import ALIGNMENT, hung
from .quant.recipe import Recipe

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Weights:
    """Bytes of one network's weights.

    Attributes:
        blocks: of each block, in the order that they are called.
        schedule: of what only makes the schedule's table.
        hosted: of what stays on the host when the network streams.
        rest: of everything else.
    """

    blocks: tuple[int, ...]
    schedule: int
    hosted: int
    rest: int

    @property
    def total(self) -> int:
        return sum(self.blocks) + self.schedule + self.hosted + self.rest

    def streaming(self, stay: tuple[int, ...]) -> int:
        """On the device while the blocks are called, those in ``stay`` and the ring included."""
        kept = set(stay)
        moving = sorted((size for number, size in enumerate(self.blocks) if number not in kept), reverse=True)
        ring = moving[0] * min(RING, len(moving)) if moving else 0
        return self.rest + ring + sum(self.blocks[number] for number in kept)


@cache
def weights(
    arch: Architecture, component: str, dtype: str, recipe: Recipe | None = None, folded: bool = False
) -> Weights:
    """The weights of "transformer", "text_encoder", "expansion" (what that needs beside it) or "vae" with activations in ``dtype``.

    Args:
        recipe: which layers are held in which format; None for all in ``dtype``.
        folded: whether the autoencoder's upsampling is (:class:`flux2_local.model.autoencoder.Doubling`).
    """
    network = costs.network(arch, component)
    quantized = {} if recipe is None else recipe.layers(network)
    sizes = {id(layer.weight): layer_bytes(recipe, *layer.weight.shape) for layer in quantized.values()}  # type: ignore[arg-type]

    def size(module: nn.Module | None) -> int:
        return sum(
            sizes.get(id(value), own_bytes(value, dtype)) for _, value in ([] if module is None else hung(module))
        )

    blocks = tuple(-(-size(block) // ALIGNMENT) * ALIGNMENT for block in repeated(network))
    schedule = sum(size(getattr(network, name, None)) for name in SCHEDULE)
    hosted = size(getattr(network, HOSTED, None))
    inside = sum(size(block) for block in repeated(network))
    rest = size(network) - inside - schedule - hosted
    if folded and isinstance(network, Autoencoder):
        rest += WIDTH[dtype] * more_when_folded(network)
    return Weights(blocks, schedule, hosted, rest)


def more_when_folded(vae: Autoencoder) -> int:
    """Values that folded upsampling holds beyond the convolutions' own: 16 for each 9 weights, and each bias four times."""
    convs = [up.conv for level in vae.decoder.up_blocks for up in level.upsamplers]  # type: ignore[union-attr]
    return sum(conv.weight.numel() // 9 * 7 + 3 * conv.bias.numel() for conv in convs)  # type: ignore[union-attr, operator]


def layer_bytes(recipe: Recipe, rows: int, columns: int) -> int:
    """Bytes of a quantized layer's values and scales."""
    form = recipe.form
    if form.group:
        return int(rows * columns * form.weight_bytes)
    return int(rows * columns + rows * round((form.weight_bytes - 1) * quant.formats.ROW_CHANNELS))


def own_bytes(value: Tensor, dtype: str) -> int:
    """Bytes of a parameter in ``dtype``; buffers (the autoencoder's statistics) keep their own."""
    return value.numel() * (WIDTH[dtype] if isinstance(value, nn.Parameter) else value.element_size())


@contextmanager
def counted(network: nn.Module, setup: Setup) -> Iterator[Peak]:
    """Count what is made inside, on the meta device."""
    copying = setup.kind == "cuda" or (setup.kind == "cpu" and not setup.channels_last)
    with (
        torch.device("meta"),
        torch.no_grad(),
        Workspaces(setup.threads, copying, setup.unfolding, setup.widened),
        Peak(network) as peak,
    ):
        yield peak


def _like(x: Tensor, *_: Any) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype)


def _normal(x: Tensor, shift: Tensor, scale: Tensor, into: Quantizer | None) -> Input:
    return _like(x) if into is None else into(x)


def _residual(
    x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor, into: Quantizer | None
) -> tuple[Tensor, Input]:
    return _like(x), _normal(x, shift, scale, into)


def _rotated(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, rotary: Rotary, out: Pair | None) -> Pair:
    return (_like(q), _like(k)) if out is None else out


def _gated(x: Tensor, out: Tensor | None) -> Tensor:
    return torch.empty(*x.shape[:-1], x.shape[-1] // 2, dtype=x.dtype) if out is None else out


def _gated_rows(x: Tensor, into: Quantizer, left: Tensor | None) -> Rows:
    width = x.shape[-1] // 2 + (0 if left is None else left.shape[-1])
    return Rows(*_quantized(x, into.dtype, 0, width))


def _quantized(x: Tensor, dtype: torch.dtype, rotation: int, width: int = 0) -> tuple[Tensor, Tensor]:
    return torch.empty(*x.shape[:-1], width or x.shape[-1], dtype=dtype), torch.empty(*x.shape[:-1], 1)


FUSED = Ops(_normal, _residual, _rotated, _gated, _gated_rows, sdpa)
"""What the Triton kernels allocate."""

WRITING = ("matmul", "sdpa-math")
"""Attention backends that write scores to memory."""

TABLES = {"triton": FUSED, "native": NATIVE, "reference": REFERENCE}


class _Computed:
    """A step that is not skipped. What step caching holds is in :func:`sampling`."""

    probes = True

    def rest(self, added: Tensor) -> Tensor | None:
        return None

    def keep(self, added: Tensor) -> None:
        pass


@dataclass(frozen=True)
class Setup:
    """What decides how much a stage allocates, beside the request.

    Attributes:
        arch: the model.
        dtype: of activations.
        kind: of device.
        form: the weights' format, or None for ``dtype``.
        ops, attention: what computes between the matmuls, and attention, by the plan's names.
        skipping: whether steps may be skipped.
        folded: whether the decoder's upsampling is folded.
        channels_last: whether convolutions run in that layout.
        gathered: pictures whose latents wait for each other at least.
        threads: of a CPU; 0 on a card, whose kernels keep attention's scores in registers.
        together: whether guidance's two passes run as one of a batch twice as large.
        place: a card that runs none of Triton's kernels; None elsewhere.
        summed: whether int8 products leave int32 sums.
        unfolding: whether convolutions write their pictures out (:func:`flux2_local.hardware.unfolds_convolutions`).
        widening: whether torchao's int8 products make the weights in 32 bit (:func:`flux2_local.hardware.widens_int8_weights`).
        widened: whether attention is computed in float32 (:func:`flux2_local.hardware.widens_attention`).
    """

    arch: Architecture
    dtype: str
    kind: Kind
    form: quant.Format | None = None
    ops: str = "reference"
    attention: str = "sdpa"
    skipping: bool = False
    folded: bool = False
    channels_last: bool = True
    gathered: int = 1
    threads: int = 0
    together: bool = False
    place: Place | None = None
    summed: bool = False
    unfolding: bool = False
    widening: bool = True
    widened: bool = False

    def rows(self, work: Work) -> int:
        """Of the batch that goes through the transformer."""
        return work.batch * (self.arch.passes if self.together else 1)

    @property
    def table(self) -> Ops:
        """Operations that allocate as the plan's do; attention that writes scores as itself, any other as fused kernels."""
        return replace(TABLES[self.ops], attend=attention.load(self.attention if self.attention in WRITING else "sdpa"))


def texts(setup: Setup, work: Work) -> int:
    """Bytes of the prompts' embeddings of all pictures that are made together, each of a request of its own at most."""
    own = setup.arch.transformer
    return setup.arch.passes * work.batch * setup.arch.text_tokens * own.joint_attention_dim * WIDTH[setup.dtype]


def carried(setup: Setup, work: Work) -> int:
    """Bytes that live from the first stages to the end of decoding: embeddings, references' latents and the pictures'."""
    arch, own = setup.arch, setup.arch.transformer
    tokens = max(work.batch, work.images, setup.gathered) * arch.tokens(work.width, work.height)
    tokens += arch.reference_tokens(work)
    return texts(setup, work) + tokens * own.in_channels * WIDTH[setup.dtype]


def tables(setup: Setup, work: Work) -> int:
    """Bytes that are kept from one picture to the next: the last schedules' modulations, this one's in size, and rotary tables."""
    arch, own = setup.arch, setup.arch.transformer
    tokens = arch.text_tokens + arch.tokens(work.width, work.height) + arch.reference_tokens(work)
    values = SCHEDULES * 17 * work.steps * own.width * WIDTH[setup.dtype]
    return values + 4 * 2 * tokens * (own.attention_head_dim // 2)


def workspace(hardware: Hardware) -> int:
    """Bytes that cuBLAS works in on a card, which torch takes once for each thread that multiplies: 32 MiB from Hopper on. Source:
    ``parseChosenWorkspaceSize`` in ``aten/src/ATen/cuda/CublasHandlePool.cpp``."""
    if hardware.kind != "cuda":
        return 0
    return 32 * 2**20 if (hardware.sm or 0) >= 90 else (2 * 4096 + 8 * 16) * 2**10


def sampling(setup: Setup, work: Work) -> int:
    """Bytes that live from one denoising step to the next, beside :func:`tables`: what is carried, the prompts side by side and
    embedded, references as tokens or what is kept of them, samples in float32, and what step caching holds."""
    arch, own, width = setup.arch, setup.arch.transformer, WIDTH[setup.dtype]
    image, others = arch.tokens(work.width, work.height), arch.reference_tokens(work)
    text, batch = arch.text_tokens, work.batch
    values = batch * text * own.joint_attention_dim + others * own.in_channels
    values += batch * arch.passes * text * own.width
    if setup.skipping:  # of each pass the blocks' contributions of two steps, and the first one's
        values += batch * 3 * arch.passes * image * own.width
    floats = ((3 + arch.passes) * batch * image + arch.step_tokens(work) - image) * own.in_channels
    if setup.together:  # tokens of both passes side by side
        values += arch.passes * batch * arch.step_tokens(work) * own.in_channels
    if arch.references_once:
        values += 2 * (own.num_layers + own.num_single_layers) * others * own.width
    if setup.kind == "cpu":  # where the noise and the positions, four int64 each, are on the same memory
        floats += batch * image * own.in_channels + 8 * (text + image + others)
    return carried(setup, work) + values * width + 4 * floats


@remembered
def denoising(setup: Setup, work: Work) -> int:
    """Most bytes alive beside the transformer's weights in a step, or while references are read once: one double and one single
    block stand for all."""
    arch, kind, own = setup.arch, DTYPES[setup.dtype], setup.arch.transformer
    few = replace(own, num_layers=min(2, own.num_layers), num_single_layers=min(2, own.num_single_layers))
    image, through, rows = arch.tokens(work.width, work.height), arch.step_tokens(work), setup.rows(work)
    others = arch.reference_tokens(work) if arch.references_once else 0
    with meta():
        network = Flux2Transformer(few, setup.table).to(kind)
        contexts = torch.empty(rows, arch.text_tokens, own.width, dtype=kind)
        tokens = torch.empty(rows, through, own.in_channels, dtype=kind)
        tables = Rotary(*torch.empty(2, arch.text_tokens + through, own.attention_head_dim // 2))
        parts = tuple(torch.empty(1, 1, own.width, dtype=kind) for _ in range(17))
        mod = Modulation(parts[:6], parts[6:12], parts[12:15], parts[15:])
        references = torch.empty(1, others, own.in_channels, dtype=kind)
        places = Rotary(*torch.empty(2, others, own.attention_head_dim // 2))
        pair = torch.empty(2, 1, others, own.num_attention_heads, own.attention_head_dim, dtype=kind)
    prepare(network, setup)
    steps = [_Computed()] * rows if setup.skipping else None
    kept = [Kept(*pair)] * (few.num_layers + few.num_single_layers) if others else None
    with counted(network, setup) as peak:
        network(tokens, contexts, mod, tables, image, steps, kept)
    if not others:
        return sampling(setup, work) + peak.peak
    with counted(network, setup) as reading:  # what is kept of these few blocks is in sampling already
        network.keys_and_values(references, mod, places)
    held = (few.num_layers + few.num_single_layers) * pair.nbytes
    return sampling(setup, work) + max(peak.peak, reading.peak - held)


@remembered
def encoding(setup: Setup) -> int:
    """Most bytes alive beside the text encoder's weights while a prompt is read."""
    arch, kind = setup.arch, DTYPES[setup.dtype]
    network = nn.Module()
    with meta():
        network.layers = nn.ModuleList([Layer(arch.language)]).to(kind)
    prepare(network, setup)
    with counted(network, setup) as peak:
        size = arch.language.hidden_size
        kept = torch.empty(len(arch.text_layers), arch.text_tokens, size, dtype=kind)
        causal, mask = torch.empty(2, 1, 1, arch.text_tokens, arch.text_tokens, dtype=torch.bool).unbind()
        rotary = tuple(torch.empty(arch.text_tokens, arch.language.head_dim, dtype=kind) for _ in range(2))
        x = torch.empty(1, arch.text_tokens, size, dtype=kind)
        network.layers[0](x, rotary, mask)  # type: ignore[index]
        del kept, causal
    return peak.peak


@remembered
def expanding(setup: Setup, chat: int) -> int:
    """Most bytes alive beside the language model's weights while it reads a chat of ``chat`` tokens and answers."""
    kind, own = DTYPES[setup.dtype], setup.arch.language
    length = chat + costs.ANSWER_AT_MOST
    network = nn.Module()
    with meta():
        network.layers = nn.ModuleList([Layer(own)]).to(kind)
        rotary = tuple(torch.empty(chat, own.head_dim, dtype=kind) for _ in range(2))
    prepare(network, setup)
    with counted(network, setup) as peak:
        x = torch.empty(1, chat, own.hidden_size, dtype=kind)
        network.layers[0](x, rotary, None, Past(own, length, kind, torch.device("meta")))  # type: ignore[index]
    wide = WIDTH[setup.dtype]
    others = (own.num_hidden_layers - 1) * 2 * own.num_key_value_heads * length * own.head_dim * wide
    tables = 2 * length * own.head_dim * wide
    drawing = own.vocab_size * (wide + 8 * 4)
    return others + tables + max(peak.peak, drawing)


@cache
def autoencoder(arch: Architecture, dtype: str, folded: bool) -> Autoencoder:
    """The autoencoder on the meta device; not to be changed."""
    with meta():
        network = Autoencoder(arch.autoencoder).to(DTYPES[dtype])
        if folded:
            network.fold_upsampling()
    return network


@remembered
def decoding(setup: Setup, width: int, height: int, tile: int) -> int:
    """Most bytes alive beside the autoencoder's weights while one picture is decoded, in tiles of ``tile`` pixels or whole, and
    brought into its range."""
    m, wide = setup.arch.multiple, WIDTH[setup.dtype]
    sides = [-(-n // m) for n in (width, height)]
    pixels = sides[0] * sides[1] * m * m
    blending = 0
    if tile and max(sides) * m > tile:
        blending = 4 * 4 * pixels
        sides = [min(n, max(4, tile // m)) for n in sides]
    network = autoencoder(setup.arch, setup.dtype, setup.folded)
    with counted(network, setup) as peak:
        channels = setup.arch.autoencoder.latent_channels * 4
        network.decode(torch.empty(1, channels, sides[1], sides[0], dtype=DTYPES[setup.dtype]))
    return max(peak.peak + blending, 3 * pixels * max(3 * wide, 2 * wide + 4))


@remembered
def referring(setup: Setup, width: int, height: int) -> int:
    """Most bytes alive beside the autoencoder's weights while a reference picture is encoded."""
    network = autoencoder(setup.arch, setup.dtype, False)
    with counted(network, setup) as peak:
        network.encode(torch.empty(1, 3, height, width, dtype=DTYPES[setup.dtype]))
    decoded = 4 * 3 * width * height if setup.kind == "cpu" and setup.dtype != "float32" else 0  # in float32, meanwhile
    return peak.peak + decoded


def prepare(network: nn.Module, setup: Setup) -> None:
    """Give a network on the meta device layers that allocate as ``setup``'s format does."""
    form = setup.form
    if form is None:
        return
    make = stand_in(form, setup)
    for name, layer in Recipe(form.name).layers(network).items():
        network.set_submodule(name, make(layer))


def stand_in(form: quant.Format, setup: Setup) -> Callable[[nn.Linear], nn.Module]:
    """A layer's replacement: ours as it is on a CPU, and on a card where torch computes it; elsewhere kernels that allocate rows,
    scales and the result; other backends unpack the whole weight."""
    if form.backend == "builtin" and (setup.kind == "cpu" or setup.place is not None):
        return lambda layer: _own(layer, form, setup)
    return lambda layer: _Replaced(layer, form, setup)


def _own(layer: nn.Linear, form: quant.Format, setup: Setup) -> nn.Module:
    from .quant import builtin

    dtype = DTYPES[setup.dtype]
    made = builtin.quantize(layer.weight, form, dtype, torch.device("cpu"))
    if setup.place is not None and isinstance(made, builtin.QuantizedLinear):
        made.arithmetic = builtin.arithmetic(form, layer.in_features, layer.out_features, dtype, setup.place)
    return made


class _Replaced(nn.Module):
    def __init__(self, layer: nn.Linear, form: quant.Format, setup: Setup) -> None:
        super().__init__()
        self.rows, self.columns, self.form = layer.out_features, layer.in_features, form
        self.dtype, self.summed = DTYPES[setup.dtype], setup.summed and form.product == "int8"
        self.widening = setup.widening
        quantizes = form.backend == "builtin" and (form.rounded or not form.group)
        self.quantizer = Quantizer(torch.int8, form.rotation, _quantized) if quantizes else None

    def forward(self, x: Input) -> Tensor:
        values, dtype = (x.values, self.dtype) if isinstance(x, Rows) else (x, x.dtype)
        if self.form.spelt_out:
            self._spell_out(values)
            return torch.empty(*values.shape[:-1], self.rows, dtype=dtype)
        held = torch.empty(self._beside(x), dtype=torch.int8), self._sums(values)
        out = torch.empty(*values.shape[:-1], self.rows, dtype=dtype)
        del held
        return out

    def _spell_out(self, x: Tensor) -> None:
        """Rows in float32, twice while they are rounded; then as int8, beside sums in 32 bit and first the weights in 32 bit, if at
        all, then the sums in float32 and what they are scaled to."""
        torch.empty(2, *x.shape)
        sums = (*x.shape[:-1], self.rows)
        held = torch.empty(x.shape, dtype=torch.int8), torch.empty(sums, dtype=torch.int32)
        if self.widening:
            torch.empty(self.rows, self.columns, dtype=torch.int32)
        torch.empty(2, *sums)
        del held

    def _beside(self, x: Input) -> int:
        """Bytes of rows that are quantized here, with their scales, or of weights that are unpacked."""
        if isinstance(x, Rows):
            return 0
        if self.form.backend == "builtin":
            return x.numel() // self.columns * (self.columns + 4)
        return int(self.rows * self.columns * self.form.unpacked * x.dtype.itemsize / 2)

    def _sums(self, x: Tensor) -> Tensor | None:
        return torch.empty(*x.shape[:-1], self.rows, dtype=torch.int32) if self.summed else None
