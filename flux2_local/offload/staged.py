"""Staged: the weights wait in host memory and visit the device for their stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

from .tensors import arriving, hang, moved
from .visiting import Visitors


def hold(module: nn.Module, device: torch.device) -> Callable[[], AbstractContextManager[None]]:
    """Keep ``module`` on the host; the context moves it to ``device`` and gives the device's copy up afterwards.

    The host's tensors are kept, so leaving costs nothing but the release of memory.
    """
    visitors = Visitors(module, device)
    home = list(arriving(visitors.rest))

    @contextmanager
    def on_device() -> Iterator[None]:
        try:
            for place, value in home:
                hang([(place, moved(value, device))])
            yield
        finally:
            hang(home)
            visitors.leave()
            if device.type == "cuda":
                torch.cuda.empty_cache()

    return on_device
