"""Resident: the weights are on the device from loading on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn


def hold(module: nn.Module, device: torch.device) -> Callable[[], AbstractContextManager[None]]:
    """Move ``module`` to ``device`` for good."""
    module.to(device)
    return nullcontext
