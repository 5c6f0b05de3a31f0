"""RMSNorm over each head of q and k, then the rotation of interleaved channel pairs, straight out of the projection.

q and k may be views into the packed projection (any token stride) and the results may go into views of larger buffers, so
that text and image tokens, normalised with different weights, land in one sequence without a copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .constraint import FLOATS, Constraint, Dims, Format, power_of_two
from .op import Case, Cost, Function, Implementation, Inputs, Op, product, size_of
from .quantize_rows import rows, widen
from .shapes import HEAD_DIM, MODELS, TOKENS

EPS = 1e-6
FLOPS_AN_ELEMENT = 8  # square, sum, two scalings, and a rotation of three multiply-adds per channel less sharing


def rotated(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The result in float32, or in float64 where the inputs are."""
    wide = widen(x)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * widen(weight)
    even, odd = wide.unflatten(-1, (-1, 2)).unbind(-1)
    c, s = widen(cos)[:, None], widen(sin)[:, None]
    return torch.stack((even * c - odd * s, odd * c + even * s), -1).flatten(-2)


def exact(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, **_: object
) -> tuple[Tensor, Tensor]:
    """q and k before rounding."""
    return rotated(q, q_weight, cos, sin), rotated(k, k_weight, cos, sin)


def turned(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, out: Tensor | None) -> Tensor:
    """One of q and k, rounded once."""
    result = rotated(x, weight, cos, sin).to(x.dtype)
    return result if out is None else out.copy_(result)


def reference(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_out: Tensor | None = None,
    k_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """RMSNorm and rotation of q and k.

    Args:
        q, k: [B, T, H, d], bf16, fp16 or fp32, of one shape and dtype; channels contiguous, any other strides.
        q_weight, k_weight: [d], any float dtype.
        cos, sin: float32 [T, d / 2], one angle per pair of neighbouring channels.
        q_out, k_out: [B, T, H, d], the dtype of q, channels contiguous; written and returned where given. Both or neither.

    Returns:
        Two [B, T, H, d], the dtype of q.
    """
    return turned(q, q_weight, cos, sin, q_out), turned(k, k_weight, cos, sin, k_out)


def angles(case: Case, device: torch.device, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """cos and sin of random angles, float32 [T, d / 2]."""
    shape = (case.dims["tokens"], case.dims["head_dim"] // 2)
    turn = 6.28 * torch.rand(shape, device=device, generator=draw)
    return turn.cos(), turn.sin()


def inputs(case: Case, form: Format, device: torch.device, draw: torch.Generator) -> Inputs:
    """q and k; the first two parts of a packed projection where the case is strided. ``dims``: batch, tokens, heads, head_dim."""
    dims = case.dims
    width = dims["heads"] * dims["head_dim"]
    packed = rows(
        Case("", {**dims, "width": 9 * width if case.strided else 2 * width}, case.strided), form.dtype, device, draw
    )
    cos, sin = angles(case, device, draw)
    q, k = (packed[..., i * width : (i + 1) * width].unflatten(-1, (dims["heads"], -1)) for i in range(2))
    weights = (1 + 0.2 * torch.randn((2, dims["head_dim"]), device=device, generator=draw)).to(form.dtype)
    return {"q": q, "k": k, "q_weight": weights[0], "k_weight": weights[1], "cos": cos, "sin": sin}


def cost(dims: Dims, form: Format) -> Cost:
    """q and k in and out, their weights, and the tables once for all heads of both."""
    elements = 2 * product(dims, "batch", "tokens", "heads", "head_dim")
    tables = 4 * product(dims, "tokens", "head_dim")
    return Cost((2 * elements + 2 * dims["head_dim"]) * size_of(form.dtype) + tables, FLOPS_AN_ELEMENT * elements)


def load_triton() -> Function:
    """Import the Triton implementation."""
    from .gpu import qk_norm_rope

    return qk_norm_rope.qk_norm_rope


CASES = (
    Case("odd-heads", {"batch": 1, "tokens": 5, "heads": 3, "head_dim": 16}),
    Case("dev", {"batch": 1, "tokens": 3, "heads": 48, "head_dim": 128}, strided=True),
    Case("klein-4b", {"batch": 2, "tokens": 3, "heads": 24, "head_dim": 128}),
    Case("batch", {"batch": 4, "tokens": 7, "heads": 2, "head_dim": 32}, strided=True),
)
SHAPES = tuple(
    Case(name, {"batch": 1, "tokens": TOKENS, "heads": m.heads, "head_dim": HEAD_DIM}, strided=True)
    for name, m in MODELS.items()
)
RULES = (power_of_two("head_dim", 16, 256),)

OPS = (
    Op(
        name="qk_norm_rope",
        reference=reference,
        exact=exact,
        outputs=("dense", "dense"),
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
)
