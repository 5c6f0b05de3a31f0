"""Triton: one program a token and a block of heads; q and k in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import qk_norm_rope as op
from ..tables import config_of
from .launch import DEVICES, Launch, options_of, sm
from .operands import check_rows, require


@triton.jit
def norm_rope_block(x, weight, out, cos, sin, heads, x_head, out_head, EPS, HEADS: tl.constexpr, DIM: tl.constexpr):
    head = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    channel = tl.arange(0, DIM)
    keep = (head < heads)[:, None]
    values = tl.load(x + head[:, None] * x_head + channel[None], mask=keep, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(values * values, axis=1) / DIM + EPS)
    values = values * factor[:, None] * tl.load(weight + channel).to(tl.float32)[None]
    even, odd = tl.split(tl.reshape(values, (HEADS, DIM // 2, 2)))
    c = tl.load(cos + tl.arange(0, DIM // 2))[None]
    s = tl.load(sin + tl.arange(0, DIM // 2))[None]
    turned = tl.reshape(tl.join(even * c - odd * s, odd * c + even * s), (HEADS, DIM))
    tl.store(out + head[:, None] * out_head + channel[None], turned.to(out.dtype.element_ty), mask=keep)


@triton.jit
def qk_norm_rope_kernel(
    q,
    k,
    q_weight,
    k_weight,
    q_out,
    k_out,
    cos,
    sin,
    tokens,
    heads,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    q_out_batch,
    q_out_token,
    q_out_head,
    k_out_batch,
    k_out_token,
    k_out_head,
    EPS: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    cos += token * (DIM // 2)
    sin += token * (DIM // 2)
    if tl.program_id(1) == 0:
        q += batch * q_batch + token * q_token
        q_out += batch * q_out_batch + token * q_out_token
        norm_rope_block(q, q_weight, q_out, cos, sin, heads, q_head, q_out_head, EPS, HEADS, DIM)
    else:
        k += batch * k_batch + token * k_token
        k_out += batch * k_out_batch + token * k_out_token
        norm_rope_block(k, k_weight, k_out, cos, sin, heads, k_head, k_out_head, EPS, HEADS, DIM)


Part = tuple[Tensor, Tensor, Tensor]
"""One of q and k: the tensor [B, T, H, d], its weight [d], where it goes."""


def launch(q: Part, k: Part, cos: Tensor, sin: Tensor, at: int) -> Launch:
    """The launch for both parts, with the configuration of SM ``at``."""
    batch, tokens, heads, dim = q[0].shape
    config = config_of(at, "qk_norm_rope", head_dim=dim)
    block = min(config["HEADS"], triton.next_power_of_2(heads))
    arguments: dict[str, object] = {"cos": cos, "sin": sin, "tokens": tokens, "heads": heads}
    for name, (x, weight, out) in (("q", q), ("k", k)):
        arguments |= {name: x, f"{name}_weight": weight, f"{name}_out": out}
        for axis, what in enumerate(("batch", "token", "head")):
            arguments |= {f"{name}_{what}": x.stride(axis), f"{name}_out_{what}": out.stride(axis)}
    return Launch(
        qk_norm_rope_kernel,
        (batch * tokens, 2, triton.cdiv(heads, block)),
        arguments,
        {"EPS": op.EPS, "HEADS": block, "DIM": dim},
        options_of(config),
        q[0].device,
    )


def _check(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, out: Tensor | None) -> None:
    require(x.ndim == 4, f"x must be [B, T, H, d], not {tuple(x.shape)}")
    dim, table = x.shape[3], (x.shape[1], x.shape[3] // 2)
    require(dim & (dim - 1) == 0 and 16 <= dim <= 256, f"head_dim must be a power of two from 16 to 256, not {dim}")
    require(tuple(weight.shape) == (dim,) and weight.is_contiguous(), f"weight must be a contiguous [{dim}]")
    for name, part in (("cos", cos), ("sin", sin)):
        fits = tuple(part.shape) == table and part.dtype == torch.float32 and part.is_contiguous()
        require(fits, f"{name} must be contiguous float32 {list(table)}, not {part.dtype} {list(part.shape)}")
    require(out is None or (out.shape == x.shape and out.dtype == x.dtype), "out must have the shape and dtype of x")
    check_rows(x=x, out=out)


def _check_pair(q: Tensor, k: Tensor, *rest: Tensor) -> None:
    q_weight, k_weight, cos, sin, q_out, k_out = rest
    require(q.shape == k.shape and q.dtype == k.dtype, "q and k must have one shape and dtype")
    _check(q, q_weight, cos, sin, q_out)
    _check(k, k_weight, cos, sin, k_out)


@torch.library.custom_op("flux2_kernels::qk_norm_rope_out", mutates_args=("q_out", "k_out"), device_types=DEVICES)
def _qk_norm_rope_out(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, q_out: Tensor, k_out: Tensor
) -> None:
    _check_pair(q, k, q_weight, k_weight, cos, sin, q_out, k_out)
    launch((q, q_weight, q_out), (k, k_weight, k_out), cos, sin, sm(q)).run()


@_qk_norm_rope_out.register_fake
def _(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, q_out: Tensor, k_out: Tensor
) -> None:
    _check_pair(q, k, q_weight, k_weight, cos, sin, q_out, k_out)


@torch.library.custom_op("flux2_kernels::qk_norm_rope", mutates_args=(), device_types=DEVICES)
def _qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    _check_pair(q, k, q_weight, k_weight, cos, sin, q_out, k_out)
    launch((q, q_weight, q_out), (k, k_weight, k_out), cos, sin, sm(q)).run()
    return q_out, k_out


@_qk_norm_rope.register_fake
def _(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    _check_pair(q, k, q_weight, k_weight, cos, sin, q_out, k_out)
    return q_out, k_out


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_out: Tensor | None = None,
    k_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As :func:`flux2_kernels.qk_norm_rope.reference`."""
    if q_out is None or k_out is None:
        require(q_out is None and k_out is None, "give both q_out and k_out or neither")
        result: tuple[Tensor, Tensor] = torch.ops.flux2_kernels.qk_norm_rope(q, k, q_weight, k_weight, cos, sin)
        return result
    torch.ops.flux2_kernels.qk_norm_rope_out(q, k, q_weight, k_weight, cos, sin, q_out, k_out)
    return q_out, k_out
