"""``x + gate·y``, alone or fused with the modulated norm that follows, so that the sum is read from registers.

The norm is taken of the sum as it is stored, so fused and separate calls agree bit for bit. In float16 the sum saturates at
±65504 instead of overflowing, as the reference transformer clips it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import modulated_norm
from .constraint import FLOATS, FP8_SM, QUANTIZED, Constraint, Dims, Format
from .modulated_norm import CASES, RULES, SHAPES, modulation
from .op import Case, Cost, Function, Implementation, Inputs, Op, product, size_of
from .quantize_rows import quantize, rows, widen

FLOAT16_MAX = 65504.0


def total(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """x + gate·y in float32, or in float64 where the inputs are; within float16's range where x is float16."""
    wide = widen(x) + widen(gate) * widen(y)
    return wide.clamp(-FLOAT16_MAX, FLOAT16_MAX) if x.dtype == torch.float16 else wide


def exact(x: Tensor, gate: Tensor, y: Tensor) -> tuple[Tensor]:
    """The sum before rounding."""
    return (total(x, gate, y),)


def exact_norm(x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor, **_: object) -> tuple[Tensor, Tensor]:
    """The sum and its norm before rounding."""
    wide = total(x, gate, y)
    return wide, modulated_norm.exact(wide, shift, scale)[0]


def reference(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """x + gate·y, rounded once.

    Args:
        x, y: [B, T, D], bf16, fp16 or fp32; channels contiguous, any other strides.
        gate: [B, 1, D] or [1, 1, D], any float dtype.

    Returns:
        [B, T, D], contiguous, the dtype of x.
    """
    return total(x, gate, y).to(x.dtype)


def norm_reference(x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The sum r = x + gate·y and LayerNorm(r)·(1 + scale) + shift.

    Args:
        x, gate, y: as :func:`reference` takes them.
        shift, scale: [B, 1, D] or [1, 1, D].

    Returns:
        The sum and the norm, both [B, T, D], contiguous, the dtype of x.
    """
    residual = reference(x, gate, y)
    return residual, modulated_norm.reference(residual, shift, scale)


def norm_quantized_reference(
    x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum [B, T, D] in x's dtype, and the norm as values in ``dtype`` and float32 scales [B, T, 1]."""
    residual = reference(x, gate, y)
    return residual, *quantize(modulated_norm.exact(residual, shift, scale)[0], dtype)


def inputs(case: Case, form: Format, device: torch.device, draw: torch.Generator) -> Inputs:
    """Random rows; ``dims``: batch, tokens, width."""
    return {
        "x": rows(case, form.dtype, device, draw),
        "gate": modulation(case, form, device, draw),
        "y": rows(case, form.dtype, device, draw),
    }


def norm_inputs(case: Case, form: Format, device: torch.device, draw: torch.Generator) -> Inputs:
    """The same, with the shift and scale of the norm."""
    given = inputs(case, form, device, draw)
    given |= {"shift": modulation(case, form, device, draw), "scale": modulation(case, form, device, draw)}
    return given if form.quantized is None else {**given, "dtype": form.quantized}


def cost(dims: Dims, form: Format) -> Cost:
    """x, y and gate in, the sum out."""
    elements = product(dims, "batch", "tokens", "width")
    return Cost((3 * elements + dims["batch"] * dims["width"]) * size_of(form.dtype), 2 * elements)


def norm_cost(dims: Dims, form: Format) -> Cost:
    """The sum's cost and the norm's, less the norm's reading of the sum."""
    read_again = Cost(-product(dims, "batch", "tokens", "width") * size_of(form.dtype), 0)
    return cost(dims, form) + modulated_norm.cost(dims, form) + read_again


def load_triton() -> Function:
    """Import the Triton implementation."""
    from .gpu import gated_residual

    return gated_residual.gated_residual


def load_triton_norm() -> Function:
    """Import the fused Triton implementation."""
    from .gpu import gated_residual

    return gated_residual.gated_residual_norm


def load_triton_norm_quantized() -> Function:
    """Import the fused, quantizing Triton implementation."""
    from .gpu import gated_residual

    return gated_residual.gated_residual_norm_quantized


OPS = (
    Op(
        name="gated_residual",
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
        name="gated_residual_norm",
        reference=norm_reference,
        exact=exact_norm,
        outputs=("dense", "dense"),
        slack=2,
        formats=tuple(map(Format, FLOATS)),
        inputs=norm_inputs,
        cost=norm_cost,
        cases=CASES,
        shapes=SHAPES,
        implementations=(
            Implementation("triton", load_triton_norm, Constraint(FLOATS, sm=80, triton=True, rules=RULES)),
            Implementation("reference", lambda: norm_reference, Constraint(FLOATS)),
        ),
    ),
    Op(
        name="gated_residual_norm_quantized",
        reference=norm_quantized_reference,
        exact=exact_norm,
        outputs=("dense", "quantized"),
        slack=2,
        formats=tuple(Format(d, q) for d in FLOATS for q in QUANTIZED),
        inputs=norm_inputs,
        cost=norm_cost,
        cases=CASES,
        shapes=SHAPES,
        implementations=(
            Implementation(
                "triton",
                load_triton_norm_quantized,
                Constraint(FLOATS, QUANTIZED, 80, FP8_SM, triton=True, rules=RULES),
            ),
            Implementation("reference", lambda: norm_quantized_reference, Constraint(FLOATS, QUANTIZED)),
        ),
    ),
)
