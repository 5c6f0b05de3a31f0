"""What the matmuls of torch's libraries leave out, in Triton.

``torch._int_mm`` returns int32 sums: a kernel scales, gates and adds. ``torch._scaled_mm`` applies both scales itself (see
``scaled_mm.py``), and ``gated_residual`` follows it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..constraint import FP8
from ..tables import config_of
from . import int_mm, scaled_mm
from .gated_residual import gated_residual
from .launch import DEVICES, Launch, batch_stride, options_of, sm
from .linear_w8a8 import finish
from .operands import check_w8a8


@triton.jit
def scale_kernel(
    total,
    x_scale,
    w_scale,
    out,
    gate,
    residual,
    rows,
    columns,
    tokens,
    gate_batch,
    residual_batch,
    residual_token,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GATED: tl.constexpr,
    SHARED: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = total + row.to(tl.int64)[:, None] * columns + column[None]
    sums = tl.load(at, mask=(row < rows)[:, None] & (column < columns)[None], other=0, eviction_policy="evict_first")
    finish(
        sums, row, column, x_scale, w_scale, out, gate, residual, rows, columns, tokens,
        gate_batch, residual_batch, residual_token, GATED, SHARED,
    )  # fmt: skip


def launch(
    total: Tensor, scales: tuple[Tensor, Tensor], out: Tensor, gated: tuple[Tensor, Tensor] | None, at: int
) -> Launch:
    """The launch that fills ``out`` [B, T, N] from int32 sums [B·T, N] and the scales of rows and columns."""
    gate, residual = gated if gated is not None else (None, None)
    config = config_of(at, "scale", n=out.shape[2])
    arguments = {
        "total": total,
        "x_scale": scales[0],
        "w_scale": scales[1],
        "out": out,
        "gate": gate,
        "residual": residual,
        "rows": total.shape[0],
        "columns": total.shape[1],
        "tokens": out.shape[1],
        "gate_batch": 0 if gate is None else batch_stride(gate),
        "residual_batch": 0 if residual is None else residual.stride(0),
        "residual_token": 0 if residual is None else residual.stride(1),
    }
    constants = {"BLOCK_M": config["BLOCK_M"], "BLOCK_N": config["BLOCK_N"], "GATED": gate is not None}
    constants["SHARED"] = gate is None or gate.shape[0] == 1
    grid = (triton.cdiv(total.shape[0], config["BLOCK_M"]), triton.cdiv(total.shape[1], config["BLOCK_N"]))
    return Launch(scale_kernel, grid, arguments, constants, options_of(config), total.device)


@torch.library.custom_op("flux2_kernels::scale_sums", mutates_args=("out",), device_types=DEVICES)
def _scale_sums(
    total: Tensor, x_scale: Tensor, w_scale: Tensor, gate: Tensor | None, residual: Tensor | None, out: Tensor
) -> None:
    gated = (gate, residual) if gate is not None and residual is not None else None
    launch(total, (x_scale, w_scale), out, gated, sm(total)).run()


@_scale_sums.register_fake
def _(
    total: Tensor, x_scale: Tensor, w_scale: Tensor, gate: Tensor | None, residual: Tensor | None, out: Tensor
) -> None:
    return None


def linear_w8a8(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """As :func:`flux2_kernels.linear_w8a8.reference`, for int8 rows."""
    check_w8a8(x, x_scale, w, w_scale)
    out = x.new_empty((*x.shape[:2], w.shape[0]), dtype=dtype)
    torch.ops.flux2_kernels.scale_sums(int_mm.sums(x, w), x_scale, w_scale, None, None, out)
    return out


def linear_w8a8_gated(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
    """As :func:`flux2_kernels.linear_w8a8.gated_reference`, except that fp8 sums are rounded to bfloat16 in between."""
    if x.dtype == FP8:
        return gated_residual(residual, gate, scaled_mm.linear_w8a8(x, x_scale, w, w_scale, residual.dtype))
    check_w8a8(x, x_scale, w, w_scale)
    out = x.new_empty(residual.shape, dtype=residual.dtype)
    torch.ops.flux2_kernels.scale_sums(int_mm.sums(x, w), x_scale, w_scale, gate, residual, out)
    return out
