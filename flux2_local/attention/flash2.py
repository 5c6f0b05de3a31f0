"""FlashAttention 2."""

from __future__ import annotations

from .backend import Backend, imported

BACKEND = Backend(
    "flash2",
    imported("flash_attn", "flash_attn_func"),
    head_dims=range(8, 257, 8),
    package="flash-attn",
    get="pip install flash-attn --no-build-isolation",
)
