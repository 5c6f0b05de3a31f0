"""The way from host memory to a CUDA device, beside what the device computes: what :mod:`.streamed` copies blocks with.

A mark is a point in the device's work that other work can wait for. Copies run one after another, in the order of the calls.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from .tensors import Packed

Mark = Any


class Link(Protocol):
    """What streaming needs of a device. Implementations: below, and without a card in :mod:`.simulated`."""

    device: torch.device

    def keep(self, block: Packed) -> None:
        """Prepare the host's side of ``block``, once."""

    def copy(self, block: Packed, buffer: Tensor, after: Mark) -> Mark:
        """Begin to copy ``block`` into ``buffer`` on the device once ``after`` is passed; the mark of its end."""

    def mark(self) -> Mark:
        """The end of what has been asked of the device's computing so far."""

    def wait(self, mark: Mark) -> None:
        """Let what is computed from here on wait for ``mark``."""

    def drain(self) -> None:
        """Return when every copy has ended."""


class PinnedLink:
    """Blocks lie in page-locked host memory, each in one piece, and are copied by a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def keep(self, block: Packed) -> None:
        block.pack(pinned(block.size))

    def copy(self, block: Packed, buffer: Tensor, after: Mark) -> Mark:
        assert block.host is not None
        return self._send(block.host, buffer, after)

    def _send(self, source: Tensor, buffer: Tensor, after: Mark) -> Mark:
        with torch.inference_mode(), torch.cuda.stream(self.stream):
            self.stream.wait_event(after)
            buffer[: len(source)].copy_(source, non_blocking=True)
            return self.stream.record_event()

    def mark(self) -> Mark:
        return torch.cuda.current_stream(self.device).record_event()

    def wait(self, mark: Mark) -> None:
        torch.cuda.current_stream(self.device).wait_event(mark)

    def drain(self) -> None:
        self.stream.synchronize()


class MappedLink(PinnedLink):
    """Blocks stay where loading left them, mapped from their files; a thread brings each through one of two pinned buffers.

    For hosts whose memory cannot hold the weights: what they need of it is two blocks.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._largest, self._turn = 0, 0
        self._stages: list[tuple[Tensor, Mark]] = []
        self._thread = ThreadPoolExecutor(1, "weights")

    def keep(self, block: Packed) -> None:
        self._largest = max(self._largest, block.size)

    def copy(self, block: Packed, buffer: Tensor, after: Mark) -> Mark:
        return self._thread.submit(self._through, block, buffer, after)

    def _through(self, block: Packed, buffer: Tensor, after: Mark) -> Mark:
        if not self._stages:
            self._stages = [(pinned(self._largest), None) for _ in range(2)]
        self._turn = 1 - self._turn
        stage, sent = self._stages[self._turn]
        if sent is not None:
            sent.synchronize()
        with torch.inference_mode():
            block.fill(stage)
        sent = self._send(stage[: block.size], buffer, after)
        self._stages[self._turn] = stage, sent
        return sent

    def wait(self, mark: Mark) -> None:
        super().wait(mark.result() if isinstance(mark, Future) else mark)

    def drain(self) -> None:
        self._thread.submit(lambda: None).result()
        super().drain()


def pinned(size: int) -> Tensor:
    """A host buffer, uint8 [size], page-locked where the system allows it; else copies from it are slower.

    torch's own pinned memory comes in powers of two, up to twice what is needed.
    """
    buffer = torch.empty(size, dtype=torch.uint8)
    runtime: Any = torch.cuda.cudart()
    if size and int(runtime.cudaHostRegister(buffer.data_ptr(), size, 0)) == 0:
        release: Callable[[int], Any] = runtime.cudaHostUnregister
        weakref.finalize(buffer.untyped_storage(), release, buffer.data_ptr())
    return buffer
