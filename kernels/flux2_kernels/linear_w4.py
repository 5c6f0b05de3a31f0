"""Linear layers on packed int4 weights with a scale per group of input channels: ``linear_w4a16`` and ``linear_w4a8``.

A group's partial sum is exact in its scale: it is accumulated on the integers and multiplied once, in float32.

Packing: byte j of a group of G channels holds channel j in its low nibble and channel j + G / 2 in its high nibble, both as
two's complement. Unpacking then yields two contiguous halves and no interleaving.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .constraint import HALF, Constraint, Dims, Format, Rule, multiple, one_of
from .op import Case, Cost, Function, Implementation, Inputs, Op, product, size_of
from .quantize_rows import quantize, rows, scale_of, widen
from .shapes import MODELS, TOKENS

GROUPS = (64, 128)
LARGEST = 7


def pack(w: Tensor, group: int = 128) -> tuple[Tensor, Tensor]:
    """Quantize weights to int4, symmetric, one scale per group of input channels.

    Args:
        w: [N, K], any float dtype; K a multiple of ``group``.
        group: 64 or 128.

    Returns:
        int8 [N, K / 2] of packed pairs and float32 scales [N, K / group].
    """
    grouped = widen(w).unflatten(-1, (-1, group))
    scale = scale_of(grouped, LARGEST)
    low, high = (grouped / scale).round().clamp(-LARGEST, LARGEST).to(torch.int8).chunk(2, -1)
    return ((low & 15) | (high << 4)).flatten(-2), scale[..., 0].float()


def unpack(w: Tensor, group: int) -> Tensor:
    """The integers -8 … 7 of :func:`pack`'s first result: int8 [N, K]."""
    pairs = w.unflatten(-1, (-1, group // 2))
    low, high = (pairs << 4) >> 4, pairs >> 4  # on int8 the right shift keeps the sign
    return torch.cat((low, high), -1).flatten(-2)


def group_of(w: Tensor, w_scale: Tensor) -> int:
    """Channels per scale, from the shapes of packed weights and their scales."""
    return 2 * w.shape[1] // w_scale.shape[1]


def exact(x: Tensor, w: Tensor, w_scale: Tensor, **_: object) -> tuple[Tensor]:
    """The product in float64 where x is, else in float32."""
    wide, group = widen(x), group_of(w, w_scale)
    weights = unpack(w, group).to(wide.dtype).unflatten(-1, (-1, group)) * w_scale[..., None].to(wide.dtype)
    return (wide @ weights.flatten(-2).T,)


def exact_quantized(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, **_: object) -> tuple[Tensor]:
    """The product of quantized rows, in the dtype of ``x_scale``."""
    return (exact(x.to(x_scale.dtype), w, w_scale)[0] * x_scale,)


def reference(x: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
    """A linear layer with int4 weights.

    Args:
        x: [B, T, K], bf16 or fp16, channels contiguous, rows evenly spaced.
        w: int8 [N, K / 2] as :func:`pack` makes it.
        w_scale: float32 [N, K / group], group 64 or 128.

    Returns:
        [B, T, N], the dtype of x.
    """
    return exact(x, w, w_scale)[0].to(x.dtype)


def quantized_reference(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A linear layer with int8 rows and int4 weights.

    Args:
        x: int8 [B, T, K], rows contiguous in memory and evenly spaced.
        x_scale: float32 [B, T, 1], contiguous.
        w, w_scale: as :func:`reference` takes them.
        dtype: of the result.

    Returns:
        [B, T, N] in ``dtype``.
    """
    return exact_quantized(x, x_scale, w, w_scale)[0].to(dtype)


def weights(case: Case, device: torch.device, draw: torch.Generator) -> Inputs:
    """Packed normal weights; ``dims``: n, k, group."""
    w = torch.randn((case.dims["n"], case.dims["k"]), device=device, generator=draw) / case.dims["k"] ** 0.5
    packed, scale = pack(w, case.dims["group"])
    return {"w": packed, "w_scale": scale}


def inputs(case: Case, form: Format, device: torch.device, draw: torch.Generator) -> Inputs:
    """Normal rows and packed weights; ``dims``: batch, tokens, n, k, group."""
    x = rows(Case("", {**case.dims, "width": case.dims["k"]}), form.dtype, device, draw)
    return {"x": x, **weights(case, device, draw)}


def quantized_inputs(case: Case, form: Format, device: torch.device, draw: torch.Generator) -> Inputs:
    """The same with int8 rows."""
    x, x_scale = quantize(inputs(case, Format(torch.float32), device, draw)["x"], torch.int8)
    return {"x": x, "x_scale": x_scale, **weights(case, device, draw), "dtype": form.dtype}


def cost(dims: Dims, form: Format) -> Cost:
    """Activations, packed weights and scales in, the result out."""
    m, n, k = product(dims, "batch", "tokens"), dims["n"], dims["k"]
    wide = size_of(form.dtype)
    read = m * k * size_of(form.quantized or form.dtype) + n * k // 2 + 4 * n * k // dims["group"]
    scales = 4 * m if form.quantized else 0
    return Cost(read + scales + m * n * wide, 2 * m * n * k, form.quantized or form.dtype)


def load_triton() -> Function:
    """Import the Triton implementation."""
    from .gpu import linear_w4

    return linear_w4.linear_w4a16


def load_triton_quantized() -> Function:
    """Import the Triton implementation for int8 rows."""
    from .gpu import linear_w4

    return linear_w4.linear_w4a8


CASES = (
    Case("odd", {"batch": 1, "tokens": 19, "n": 48, "k": 192, "group": 64}),
    Case("dev", {"batch": 1, "tokens": 24, "n": 96, "k": 6144, "group": 128}),
    Case("batch", {"batch": 4, "tokens": 33, "n": 160, "k": 256, "group": 128}),
)
SHAPES = tuple(
    Case(f"{name}-{layer}", {"batch": 1, "tokens": TOKENS, "n": n, "k": k, "group": 128})
    for name, model in MODELS.items()
    for layer, (n, k) in model.linears.items()
)
WHOLE_GROUPS = Rule("k must be a multiple of group", lambda d: d.get("k", 0) % d.get("group", 1) == 0)
RULES = (one_of("group", *GROUPS), WHOLE_GROUPS, multiple("n", 16))

OPS = (
    Op(
        name="linear_w4a16",
        reference=reference,
        exact=exact,
        outputs=("dense",),
        formats=tuple(map(Format, HALF)),
        inputs=inputs,
        cost=cost,
        cases=CASES,
        shapes=SHAPES,
        implementations=(
            Implementation("triton", load_triton, Constraint(HALF, sm=80, triton=True, rules=RULES)),
            Implementation("reference", lambda: reference, Constraint(HALF)),
        ),
    ),
    Op(
        name="linear_w4a8",
        reference=quantized_reference,
        exact=exact_quantized,
        outputs=("dense",),
        formats=tuple(Format(d, torch.int8) for d in HALF),
        inputs=quantized_inputs,
        cost=cost,
        cases=CASES,
        shapes=SHAPES,
        implementations=(
            Implementation(
                "triton", load_triton_quantized, Constraint(HALF, (torch.int8,), sm=80, triton=True, rules=RULES)
            ),
            Implementation("reference", lambda: quantized_reference, Constraint(HALF, (torch.int8,))),
        ),
    ),
)
