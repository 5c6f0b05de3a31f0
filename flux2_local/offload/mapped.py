"""Mapped: on a CPU, weights stay in the files that they are mapped from, and are in memory while they are computed with.

A block is read while the one before it computes, and its pages are let go of behind it; where memory is left, the system has them
still the next time. Blocks that stay are let go of when the network has been used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from ..mapping import READERS, release
from ..model.blocks import repeated
from .tensors import Packed, on_host
from .visiting import Visitors


class Mapped:
    """A network that is read from its files as it works; calling it gives the context to use it in
    (:data:`flux2_local.offload.Hold`).

    Args:
        network: as loading left it. What is not mapped from a file stays in memory.
        stay: numbers of the blocks that stay in memory while the network is in use, in the order that they are called.
    """

    def __init__(self, network: nn.Module, stay: Iterable[int] = ()) -> None:
        self.stay = frozenset(stay)
        self.blocks = [Packed(module) for module in repeated(network)]
        self._visitors = Visitors(network, torch.device("cpu"))
        self._readers, self._reading = ThreadPoolExecutor(READERS, "disk"), dict[int, list[Future[None]]]()
        self._hooks = []
        for number, module in enumerate(repeated(network)):
            self._hooks.append(module.register_forward_pre_hook(partial(self._before, number)))
            self._hooks.append(module.register_forward_hook(partial(self._after, number)))

    def settle(self, stay: Iterable[int], mapped: Iterable[int]) -> None:
        """Let other blocks stay from the next use on; every block is mapped."""
        self.stay = frozenset(stay)

    def release(self) -> None:
        """Leave the network alone from here on, so that it goes when nobody has it any more."""
        self._visitors.release()
        for hook in self._hooks:
            hook.remove()

    def __call__(self) -> AbstractContextManager[None]:
        return self._held()

    @contextmanager
    def _held(self) -> Iterator[None]:
        try:
            yield
        finally:
            for reading in self._reading.values():
                for part in reading:
                    part.result()
            self._reading.clear()
            self._visitors.leave()
            for _, value in self._visitors.rest:
                for leaf in on_host(value):
                    release(leaf)

    def _before(self, number: int, *_: Any) -> None:
        for one in (number, (number + 1) % len(self.blocks)):
            if one not in self._reading:
                self._reading[one] = self.blocks[one].read(self._readers)
        for part in self._reading[number]:
            part.result()

    def _after(self, number: int, *_: Any) -> None:
        del self._reading[number]
        if number not in self.stay:
            self.blocks[number].release()
