"""Links without a card: one copies on the host at a limited rate, one only keeps time. Streaming is tested with them."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from .link import Mark
from .tensors import Packed


class SimulatedLink:
    """A device whose memory is the host's, reached at ``rate`` bytes per second by a copier on its own thread.

    Attributes:
        copied: bytes copied so far.
    """

    def __init__(self, rate: float = float("inf")) -> None:
        self.device, self.rate, self.copied = torch.device("cpu"), rate, 0
        self._thread = ThreadPoolExecutor(1, "copier")

    def keep(self, block: Packed) -> None:
        block.pack(torch.empty(block.size, dtype=torch.uint8))

    def copy(self, block: Packed, buffer: Tensor, after: Mark) -> Mark:
        return self._thread.submit(self._copy, block, buffer)

    def _copy(self, block: Packed, buffer: Tensor) -> None:
        start = time.perf_counter()
        with torch.inference_mode():  # buffers are made in it
            block.fill(buffer)
        self.copied += block.size
        time.sleep(max(0.0, block.size / self.rate - (time.perf_counter() - start)))

    def mark(self) -> Mark:
        """Computing on the host has happened when it has been asked for."""

    def wait(self, mark: Mark) -> None:
        if isinstance(mark, Future):
            mark.result()

    def drain(self) -> None:
        self._thread.submit(lambda: None).result()


class VirtualLink:
    """A discrete-event simulation: blocks, which may be on the meta device, are copied in no time while a clock runs.

    Attributes:
        rate: bytes per second.
        now: the computing's clock in seconds; whoever computes adds to it.
        busy: seconds that the link has copied.
    """

    def __init__(self, rate: float) -> None:
        self.device, self.rate = torch.device("meta"), rate
        self.now = self.busy = self._free = 0.0

    def keep(self, block: Packed) -> None:
        pass

    def copy(self, block: Packed, buffer: Tensor, after: Mark) -> Mark:
        seconds = block.size / self.rate
        self._free = max(self._free, after) + seconds
        self.busy += seconds
        return self._free

    def mark(self) -> Mark:
        return self.now

    def wait(self, mark: Mark) -> None:
        self.now = max(self.now, mark)

    def drain(self) -> None:
        pass
