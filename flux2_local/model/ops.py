"""The operations between the transformer's matmuls, as one frozen table, so that implementations swap in as a whole.

:data:`REFERENCE` is plain torch, in the order of operations of diffusers' Flux2 modules: bit for bit the same results.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """Rotary tables for one sequence: cos and sin, float32 [tokens, head_dim / 2], one angle per pair of channels."""

    cos: Tensor
    sin: Tensor

    def rows(self, start: int, stop: int) -> Rotary:
        return Rotary(self.cos[start:stop], self.sin[start:stop])


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Ops:
    """What a block calls.

    Attributes:
        modulated_norm: (x [B, T, D], shift [B, 1, D], scale [B, 1, D]) -> LayerNorm(x)·(1 + scale) + shift.
        gated_residual: (x, gate [B, 1, D], y) -> x + gate·y.
        qk_norm_rope: (x [B, T, H, d] any strides, weight [d], rotary rows of the T tokens, out or None) -> RMSNorm and
            rotation, written into ``out`` [B, T, H, d] where one is given.
        swiglu: (x [B, T, 2M] any row stride, out [B, T, M] or None) -> silu(first half)·second half.
        attend: (q [B, T, H, d], k and v [B, S, H, d]) -> [B, T, H, d].
    """

    modulated_norm: Callable[[Tensor, Tensor, Tensor], Tensor]
    gated_residual: Callable[[Tensor, Tensor, Tensor], Tensor]
    qk_norm_rope: Callable[[Tensor, Tensor, Rotary, Tensor | None], Tensor]
    swiglu: Callable[[Tensor, Tensor | None], Tensor]
    attend: Attend


EPS = 1e-6


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return (1 + scale) * F.layer_norm(x, x.shape[-1:], eps=EPS) + shift


def gated_residual(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    return x + gate * y


def qk_norm_rope(x: Tensor, weight: Tensor, rotary: Rotary, out: Tensor | None = None) -> Tensor:
    x = F.rms_norm(x, weight.shape, weight, EPS)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotary.cos[None, :, None], rotary.sin[None, :, None]
    rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)
    return rotated.to(x.dtype) if out is None else out.copy_(rotated)


def swiglu(x: Tensor, out: Tensor | None = None) -> Tensor:
    gate, up = x.chunk(2, -1)
    if out is None:
        return F.silu(gate) * up
    if torch.compiler.is_compiling():  # which makes one pass of it, and takes no strided ``out``
        return out.copy_(F.silu(gate) * up)
    return torch.mul(F.silu(gate), up, out=out)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


REFERENCE = Ops(modulated_norm, gated_residual, qk_norm_rope, swiglu, sdpa)
