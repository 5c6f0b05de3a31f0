"""What the implementations ask of their tensors. Imports no Triton."""

import torch
from torch import Tensor

from ..constraint import QUANTIZED

FARTHEST_ROW = 2**22  # offsets inside a tile of up to 256 rows have 32 bits


def require(condition: bool, what: str) -> None:
    """Raise ValueError(what) unless the condition holds; ops call it on shapes and strides, which trace as constants."""
    if not condition:
        raise ValueError(what)


def check_rows(**tensors: Tensor | None) -> None:
    """Each tensor's last dimension must be contiguous in memory (or of size one)."""
    for name, x in tensors.items():
        if x is not None:
            require(x.stride(-1) == 1 or x.shape[-1] == 1, f"{name} must be contiguous in its last dimension")


def check_modulation(x: Tensor, **parts: Tensor) -> None:
    """Each part of a modulation must be [B, 1, D] or [1, 1, D] beside x [B, T, D]."""
    require(x.ndim == 3, f"x must be [B, T, D], not {tuple(x.shape)}")
    for name, part in parts.items():
        fits = part.ndim == 3 and part.shape[0] in (1, x.shape[0]) and tuple(part.shape[1:]) == (1, x.shape[2])
        require(fits, f"{name} must be [B, 1, D] or [1, 1, D] beside x {tuple(x.shape)}, not {tuple(part.shape)}")
    check_rows(x=x, **parts)


def check_evenly_spaced(x: Tensor, x_scale: Tensor | None = None) -> None:
    """The rows of x [B, T, K] must follow one another at one step, as one matrix; scales must be float32 [B, T, 1]."""
    check_rows(x=x)
    require(x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1), "the rows of x must be evenly spaced in memory")
    require(
        x.stride(1) <= FARTHEST_ROW, f"the rows of x may lie at most {FARTHEST_ROW} elements apart, not {x.stride(1)}"
    )
    if x_scale is not None:
        fits = tuple(x_scale.shape) == (*x.shape[:2], 1) and x_scale.is_contiguous() and x_scale.dtype == torch.float32
        require(fits, f"x_scale must be contiguous float32 {(*x.shape[:2], 1)}, not {tuple(x_scale.shape)}")


def check_w8a8(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor) -> None:
    """ValueError unless the operands are as :func:`flux2_kernels.linear_w8a8.reference` wants them."""
    require(x.ndim == 3 and w.ndim == 2, f"x must be [B, T, K] and w [N, K], not {tuple(x.shape)} and {tuple(w.shape)}")
    require(x.dtype == w.dtype, f"x ({x.dtype}) and w ({w.dtype}) must have one dtype")
    require(x.dtype in QUANTIZED, f"x must be {' or '.join(map(str, QUANTIZED))}, not {x.dtype}")
    require(x.shape[2] == w.shape[1], f"x has {x.shape[2]} channels and w takes {w.shape[1]}")
    require(w.shape[1] % 16 == 0, f"channels must be a multiple of 16, not {w.shape[1]}")
    require(w.is_contiguous(), "w must be contiguous")
    require(tuple(w_scale.shape) == (w.shape[0],) and w_scale.is_contiguous(), f"w_scale must be [{w.shape[0]}]")
    check_evenly_spaced(x, x_scale)
