"""FlashAttention 3, for Hopper. Earlier versions return the log-sum-exp too."""

from __future__ import annotations

from .backend import Backend, imported

BACKEND = Backend(
    "flash3",
    imported("flash_attn_interface", "flash_attn_func"),
    sms=(90,),
    head_dims=range(8, 257, 8),
    package="flash-attn-3",
    get="build it from the folder hopper/ of https://github.com/Dao-AILab/flash-attention (python setup.py install)",
)
