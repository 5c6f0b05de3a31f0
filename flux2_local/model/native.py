"""The operations between the transformer's matmuls as few of torch's own operators as they can be, for devices that Triton
has no compiler for. Each is within rounding of the reference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .ops import EPS, Ops, Rotary, sdpa


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """The modulation as LayerNorm's weight and bias, which takes one modulation for the whole batch."""
    if len(shift) > 1:
        return ops.modulated_norm(x, shift, scale)
    return F.layer_norm(x, x.shape[-1:], 1 + scale[0, 0], shift[0, 0], EPS)


def qk_norm_rope(x: Tensor, weight: Tensor, rotary: Rotary, out: Tensor | None = None) -> Tensor:
    """The rotation as a product of complex numbers, in float32; what is normalised by commutes with it and comes last."""
    wide = x.float()
    inverse = torch.linalg.vecdot(wide, wide)[..., None].div_(x.shape[-1]).add_(EPS).rsqrt_()
    pairs = torch.view_as_complex((wide * weight.float()).unflatten(-1, (-1, 2)))
    pairs.mul_(torch.complex(rotary.cos, rotary.sin)[:, None])
    rotated = torch.view_as_real(pairs).flatten(-2).mul_(inverse)
    return rotated.to(x.dtype) if out is None else out.copy_(rotated)


NATIVE = Ops(modulated_norm, torch.addcmul, qk_norm_rope, ops.swiglu, sdpa)
