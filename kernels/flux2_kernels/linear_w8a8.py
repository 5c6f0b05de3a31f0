"""Linear layers on int8 or fp8 rows: ``(x · wᵀ) · x_scale · w_scale``, optionally gated and added to a residual.

The product is exact in int8 (int32 accumulators) and accumulates in float32 in fp8, with the fast accumulation of the matrix
units (on Hopper about 14 bits within one instruction chain), as inference libraries use it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .constraint import FLOATS, FP8, FP8_SM, QUANTIZED, Constraint, Dims, Format, at_most, multiple
from .modulated_norm import modulation
from .op import Case, Cost, Function, Implementation, Inputs, Op, product, size_of
from .quantize_rows import quantize, rows, widen
from .shapes import MODELS, TOKENS


def exact(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, **_: object) -> tuple[Tensor]:
    """The product in float64 where the scales are, else in float32."""
    wide = widen(x_scale).dtype
    return ((x.to(wide) @ w.to(wide).T) * x_scale * w_scale,)


def exact_gated(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, gate: Tensor, residual: Tensor
) -> tuple[Tensor]:
    """residual + gate · product before rounding."""
    return (widen(residual) + widen(gate) * exact(x, x_scale, w, w_scale)[0],)


def reference(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A linear layer on quantized rows, rounded once.

    Args:
        x: [B, T, K], int8 or float8_e4m3fn, rows contiguous in memory and evenly spaced.
        x_scale: float32 [B, T, 1], contiguous.
        w: [N, K], the dtype of x, contiguous.
        w_scale: float32 [N].
        dtype: of the result: bf16, fp16 or fp32.

    Returns:
        [B, T, N] in ``dtype``, contiguous.
    """
    return exact(x, x_scale, w, w_scale)[0].to(dtype)


def gated_reference(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
    """residual + gate · linear(x), rounded once.

    Args:
        x, x_scale, w, w_scale: as :func:`reference` takes them.
        gate: [B, 1, N] or [1, 1, N], any float dtype.
        residual: [B, T, N], channels contiguous, any other strides.

    Returns:
        [B, T, N], contiguous, the dtype of residual.
    """
    return exact_gated(x, x_scale, w, w_scale, gate, residual)[0].to(residual.dtype)


def operands(case: Case, form: Format, device: torch.device, draw: torch.Generator) -> Inputs:
    """Quantized normal rows and weights; ``dims``: batch, tokens, k, n."""
    assert form.quantized is not None
    x = rows(Case("", {**case.dims, "width": case.dims["k"]}), torch.float32, device, draw)
    w = torch.randn((case.dims["n"], case.dims["k"]), device=device, generator=draw) / case.dims["k"] ** 0.5
    values, scale = quantize(x, form.quantized)
    w_values, w_scale = quantize(w, form.quantized)
    return {"x": values, "x_scale": scale, "w": w_values, "w_scale": w_scale[:, 0].contiguous()}


def inputs(case: Case, form: Format, device: torch.device, draw: torch.Generator) -> Inputs:
    """:func:`operands` and the result's dtype."""
    return {**operands(case, form, device, draw), "dtype": form.dtype}


def gated_inputs(case: Case, form: Format, device: torch.device, draw: torch.Generator) -> Inputs:
    """:func:`operands`, a gate and a residual."""
    wide = Case("", {**case.dims, "width": case.dims["n"]}, case.strided)
    gate, residual = modulation(wide, form, device, draw), rows(wide, form.dtype, device, draw)
    return {**operands(case, form, device, draw), "gate": gate, "residual": residual}


def cost(dims: Dims, form: Format) -> Cost:
    """Operands and scales in, the result out."""
    m, n, k = product(dims, "batch", "tokens"), dims["n"], dims["k"]
    assert form.quantized is not None
    moved = (m + n) * k * size_of(form.quantized) + 4 * (m + n) + m * n * size_of(form.dtype)
    return Cost(moved, 2 * m * n * k, form.quantized)


def gated_cost(dims: Dims, form: Format) -> Cost:
    """The linear's cost, with the residual and the gate read too."""
    m, n = product(dims, "batch", "tokens"), dims["n"]
    return cost(dims, form) + Cost((m + dims["batch"]) * n * size_of(form.dtype), 2 * m * n)


def load_triton() -> Function:
    """Import the Triton implementation."""
    from .gpu import linear_w8a8

    return linear_w8a8.linear_w8a8


def load_triton_gated() -> Function:
    """Import the Triton implementation with the gate and residual in its epilogue."""
    from .gpu import linear_w8a8

    return linear_w8a8.linear_w8a8_gated


def load_scaled_mm() -> Function:
    """The fp8 matmul of torch's library."""
    from .gpu import scaled_mm

    return scaled_mm.linear_w8a8


def load_int_mm() -> Function:
    """The int8 matmul of torch's library, scaled by torch."""
    from .gpu import int_mm

    return int_mm.linear_w8a8


def load_library() -> Function:
    """The int8 matmul of torch's library, then the scales."""
    from .gpu import library

    return library.linear_w8a8


def load_library_gated() -> Function:
    """The library's linear, then ``gated_residual``."""
    from .gpu import library

    return library.linear_w8a8_gated


CASES = (
    Case("odd", {"batch": 1, "tokens": 19, "n": 40, "k": 80}),
    Case("dev", {"batch": 1, "tokens": 24, "n": 96, "k": 6144}),
    Case("batch", {"batch": 4, "tokens": 33, "n": 160, "k": 256}, strided=True),
    Case("klein-4b", {"batch": 2, "tokens": 17, "n": 272, "k": 3072}),
)
SHAPES = tuple(
    Case(f"{name}-{layer}", {"batch": 1, "tokens": TOKENS, "n": n, "k": k})
    for name, model in MODELS.items()
    for layer, (n, k) in model.linears.items()
)
GATED_SHAPES = tuple(case for case in SHAPES if not case.name.endswith("-in"))

ALIGNED = (multiple("k", 16), multiple("n", 8), at_most("k", 2**17))
TRITON = Constraint(FLOATS, QUANTIZED, 80, FP8_SM, triton=True, rules=ALIGNED)
LIBRARY_RULES = (multiple("k", 16), multiple("n", 16))
SCALED_MM = Constraint((torch.bfloat16,), (FP8,), 89, rules=LIBRARY_RULES)
INT_MM = Constraint(FLOATS, (torch.int8,), 80, triton=True, rules=LIBRARY_RULES)
INT_MM_ALONE = Constraint(FLOATS, (torch.int8,), 80, rules=LIBRARY_RULES)
FORMATS = tuple(Format(d, q) for d in FLOATS for q in QUANTIZED)
REFERENCE = Constraint(FLOATS, QUANTIZED)

OPS = (
    Op(
        name="linear_w8a8",
        reference=reference,
        exact=exact,
        outputs=("dense",),
        formats=FORMATS,
        inputs=inputs,
        cost=cost,
        cases=CASES,
        shapes=SHAPES,
        implementations=(
            Implementation("triton", load_triton, TRITON),
            Implementation("scaled_mm", load_scaled_mm, SCALED_MM),
            Implementation("int_mm", load_library, INT_MM),
            Implementation("int_mm_alone", load_int_mm, INT_MM_ALONE),
            Implementation("reference", lambda: reference, REFERENCE),
        ),
    ),
    Op(
        name="linear_w8a8_gated",
        reference=gated_reference,
        exact=exact_gated,
        outputs=("dense",),
        formats=FORMATS,
        inputs=gated_inputs,
        cost=gated_cost,
        cases=CASES,
        shapes=GATED_SHAPES,
        implementations=(
            Implementation("triton", load_triton_gated, TRITON),
            Implementation("scaled_mm", load_library_gated, replace(SCALED_MM, triton=True), slack=2),
            Implementation("int_mm", load_library_gated, INT_MM),
            Implementation("reference", lambda: gated_reference, REFERENCE),
        ),
    ),
)
