"""Triton: the sum in column blocks; with the norm fused, one program a row and the row in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import modulated_norm as norm_op
from ..tables import config_of
from . import blocks
from .launch import DEVICES, Launch, batch_stride, empty_quantized, options_of, sm
from .modulated_norm import quantization
from .operands import check_modulation, check_rows, require


@triton.jit
def gated_residual_kernel(
    x,
    gate,
    y,
    out,
    tokens,
    width,
    x_batch,
    x_token,
    y_batch,
    y_token,
    gate_batch,
    BLOCK: tl.constexpr,
    HALF: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep = columns < width
    values = tl.load(x + batch * x_batch + token * x_token + columns, mask=keep).to(tl.float32)
    branch = tl.load(y + batch * y_batch + token * y_token + columns, mask=keep).to(tl.float32)
    opened = tl.load(gate + batch * gate_batch + columns, mask=keep).to(tl.float32)
    values = blocks.saturate(values + opened * branch, HALF)
    tl.store(out + row * width + columns, values.to(out.dtype.element_ty), mask=keep)


@triton.jit
def gated_residual_norm_kernel(
    x,
    gate,
    y,
    shift,
    scale,
    residual,
    out,
    row_scales,
    tokens,
    width,
    x_batch,
    x_token,
    y_batch,
    y_token,
    gate_batch,
    shift_batch,
    scale_batch,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
    HALF: tl.constexpr,
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
    branch = tl.load(y + batch * y_batch + token * y_token + columns, mask=keep, other=0.0).to(tl.float32)
    opened = tl.load(gate + batch * gate_batch + columns, mask=keep, other=0.0).to(tl.float32)
    stored = blocks.saturate(values + opened * branch, HALF).to(residual.dtype.element_ty)
    tl.store(residual + row * width + columns, stored, mask=keep)
    values = blocks.normalize(stored.to(tl.float32), keep, width, EPS)
    factor = tl.load(scale + batch * scale_batch + columns, mask=keep, other=0.0).to(tl.float32)
    offset = tl.load(shift + batch * shift_batch + columns, mask=keep, other=0.0).to(tl.float32)
    values = values * (1.0 + factor) + offset
    if QUANTIZE:
        step = blocks.row_scale(blocks.magnitude(values), LARGEST, FLOOR)
        tl.store(row_scales + row, step)
        tl.store(out + row * width + columns, blocks.quantize(values, step, INTEGER, LARGEST), mask=keep)
    else:
        tl.store(out + row * width + columns, values.to(out.dtype.element_ty), mask=keep)


def _common(x: Tensor, gate: Tensor, y: Tensor) -> dict[str, object]:
    return {
        "x": x,
        "gate": gate,
        "y": y,
        "tokens": x.shape[1],
        "width": x.shape[2],
        "x_batch": x.stride(0),
        "x_token": x.stride(1),
        "y_batch": y.stride(0),
        "y_token": y.stride(1),
        "gate_batch": batch_stride(gate),
    }


def launch(x: Tensor, gate: Tensor, y: Tensor, out: Tensor, at: int) -> Launch:
    """The launch that fills ``out`` with the sum, with the configuration of SM ``at``."""
    batch, tokens, width = x.shape
    config = config_of(at, "gated_residual", width=width)
    block = min(config["BLOCK"], triton.next_power_of_2(width))
    return Launch(
        gated_residual_kernel,
        (batch * tokens, triton.cdiv(width, block)),
        {**_common(x, gate, y), "out": out},
        {"BLOCK": block, "HALF": x.dtype == torch.float16},
        options_of(config),
        x.device,
    )


def launch_norm(
    x: Tensor,
    gate: Tensor,
    y: Tensor,
    modulation: tuple[Tensor, Tensor],
    residual: Tensor,
    out: tuple[Tensor, Tensor | None],
    at: int,
) -> Launch:
    """The launch that fills ``residual`` and ``out`` (values and, when quantizing, row scales); modulation: shift, scale."""
    batch, tokens, width = x.shape
    block = triton.next_power_of_2(width)
    (shift, scale), (values, row_scales) = modulation, out
    arguments = {
        **_common(x, gate, y),
        "shift": shift,
        "scale": scale,
        "residual": residual,
        "out": values,
        "row_scales": row_scales,
        "shift_batch": batch_stride(shift),
        "scale_batch": batch_stride(scale),
    }
    constants = {"EPS": norm_op.EPS, "BLOCK": block, "HALF": x.dtype == torch.float16}
    constants |= quantization(row_scales is not None, values.dtype)
    options = options_of(config_of(at, "gated_residual_norm", width=block, size=x.element_size()))
    return Launch(gated_residual_norm_kernel, (batch * tokens,), arguments, constants, options, x.device)


def _check(x: Tensor, gate: Tensor, y: Tensor, **modulation: Tensor) -> None:
    check_modulation(x, gate=gate, **modulation)
    check_rows(y=y)
    require(y.shape == x.shape, f"x {tuple(x.shape)} and y {tuple(y.shape)} must have one shape")


@torch.library.custom_op("flux2_kernels::gated_residual", mutates_args=(), device_types=DEVICES)
def _gated_residual(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    _check(x, gate, y)
    out = x.new_empty(x.shape)
    launch(x, gate, y, out, sm(x)).run()
    return out


@_gated_residual.register_fake
def _(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    _check(x, gate, y)
    return x.new_empty(x.shape)


@torch.library.custom_op("flux2_kernels::gated_residual_norm", mutates_args=(), device_types=DEVICES)
def _gated_residual_norm(x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    _check(x, gate, y, shift=shift, scale=scale)
    residual, out = x.new_empty(x.shape), x.new_empty(x.shape)
    launch_norm(x, gate, y, (shift, scale), residual, (out, None), sm(x)).run()
    return residual, out


@_gated_residual_norm.register_fake
def _(x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    _check(x, gate, y, shift=shift, scale=scale)
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.custom_op("flux2_kernels::gated_residual_norm_quantized", mutates_args=(), device_types=DEVICES)
def _gated_residual_norm_quantized(
    x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, gate, y, shift=shift, scale=scale)
    residual, out = x.new_empty(x.shape), empty_quantized(x, x.shape[2], dtype)
    launch_norm(x, gate, y, (shift, scale), residual, out, sm(x)).run()
    return residual, *out


@_gated_residual_norm_quantized.register_fake
def _(
    x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, gate, y, shift=shift, scale=scale)
    return x.new_empty(x.shape), *empty_quantized(x, x.shape[2], dtype)


def gated_residual(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """As :func:`flux2_kernels.gated_residual.reference`."""
    result: Tensor = torch.ops.flux2_kernels.gated_residual(x, gate, y)
    return result


def gated_residual_norm(x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`flux2_kernels.gated_residual.norm_reference`."""
    result: tuple[Tensor, Tensor] = torch.ops.flux2_kernels.gated_residual_norm(x, gate, y, shift, scale)
    return result


def gated_residual_norm_quantized(
    x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`flux2_kernels.gated_residual.norm_quantized_reference`."""
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.flux2_kernels.gated_residual_norm_quantized(
        x, gate, y, shift, scale, dtype
    )
    return result
