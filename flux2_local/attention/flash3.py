"""FlashAttention 3, for Hopper."""

from __future__ import annotations

from torch import Tensor

from ..model.ops import Attend
from .backend import Backend


def load() -> Attend:
    """Import it."""
    from flash_attn_interface import flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attn_func(q, k, v)
        result: Tensor = out[0] if isinstance(out, tuple) else out  # earlier versions return the log-sum-exp too
        return result

    return attend


BACKEND = Backend(
    "flash3",
    load,
    sms=(90,),
    head_dims=range(8, 257, 8),
    package="flash-attn-3",
    get="build it from the folder hopper/ of https://github.com/Dao-AILab/flash-attention (python setup.py install)",
)
