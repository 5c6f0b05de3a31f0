"""torch's flex attention, compiled into one fused kernel per shape."""

from __future__ import annotations

import torch
from torch import Tensor

from ..model.ops import Attend
from .backend import HALF, Backend


def load() -> Attend:
    """The compiled function; the compiler runs at the first call of a shape."""
    from torch.nn.attention.flex_attention import flex_attention

    fused = torch.compile(flex_attention, dynamic=False)  # uncompiled it writes every score to memory

    def attend(q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None) -> Tensor:
        found: Tensor = fused(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
        return found if out is None else out.copy_(found)

    return attend


BACKEND = Backend(
    "flex",
    load,
    {"cuda": {**HALF, "float32": 80}},
    head_dims=(16, 32, 64, 128, 256),
    package="triton",
    get="pip install triton, on Windows triton-windows",
    only_named="it is compiled at the first call of every size, and without a mask it gains nothing",
)
