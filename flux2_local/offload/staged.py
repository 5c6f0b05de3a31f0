"""Staged: the weights wait in host memory and visit the device for their stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn


def hold(module: nn.Module, device: torch.device) -> Callable[[], AbstractContextManager[None]]:
    """Keep ``module`` on the host; the context moves it to ``device`` and gives the device's copy up afterwards.

    The host's tensors are kept, so leaving costs nothing but the release of memory.
    """
    home = {name: p.data for name, p in module.named_parameters()}
    home_buffers = {name: b.data for name, b in module.named_buffers()}

    @contextmanager
    def on_device() -> Iterator[None]:
        module.to(device)
        try:
            yield
        finally:
            for name, p in module.named_parameters():
                p.data = home[name]
            for name, b in module.named_buffers():
                b.data = home_buffers[name]
            if device.type == "cuda":
                torch.cuda.empty_cache()

    return on_device
