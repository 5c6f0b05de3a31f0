"""The int8 matmul of torch's library, whatever the number of rows. Imports no Triton: not every torch brings it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .operands import check_w8a8

FEWEST = 17
"""Rows that the library takes at least; a language model that writes has one."""

PART = 1024
"""Rows whose sums are there at once: in int32 and in float32 they take four times what the result does."""


def sums(x: Tensor, w: Tensor) -> Tensor:
    """int8 x [B, T, K] times w [N, K]: int32 [B·T, N]."""
    rows = x.flatten(0, 1)
    count = rows.shape[0]
    if count < FEWEST:
        rows = F.pad(rows, (0, 0, 0, FEWEST - count))
    return torch._int_mm(rows, w.t())[:count]


def linear_w8a8(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """As :func:`flux2_kernels.linear_w8a8.reference`, for int8 rows."""
    check_w8a8(x, x_scale, w, w_scale)
    out = x.new_empty((*x.shape[:2], w.shape[0]), dtype=dtype)
    for rows, scale, place in zip(*(whole.flatten(0, 1).split(PART) for whole in (x, x_scale, out)), strict=True):
        torch.mul(sums(rows[None], w) * scale, w_scale, out=place)
    return out
