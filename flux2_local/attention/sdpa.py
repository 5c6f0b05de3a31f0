"""torch's scaled dot product attention: its own choice of kernel, or one of its kernels by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..model.ops import Attend, sdpa
from .backend import ANY, HALF, Backend

aten = torch.ops.aten


def load() -> Attend:
    """The reference's own call."""
    return sdpa


def load_kernel(kernel: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]) -> Attend:
    """The same call, held to one kernel: RuntimeError where that one cannot run, never another in its place.

    The operator itself is called: torch's switches for its kernels hold for the whole process, and prompts are read in another thread.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None) -> Tensor:
        found = kernel(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))[0].transpose(1, 2)
        return found if out is None else out.copy_(found)

    return attend


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return aten._scaled_dot_product_cudnn_attention.default(q, k, v, None, False)  # no mask, no sums to go back with


def flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v)
    return aten._scaled_dot_product_flash_attention.default(q, k, v)


def efficient(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return aten._scaled_dot_product_efficient_attention.default(q, k, v, None, False)


def math(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return aten._scaled_dot_product_attention_math.default(q, k, v)


BACKENDS = (
    Backend("sdpa", load, {"cuda": ANY, "cpu": ANY, "mps": ANY}),
    Backend("sdpa-cudnn", partial(load_kernel, cudnn), head_dims=range(8, 129, 8)),
    Backend(
        "sdpa-flash",
        partial(load_kernel, flash),
        {"cuda": HALF, "cpu": ANY},
        head_dims=range(8, 257, 8),
    ),
    Backend(
        "sdpa-efficient",
        partial(load_kernel, efficient),
        {"cuda": {"float32": 50, "bfloat16": 80, "float16": 50}},
        head_dims=range(8, 513, 8),
    ),
    Backend(
        "sdpa-math",
        partial(load_kernel, math),
        {"cuda": ANY, "cpu": ANY, "mps": ANY},
        only_named="it writes every score to memory",
    ),
)
