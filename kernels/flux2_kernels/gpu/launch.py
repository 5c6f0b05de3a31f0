"""Launching a kernel: one value holds everything about a launch, so that what runs is what was compiled ahead and tested."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ..constraint import sm_of
from ..quantize_rows import LARGEST
from .operands import require

INTERPRETED = bool(triton.knobs.runtime.interpret)
DEVICES = ("cpu", "cuda") if INTERPRETED else "cuda"
ASSUMED_SM = 89  # whose configurations interpreted launches use: the lowest SM that every kernel runs on


@dataclass(frozen=True)
class Launch:
    """A kernel, its grid and its arguments.

    Attributes:
        kernel: the jitted function.
        grid: programs per axis.
        args: run-time arguments by name: tensors, integers, floats, None.
        constants: compile-time arguments by name.
        options: ``num_warps``, ``num_stages``.
        device: where the tensors are.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, Any]
    device: torch.device

    def run(self) -> None:
        """Enqueue on the current stream of the tensors' device; nothing waits."""
        if 0 in self.grid:
            return
        if self.device.type == "cuda" and self.device.index != torch.cuda.current_device():
            with torch.cuda.device(self.device):
                self.kernel[self.grid](**self.args, **self.constants, **self.options)
        else:
            self.kernel[self.grid](**self.args, **self.constants, **self.options)


def sm(x: Tensor) -> int:
    """Compute capability of the device of ``x``; :data:`ASSUMED_SM` off CUDA."""
    return sm_of(x.device.index) if x.device.type == "cuda" else ASSUMED_SM


def options_of(config: Any) -> dict[str, Any]:
    """The launch options of a kept configuration. Multiply-adds fuse, whatever this Triton's default."""
    return {name: config[name] for name in ("num_warps", "num_stages") if name in config} | {"enable_fp_fusion": True}


def batch_stride(part: Tensor) -> int:
    """The step from one picture to the next; 0 where one row serves all."""
    return part.stride(0) if part.shape[0] > 1 else 0


def empty_quantized(x: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Room for values [..., width] and scales [..., 1] of the rows of ``x``; ValueError for a dtype that rows cannot have."""
    require(dtype in LARGEST, f"rows can be quantized to {' or '.join(map(str, LARGEST))}, not to {dtype}")
    return x.new_empty((*x.shape[:-1], width), dtype=dtype), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
