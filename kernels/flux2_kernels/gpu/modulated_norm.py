"""Triton: one program a row, the row in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import modulated_norm as op
from ..quantize_rows import LARGEST, SMALLEST_ROW
from ..tables import config_of
from . import blocks
from .launch import DEVICES, Launch, batch_stride, empty_quantized, options_of, sm
from .operands import check_modulation


@triton.jit
def modulated_norm_kernel(
    x,
    shift,
    scale,
    out,
    row_scales,
    tokens,
    width,
    x_batch,
    x_token,
    shift_batch,
    scale_batch,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
    QUANTIZE: tl.constexpr,
    INTEGER: tl.constexpr,
    LARGEST: tl.constexpr,
    FLOOR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    columns = tl.arange(0, BLOCK)
    keep = columns < width
    values = tl.load(x + batch * x_batch + token * x_token + columns, mask=keep, other=0.0).to(tl.float32)
    values = blocks.normalize(values, keep, width, EPS)
    factor = tl.load(scale + batch * scale_batch + columns, mask=keep, other=0.0).to(tl.float32)
    offset = tl.load(shift + batch * shift_batch + columns, mask=keep, other=0.0).to(tl.float32)
    values = values * (1.0 + factor) + offset
    if QUANTIZE:
        step = blocks.row_scale(blocks.magnitude(values), LARGEST, FLOOR)
        tl.store(row_scales + row, step)
        tl.store(out + row * width + columns, blocks.quantize(values, step, INTEGER, LARGEST), mask=keep)
    else:
        tl.store(out + row * width + columns, values.to(out.dtype.element_ty), mask=keep)


def launch(x: Tensor, shift: Tensor, scale: Tensor, out: Tensor, row_scales: Tensor | None, at: int) -> Launch:
    """The launch that fills ``out`` and, when quantizing, ``row_scales``, with the configuration of SM ``at``."""
    batch, tokens, width = x.shape
    block = triton.next_power_of_2(width)
    config = config_of(at, "modulated_norm", width=block, size=x.element_size())
    return Launch(
        modulated_norm_kernel,
        (batch * tokens,),
        {
            "x": x,
            "shift": shift,
            "scale": scale,
            "out": out,
            "row_scales": row_scales,
            "tokens": tokens,
            "width": width,
            "x_batch": x.stride(0),
            "x_token": x.stride(1),
            "shift_batch": batch_stride(shift),
            "scale_batch": batch_stride(scale),
        },
        {"EPS": op.EPS, "BLOCK": block, **quantization(row_scales is not None, out.dtype)},
        options_of(config),
        x.device,
    )


def quantization(wanted: bool, dtype: torch.dtype) -> dict[str, object]:
    """The compile-time arguments that say how a kernel quantizes."""
    return {
        "QUANTIZE": wanted,
        "INTEGER": dtype == torch.int8,
        "LARGEST": LARGEST[dtype] if wanted else 1.0,
        "FLOOR": SMALLEST_ROW,
    }


@torch.library.custom_op("flux2_kernels::modulated_norm", mutates_args=(), device_types=DEVICES)
def _modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    check_modulation(x, shift=shift, scale=scale)
    out = x.new_empty(x.shape)
    launch(x, shift, scale, out, None, sm(x)).run()
    return out


@_modulated_norm.register_fake
def _(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    check_modulation(x, shift=shift, scale=scale)
    return x.new_empty(x.shape)


@torch.library.custom_op("flux2_kernels::modulated_norm_quantized", mutates_args=(), device_types=DEVICES)
def _modulated_norm_quantized(x: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    check_modulation(x, shift=shift, scale=scale)
    values, row_scales = empty_quantized(x, x.shape[2], dtype)
    launch(x, shift, scale, values, row_scales, sm(x)).run()
    return values, row_scales


@_modulated_norm_quantized.register_fake
def _(x: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    check_modulation(x, shift=shift, scale=scale)
    return empty_quantized(x, x.shape[2], dtype)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """As :func:`flux2_kernels.modulated_norm.reference`; ValueError for shapes or strides that it does not take."""
    result: Tensor = torch.ops.flux2_kernels.modulated_norm(x, shift, scale)
    return result


def modulated_norm_quantized(x: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As :func:`flux2_kernels.modulated_norm.quantized_reference`."""
    result: tuple[Tensor, Tensor] = torch.ops.flux2_kernels.modulated_norm_quantized(x, shift, scale, dtype)
    return result
