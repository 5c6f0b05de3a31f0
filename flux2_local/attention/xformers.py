"""xFormers' memory-efficient attention, which picks among its own kernels."""

from __future__ import annotations

from .backend import Backend, imported

BACKEND = Backend(
    "xformers",
    imported("xformers.ops", "memory_efficient_attention"),
    head_dims=range(8, 257, 8),
    package="xformers",
    get="pip install xformers, in the version built for this torch",
)
