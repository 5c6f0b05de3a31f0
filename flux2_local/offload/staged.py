"""Staged: the weights wait in host memory and visit the device for their stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn


def hold(module: nn.Module, device: torch.device) -> Callable[[], AbstractContextManager[None]]:
    """Keep ``module`` on the host; the context moves it to ``device`` and gives the device's copy up afterwards.

    The host's tensors are kept, so leaving costs nothing but the release of memory.
    """
    home: list[tuple[dict[str, Any], str, Tensor]] = [
        (cast("dict[str, Any]", table), name, value)
        for part in module.modules()
        for table in (part._parameters, part._buffers)
        for name, value in table.items()
        if value is not None
    ]

    @contextmanager
    def on_device() -> Iterator[None]:
        for table, name, value in home:
            table[name] = moved(value, device)
        try:
            yield
        finally:
            for table, name, value in home:
                table[name] = value
            if device.type == "cuda":
                torch.cuda.empty_cache()

    return on_device


def moved(value: Tensor, device: torch.device) -> Tensor:
    """A copy on ``device``. Quantized weights are tensors around tensors, for which setting ``.data`` would not do."""
    there = value.to(device)
    return nn.Parameter(there, requires_grad=False) if isinstance(value, nn.Parameter) else there
