"""Where a network's weights are while it works and while it does not. One file per placement, one table."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from . import resident, staged

if TYPE_CHECKING:
    import torch
    from torch import nn

Hold = Callable[[], AbstractContextManager[None]]
"""Entered around every use of a network: inside, its weights are on the device."""

PLACEMENTS: dict[str, Callable[[nn.Module, torch.device], Hold]] = {
    "resident": resident.hold,
    "staged": staged.hold,
}
