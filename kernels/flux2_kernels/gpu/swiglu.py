"""Triton: the product in column blocks; when quantizing, one program a row, which it reads a second time out of cache."""

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
def product(x, columns, width, CACHE: tl.constexpr):
    keep = columns < width
    gate = tl.load(x + columns, mask=keep, other=0.0, eviction_policy=CACHE).to(tl.float32)
    up = tl.load(x + width + columns, mask=keep, other=0.0, eviction_policy=CACHE).to(tl.float32)
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def swiglu_kernel(x, out, tokens, width, x_batch, x_token, out_batch, out_token, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = product(x + batch * x_batch + token * x_token, columns, width, "evict_first")
    tl.store(
        out + batch * out_batch + token * out_token + columns, values.to(out.dtype.element_ty), mask=columns < width
    )


@triton.jit
def swiglu_quantized_kernel(
    x,
    left,
    out,
    row_scales,
    tokens,
    width,
    left_width,
    x_batch,
    x_token,
    left_batch,
    left_token,
    BLOCK: tl.constexpr,
    LEFT: tl.constexpr,
    QUANTIZE: tl.constexpr,
    INTEGER: tl.constexpr,
    LARGEST: tl.constexpr,
    FLOOR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    x += batch * x_batch + token * x_token
    out += row * (left_width + width)
    most = tl.zeros([BLOCK], tl.int32)
    if LEFT:
        left += batch * left_batch + token * left_token
        for start in range(0, left_width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            values = tl.load(left + columns, mask=columns < left_width, other=0.0, eviction_policy="evict_last")
            most = tl.maximum(most, tl.abs(values.to(tl.float32)).to(tl.int32, bitcast=True))
    for start in range(0, width, BLOCK):
        values = product(x, start + tl.arange(0, BLOCK), width, "evict_last")
        most = tl.maximum(most, tl.abs(values).to(tl.int32, bitcast=True))
    step = blocks.row_scale(tl.max(most, axis=0), LARGEST, FLOOR)
    tl.store(row_scales + row, step)
    if LEFT:
        for start in range(0, left_width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            keep = columns < left_width
            values = tl.load(left + columns, mask=keep, other=0.0, eviction_policy="evict_first").to(tl.float32)
            tl.store(out + columns, blocks.quantize(values, step, INTEGER, LARGEST), mask=keep)
        out += left_width
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        values = product(x, columns, width, "evict_first")
        tl.store(out + columns, blocks.quantize(values, step, INTEGER, LARGEST), mask=columns < width)


def launch(x: Tensor, out: Tensor, at: int) -> Launch:
    """The launch that fills ``out``, with the configuration of SM ``at``."""
    batch, tokens, width = out.shape
    config = config_of(at, "swiglu", mlp=width)
    block = min(config["BLOCK"], triton.next_power_of_2(width))
    arguments = {
        "x": x,
        "out": out,
        "tokens": tokens,
        "width": width,
        "x_batch": x.stride(0),
        "x_token": x.stride(1),
        "out_batch": out.stride(0),
        "out_token": out.stride(1),
    }
    grid = (batch * tokens, triton.cdiv(width, block))
    return Launch(swiglu_kernel, grid, arguments, {"BLOCK": block}, options_of(config), x.device)


def launch_quantized(x: Tensor, left: Tensor | None, values: Tensor, row_scales: Tensor, at: int) -> Launch:
    """The launch that fills ``values`` and ``row_scales``."""
    batch, tokens, width = x.shape[0], x.shape[1], x.shape[2] // 2
    config = config_of(at, "swiglu_quantized", mlp=width)
    arguments = {
        "x": x,
        "left": left,
        "out": values,
        "row_scales": row_scales,
        "tokens": tokens,
        "width": width,
        "left_width": 0 if left is None else left.shape[2],
        "x_batch": x.stride(0),
        "x_token": x.stride(1),
        "left_batch": 0 if left is None else left.stride(0),
        "left_token": 0 if left is None else left.stride(1),
    }
    constants = {"BLOCK": config["BLOCK"], "LEFT": left is not None, **quantization(True, values.dtype)}
    return Launch(swiglu_quantized_kernel, (batch * tokens,), arguments, constants, options_of(config), x.device)


def _check(x: Tensor, out: Tensor | None = None, left: Tensor | None = None) -> None:
    require(x.ndim == 3 and x.shape[2] % 2 == 0, f"x must be [B, T, 2M], not {tuple(x.shape)}")
    shape = (*x.shape[:2], x.shape[2] // 2)
    require(out is None or (tuple(out.shape) == shape and out.dtype == x.dtype), f"out must be {shape} in x's dtype")
    fits = left is None or (left.ndim == 3 and left.shape[:2] == x.shape[:2] and left.dtype == x.dtype)
    require(fits, f"left must be [B, T, L] with the rows of x, {tuple(x.shape[:2])}, in {x.dtype}")
    check_rows(x=x, out=out, left=left)


@torch.library.custom_op("flux2_kernels::swiglu_out", mutates_args=("out",), device_types=DEVICES)
def _swiglu_out(x: Tensor, out: Tensor) -> None:
    _check(x, out)
    launch(x, out, sm(x)).run()


@_swiglu_out.register_fake
def _(x: Tensor, out: Tensor) -> None:
    _check(x, out)


@torch.library.custom_op("flux2_kernels::swiglu", mutates_args=(), device_types=DEVICES)
def _swiglu(x: Tensor) -> Tensor:
    _check(x)
    out = x.new_empty((*x.shape[:2], x.shape[2] // 2))
    launch(x, out, sm(x)).run()
    return out


@_swiglu.register_fake
def _(x: Tensor) -> Tensor:
    _check(x)
    return x.new_empty((*x.shape[:2], x.shape[2] // 2))


def _room(x: Tensor, dtype: torch.dtype, left: Tensor | None) -> tuple[Tensor, Tensor]:
    _check(x, left=left)
    return empty_quantized(x, x.shape[2] // 2 + (0 if left is None else left.shape[2]), dtype)


@torch.library.custom_op("flux2_kernels::swiglu_quantized", mutates_args=(), device_types=DEVICES)
def _swiglu_quantized(x: Tensor, dtype: torch.dtype, left: Tensor | None) -> tuple[Tensor, Tensor]:
    values, row_scales = _room(x, dtype, left)
    launch_quantized(x, left, values, row_scales, sm(x)).run()
    return values, row_scales


@_swiglu_quantized.register_fake
def _(x: Tensor, dtype: torch.dtype, left: Tensor | None) -> tuple[Tensor, Tensor]:
    return _room(x, dtype, left)


def swiglu(x: Tensor, out: Tensor | None = None) -> Tensor:
    """As :func:`flux2_kernels.swiglu.reference`."""
    if out is None:
        result: Tensor = torch.ops.flux2_kernels.swiglu(x)
        return result
    torch.ops.flux2_kernels.swiglu_out(x, out)
    return out


def swiglu_quantized(x: Tensor, dtype: torch.dtype, left: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As :func:`flux2_kernels.swiglu.quantized_reference`."""
    result: tuple[Tensor, Tensor] = torch.ops.flux2_kernels.swiglu_quantized(x, dtype, left)
    return result
