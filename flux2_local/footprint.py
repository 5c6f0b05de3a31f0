"""Bytes of each network's weights, part by part, and of what is alive beside them while a stage runs.

Counted, not estimated: networks are built on the meta device, and stages are run there under a counter of live tensors. What
attention allocates is its result, as every fused implementation does; Triton kernels allocate their results only.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from . import costs, quant
from .costs import WIDTH, Architecture, Work
from .errors import OutputError
from .files import cache_folder, write
from .hardware import Kind
from .model.autoencoder import Autoencoder
from .model.blocks import SCHEDULE, repeated
from .model.language import Layer
from .model.meta import meta
from .model.ops import REFERENCE, Ops, Rotary
from .model.transformer import Flux2Transformer, Modulation
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

    def moving(self, stay: tuple[int, ...]) -> int:
        """What comes through the ring in every pass."""
        return sum(self.blocks) - sum(self.blocks[number] for number in set(stay))


@cache
def weights(
    arch: Architecture, component: str, dtype: str, recipe: Recipe | None = None, folded: bool = False
) -> Weights:
    """The weights of "transformer", "text_encoder" or "vae" with activations in ``dtype``.

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


Count = TypeVar("Count", bound=Callable[..., int])


def remembered(count: Count) -> Count:
    """Keep what ``count`` returns on disk. For what runs on the meta device torch imports its compiler, which takes longer than
    a small picture; a process that asks for nothing new need not."""

    @cache
    def known(*arguments: Any) -> int:
        path, key = counts_file(), f"{count.__name__}{arguments!r}"
        table = read_counts(path)
        if key not in table:
            value = count(*arguments)
            # Read again: another process may have counted meanwhile.
            with suppress(OutputError):
                write(path, json.dumps({**read_counts(path), key: value}).encode())
            return value
        return table[key]

    return known  # type: ignore[return-value]


@cache
def counts_file() -> Path:
    """Counts made by this version of torch and of the code that they follow from."""
    here = Path(__file__).parent
    sources = sorted(p for name in ("*.py", "model/*.py", "offload/*.py", "quant/*.py") for p in here.glob(name))
    digest = hashlib.sha256(torch.__version__.encode())
    for source in sources:
        digest.update(source.read_bytes())
    return cache_folder("counts") / f"{digest.hexdigest()[:16]}.json"


def read_counts(path: Path) -> dict[str, int]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class Peak(TorchDispatchMode):
    """Counts the bytes of tensors that operations make, while they live.

    Attributes:
        now, peak: bytes alive, and the most that were at once.
    """

    def __init__(self, known: nn.Module | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._live = {value.untyped_storage()._cdata for _, value in ([] if known is None else hung(known))}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: torch would import its compiler for it, which takes a second."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return tree_map_only(Tensor, self._seen, func(*args, **(kwargs or {})))

    def _seen(self, value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage._cdata not in self._live:
            self._live.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return value

    def _gone(self, key: int, size: int) -> None:
        self._live.discard(key)
        self.now -= size


class FusedAttention(TorchFunctionMode):
    """Attention that allocates its result alone, [B, H, T, d] in the layout that the fused kernels give."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return torch.empty_like(args[0].transpose(1, 2)).transpose(1, 2)
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(network: nn.Module) -> Iterator[Peak]:
    """Count what is made inside, on the meta device."""
    with torch.device("meta"), torch.no_grad(), FusedAttention(), Peak(network) as peak:
        yield peak


def _like(x: Tensor, *_: Any) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype)


def _rotated(x: Tensor, weight: Tensor, rotary: Rotary, out: Tensor | None) -> Tensor:
    return _like(x) if out is None else out


def _gated(x: Tensor, out: Tensor | None) -> Tensor:
    return torch.empty(*x.shape[:-1], x.shape[-1] // 2, dtype=x.dtype) if out is None else out


FUSED = Ops(modulated_norm=_like, gated_residual=_like, qk_norm_rope=_rotated, swiglu=_gated, attend=_like)
"""What the Triton kernels allocate."""


class _Kept:
    """Holds what step caching holds of one picture: of each pass the blocks' contributions of two steps and the first one's."""

    probes = True

    def __init__(self, like: Tensor, passes: int) -> None:
        self.before = [_like(like) for _ in range(2 + 3 * (passes - 1))]
        self.added: Tensor | None = None

    def rest(self, added: Tensor) -> Tensor | None:
        self.added = added
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
        fused: whether the Triton kernels run.
        skipping: whether steps may be skipped.
    """

    arch: Architecture
    dtype: str
    kind: Kind
    form: quant.Format | None = None
    fused: bool = False
    skipping: bool = False


@remembered
def denoising(setup: Setup, work: Work) -> int:
    """Most bytes alive beside the transformer's weights in a step: one double and one single block stand for all."""
    arch, kind, own = setup.arch, DTYPES[setup.dtype], setup.arch.transformer
    few = replace(own, num_layers=min(2, own.num_layers), num_single_layers=min(2, own.num_single_layers))
    image = arch.tokens(work.width, work.height)
    others = sum(arch.tokens(*size) for size in work.references)
    with meta():
        network = Flux2Transformer(few, FUSED if setup.fused else REFERENCE).to(kind)
    prepare(network, setup)
    with counted(network) as peak:
        text = torch.empty(arch.passes, arch.text_tokens, own.joint_attention_dim, dtype=kind)
        latents = torch.empty(1, others, own.in_channels, dtype=kind)
        contexts = torch.empty(arch.passes * work.batch, arch.text_tokens, own.width, dtype=kind)
        table = torch.empty(work.steps, 17, own.width, dtype=kind)
        tables = Rotary(*torch.empty(2, arch.text_tokens + image + others, own.attention_head_dim // 2))
        samples = torch.empty(2 + arch.passes, work.batch, image, own.in_channels)
        tokens = torch.empty(work.batch, image + others, own.in_channels, dtype=kind)
        parts = tuple(torch.empty(1, 1, own.width, dtype=kind) for _ in range(17))
        mod = Modulation(parts[:6], parts[6:12], parts[12:15], parts[15:])
        like = torch.empty(image, own.width, dtype=kind)
        kept = [_Kept(like, arch.passes) for _ in range(work.batch)] if setup.skipping else None
        del like
        network(tokens, contexts[: work.batch], mod, tables, image, kept)
        del text, latents, table, samples
    return peak.peak


@remembered
def encoding(setup: Setup) -> int:
    """Most bytes alive beside the text encoder's weights while a prompt is read."""
    arch, kind = setup.arch, DTYPES[setup.dtype]
    network = nn.Module()
    with meta():
        network.layers = nn.ModuleList([Layer(arch.language)]).to(kind)
    prepare(network, setup)
    with counted(network) as peak:
        size = arch.language.hidden_size
        kept = torch.empty(len(arch.text_layers) * (arch.passes + 1), arch.text_tokens, size, dtype=kind)
        mask = torch.empty(1, 1, arch.text_tokens, arch.text_tokens, dtype=torch.bool)
        rotary = tuple(torch.empty(arch.text_tokens, arch.language.head_dim, dtype=kind) for _ in range(2))
        x = torch.empty(1, arch.text_tokens, size, dtype=kind)
        network.layers[0](x, rotary, mask)  # type: ignore[index]
        del kept
    return peak.peak


@cache
def autoencoder(arch: Architecture, dtype: str) -> Autoencoder:
    """The autoencoder on the meta device; not to be changed."""
    with meta():
        return Autoencoder(arch.autoencoder).to(DTYPES[dtype])


@remembered
def decoding(setup: Setup, width: int, height: int, tile: int) -> int:
    """Most bytes alive beside the autoencoder's weights while one picture is decoded, in tiles of ``tile`` pixels or whole."""
    m = setup.arch.multiple
    sides = [-(-n // m) for n in (width, height)]
    blending = 0
    if tile and max(sides) * m > tile:
        blending = 4 * 4 * sides[0] * sides[1] * m * m
        sides = [min(n, max(4, tile // m)) for n in sides]
    network = autoencoder(setup.arch, setup.dtype)
    with counted(network) as peak:
        channels = setup.arch.autoencoder.latent_channels * 4
        network.decode(torch.empty(1, channels, sides[1], sides[0], dtype=DTYPES[setup.dtype]))
    return peak.peak + blending


@remembered
def referring(setup: Setup, width: int, height: int) -> int:
    """Most bytes alive beside the autoencoder's weights while a reference picture is encoded."""
    network = autoencoder(setup.arch, setup.dtype)
    with counted(network) as peak:
        network.encode(torch.empty(1, 3, height, width, dtype=DTYPES[setup.dtype]))
    return peak.peak


def prepare(network: nn.Module, setup: Setup) -> None:
    """Give a network on the meta device layers that allocate as ``setup``'s format does."""
    form = setup.form
    if form is None:
        return
    make = stand_in(form, setup)
    for name, layer in Recipe(form.name).layers(network).items():
        network.set_submodule(name, make(layer))


def stand_in(form: quant.Format, setup: Setup) -> Callable[[nn.Linear], nn.Module]:
    """A layer's replacement: ours on a CPU as it is; on a card, kernels that allocate rows, scales and the result; other
    backends unpack the whole weight."""
    if form.backend == "builtin" and setup.kind == "cpu":
        from .quant import builtin

        return lambda layer: builtin.quantize(layer.weight, form, DTYPES[setup.dtype], torch.device("cpu"))
    return lambda layer: _Replaced(layer, form)


class _Replaced(nn.Module):
    def __init__(self, layer: nn.Linear, form: quant.Format) -> None:
        super().__init__()
        self.rows, self.columns, self.form = layer.out_features, layer.in_features, form

    def forward(self, x: Tensor) -> Tensor:
        held = torch.empty(*x.shape[:-1], self.columns + 4, dtype=torch.int8)
        if self.form.backend != "builtin":
            held = torch.empty(self.rows, self.columns, dtype=x.dtype)
        out = torch.empty(*x.shape[:-1], self.rows, dtype=x.dtype)
        del held
        return out
