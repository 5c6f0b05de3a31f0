"""LayerNorm without weights, then the modulation ``norm(x)·(1 + scale) + shift``; optionally quantized on the way out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .constraint import FLOATS, FP8_SM, QUANTIZED, Constraint, Dims, Format, at_most
from .op import Case, Cost, Function, Implementation, Inputs, Op, product, size_of
from .quantize_rows import quantize, rows, widen
from .shapes import MODELS, TOKENS

EPS = 1e-6
WIDEST = 16384  # a row is held in registers
FLOPS_AN_ELEMENT = 8  # mean, centre, square, sum, normalise, scale, shift


def exact(x: Tensor, shift: Tensor, scale: Tensor, **_: object) -> tuple[Tensor]:
    """The result in float32, or in float64 where the inputs are."""
    wide = widen(x)
    return (F.layer_norm(wide, wide.shape[-1:], eps=EPS) * (1 + widen(scale)) + widen(shift),)


def reference(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm(x)·(1 + scale) + shift, rounded once.

    Args:
        x: [B, T, D], bf16, fp16 or fp32; channels contiguous, any other strides.
        shift, scale: [B, 1, D] or [1, 1, D], any float dtype.

    Returns:
        [B, T, D], contiguous, the dtype of x.
    """
    return exact(x, shift, scale)[0].to(x.dtype)


def quantized_reference(x: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same, quantized per row before it is rounded to x's dtype.

    Args:
        x, shift, scale: as :func:`reference` takes them.
        dtype: torch.int8 or torch.float8_e4m3fn.

    Returns:
        values [B, T, D] in ``dtype`` and float32 scales [B, T, 1].
    """
    return quantize(exact(x, shift, scale)[0], dtype)


def modulation(case: Case, form: Format, device: torch.device, draw: torch.Generator) -> Tensor:
    """One row [B, 1, D] of a modulation, a view into a wider tensor; "shared" in dims makes it [1, 1, D]."""
    batch, width = 1 if case.dims.get("shared") else case.dims["batch"], case.dims["width"]
    parts = torch.randn((batch, 1, 3 * width), device=device, generator=draw, dtype=torch.float32).to(form.dtype)
    return parts[..., width : 2 * width]


def inputs(case: Case, form: Format, device: torch.device, draw: torch.Generator) -> Inputs:
    """Rows with a mean of three; ``dims``: batch, tokens, width."""
    x = rows(case, form.dtype, device, draw) + 3 * (not case.strided)
    given: Inputs = {
        "x": x,
        "shift": modulation(case, form, device, draw),
        "scale": modulation(case, form, device, draw),
    }
    return given if form.quantized is None else {**given, "dtype": form.quantized}


def cost(dims: Dims, form: Format) -> Cost:
    """x, shift and scale in; the norm out, quantized rows with four bytes of scale each."""
    elements, row_count = product(dims, "batch", "tokens", "width"), product(dims, "batch", "tokens")
    wide = size_of(form.dtype)
    written = elements * size_of(form.quantized) + 4 * row_count if form.quantized else elements * wide
    return Cost(elements * wide + written + 2 * dims["batch"] * dims["width"] * wide, FLOPS_AN_ELEMENT * elements)


def load_triton() -> Function:
    """Import the Triton implementation."""
    from .gpu import modulated_norm

    return modulated_norm.modulated_norm


def load_triton_quantized() -> Function:
    """Import the quantizing Triton implementation."""
    from .gpu import modulated_norm

    return modulated_norm.modulated_norm_quantized


CASES = (
    Case("odd", {"batch": 1, "tokens": 5, "width": 100}),
    Case("dev", {"batch": 1, "tokens": 3, "width": 6144}),
    Case("klein-4b", {"batch": 2, "tokens": 3, "width": 3072, "shared": 1}),
    Case("strided", {"batch": 3, "tokens": 4, "width": 384}, strided=True),
    Case("batch", {"batch": 4, "tokens": 7, "width": 129}),
)
SHAPES = tuple(Case(name, {"batch": 1, "tokens": TOKENS, "width": m.width}) for name, m in MODELS.items())
RULES = (at_most("width", WIDEST),)

OPS = (
    Op(
        name="modulated_norm",
        reference=reference,
        exact=exact,
        outputs=("dense",),
        formats=tuple(map(Format, FLOATS)),
        inputs=inputs,
        cost=cost,
        cases=CASES,
        shapes=SHAPES,
        implementations=(
            Implementation("triton", load_triton, Constraint(FLOATS, sm=80, triton=True, rules=RULES)),
            Implementation("reference", lambda: reference, Constraint(FLOATS)),
        ),
    ),
    Op(
        name="modulated_norm_quantized",
        reference=quantized_reference,
        exact=exact,
        outputs=("quantized",),
        formats=tuple(Format(d, q) for d in FLOATS for q in QUANTIZED),
        inputs=inputs,
        cost=cost,
        cases=CASES,
        shapes=SHAPES,
        implementations=(
            Implementation(
                "triton", load_triton_quantized, Constraint(FLOATS, QUANTIZED, 80, FP8_SM, triton=True, rules=RULES)
            ),
            Implementation("reference", lambda: quantized_reference, Constraint(FLOATS, QUANTIZED)),
        ),
    ),
)
