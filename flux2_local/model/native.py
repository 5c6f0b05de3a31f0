"""The operations between the transformer's matmuls as few of torch's own operators as they can be, for devices that Triton
has no compiler for. Each is within rounding of the reference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .ops import EPS, Input, Ops, Pair, Quantizer, Rotary, clip, sdpa


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, into: Quantizer | None = None) -> Input:
    """The modulation as LayerNorm's weight and bias, which takes one modulation for the whole batch."""
    if len(shift) > 1:
        return ops.modulated_norm(x, shift, scale, into)
    y = F.layer_norm(x, x.shape[-1:], 1 + scale[0, 0], shift[0, 0], EPS)
    return y if into is None else into(y)


def residual_norm(
    x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor, into: Quantizer | None = None
) -> tuple[Tensor, Input]:
    """Two passes: torch has no operator for both."""
    x = clip(torch.addcmul(x, gate, y))
    return x, modulated_norm(x, shift, scale, into)


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, rotary: Rotary, out: Pair | None = None
) -> Pair:
    q_out, k_out = out or (None, None)
    turn = torch.complex(rotary.cos, rotary.sin)[:, None]
    return norm_rope(q, q_weight, turn, q_out), norm_rope(k, k_weight, turn, k_out)


def norm_rope(x: Tensor, weight: Tensor, turn: Tensor, out: Tensor | None) -> Tensor:
    """The rotation as a product of complex numbers, in float32; what is normalised by commutes with it and comes last."""
    wide = x.float()
    inverse = torch.linalg.vecdot(wide, wide)[..., None].div_(x.shape[-1]).add_(EPS).rsqrt_()
    pairs = torch.view_as_complex((wide * weight.float()).unflatten(-1, (-1, 2)))
    rotated = torch.view_as_real(pairs.mul_(turn)).flatten(-2).mul_(inverse)
    return rotated.to(x.dtype) if out is None else out.copy_(rotated)


NATIVE = Ops(modulated_norm, residual_norm, qk_norm_rope, ops.swiglu, ops.swiglu_rows, sdpa)
