"""Networks without weights: what is built inside :func:`meta` has shapes and types, and nothing is computed to fill it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import init
from torch.overrides import TorchFunctionMode

FILLS = (
    Tensor.normal_,
    Tensor.uniform_,
    Tensor.fill_,
    Tensor.zero_,
    init.normal_,
    init.uniform_,
    init.kaiming_uniform_,
)


class _Unfilled(TorchFunctionMode):
    """Leaves new parameters alone. On the meta device torch imports its compiler to draw normal numbers, for seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return (args[0] if args else kwargs["tensor"]) if func in FILLS else func(*args, **kwargs)


@contextmanager
def meta() -> Iterator[None]:
    """Build modules inside on the meta device."""
    with torch.device("meta"), _Unfilled():
        yield
