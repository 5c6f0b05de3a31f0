"""Streamed: some blocks stay on the device, the others come through a ring of buffers while those before them compute.

Both sides wait only for what they need: a copy until the block that was in its buffer is computed, a block until its copy has
ended. The ring goes on over the end of a step, so that the next step's first blocks are there when it begins. Blocks that stay
come with the first step. In between two uses nothing is on the device.

A block's home is host memory or, where that is short, the files that it was loaded from, of which the next ones are read ahead.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..model.blocks import repeated
from .link import Link, Mark
from .tensors import Packed, hang, hung, moved
from .visiting import Visitors

RING = 2
"""Buffers: one is computed from while the other is filled."""

READ_AHEAD = 2
"""Blocks that are read from their files before they are sent for."""

HOSTED = "embed_tokens"
"""A table of which a call reads a few rows: it stays on the host, and the rows travel."""


class Streamed:
    """A network that streams; calling it gives the context to use it in (:data:`flux2_local.offload.Hold`).

    Args:
        network: on the host, its weights final. Its blocks must be called one after another; running some of them again from the
            first on, as step caching does, is allowed.
        link: the way to the device.
        stay: numbers of the blocks that stay while the network is in use, in the order that they are called.
        mapped: numbers of the blocks that are left to their files; the others are pinned in host memory.
    """

    def __init__(self, network: nn.Module, link: Link, stay: Iterable[int] = (), mapped: Iterable[int] = ()) -> None:
        modules = repeated(network)
        self.link, self.stay = link, frozenset(stay)
        self.blocks = [Packed(module) for module in modules]
        inside = {id(table) for block in self.blocks for (table, _), _ in block.home}
        self._visitors = Visitors(network, link.device)
        hosted = getattr(network, HOSTED, None)
        inside |= {id(table) for (table, _), _ in ([] if hosted is None else hung(hosted))}
        self._rest = [entry for entry in self._visitors.rest if id(entry[0][0]) not in inside]
        self.mapped = frozenset(range(len(self.blocks)))
        self.settle(stay, mapped)
        self._hooks = []
        for number, module in enumerate(modules):
            self._hooks.append(module.register_forward_pre_hook(partial(self._before, number)))
            self._hooks.append(module.register_forward_hook(partial(self._after, number)))
        if hosted is not None:
            self._hooks.append(hosted.register_forward_pre_hook(lambda _, args: tuple(a.cpu() for a in args)))
            self._hooks.append(hosted.register_forward_hook(lambda _, __, rows: rows.to(self.link.device)))
        self._active = False
        self._places: dict[int, Tensor] = {}
        self._here: dict[int, tuple[Tensor, Mark]] = {}
        self._ring: deque[tuple[Tensor, Mark]] = deque()
        self._upcoming: int | None = None
        self._coming: set[int] = set()

    def settle(self, stay: Iterable[int], mapped: Iterable[int]) -> None:
        """Let other blocks stay on the device, and others have their homes in host memory, from the next use on. A block that was
        not mapped from files when it was pinned remains so."""
        self.stay, mapped = frozenset(stay), frozenset(mapped)
        left = {n for n in mapped - self.mapped if self.blocks[n].unpack()}
        for number in sorted(self.mapped - mapped):
            self.link.pin(self.blocks[number])
        self.mapped = (self.mapped & mapped) | left

    def __call__(self) -> AbstractContextManager[None]:
        return self._held()

    def release(self) -> None:
        """Leave the network alone from here on, so that it, and its host buffers with it, go when nobody has it any more."""
        self._visitors.release()
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def _held(self) -> Iterator[None]:
        streamed = [block.size for number, block in enumerate(self.blocks) if number not in self.stay]
        try:
            for place, value in self._rest:
                hang([(place, moved(value, self.link.device))])
            ring = [self._buffer(max(streamed)) for _ in range(min(RING, len(streamed)))]
            self._ring.extend((buffer, self.link.mark()) for buffer in ring)
            self._active, self._upcoming = True, 0
            yield
        finally:
            self._active = False
            self.link.drain()
            for block in self.blocks:
                block.forget()
            self._visitors.leave()
            hang(self._rest)
            self._here.clear()
            self._places.clear()
            self._ring.clear()
            self._coming.clear()
            if self.link.device.type == "cuda":
                torch.cuda.empty_cache()

    def _buffer(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.link.device)

    def _for_those_that_stay(self) -> dict[int, Tensor]:
        """Their places in one buffer, taken at once: among the first step's activations they would lie scattered, with gaps between
        them that nothing fits in."""
        sizes = {number: self.blocks[number].size for number in sorted(self.stay)}
        buffer = self._buffer(sum(sizes.values()))
        return dict(zip(sizes, buffer.split(list(sizes.values())), strict=True))

    def _before(self, number: int, *_: Any) -> None:
        if not self._active:
            return
        if number not in self._here:
            self._restart(number)
        buffer, arrived = self._here[number]
        self.link.wait(arrived)
        self.blocks[number].use(buffer)

    def _after(self, number: int, *_: Any) -> None:
        if self._active and number not in self.stay:
            buffer, _ = self._here.pop(number)
            self.blocks[number].leave()
            self._ring.append((buffer, self.link.mark()))
            self._ahead()

    def _ahead(self) -> None:
        """Send for the next blocks, as far as there is room for them."""
        while self._upcoming is not None and (self._upcoming in self.stay or self._ring):
            number, block = self._upcoming, self.blocks[self._upcoming]
            buffer, free = (self._places[number], self.link.mark()) if number in self.stay else self._ring.popleft()
            self._here[number] = buffer, self.link.copy(block, buffer, free)
            self._coming.discard(number)
            self._upcoming = self._following(number)
            self._read_ahead()

    def _read_ahead(self) -> None:
        """Have the files of the next mapped blocks read, :data:`READ_AHEAD` of them."""
        number, found = self._upcoming, 0
        for _ in self.blocks if self.mapped else ():
            if number is None or found == READ_AHEAD:
                return
            if number in self.mapped:
                found += 1
                if number not in self._coming:
                    self._coming.add(number)
                    self.link.read(self.blocks[number])
            number = self._following(number)

    def _following(self, number: int) -> int | None:
        """The next block that is still to be sent for: every one that streams, and those that stay the first time."""
        count = len(self.blocks)
        turn = ((number + i) % count for i in range(1, count + 1))
        return next((n for n in turn if n not in self.stay or n not in self._here), None)

    def _restart(self, number: int) -> None:
        """Begin the ring at ``number``, at the first block or because those that were sent for are not wanted yet.

        A buffer that is still being filled is safe to be filled again, since copies run one after another.
        """
        for other in [n for n in self._here if n not in self.stay]:
            self._ring.append((self._here.pop(other)[0], self.link.mark()))
        if self.stay and not self._places:
            self._places = self._for_those_that_stay()
        self._upcoming = number
        self._ahead()
