"""The operations between the transformer's matmuls, as one frozen table, so that implementations swap in as a whole.

:data:`REFERENCE` is plain torch, in the order of operations of diffusers' Flux2 modules: bit for bit the same results.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

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


class Rows(NamedTuple):
    """Quantized rows: values [B, T, K], int8 or float8_e4m3fn, and scales, float32 [B, T, 1]; a value times its row's scale is
    what it stands for."""

    values: Tensor
    scales: Tensor


@dataclass(frozen=True)
class Quantizer:
    """How a layer wants the rows that it multiplies quantized.

    Attributes:
        dtype: of the values.
        rotation: size of the Hadamard blocks that rows are rotated in before; 0 for none.
        function: (x [B, T, K], dtype, rotation) -> values and scales, for where no other operation quantizes on its way.
    """

    dtype: torch.dtype
    rotation: int
    function: Callable[[Tensor, torch.dtype, int], tuple[Tensor, Tensor]]

    def __call__(self, x: Tensor) -> Rows:
        return Rows(*self.function(x, self.dtype, self.rotation))


Input = Tensor | Rows
"""What a linear layer takes: rows [B, T, K] or, if it has a quantizer, quantized ones."""
Pair = tuple[Tensor, Tensor]


class Attend(Protocol):
    """(q [B, T, H, d], k and v [B, S, H, d], out) -> [B, T, H, d], written into ``out``, whose tokens may lie in wider rows, where it
    is given."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Ops:
    """What a block calls. ``into`` is the quantizer of the layers that come next, or None for dense rows.

    Attributes:
        modulated_norm: (x [B, T, D], shift [B, 1, D], scale [B, 1, D], into) -> LayerNorm(x)·(1 + scale) + shift.
        residual_norm: (x, gate [B, 1, D], y, shift, scale, into) -> r = x + gate·y, finite in float16, and r's modulated norm.
        qk_norm_rope: (q, k [B, T, H, d] any strides, their weights [d], rotary rows of the T tokens, out or None) -> RMSNorm and
            rotation of both, written into the two tensors [B, T, H, d] of ``out`` where it is given.
        swiglu: (x [B, T, 2M] any row stride, out [B, T, M] or None) -> silu(first half)·second half.
        swiglu_rows: (x, into, left [B, T, L] or None) -> the same with ``left`` in front, quantized.
        attend: :class:`Attend`; a backend that cannot write into ``out`` copies.
    """

    modulated_norm: Callable[[Tensor, Tensor, Tensor, Quantizer | None], Input]
    residual_norm: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Quantizer | None], tuple[Tensor, Input]]
    qk_norm_rope: Callable[[Tensor, Tensor, Tensor, Tensor, Rotary, Pair | None], Pair]
    swiglu: Callable[[Tensor, Tensor | None], Tensor]
    swiglu_rows: Callable[[Tensor, Quantizer, Tensor | None], Rows]
    attend: Attend


EPS = 1e-6
FLOAT16_MAX = 65504.0


def clip(x: Tensor) -> Tensor:
    """Keep float16 finite, as diffusers does after a block; other dtypes pass."""
    return x.clip(-FLOAT16_MAX, FLOAT16_MAX) if x.dtype == torch.float16 else x


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, into: Quantizer | None = None) -> Input:
    y = (1 + scale) * F.layer_norm(x, x.shape[-1:], eps=EPS) + shift
    return y if into is None else into(y)


def residual_norm(
    x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor, into: Quantizer | None = None
) -> tuple[Tensor, Input]:
    x = clip(x + gate * y)
    return x, modulated_norm(x, shift, scale, into)


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, rotary: Rotary, out: Pair | None = None
) -> Pair:
    q_out, k_out = out or (None, None)
    return norm_rope(q, q_weight, rotary, q_out), norm_rope(k, k_weight, rotary, k_out)


def norm_rope(x: Tensor, weight: Tensor, rotary: Rotary, out: Tensor | None) -> Tensor:
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


def swiglu_rows(x: Tensor, into: Quantizer, left: Tensor | None = None) -> Rows:
    return into(beside(left, x, swiglu))


def beside(left: Tensor | None, x: Tensor, activation: Callable[[Tensor, Tensor | None], Tensor]) -> Tensor:
    """``left`` [B, T, L] and what ``activation``, a ``swiglu``, makes of x [B, T, 2M], side by side: [B, T, L + M]."""
    if left is None:
        return activation(x, None)
    width = left.shape[-1]
    both = x.new_empty(*x.shape[:-1], width + x.shape[-1] // 2)
    activation(x, both[..., width:])
    both[..., :width].copy_(left)
    return both


widened = False
"""Whether attention in bf16 is computed in float32 in this process."""


def widen() -> None:
    """Have it so, for a card that needs it (:func:`flux2_local.hardware.widens_attention`)."""
    global widened
    widened = True


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """torch's scaled dot product attention of [B, H, T, d], by a boolean ``mask`` [B, 1, T, S]; bf16 in float32 where it is
    :data:`widened`."""
    if widened and q.dtype == torch.bfloat16 and not q.is_meta:
        found = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask, is_causal=causal)
        return found.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


def sdpa(q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None) -> Tensor:
    found = fused_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
    return found if out is None else out.copy_(found)


REFERENCE = Ops(modulated_norm, residual_norm, qk_norm_rope, swiglu, swiglu_rows, sdpa)
