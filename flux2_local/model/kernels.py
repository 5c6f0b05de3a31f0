"""The operations between the transformer's matmuls as fused Triton kernels: one pass over memory each."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from flux2_kernels import Format, Place, choose, place_of, reasons
from flux2_kernels.constraint import LEAST_SM
from torch import Tensor

from .ops import Input, Ops, Pair, Quantizer, Rotary, Rows, beside, sdpa
from .transformer import TransformerConfig

if TYPE_CHECKING:
    from ..hardware import Hardware

NEEDED = (
    "modulated_norm",
    "modulated_norm_quantized",
    "gated_residual_norm",
    "gated_residual_norm_quantized",
    "qk_norm_rope",
    "swiglu",
    "swiglu_quantized",
)
"""Residuals are added on the way to the norm that follows, so ``gated_residual`` alone is not among them; nor is
``linear_w8a8_gated``, which would leave the norm a pass of its own, and no library's product has it."""


def place_on(hardware: Hardware) -> Place:
    """Where kernels run on ``hardware``; one that is not at hand has Triton."""
    if hardware.kind == "cuda" and not hardware.described:
        return place_of(hardware.device)
    here = place_of("cpu")
    return Place(hardware.kind, hardware.sm or 0, here.triton or hardware.described, here.interpreter)


def place_without(hardware: Hardware) -> Place | None:
    """The card of ``hardware`` if no kernel of Triton's runs there, so that torch computes in their place."""
    place = place_on(hardware)
    if place.device != "cuda" or (place.triton and place.sm >= LEAST_SM):
        return None
    return Place("cuda", place.sm)


def summed(hardware: Hardware, dtype: str) -> bool:
    """Whether int8 products leave int32 sums there, which are scaled afterwards."""
    why = reasons("linear_w8a8", place_on(hardware), Format(getattr(torch, dtype), torch.int8))
    return next(name for name, reason in why.items() if reason is None) == "int_mm"


def dims(config: TransformerConfig) -> dict[str, int]:
    return {"width": config.width, "head_dim": config.attention_head_dim}


def reason_against(place: Place, dtype: str, config: TransformerConfig) -> str | None:
    """Why the kernels cannot serve a transformer at ``place``, or None if they can. Nothing is imported."""
    for name in NEEDED:
        if why := reasons(name, place, form(name, getattr(torch, dtype)), dims(config))["triton"]:
            return why
    return None


def form(name: str, dtype: torch.dtype) -> Format:
    """What ``name`` is resolved for. A kernel that quantizes makes fp8 rows too, on the cards that multiply them."""
    return Format(dtype, torch.int8 if name.endswith("_quantized") else None)


def fused(device: torch.device, dtype: torch.dtype, config: TransformerConfig) -> Ops:
    """The table of Triton kernels, each within rounding of the reference; attention is torch's own.

    Args:
        device: where they will run.
        dtype: of activations.
        config: the transformer's architecture.

    Raises:
        flux2_kernels.KernelUnavailable: one of them cannot run there.
    """
    found = {n: choose(n, device, form(n, dtype), dims(config), "triton").function for n in NEEDED}
    return Ops(
        norms(found["modulated_norm"], found["modulated_norm_quantized"]),
        residuals(found["gated_residual_norm"], found["gated_residual_norm_quantized"]),
        rotated(found["qk_norm_rope"]),
        found["swiglu"],
        activated(found["swiglu"], found["swiglu_quantized"]),
        sdpa,
    )


Kernel = Callable[..., Any]


def norms(dense: Kernel, quantized: Kernel) -> Callable[[Tensor, Tensor, Tensor, Quantizer | None], Input]:
    def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, into: Quantizer | None = None) -> Input:
        if into is not None and not into.rotation:
            return Rows(*quantized(x, shift, scale, into.dtype))
        y: Tensor = dense(x, shift, scale)
        return y if into is None else into(y)

    return modulated_norm


def residuals(
    dense: Kernel, quantized: Kernel
) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Quantizer | None], tuple[Tensor, Input]]:
    def residual_norm(
        x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor, into: Quantizer | None = None
    ) -> tuple[Tensor, Input]:
        if into is not None and not into.rotation:
            x, values, scales = quantized(x, gate, y, shift, scale, into.dtype)
            return x, Rows(values, scales)
        x, normal = dense(x, gate, y, shift, scale)
        return x, normal if into is None else into(normal)

    return residual_norm


def activated(dense: Kernel, quantized: Kernel) -> Callable[[Tensor, Quantizer, Tensor | None], Rows]:
    def swiglu_rows(x: Tensor, into: Quantizer, left: Tensor | None = None) -> Rows:
        if not into.rotation:
            return Rows(*quantized(x, into.dtype, left))
        return into(beside(left, x, dense))

    return swiglu_rows


def rotated(rope: Kernel) -> Callable[[Tensor, Tensor, Tensor, Tensor, Rotary, Pair | None], Pair]:
    def qk_norm_rope(
        q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, rotary: Rotary, out: Pair | None = None
    ) -> Pair:
        result: Pair = rope(q, k, q_weight, k_weight, rotary.cos, rotary.sin, *(out or (None, None)))
        return result

    return qk_norm_rope
