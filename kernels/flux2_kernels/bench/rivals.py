"""Other ways to compute an op: torch op by op, inductor's fusion of the same, and the libraries' own kernels."""

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


def cublas_bf16(name: str, inputs: Inputs) -> tuple[Function, Inputs] | None:
    """The same linear in bf16 by cuBLAS: what quantizing is to beat. None where ``name`` is no linear."""
    if not name.startswith("linear"):
        return None
    w = unpack(inputs["w"], group_of(inputs["w"], inputs["w_scale"])) if "w4" in name else inputs["w"]
    given = {"x": inputs["x"].to(torch.bfloat16), "weight": w.to(torch.bfloat16)}
    if "gate" not in inputs:
        return (lambda x, weight: F.linear(x, weight)), given
    given |= {"gate": inputs["gate"].to(torch.bfloat16), "residual": inputs["residual"].to(torch.bfloat16)}
    return (lambda x, weight, gate, residual: torch.addcmul(residual, gate, F.linear(x, weight))), given


def libraries(op: Op, form: Format, dims: Dims, place: Place) -> dict[str, Function]:
    """Library kernels for ``op`` that run at ``place``: its own library implementations, then torch's fused functions."""
    why = reasons(op.name, place, form, dims)
    names = [name for name, reason in why.items() if reason is None and name not in ("triton", "reference")]
    found = {name: op.implementation(name).load() for name in names}
    if op.name in KERNELS and dims.get("batch", 1) == 1:
        found.update([KERNELS[op.name]])
    return found


def inductor(op: Op, backend: str = "inductor") -> Function:
    """The reference, compiled for the shapes it gets."""
    torch.compiler.reset()
    return torch.compile(op.reference, fullgraph=True, dynamic=False, backend=backend)
