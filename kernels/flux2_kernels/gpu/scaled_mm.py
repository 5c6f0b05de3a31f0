"""The fp8 matmul of torch's library, which applies both scales itself. Imports no Triton: not every torch brings it."""

import torch
from torch import Tensor

from .operands import check_w8a8, require


def linear_w8a8(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """As :func:`flux2_kernels.linear_w8a8.reference`, for fp8 rows and a bfloat16 result."""
    check_w8a8(x, x_scale, w, w_scale)
    require(dtype == torch.bfloat16, f"row-wise scales go with a bfloat16 result, not {dtype}")
    scales = {"scale_a": x_scale.flatten(0, 1), "scale_b": w_scale[None]}
    result = torch._scaled_mm(x.flatten(0, 1), w.t(), **scales, out_dtype=dtype, use_fast_accum=True)
    return result.unflatten(0, x.shape[:2])
