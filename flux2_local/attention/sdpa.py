"""torch's scaled dot product attention: its own choice of kernel, or one of its kernels by name."""

from __future__ import annotations

from functools import partial

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..model.ops import Attend, sdpa
from .backend import ANY, HALF, Backend


def load() -> Attend:
    """The reference's own call."""
    return sdpa


def load_kernel(kernel: SDPBackend) -> Attend:
    """The same call, held to one kernel: RuntimeError where that one cannot run, never another in its place."""

    def attend(q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None) -> Tensor:
        with sdpa_kernel(kernel):
            return sdpa(q, k, v, out)

    return attend


BACKENDS = (
    Backend("sdpa", load, {"cuda": ANY, "cpu": ANY, "mps": ANY}),
    Backend("sdpa-cudnn", partial(load_kernel, SDPBackend.CUDNN_ATTENTION), head_dims=range(8, 129, 8)),
    Backend(
        "sdpa-flash",
        partial(load_kernel, SDPBackend.FLASH_ATTENTION),
        {"cuda": HALF, "cpu": ANY},
        head_dims=range(8, 257, 8),
    ),
    Backend(
        "sdpa-efficient",
        partial(load_kernel, SDPBackend.EFFICIENT_ATTENTION),
        {"cuda": {"float32": 50, "bfloat16": 80, "float16": 50}},
        head_dims=range(8, 513, 8),
    ),
    Backend(
        "sdpa-math",
        partial(load_kernel, SDPBackend.MATH),
        {"cuda": ANY, "cpu": ANY, "mps": ANY},
        only_named="it writes every score to memory",
    ),
)
