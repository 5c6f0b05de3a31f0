"""Each op in torch's operators and in the activations' dtype, as models are written: what a kernel replaces.

The ops' references will not do for that: they compute in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..linear_w4 import group_of, unpack
from ..modulated_norm import EPS as NORM_EPS
from ..op import Function
from ..qk_norm_rope import EPS as ROPE_EPS
from ..quantize_rows import quantize, rotate, widen


def normed(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm, then the modulation."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) * (1 + scale) + shift


def added(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """The gated branch and the residual."""
    return x + gate * y


def added_normed(x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Both of the above."""
    total = added(x, gate, y)
    return total, normed(total, shift, scale)


def turned(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RMSNorm, then the rotation, which the models compute in float32."""
    even, odd = F.rms_norm(x, x.shape[-1:], weight, ROPE_EPS).float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).to(x.dtype)


def turned_pair(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """q and k."""
    return turned(q, q_weight, cos, sin), turned(k, k_weight, cos, sin)


def activated(x: Tensor) -> Tensor:
    """silu(gate)·up."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def rounded(x: Tensor, dtype: torch.dtype, hadamard: int = 0) -> tuple[Tensor, Tensor]:
    """Rows quantized after what went before has been rounded."""
    return quantize(widen(rotate(x, hadamard)), dtype)


def normed_rows(x: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Norm and modulation, then quantization."""
    return rounded(normed(x, shift, scale), dtype)


def added_normed_rows(
    x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Residual and norm, then quantization."""
    total = added(x, gate, y)
    return total, *normed_rows(total, shift, scale, dtype)


def activated_rows(x: Tensor, dtype: torch.dtype, left: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention and MLP side by side, then quantization."""
    return rounded(activated(x) if left is None else torch.cat((left, activated(x)), -1), dtype)


def multiplied(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The product of quantized operands in ``dtype``, then their scales."""
    return (F.linear(x.to(dtype), w.to(dtype)) * x_scale * w_scale).to(dtype)


def multiplied_gated(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
    """The same, with gate and residual."""
    return added(residual, gate, multiplied(x, x_scale, w, w_scale, residual.dtype))


def unpacked(w: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """int4 weights [N, K] in ``dtype``."""
    group = group_of(w, w_scale)
    return (unpack(w, group).to(dtype).unflatten(-1, (-1, group)) * w_scale[..., None].to(dtype)).flatten(-2)


def multiplied_unpacked(x: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
    """The product with unpacked weights."""
    return F.linear(x, unpacked(w, w_scale, x.dtype))


def multiplied_rows_unpacked(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The same for int8 rows."""
    return (F.linear(x.to(dtype), unpacked(w, w_scale, dtype)) * x_scale).to(dtype)


STOCK: dict[str, Function] = {
    "modulated_norm": normed,
    "modulated_norm_quantized": normed_rows,
    "gated_residual": added,
    "gated_residual_norm": added_normed,
    "gated_residual_norm_quantized": added_normed_rows,
    "qk_norm_rope": turned_pair,
    "swiglu": activated,
    "swiglu_quantized": activated_rows,
    "quantize_rows": rounded,
    "linear_w8a8": multiplied,
    "linear_w8a8_gated": multiplied_gated,
    "linear_w4a16": multiplied_unpacked,
    "linear_w4a8": multiplied_rows_unpacked,
}
