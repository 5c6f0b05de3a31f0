"""Links without a card: one copies on the host at a limited rate, one only keeps time. Streaming is tested with them."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from flux2_local.offload.link import Mark
from flux2_local.offload.tensors import Packed


class SimulatedLink:
    """A device whose memory is the host's, reached at ``rate`` bytes per second by a copier on its own thread. Files are read at
    ``disk`` bytes per second by another.

    Attributes:
        copied, loaded: bytes copied so far, and bytes of these that came from files.
    """

    def __init__(self, rate: float = float("inf"), disk: float = float("inf")) -> None:
        self.device, self.rate, self.disk = torch.device("cpu"), rate, disk
        self.copied = self.loaded = 0
        self._thread, self._reader = ThreadPoolExecutor(1, "copier"), ThreadPoolExecutor(1, "disk")
        self._reading: dict[int, Future[None]] = {}

    def pin(self, block: Packed) -> None:
        block.pack(torch.empty(block.size, dtype=torch.uint8))

    def read(self, block: Packed) -> None:
        self._reading[id(block)] = self._reader.submit(time.sleep, block.size / self.disk)

    def copy(self, block: Packed, buffer: Tensor, after: Mark) -> Mark:
        if block.host is None and id(block) not in self._reading:
            self.read(block)
        return self._thread.submit(self._copy, block, buffer, self._reading.pop(id(block), None))

    def _copy(self, block: Packed, buffer: Tensor, reading: Future[None] | None) -> None:
        if reading is not None:
            reading.result()
            self.loaded += block.size
        start = time.perf_counter()
        with torch.inference_mode():  # buffers are made in it
            block.fill(buffer)
        block.release()
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
        rate, disk: bytes per second of copying, and of reading files.
        now: the computing's clock in seconds; whoever computes adds to it.
        busy: seconds that the link has copied.
    """

    def __init__(self, rate: float, disk: float = float("inf")) -> None:
        self.device, self.rate, self.disk = torch.device("meta"), rate, disk
        self.now = self.busy = self._free = self._read = 0.0
        self._pinned: set[int] = set()
        self._there: dict[int, float] = {}

    def pin(self, block: Packed) -> None:
        self._pinned.add(id(block))

    def read(self, block: Packed) -> None:
        self._read = max(self._read, self.now) + block.size / self.disk
        self._there[id(block)] = self._read

    def copy(self, block: Packed, buffer: Tensor, after: Mark) -> Mark:
        if id(block) not in self._pinned and id(block) not in self._there:
            self.read(block)
        seconds = block.size / self.rate
        self._free = max(self._free, after, self._there.pop(id(block), 0.0)) + seconds
        self.busy += seconds
        return self._free

    def mark(self) -> Mark:
        return self.now

    def wait(self, mark: Mark) -> None:
        self.now = max(self.now, mark)

    def drain(self) -> None:
        pass
