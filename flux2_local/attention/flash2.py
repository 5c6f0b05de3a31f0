"""FlashAttention 2."""

from __future__ import annotations

from torch import Tensor

from ..model.ops import Attend
from .backend import Backend


def load() -> Attend:
    """Import it."""
    from flash_attn import flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = flash_attn_func(q, k, v)
        return out

    return attend


BACKEND = Backend(
    "flash2",
    load,
    head_dims=range(8, 257, 8),
    package="flash-attn",
    get="pip install flash-attn --no-build-isolation",
)
