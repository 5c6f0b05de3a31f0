"""Resident: the weights are on the device from loading on, but for those that only make the schedule's table."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from .tensors import arriving, hang, moved
from .visiting import Visitors


def hold(module: nn.Module, device: torch.device) -> Callable[[], AbstractContextManager[None]]:
    """Bring ``module`` to ``device`` for good, tensor by tensor: the host keeps none of them."""
    for place, value in arriving(Visitors(module, device).rest):
        if value.device != device:
            hang([(place, moved(value, device))])
    return nullcontext
