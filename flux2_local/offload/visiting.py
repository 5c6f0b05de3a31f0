"""What only makes the schedule's table comes to the device when a table is made, and leaves before the first block is called."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..mapping import fetched, release
from ..model.blocks import SCHEDULE, repeated
from .tensors import hang, hung, moved, on_host


class Visitors:
    """The modulations of a transformer, and all that leads to them; nothing of another network.

    Args:
        network: on the host.
        device: where it computes.

    Attributes:
        rest: every other tensor of ``network`` with its place.
    """

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        parts = [getattr(network, name) for name in SCHEDULE if hasattr(network, name)]
        self.device, self._home = device, [entry for part in parts for entry in hung(part)]
        inside = {id(table) for (table, _), _ in self._home}
        self.rest = [entry for entry in hung(network) if id(entry[0][0]) not in inside]
        self._here = False
        self._hooks = []
        if parts:
            self._hooks.append(parts[0].register_forward_pre_hook(self._come))
            self._hooks.append(repeated(network)[0].register_forward_pre_hook(self.leave))

    def _come(self, *_: Any) -> None:
        if not self._here:
            self._here = True
            try:
                for place, value in fetched(self._home, lambda entry: on_host(entry[1])):
                    hang([(place, moved(value, self.device))])
            except BaseException:  # the next use would find some of them here
                self.leave()
                raise

    def leave(self, *_: Any) -> None:
        """Let the network have its own tensors again, and the system what it read of their files."""
        if self._here:
            self._here = False
            hang(self._home)
            for _, value in self._home:
                for leaf in on_host(value):
                    release(leaf)

    def release(self) -> None:
        """Leave the network alone from here on."""
        for hook in self._hooks:
            hook.remove()
