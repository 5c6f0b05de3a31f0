"""What code does, counted instead of timed: the same on a busy machine as on an idle one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Counts:
    """One call of a function.

    Attributes:
        operations: calls that reach a backend and are more than a view; in eager mode on a card, about its kernel launches.
        moved: bytes that they read and write, each tensor once per operation.
        allocations, allocated: new storages among their results, and the bytes of these.
        flops: of matrix products, convolutions and attention.
    """

    operations: int
    moved: int
    allocations: int
    allocated: int
    flops: int


class Tally(TorchDispatchMode):
    """Counts while it is entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = self.moved = self.allocations = self.allocated = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.is_view:
            return out
        taken, made = ([x for x in tree_leaves(part) if isinstance(x, Tensor)] for part in ((args, kwargs), out))
        known = {x.untyped_storage().data_ptr() for x in taken}
        new = [x for x in made if x.untyped_storage().data_ptr() not in known]
        self.operations += 1
        self.moved += sum(x.numel() * x.itemsize for x in (*taken, *made))
        self.allocations += len(new)
        self.allocated += sum(x.numel() * x.itemsize for x in new)
        return out


def count(function: Callable[[], Any]) -> Counts:
    """Call ``function`` without gradients and count."""
    with torch.inference_mode(False), torch.no_grad(), FlopCounterMode(display=False) as flops, Tally() as tally:
        function()
    return Counts(tally.operations, tally.moved, tally.allocations, tally.allocated, int(flops.get_total_flops()))
