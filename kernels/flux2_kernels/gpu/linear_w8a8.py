"""Triton: a tiled matmul with the scales, and if asked the gate and the residual, in its epilogue.

Two kernels compute the same: one loads through pointers and launches a program a tile; one loads through tensor
descriptors (the copy engine of SM 9.0 and later) and keeps a program on each multiprocessor. The kept configuration of the
SM says which.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..constraint import FP8
from ..tables import Config, config_of
from .launch import DEVICES, Launch, batch_stride, options_of, sm
from .operands import check_rows, check_w8a8, require

PROGRAMS_OFF_CUDA = 4
GATED_COLUMNS = 32  # that an epilogue with a gate takes at once


@triton.jit
def tile_of(index, rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Tile ``index`` in an order that walks GROUP row blocks down before it steps to the next column block."""
    down, across = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    first = index // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    inside = index % (GROUP * across)
    return first + inside % height, inside // height


@triton.jit
def finish(
    total,
    row,
    column,
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
    GATED: tl.constexpr,
    SHARED: tl.constexpr,
):
    """Scale a tile of sums, gate it, add the residual, store it."""
    inside, across = row < rows, column < columns
    keep = inside[:, None] & across[None]
    factor = (
        tl.load(x_scale + row, mask=inside, other=0.0)[:, None]
        * tl.load(w_scale + column, mask=across, other=0.0)[None]
    )
    values = total.to(tl.float32) * factor
    if GATED:
        batch, token = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64)
        if SHARED:
            opened = tl.load(gate + column, mask=across, other=0.0).to(tl.float32)[None]
        else:
            opened = tl.load(gate + (batch * gate_batch)[:, None] + column[None], mask=keep, other=0.0).to(tl.float32)
        at = residual + (batch * residual_batch + token * residual_token)[:, None] + column[None]
        values = tl.load(at, mask=keep, other=0.0).to(tl.float32) + opened * values
    at = out + row.to(tl.int64)[:, None] * columns + column[None]
    tl.store(at, values.to(out.dtype.element_ty), mask=keep)


@triton.jit
def finish_in_parts(
    total,
    row,
    start,
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
    GATED: tl.constexpr,
    SHARED: tl.constexpr,
    PARTS: tl.constexpr,
):
    """:func:`finish` for the columns from ``start``, a part after the other: a gated tile at once would spill registers."""
    WIDTH: tl.constexpr = total.shape[1]
    if PARTS == 1:
        finish(
            total, row, start + tl.arange(0, WIDTH), x_scale, w_scale, out, gate, residual, rows, columns, tokens,
            gate_batch, residual_batch, residual_token, GATED, SHARED,
        )  # fmt: skip
    else:
        halves = tl.permute(tl.reshape(total, (total.shape[0], 2, WIDTH // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        finish_in_parts(
            left, row, start, x_scale, w_scale, out, gate, residual, rows, columns, tokens,
            gate_batch, residual_batch, residual_token, GATED, SHARED, PARTS // 2,
        )  # fmt: skip
        finish_in_parts(
            right, row, start + WIDTH // 2, x_scale, w_scale, out, gate, residual, rows, columns, tokens,
            gate_batch, residual_batch, residual_token, GATED, SHARED, PARTS // 2,
        )  # fmt: skip


@triton.jit
def linear_w8a8_kernel(
    x,
    w,
    x_scale,
    w_scale,
    out,
    gate,
    residual,
    rows,
    columns,
    depth,
    tokens,
    x_row,
    gate_batch,
    residual_batch,
    residual_token,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    TOTAL: tl.constexpr,
    GATED: tl.constexpr,
    SHARED: tl.constexpr,
    PARTS: tl.constexpr,
):
    tile_m, tile_n = tile_of(tl.program_id(0), rows, columns, BLOCK_M, BLOCK_N, GROUP)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    # Only the tile's corner needs 64 bits; offsets inside it in 32 halve what the loop keeps in registers.
    x += (tile_m * BLOCK_M).to(tl.int64) * x_row
    w += (tile_n * BLOCK_N).to(tl.int64) * depth
    x_at = tl.arange(0, BLOCK_M)[:, None] * x_row + inner[None]
    w_at = tl.arange(0, BLOCK_N)[None] * depth + inner[:, None]
    inside, across = (row < rows)[:, None], (column < columns)[None]
    total = tl.zeros((BLOCK_M, BLOCK_N), TOTAL)
    for start in range(0, depth, BLOCK_K):
        if EVEN:
            a = tl.load(x + x_at, mask=inside, other=0.0)
            b = tl.load(w + w_at, mask=across, other=0.0)
        else:
            a = tl.load(x + x_at, mask=inside & (inner < depth - start)[None], other=0.0)
            b = tl.load(w + w_at, mask=across & (inner < depth - start)[:, None], other=0.0)
        total = tl.dot(a, b, total, out_dtype=TOTAL)
        x += BLOCK_K
        w += BLOCK_K
    finish_in_parts(
        total, row, tile_n * BLOCK_N, x_scale, w_scale, out, gate, residual, rows, columns, tokens,
        gate_batch, residual_batch, residual_token, GATED, SHARED, PARTS,
    )  # fmt: skip


@triton.jit
def linear_w8a8_descriptor_kernel(
    x,
    w,
    x_scale,
    w_scale,
    out,
    gate,
    residual,
    rows,
    columns,
    depth,
    tokens,
    gate_batch,
    residual_batch,
    residual_token,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    TOTAL: tl.constexpr,
    GATED: tl.constexpr,
    SHARED: tl.constexpr,
    PARTS: tl.constexpr,
):
    tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(columns, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        tile_m, tile_n = tile_of(tile, rows, columns, BLOCK_M, BLOCK_N, GROUP)
        total = tl.zeros((BLOCK_M, BLOCK_N), TOTAL)
        for start in range(0, depth, BLOCK_K):
            a = x.load([tile_m * BLOCK_M, start])
            b = w.load([tile_n * BLOCK_N, start])
            total = tl.dot(a, b.T, total, out_dtype=TOTAL)
        row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        finish_in_parts(
            total, row, tile_n * BLOCK_N, x_scale, w_scale, out, gate, residual, rows, columns, tokens,
            gate_batch, residual_batch, residual_token, GATED, SHARED, PARTS,
        )  # fmt: skip


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; a small number elsewhere, where programs run one after another."""
    if device.type != "cuda":
        return PROGRAMS_OFF_CUDA
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def launch(
    x: tuple[Tensor, Tensor],
    w: tuple[Tensor, Tensor],
    out: Tensor,
    gated: tuple[Tensor, Tensor] | None,
    config: Config,
) -> Launch:
    """The launch that fills ``out`` [B, T, N] from rows and weights with their scales; ``gated``: gate, residual."""
    (values, x_scale), (weights, w_scale) = x, w
    batch, tokens, depth = values.shape
    rows, columns = batch * tokens, weights.shape[0]
    gate, residual = gated if gated is not None else (None, None)
    tiles = triton.cdiv(rows, config["BLOCK_M"]) * triton.cdiv(columns, config["BLOCK_N"])
    arguments = {
        "x": values,
        "w": weights,
        "x_scale": x_scale,
        "w_scale": w_scale,
        "out": out,
        "gate": gate,
        "residual": residual,
        "rows": rows,
        "columns": columns,
        "depth": depth,
        "tokens": tokens,
        "gate_batch": 0 if gate is None else batch_stride(gate),
        "residual_batch": 0 if residual is None else residual.stride(0),
        "residual_token": 0 if residual is None else residual.stride(1),
    }
    constants = {name: config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP")}
    constants |= {"TOTAL": tl.int32 if values.dtype == torch.int8 else tl.float32, "GATED": gate is not None}
    constants["SHARED"] = gate is None or gate.shape[0] == 1
    whole = gate is None and out.element_size() <= 2 and columns % 16 == 0  # what spills no registers
    constants["PARTS"] = 1 if whole else max(config["BLOCK_N"] // GATED_COLUMNS, 1)
    if not config.get("descriptors"):
        arguments["x_row"] = values.stride(1)
        constants["EVEN"] = depth % config["BLOCK_K"] == 0
        return Launch(linear_w8a8_kernel, (tiles,), arguments, constants, options_of(config), values.device)
    flat = values.as_strided((rows, depth), (values.stride(1), 1))
    arguments["x"] = TensorDescriptor.from_tensor(aligned(flat), [config["BLOCK_M"], config["BLOCK_K"]])
    arguments["w"] = TensorDescriptor.from_tensor(aligned(weights), [config["BLOCK_N"], config["BLOCK_K"]])
    grid = (min(tiles, processors(values.device)),)
    return Launch(linear_w8a8_descriptor_kernel, grid, arguments, constants, options_of(config), values.device)


def aligned(x: Tensor) -> Tensor:
    """8-bit ``x`` [M, K] if its rows start at multiples of 16 bytes, as descriptors want them, else a copy.

    The other kernel would take it as it is, but in a descriptor's tile sizes it spills registers.
    """
    fits = x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def kept_config(x: Tensor, w: Tensor, at: int) -> Config:
    """The configuration of SM ``at`` for rows ``x`` [B, T, K] and weights ``w`` [N, K]."""
    kernel = "linear_w8a8_fp8" if x.dtype == FP8 else "linear_w8a8_int8"
    return config_of(at, kernel, rows=x.shape[0] * x.shape[1], n=w.shape[0], k=w.shape[1])


def _room(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    check_w8a8(x, x_scale, w, w_scale)
    return x.new_empty((*x.shape[:2], w.shape[0]), dtype=dtype)


@torch.library.custom_op("flux2_kernels::linear_w8a8", mutates_args=(), device_types=DEVICES)
def _linear_w8a8(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    out = _room(x, x_scale, w, w_scale, dtype)
    launch((x, x_scale), (w, w_scale), out, None, kept_config(x, w, sm(x))).run()
    return out


@_linear_w8a8.register_fake
def _(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return _room(x, x_scale, w, w_scale, dtype)


def _room_gated(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
    out = _room(x, x_scale, w, w_scale, residual.dtype)
    require(residual.shape == out.shape, f"residual must be {tuple(out.shape)}, not {tuple(residual.shape)}")
    fits = gate.ndim == 3 and gate.shape[0] in (1, x.shape[0]) and tuple(gate.shape[1:]) == (1, w.shape[0])
    require(fits, f"gate must be [B, 1, N] or [1, 1, N], not {tuple(gate.shape)}")
    check_rows(gate=gate, residual=residual)
    return out


@torch.library.custom_op("flux2_kernels::linear_w8a8_gated", mutates_args=(), device_types=DEVICES)
def _linear_w8a8_gated(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, gate: Tensor, residual: Tensor
) -> Tensor:
    out = _room_gated(x, x_scale, w, w_scale, gate, residual)
    launch((x, x_scale), (w, w_scale), out, (gate, residual), kept_config(x, w, sm(x))).run()
    return out


@_linear_w8a8_gated.register_fake
def _(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
    return _room_gated(x, x_scale, w, w_scale, gate, residual)


def linear_w8a8(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """As :func:`flux2_kernels.linear_w8a8.reference`."""
    result: Tensor = torch.ops.flux2_kernels.linear_w8a8(x, x_scale, w, w_scale, dtype)
    return result


def linear_w8a8_gated(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
    """As :func:`flux2_kernels.linear_w8a8.gated_reference`."""
    result: Tensor = torch.ops.flux2_kernels.linear_w8a8_gated(x, x_scale, w, w_scale, gate, residual)
    return result
