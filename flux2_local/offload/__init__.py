"""Where a network's weights are while it works and while it does not. One file per placement."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..plan import ComponentPlan

Hold = Callable[[], AbstractContextManager[None]]
"""Entered around every use of a network: inside, its weights are on the device."""


def place(network: nn.Module, device: torch.device, held: ComponentPlan, tell: Callable[[str], None]) -> Hold:
    """Put a loaded network where its plan says that it waits, and give the way to use it; ``tell`` is called with what the user should
    know about that, now or later."""
    from . import link, mapped, resident, staged, streamed

    if held.placement == "streamed" and device.type == "cpu":
        return mapped.Mapped(network, held.stay)
    if held.placement == "streamed":
        return streamed.Streamed(network, link.CudaLink(device, tell), held.stay, held.mapped)
    return (resident if held.placement == "resident" else staged).hold(network, device)


class Later:
    """A network that is loaded when it is first used.

    Args:
        load: gives it its weights and the way to use it.
    """

    def __init__(self, load: Callable[[], Hold]) -> None:
        self.load = load
        self.hold: Hold | None = None
        self.held: ComponentPlan | None = None

    def __call__(self) -> AbstractContextManager[None]:
        if self.hold is None:
            self.hold = self.load()
            if self.held is not None:
                adapt(self.hold, self.held)
        return self.hold()


def adapt(hold: Hold, held: ComponentPlan) -> None:
    """Let other blocks stay, and others wait in host memory, from the next use on, where the network streams."""
    from .mapped import Mapped
    from .streamed import Streamed

    if isinstance(hold, Later):
        hold.held = held
        if hold.hold is not None:
            adapt(hold.hold, held)
    if isinstance(hold, (Mapped, Streamed)) and held.placement == "streamed":
        hold.settle(held.stay, held.mapped)


def release(hold: Hold) -> None:
    """Let go of a network that will not be used again."""
    from .mapped import Mapped
    from .streamed import Streamed

    if isinstance(hold, (Mapped, Streamed)):
        hold.release()
