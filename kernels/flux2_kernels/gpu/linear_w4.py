"""Triton: one group of input channels a step, its nibbles multiplied as integers and its scale applied to the group's sum."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..constraint import HALF
from ..linear_w4 import GROUPS, group_of
from ..tables import Config, config_of
from .launch import DEVICES, Launch, options_of, sm
from .linear_w8a8 import tile_of
from .operands import check_evenly_spaced, require


@triton.jit
def linear_w4_kernel(
    x,
    w,
    x_scale,
    w_scale,
    out,
    rows,
    columns,
    depth,
    x_row,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
    CHANNELS: tl.constexpr,
    TOTAL: tl.constexpr,
    SCALED: tl.constexpr,
):
    tile_m, tile_n = tile_of(tl.program_id(0), rows, columns, BLOCK_M, BLOCK_N, GROUP)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside, across = (row < rows)[:, None], column < columns
    HALF: tl.constexpr = CHANNELS // 2
    half = tl.arange(0, HALF)
    groups = depth // CHANNELS
    x += (tile_m * BLOCK_M).to(tl.int64) * x_row
    w += (tile_n * BLOCK_N).to(tl.int64) * (depth // 2)
    w_scale += (tile_n * BLOCK_N).to(tl.int64) * groups
    x_at = tl.arange(0, BLOCK_M)[:, None] * x_row + half[None]
    w_at = tl.arange(0, BLOCK_N)[None] * (depth // 2) + half[:, None]
    scale_at = tl.arange(0, BLOCK_N) * groups
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(groups):
        pairs = tl.load(w + w_at, mask=across[None], other=0)
        low, high = ((pairs << 4) >> 4).to(x.dtype.element_ty), (pairs >> 4).to(x.dtype.element_ty)
        part = tl.dot(tl.load(x + x_at, mask=inside, other=0.0), low, out_dtype=TOTAL)
        part = tl.dot(tl.load(x + HALF + x_at, mask=inside, other=0.0), high, part, out_dtype=TOTAL)
        total += part.to(tl.float32) * tl.load(w_scale + scale_at, mask=across, other=0.0)[None]
        x += CHANNELS
        w += HALF
        w_scale += 1
    if SCALED:
        total *= tl.load(x_scale + row, mask=row < rows, other=0.0)[:, None]
    at = out + row.to(tl.int64)[:, None] * columns + column[None]
    tl.store(at, total.to(out.dtype.element_ty), mask=inside & across[None])


def launch(x: Tensor, x_scale: Tensor | None, w: Tensor, w_scale: Tensor, out: Tensor, config: Config) -> Launch:
    """The launch that fills ``out`` [B, T, N]; int8 rows come with ``x_scale``."""
    batch, tokens, depth = x.shape
    rows, columns = batch * tokens, w.shape[0]
    arguments: dict[str, Any] = {
        "x": x,
        "w": w,
        "x_scale": x_scale,
        "w_scale": w_scale,
        "out": out,
        "rows": rows,
        "columns": columns,
        "depth": depth,
        "x_row": x.stride(1),
    }
    constants = {name: config[name] for name in ("BLOCK_M", "BLOCK_N", "GROUP")}
    constants |= {"CHANNELS": group_of(w, w_scale), "SCALED": x_scale is not None}
    constants["TOTAL"] = tl.int32 if x.dtype == torch.int8 else tl.float32
    grid = (triton.cdiv(rows, config["BLOCK_M"]) * triton.cdiv(columns, config["BLOCK_N"]),)
    return Launch(linear_w4_kernel, grid, arguments, constants, options_of(config), x.device)


def kept_config(x: Tensor, w: Tensor, at: int) -> Config:
    """The configuration of SM ``at`` for rows ``x`` [B, T, K] and packed weights ``w``."""
    kernel = "linear_w4a8" if x.dtype == torch.int8 else "linear_w4a16"
    return config_of(at, kernel, rows=x.shape[0] * x.shape[1], n=w.shape[0], k=x.shape[2])


def _room(x: Tensor, x_scale: Tensor | None, w: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    require(
        x.ndim == 3 and w.ndim == 2, f"x must be [B, T, K] and w [N, K / 2], not {tuple(x.shape)}, {tuple(w.shape)}"
    )
    require(x.shape[2] == 2 * w.shape[1], f"x has {x.shape[2]} channels and w takes {2 * w.shape[1]}")
    fits = w_scale.ndim == 2 and w_scale.shape[0] == w.shape[0] and x.shape[2] % w_scale.shape[1] == 0
    fits = fits and group_of(w, w_scale) in GROUPS
    require(fits, f"w_scale must be [N, K / group] with a group of {GROUPS}, not {tuple(w_scale.shape)}")
    require(w.is_contiguous() and w_scale.is_contiguous(), "w and w_scale must be contiguous")
    wanted = HALF if x_scale is None else (torch.int8,)
    require(x.dtype in wanted, f"x must be {' or '.join(map(str, wanted))}, not {x.dtype}")
    require(w.dtype == torch.int8, f"w must be packed pairs in int8, not {w.dtype}")
    check_evenly_spaced(x, x_scale)
    return x.new_empty((*x.shape[:2], w.shape[0]), dtype=dtype)


@torch.library.custom_op("flux2_kernels::linear_w4a16", mutates_args=(), device_types=DEVICES)
def _linear_w4a16(x: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
    out = _room(x, None, w, w_scale, x.dtype)
    launch(x, None, w, w_scale, out, kept_config(x, w, sm(x))).run()
    return out


@_linear_w4a16.register_fake
def _(x: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
    return _room(x, None, w, w_scale, x.dtype)


@torch.library.custom_op("flux2_kernels::linear_w4a8", mutates_args=(), device_types=DEVICES)
def _linear_w4a8(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    out = _room(x, x_scale, w, w_scale, dtype)
    launch(x, x_scale, w, w_scale, out, kept_config(x, w, sm(x))).run()
    return out


@_linear_w4a8.register_fake
def _(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return _room(x, x_scale, w, w_scale, dtype)


def linear_w4a16(x: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
    """As :func:`flux2_kernels.linear_w4.reference`."""
    result: Tensor = torch.ops.flux2_kernels.linear_w4a16(x, w, w_scale)
    return result


def linear_w4a8(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """As :func:`flux2_kernels.linear_w4.quantized_reference`."""
    result: Tensor = torch.ops.flux2_kernels.linear_w4a8(x, x_scale, w, w_scale, dtype)
    return result
