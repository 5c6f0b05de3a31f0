"""xFormers' memory-efficient attention, which picks among its own kernels."""

from __future__ import annotations

from torch import Tensor

from ..model.ops import Attend
from .backend import Backend


def load() -> Attend:
    """Import it."""
    from xformers.ops import memory_efficient_attention

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = memory_efficient_attention(q, k, v)
        return out

    return attend


BACKEND = Backend(
    "xformers",
    load,
    head_dims=range(8, 257, 8),
    package="xformers",
    get="pip install xformers, in the version built for this torch",
)
