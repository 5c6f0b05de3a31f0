"""Per-row quantization to int8 or fp8, with an optional rotation that spreads outliers.

A row's scale is its largest magnitude over the format's largest value (127, or 448 for e4m3), so that
``values * scale`` is the row again. The rotation multiplies every block of ``hadamard`` channels with the orthonormal
Hadamard matrix of that size; weights rotated the same way leave the product of a linear unchanged.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .constraint import FLOATS, FP8, FP8_SM, QUANTIZED, Constraint, Dims, Format, Rule, at_most, one_of
from .op import Case, Cost, Function, Implementation, Inputs, Op, product, size_of
from .shapes import MODELS, TOKENS

LARGEST = {torch.int8: 127.0, FP8: 448.0}
SMALLEST_ROW = 1e-30  # rows below it (zeros among them) get its scale: a division by zero would turn zeros into NaN


def widen(x: Tensor) -> Tensor:
    """float64 as it is, anything else as float32."""
    return x if x.dtype == torch.float64 else x.float()


def hadamard_matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The orthonormal Hadamard matrix [size, size]: entry (i, j) has the sign of the parity of i & j (Sylvester's order)."""
    index = torch.arange(size, device=device)
    common = index[:, None] & index[None]
    parity = sum((common >> bit) & 1 for bit in range(size.bit_length())) % 2  # type: ignore[operator]
    signs: Tensor = 1 - 2 * parity  # type: ignore[assignment]
    return signs.to(dtype) / math.sqrt(size)


def rotate(x: Tensor, hadamard: int) -> Tensor:
    """Blocks of ``hadamard`` channels times the Hadamard matrix; 0 leaves x as it is."""
    if not hadamard:
        return x
    matrix = hadamard_matrix(hadamard, x.dtype, x.device)
    return (x.unflatten(-1, (-1, hadamard)) @ matrix).flatten(-2)


def scale_of(x: Tensor, largest: float) -> Tensor:
    """The largest magnitude of each row of ``x`` [..., K] over ``largest``: [..., 1], the dtype of x."""
    # On a card torch divides by a number as a product with its reciprocal, which rounds otherwise than a CPU's division.
    most = x.abs().amax(-1, keepdim=True).clamp(min=SMALLEST_ROW)
    return most / (x.new_full((), largest) if x.is_cuda else largest)


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of float32 or float64 ``x`` [..., K] -> values [..., K] in ``dtype`` and scales [..., 1] in float32."""
    largest = LARGEST[dtype]
    scale = scale_of(x, largest)
    values = (x / scale).clamp(-largest, largest)
    values = values.round().nan_to_num(0) if dtype == torch.int8 else values
    return values.to(dtype), scale.float()


def exact(x: Tensor, dtype: torch.dtype, hadamard: int = 0) -> tuple[Tensor]:
    """What ``values * scale`` stands for."""
    return (rotate(widen(x), hadamard),)


def reference(x: Tensor, dtype: torch.dtype, hadamard: int = 0) -> tuple[Tensor, Tensor]:
    """Quantize the rows of ``x``.

    Args:
        x: [..., K], bf16, fp16 or fp32, any strides.
        dtype: torch.int8 or torch.float8_e4m3fn.
        hadamard: block size of the rotation (a power of two that divides K), or 0 for none.

    Returns:
        values [..., K] in ``dtype``, contiguous, and float32 scales [..., 1]. A row with a NaN has the scale NaN.
    """
    return quantize(exact(x, dtype, hadamard)[0], dtype)


def rows(case: Case, dtype: torch.dtype, device: torch.device, draw: torch.Generator, width: str = "width") -> Tensor:
    """Normal numbers [batch, tokens, dims[width]]; with gaps between rows and batches where the case is strided."""
    batch, tokens, columns = case.dims["batch"], case.dims["tokens"], case.dims[width]
    gap = 16 if case.strided else 0
    shape = (batch, tokens + gap // 8, columns + gap)
    x = torch.randn(shape, device=device, generator=draw, dtype=torch.float32).to(dtype)
    return x[:, :tokens, gap // 2 : gap // 2 + columns]


def inputs(case: Case, form: Format, device: torch.device, draw: torch.Generator) -> Inputs:
    """Random rows, two columns of them far out; ``dims``: batch, tokens, width and, for a rotation, hadamard."""
    x = rows(case, form.dtype, device, draw)
    x[..., :2] *= 20
    return {"x": x, "dtype": form.quantized, "hadamard": case.dims.get("hadamard", 0)}


def cost(dims: Dims, form: Format) -> Cost:
    """Rows in, values and scales out; three operations an element, and the rotation."""
    assert form.quantized is not None
    elements = product(dims, "batch", "tokens", "width")
    written = elements * size_of(form.quantized) + 4 * product(dims, "batch", "tokens")
    return Cost(elements * size_of(form.dtype) + written, elements * (3 + 2 * dims.get("hadamard", 0)))


def load_triton() -> Function:
    """Import the Triton implementation."""
    from .gpu import quantize_rows

    return quantize_rows.quantize_rows


DIVIDES = Rule(
    "width must be a multiple of hadamard", lambda d: not d.get("hadamard") or d.get("width", 0) % d["hadamard"] == 0
)

OPS = (
    Op(
        name="quantize_rows",
        reference=reference,
        exact=exact,
        outputs=("quantized",),
        formats=tuple(Format(d, q) for d in FLOATS for q in QUANTIZED),
        inputs=inputs,
        cost=cost,
        cases=(
            Case("odd", {"batch": 1, "tokens": 3, "width": 100}),
            Case("klein-4b", {"batch": 2, "tokens": 3, "width": 3072}),
            Case("dev-out", {"batch": 1, "tokens": 2, "width": 24576}),
            Case("strided", {"batch": 4, "tokens": 3, "width": 384}, strided=True),
            Case("rotated", {"batch": 2, "tokens": 3, "width": 3072, "hadamard": 128}),
            Case("rotated-odd", {"batch": 1, "tokens": 5, "width": 192, "hadamard": 64}, strided=True),
        ),
        shapes=(
            *(Case(name, {"batch": 1, "tokens": TOKENS, "width": m.width}) for name, m in MODELS.items()),
            Case("dev-out", {"batch": 1, "tokens": TOKENS, "width": 24576}),
            Case("dev-out-rotated", {"batch": 1, "tokens": TOKENS, "width": 24576, "hadamard": 128}),
        ),
        implementations=(
            Implementation(
                "triton",
                load_triton,
                Constraint(
                    FLOATS,
                    QUANTIZED,
                    sm=80,
                    sm_for=FP8_SM,
                    triton=True,
                    rules=(
                        at_most("width", 32768),
                        one_of("hadamard", 0, 16, 32, 64, 128),
                        DIVIDES,
                    ),
                ),
            ),
            Implementation("reference", lambda: reference, Constraint(FLOATS, QUANTIZED)),
        ),
    ),
)
