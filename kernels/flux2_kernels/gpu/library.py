"""The int8 and fp8 matmuls of torch's libraries, with what they leave out around them.

``torch._scaled_mm`` applies both scales itself. ``torch._int_mm`` returns int32 sums: a Triton kernel scales, gates and adds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..constraint import FP8
from ..tables import config_of
from .gated_residual import gated_residual
from .launch import DEVICES, Launch, batch_stride, options_of, require, sm
from .linear_w8a8 import check, finish


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
    out_batch,
    out_token,
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
        out_batch, out_token, gate_batch, residual_batch, residual_token, GATED, SHARED,
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
        "out_batch": out.stride(0),
        "out_token": out.stride(1),
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


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _fp8(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    require(dtype == torch.bfloat16, f"row-wise scales go with a bfloat16 result, not {dtype}")
    result = torch._scaled_mm(
        _flat(x), w.t(), scale_a=_flat(x_scale), scale_b=w_scale[None], out_dtype=dtype, use_fast_accum=True
    )
    return result.unflatten(0, x.shape[:-1])


def linear_w8a8(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """As :func:`flux2_kernels.linear_w8a8.reference`."""
    check(x, x_scale, w, w_scale)
    if x.dtype == FP8:
        result = _fp8(x, x_scale, w, w_scale, dtype)
        return result if out is None else out.copy_(result)
    result = x.new_empty((*x.shape[:-1], w.shape[0]), dtype=dtype) if out is None else out
    torch.ops.flux2_kernels.scale_sums(torch._int_mm(_flat(x), w.t()), x_scale, w_scale, None, None, result)
    return result


def linear_w8a8_gated(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
    """As :func:`flux2_kernels.linear_w8a8.gated_reference`, except that fp8 sums are rounded to bfloat16 in between."""
    check(x, x_scale, w, w_scale)
    if x.dtype == FP8:
        return gated_residual(residual, gate, _fp8(x, x_scale, w, w_scale, residual.dtype))
    out = x.new_empty(residual.shape, dtype=residual.dtype)
    total = torch._int_mm(_flat(x), w.t())
    torch.ops.flux2_kernels.scale_sums(total, x_scale, w_scale, gate, residual, out)
    return out
