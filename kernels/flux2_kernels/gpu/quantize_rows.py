"""Triton: one program a row, the row in registers.

A rotation is a product of matrix units with ±1, of a part of the row at a time: twice, the second time out of cache, because
a whole row rotated in float32 does not fit into registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tables import config_of
from . import blocks
from .launch import DEVICES, Launch, empty_quantized, options_of, sm
from .modulated_norm import quantization
from .operands import check_rows, require


@triton.jit
def rotation(SIZE: tl.constexpr, dtype: tl.constexpr):
    """Signs of the Hadamard matrix of up to 256 rows: the parity of the bits that row and column share."""
    shared = tl.arange(0, SIZE)[:, None] & tl.arange(0, SIZE)[None]
    shared = shared ^ (shared >> 4)
    shared = shared ^ (shared >> 2)
    shared = (shared ^ (shared >> 1)) & 1
    return (1 - 2 * shared).to(dtype)


@triton.jit
def rotate(values, SIZE: tl.constexpr, FACTOR: tl.constexpr):
    """Rows of ``values`` times the orthonormal Hadamard matrix; float32 goes as three bfloat16 terms, so no bit is lost."""
    if values.dtype == tl.float32:
        signs = rotation(SIZE, tl.bfloat16)
        high = values.to(tl.bfloat16)
        rest = values - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        total = tl.dot(high, signs, tl.dot(middle, signs, tl.dot(low, signs)))
    else:
        total = tl.dot(values, rotation(SIZE, values.dtype))
    return total * FACTOR


@triton.jit
def quantize_rows_kernel(
    x,
    out,
    row_scales,
    tokens,
    width,
    x_batch,
    x_token,
    BLOCK: tl.constexpr,
    QUANTIZE: tl.constexpr,
    INTEGER: tl.constexpr,
    LARGEST: tl.constexpr,
    FLOOR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x += row // tokens * x_batch + row % tokens * x_token
    columns = tl.arange(0, BLOCK)
    values = tl.load(x + columns, mask=columns < width, other=0.0).to(tl.float32)
    step = blocks.row_scale(blocks.magnitude(values), LARGEST, FLOOR)
    tl.store(row_scales + row, step)
    tl.store(out + row * width + columns, blocks.quantize(values, step, INTEGER, LARGEST), mask=columns < width)


@triton.jit
def quantize_rotated_kernel(
    x,
    out,
    row_scales,
    tokens,
    width,
    x_batch,
    x_token,
    BLOCK: tl.constexpr,
    HADAMARD: tl.constexpr,
    FACTOR: tl.constexpr,
    QUANTIZE: tl.constexpr,
    INTEGER: tl.constexpr,
    LARGEST: tl.constexpr,
    FLOOR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x += row // tokens * x_batch + row % tokens * x_token
    out += row * width
    inside = tl.arange(0, BLOCK // HADAMARD)[:, None] * HADAMARD + tl.arange(0, HADAMARD)[None]
    most = tl.zeros([BLOCK // HADAMARD], tl.int32)
    for start in range(0, width, BLOCK):
        columns = start + inside
        values = tl.load(x + columns, mask=columns < width, other=0.0, eviction_policy="evict_last")
        most = tl.maximum(most, blocks.magnitude(rotate(values, HADAMARD, FACTOR)))
    step = blocks.row_scale(tl.max(most, axis=0), LARGEST, FLOOR)
    tl.store(row_scales + row, step)
    for start in range(0, width, BLOCK):
        columns = start + inside
        values = tl.load(x + columns, mask=columns < width, other=0.0, eviction_policy="evict_first")
        values = blocks.quantize(rotate(values, HADAMARD, FACTOR), step, INTEGER, LARGEST)
        tl.store(out + columns, values, mask=columns < width)


def launch(x: Tensor, hadamard: int, values: Tensor, row_scales: Tensor, at: int) -> Launch:
    """The launch that fills ``values`` and ``row_scales`` from x [B, T, K], with the configuration of SM ``at``."""
    batch, tokens, width = x.shape
    block = triton.next_power_of_2(width)
    config = config_of(at, "quantize_rotated" if hadamard else "quantize_rows", width=block, size=x.element_size())
    arguments = {
        "x": x,
        "out": values,
        "row_scales": row_scales,
        "tokens": tokens,
        "width": width,
        "x_batch": x.stride(0),
        "x_token": x.stride(1),
    }
    constants = {"BLOCK": block, **quantization(True, values.dtype)}
    kernel = quantize_rows_kernel
    if hadamard:
        kernel = quantize_rotated_kernel
        block = max(min(config["BLOCK"], block), 16 * hadamard)  # matrix units take at least 16 rows
        constants |= {"BLOCK": block, "HADAMARD": hadamard, "FACTOR": hadamard**-0.5}
    return Launch(kernel, (batch * tokens,), arguments, constants, options_of(config), x.device)


def _room(x: Tensor, dtype: torch.dtype, hadamard: int) -> tuple[Tensor, Tensor]:
    require(x.ndim == 3, f"x must be [B, T, K], not {tuple(x.shape)}")
    require(x.shape[2] <= 32768, f"rows of at most 32768 channels, not {x.shape[2]}")
    require(hadamard in (0, 16, 32, 64, 128), f"hadamard must be 0, 16, 32, 64 or 128, not {hadamard}")
    require(not hadamard or x.shape[2] % hadamard == 0, f"hadamard {hadamard} does not divide {x.shape[2]} channels")
    check_rows(x=x)
    return empty_quantized(x, x.shape[2], dtype)


@torch.library.custom_op("flux2_kernels::quantize_rows", mutates_args=(), device_types=DEVICES)
def _quantize_rows(x: Tensor, dtype: torch.dtype, hadamard: int) -> tuple[Tensor, Tensor]:
    values, row_scales = _room(x, dtype, hadamard)
    launch(x, hadamard, values, row_scales, sm(x)).run()
    return values, row_scales


@_quantize_rows.register_fake
def _(x: Tensor, dtype: torch.dtype, hadamard: int) -> tuple[Tensor, Tensor]:
    return _room(x, dtype, hadamard)


def quantize_rows(x: Tensor, dtype: torch.dtype, hadamard: int = 0) -> tuple[Tensor, Tensor]:
    """As :func:`flux2_kernels.quantize_rows.reference`, for x [B, T, K]."""
    result: tuple[Tensor, Tensor] = torch.ops.flux2_kernels.quantize_rows(x, dtype, hadamard)
    return result
