"""Attention on a CPU as two matrix products a head, with the scores between them kept in the cache.

In bfloat16 torch's fused kernel for CPUs stays below the rate of its matrix products: on one core with AVX512-BF16 it took
1.7 times as long as this at 336 tokens in 4 heads of 64, and 1.9 times at 1536 tokens in 24 heads of 128. In float32 it is
the faster one. The price is that scores are rounded to bfloat16: single results are off by up to 1.2 % of the largest value,
where the fused kernel's are off by 0.4 %. ``benchmarks/suites/test_attention.py`` measures both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..model.ops import Attend
from .backend import Backend, operation

CACHE = 2**20
"""Bytes of scores that are computed together: about what a core's second-level cache holds."""


def load() -> Attend:
    return attend


def attend(q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None) -> Tensor:
    """Heads in groups whose scores fit the cache, or one at a time."""
    if torch.compiler.is_compiling():
        return as_one(q, k, v) if out is None else out.copy_(as_one(q, k, v))
    return in_groups(q, k, v, torch.empty_like(q) if out is None else out)


def in_groups(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
    _, tokens, heads, channels = q.shape
    group = max(1, CACHE // (tokens * k.shape[1] * q.element_size()))
    for queries, keys, values, results in zip(q * channels**-0.5, k, v, out, strict=True):
        for i in range(0, heads, group):
            part = slice(i, i + group)
            scores = torch.bmm(queries[:, part].transpose(0, 1), keys[:, part].permute(1, 2, 0))
            torch.softmax(scores, -1, out=scores)
            torch.bmm(scores, values[:, part].transpose(0, 1), out=results[:, part].transpose(0, 1))
            del scores  # or it would still be there while the next ones are computed
    return out


# What torch.compile sees: traced, it would be another graph for every number of groups.
as_one = operation("matmul_attention", lambda q, k, v: in_groups(q, k, v, q.new_empty(q.shape)))

BACKEND = Backend("matmul", load, {"cpu": {"bfloat16": 0}})
