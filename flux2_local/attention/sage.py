"""SageAttention: q and k in int8, the rest in fp16 or fp8. Lossy."""

from __future__ import annotations

from torch import Tensor

from ..model.ops import Attend
from .backend import Backend


def load() -> Attend:
    """Import it."""
    from sageattention import sageattn

    def attend(q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None) -> Tensor:
        # Its first version centres k in place, and every version takes misspelt options in silence.
        found: Tensor = sageattn(q, k, v, tensor_layout="NHD", is_causal=False)
        return found if out is None else out.copy_(found)

    return attend


BACKEND = Backend(
    "sage",
    load,
    sms=(80, 86, 89, 90, 120),
    head_dims=(64, 96, 128),
    package="sageattention",
    get="pip install sageattention, or build version 2 from https://github.com/thu-ml/SageAttention",
    lossy=True,
)
