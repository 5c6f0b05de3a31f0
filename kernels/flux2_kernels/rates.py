"""How fast a device moves bytes and multiplies, by its data sheet or as measured, and the time below which no op can run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .op import Cost


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
