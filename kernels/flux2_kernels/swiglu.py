"""``silu(gate)·up`` out of the packed projection, into the next projection's input; optionally quantized.

A single block's output projection reads attention and MLP side by side, so the quantizing form takes what goes on the left
of the MLP and quantizes both as one row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .constraint import FLOATS, FP8_SM, QUANTIZED, Constraint, Dims, Format
from .op import Case, Cost, Function, Implementation, Inputs, Op, product, size_of
from .quantize_rows import quantize, rows, widen
from .shapes import MODELS, TOKENS

FLOPS_AN_ELEMENT = 5  # negate, exponential, add, divide, multiply


def exact(x: Tensor, **_: object) -> tuple[Tensor]:
    """The product before rounding."""
    gate, up = widen(x).chunk(2, -1)
    return (F.silu(gate) * up,)


def exact_joined(x: Tensor, left: Tensor | None = None, **_: object) -> tuple[Tensor]:
    """``left`` and the product side by side, before rounding."""
    result = exact(x)[0]
    return (result if left is None else torch.cat((widen(left), result), -1),)


def reference(x: Tensor, out: Tensor | None = None) -> Tensor:
    """silu(first half)·second half, rounded once.

    Args:
        x: [B, T, 2M], bf16, fp16 or fp32; channels contiguous, any other strides.
        out: [B, T, M], the dtype of x, channels contiguous, any other strides; written and returned where given.

    Returns:
        [B, T, M], the dtype of x.
    """
    result = exact(x)[0].to(x.dtype)
    return result if out is None else out.copy_(result)


def quantized_reference(x: Tensor, dtype: torch.dtype, left: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The rows [left, silu(first half)·second half], quantized before they are rounded to x's dtype.

    Args:
        x: [B, T, 2M] as :func:`reference` takes it.
        dtype: torch.int8 or torch.float8_e4m3fn.
        left: [B, T, L] in x's dtype, channels contiguous, any other strides; None for L = 0.

    Returns:
        values [B, T, L + M] in ``dtype`` and float32 scales [B, T, 1].
    """
    return quantize(exact_joined(x, left)[0], dtype)


def inputs(case: Case, form: Format, device: torch.device, draw: torch.Generator) -> Inputs:
    """Gate and up; ``dims``: batch, tokens, mlp and, for the quantizing form, left."""
    case = Case(case.name, {**case.dims, "width": 2 * case.dims["mlp"]}, case.strided)
    given: Inputs = {"x": rows(case, form.dtype, device, draw)}
    if form.quantized is None:
        return given
    left = rows(case, form.dtype, device, draw, "left") if case.dims.get("left") else None
    return {**given, "dtype": form.quantized, "left": left}


def cost(dims: Dims, form: Format) -> Cost:
    """Gate and up in, the product out; the quantizing form also moves what stands on the left."""
    elements, left = product(dims, "batch", "tokens", "mlp"), 0
    wide = size_of(form.dtype)
    if form.quantized is None:
        return Cost(3 * elements * wide, FLOPS_AN_ELEMENT * elements)
    row_count = product(dims, "batch", "tokens")
    left = row_count * dims.get("left", 0)
    written = (elements + left) * size_of(form.quantized) + 4 * row_count
    return Cost((2 * elements + left) * wide + written, (FLOPS_AN_ELEMENT + 3) * elements + 3 * left)


def load_triton() -> Function:
    """Import the Triton implementation."""
    from .gpu import swiglu

    return swiglu.swiglu


def load_triton_quantized() -> Function:
    """Import the quantizing Triton implementation."""
    from .gpu import swiglu

    return swiglu.swiglu_quantized


CASES = (
    Case("odd", {"batch": 1, "tokens": 5, "mlp": 100, "left": 36}),
    Case("dev", {"batch": 1, "tokens": 2, "mlp": 18432, "left": 6144}, strided=True),
    Case("klein-4b", {"batch": 2, "tokens": 3, "mlp": 9216}),
    Case("batch", {"batch": 4, "tokens": 7, "mlp": 384, "left": 128}, strided=True),
)
SHAPES = tuple(
    Case(name, {"batch": 1, "tokens": TOKENS, "mlp": m.mlp, "left": m.width}, strided=True)
    for name, m in MODELS.items()
)

OPS = (
    Op(
        name="swiglu",
        reference=reference,
        exact=exact,
        outputs=("dense",),
        formats=tuple(map(Format, FLOATS)),
        inputs=inputs,
        cost=cost,
        cases=CASES,
        shapes=SHAPES,
        implementations=(
            Implementation("triton", load_triton, Constraint(FLOATS, sm=80, triton=True)),
            Implementation("reference", lambda: reference, Constraint(FLOATS)),
        ),
    ),
    Op(
        name="swiglu_quantized",
        reference=quantized_reference,
        exact=exact_joined,
        outputs=("quantized",),
        formats=tuple(Format(d, q) for d in FLOATS for q in QUANTIZED),
        inputs=inputs,
        cost=cost,
        cases=CASES,
        shapes=SHAPES,
        implementations=(
            Implementation("triton", load_triton_quantized, Constraint(FLOATS, QUANTIZED, 80, FP8_SM, triton=True)),
            Implementation("reference", lambda: quantized_reference, Constraint(FLOATS, QUANTIZED)),
        ),
    ),
)
