"""Other ways to compute an op: inductor's fusion, the libraries' own kernels, and for linears bf16."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..constraint import Dims, Format, Place
from ..linear_w4 import group_of, unpack
from ..op import Function, Inputs, Op
from ..registry import reasons


def layer_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """torch's fused LayerNorm with the modulation as its weight and bias: one picture only."""
    return F.layer_norm(x, x.shape[-1:], 1 + scale.flatten(), shift.flatten(), 1e-6)


def addcmul(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """torch's fused multiply and add."""
    return torch.addcmul(x, gate, y)


def residual_layer_norm(x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Both of the above."""
    total = torch.addcmul(x, gate, y)
    return total, layer_norm(total, shift, scale)


KERNELS: dict[str, tuple[str, Function]] = {
    "modulated_norm": ("layer_norm", layer_norm),
    "gated_residual": ("addcmul", addcmul),
    "gated_residual_norm": ("addcmul+layer_norm", residual_layer_norm),
}


def in_bf16(inputs: Inputs) -> Inputs:
    """A linear's inputs for :func:`linear_bf16`."""
    x, w = inputs["x"], inputs["w"]
    if w.shape[1] != x.shape[2]:
        w = unpack(w, group_of(w, inputs["w_scale"]))
    wide = {"x": x, "w": w} | {name: inputs[name] for name in ("gate", "residual") if name in inputs}
    return {name: value.to(torch.bfloat16) for name, value in wide.items()}


def linear_bf16(x: Tensor, w: Tensor, gate: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """The same linear in bf16 by cuBLAS: what quantizing is to beat."""
    y = F.linear(x, w)
    return y if gate is None or residual is None else addcmul(residual, gate, y)


def libraries(op: Op, form: Format, dims: Dims, place: Place) -> dict[str, Function]:
    """Library kernels for ``op`` that run at ``place``: its own library implementations, then torch's fused functions."""
    why = reasons(op.name, place, form, dims)
    names = [name for name, reason in why.items() if reason is None and name not in ("triton", "reference")]
    found = {name: op.implementation(name).load() for name in names}
    if op.name in KERNELS and dims.get("batch", 1) == 1:
        found.update([KERNELS[op.name]])
    return found


def inductor(function: Function, backend: str = "inductor") -> Function:
    """``function``, compiled for the shapes it gets."""
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)
