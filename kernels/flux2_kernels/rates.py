"""How fast a device moves bytes and multiplies, by its data sheet or as measured, and the time below which no op can run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .constraint import FP8
from .op import Cost

MULTIPLES: Mapping[int, Mapping[torch.dtype, float]] = {
    80: {torch.int8: 2},
    86: {torch.int8: 4},
    89: {torch.int8: 4, FP8: 2},
    90: {torch.int8: 2, FP8: 2},
    100: {torch.int8: 2, FP8: 2},
    120: {torch.int8: 4, FP8: 2},
}
"""Dense int8 and fp8 rates over the bf16 rate, by SM, from the vendor's data sheets. On GeForce cards (86, 89, 120) bf16 and
fp8 with float32 accumulation run at half the rate of the matrix units, int8 at the whole."""


@dataclass(frozen=True)
class Rates:
    """What a device can do.

    Attributes:
        memory: bytes per second to and from device memory.
        matmul: operations per second by the operands' dtype; a dtype without an entry cannot be multiplied.
    """

    memory: float
    matmul: Mapping[torch.dtype, float]

    def seconds(self, cost: Cost) -> float | None:
        """The roofline time of a call: moving its bytes or multiplying, whichever takes longer; None if it cannot multiply.

        Arithmetic outside of matmuls is not counted: it stays far below what moving the same elements costs.
        """
        moving = cost.bytes / self.memory
        if cost.matmul is None:
            return moving
        rate = self.matmul.get(cost.matmul)
        return max(moving, cost.flops / rate) if rate else None

    def bound(self, cost: Cost) -> str:
        """What the roofline time is made of: "memory" or "matmul"."""
        rate = self.matmul.get(cost.matmul) if cost.matmul else None
        return "matmul" if rate and cost.flops / rate > cost.bytes / self.memory else "memory"


def rates_of(sm: int, bf16: float, memory: float) -> Rates:
    """The rates of a card by its data sheet: ``bf16`` in operations per second, ``memory`` in bytes per second."""
    matmul = {torch.bfloat16: bf16, torch.float16: bf16}
    return Rates(memory, matmul | {dtype: factor * bf16 for dtype, factor in MULTIPLES.get(sm, {}).items()})
