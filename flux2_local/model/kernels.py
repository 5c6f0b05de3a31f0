"""The operations between the transformer's matmuls as fused Triton kernels: one pass over memory each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from flux2_kernels import Format, Place, choose, reasons
from torch import Tensor

from .ops import Ops, Rotary, sdpa
from .transformer import TransformerConfig

NEEDED = ("modulated_norm", "gated_residual", "norm_rope", "swiglu")


def dims(config: TransformerConfig) -> dict[str, int]:
    return {"width": config.width, "head_dim": config.attention_head_dim}


def reason_against(place: Place, dtype: str, config: TransformerConfig) -> str | None:
    """Why the kernels cannot serve a transformer at ``place``, or None if they can. Nothing is imported."""
    for name in NEEDED:
        if why := reasons(name, place, Format(getattr(torch, dtype)), dims(config))["triton"]:
            return why
    return None


def fused(device: torch.device, dtype: torch.dtype, config: TransformerConfig) -> Ops:
    """The table of Triton kernels, each within rounding of the reference; attention is torch's own.

    Args:
        device: where they will run.
        dtype: of activations.
        config: the transformer's architecture.

    Raises:
        flux2_kernels.KernelUnavailable: one of them cannot run there.
    """
    norm, residual, rope, swiglu = (choose(name, device, dtype, dims(config), "triton").function for name in NEEDED)
    return Ops(norm, residual, rotated(rope), swiglu, sdpa)


def rotated(rope: Callable[..., Any]) -> Callable[[Tensor, Tensor, Rotary, Tensor | None], Tensor]:
    def qk_norm_rope(x: Tensor, weight: Tensor, rotary: Rotary, out: Tensor | None = None) -> Tensor:
        result: Tensor = rope(x, weight, rotary.cos, rotary.sin, out)
        return result

    return qk_norm_rope
