"""The way from host memory to a CUDA device, beside what the device computes: what :mod:`.streamed` copies blocks with.

A mark is a point in the device's work that other work can wait for. Copies run one after another, in the order of the calls.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor

from ..mapping import READERS
from .tensors import Packed

Mark = Any

STAGES = 2
"""Page-locked buffers that blocks from files go through: one is filled while the other is copied."""


UNPINNED = (
    "The system would not page-lock as much host memory as planned, so that weights come to the card more slowly than predicted. "
    "Free host memory before loading; Windows gives about half of it at most."
)
"""What the user is told about that."""


class Link(Protocol):
    """What streaming needs of a device. Implementations: below, and in tests some without a card."""

    device: torch.device

    def pin(self, block: Packed) -> None:
        """Move ``block`` into host memory that copies to the device are fast from."""

    def read(self, block: Packed) -> None:
        """Begin to read a block that is not pinned from its files: it will be copied soon."""

    def copy(self, block: Packed, buffer: Tensor, after: Mark) -> Mark:
        """Begin to copy ``block`` into ``buffer`` on the device once ``after`` is passed; the mark of its end."""

    def mark(self) -> Mark:
        """The end of what has been asked of the device's computing so far."""

    def wait(self, mark: Mark) -> None:
        """Let what is computed from here on wait for ``mark``."""

    def drain(self) -> None:
        """Return when every copy has ended."""


class CudaLink:
    """Copies are made by a stream of their own.

    Pinned blocks lie in page-locked host memory, each in one piece. The others stay where loading left them, mapped from their
    files; a thread brings each through one of two page-locked buffers, and lets go of the files' pages behind it: what they need of
    the host is two blocks.

    Args:
        device: where copies go.
        tell: called with what the user should know.
    """

    def __init__(self, device: torch.device, tell: Callable[[str], None] = lambda _: None) -> None:
        self.device, self.stream, self._tell = device, torch.cuda.Stream(device), tell
        self._pins = True
        self._stages: deque[tuple[Tensor, Mark]] = deque()
        self._thread, self._readers = ThreadPoolExecutor(1, "weights"), ThreadPoolExecutor(READERS, "disk")
        self._queued = False

    def pin(self, block: Packed) -> None:
        block.pack(self._host_buffer(block.size))

    def _host_buffer(self, size: int) -> Tensor:
        """Uint8 [size], page-locked until the system refuses that; copies from others are slower."""
        buffer = pinned(size, self.device) if self._pins else None
        if buffer is not None:
            return buffer
        if self._pins:
            self._pins = False
            forget_error(self.device)
            self._tell(UNPINNED)
        return torch.empty(size, dtype=torch.uint8)

    def read(self, block: Packed) -> None:
        block.read(self._readers)

    def copy(self, block: Packed, buffer: Tensor, after: Mark) -> Mark:
        # Behind a block that the thread has still to bring every other one waits too: copies end in the order of the calls.
        self._queued = self._queued or block.host is None
        if not self._queued:
            return self._send(block.host, buffer, after)
        return self._thread.submit(self._bring, block, buffer, after)

    def _bring(self, block: Packed, buffer: Tensor, after: Mark) -> Mark:
        if block.host is not None:
            return self._send(block.host, buffer, after)
        stage, sent = self._stages.popleft() if len(self._stages) == STAGES else (None, None)
        if sent is not None:
            sent.synchronize()
        if stage is None or len(stage) < block.size:
            del stage  # before another is there
            stage = self._host_buffer(block.size)
        with torch.inference_mode():
            block.fill(stage)
        block.release()
        sent = self._send(stage[: block.size], buffer, after)
        self._stages.append((stage, sent))
        return sent

    def _send(self, source: Tensor | None, buffer: Tensor, after: Mark) -> Mark:
        assert source is not None
        with torch.inference_mode(), torch.cuda.stream(self.stream):
            self.stream.wait_event(after)
            buffer[: len(source)].copy_(source, non_blocking=True)
            return self.stream.record_event()

    def mark(self) -> Mark:
        return torch.cuda.current_stream(self.device).record_event()

    def wait(self, mark: Mark) -> None:
        torch.cuda.current_stream(self.device).wait_event(mark.result() if isinstance(mark, Future) else mark)

    def drain(self) -> None:
        if self._queued:
            self._thread.submit(lambda: None).result()
        self.stream.synchronize()
        self._queued = False


def pinned(size: int, device: torch.device) -> Tensor | None:
    """A page-locked host buffer for copies to ``device``, uint8 [size]; None where the system refuses one.

    torch's own pinned memory comes in powers of two, up to twice what is needed.
    """
    buffer = torch.empty(size, dtype=torch.uint8)
    if size:
        runtime: Any = torch.cuda.cudart()
        with torch.cuda.device(device):  # CUDA takes some of the first card otherwise, whichever is meant
            if int(runtime.cudaHostRegister(buffer.data_ptr(), size, 0)) != 0:
                return None
        weakref.finalize(buffer.untyped_storage(), unpin, buffer.data_ptr(), device)
    return buffer


def unpin(address: int, device: torch.device) -> None:
    """Give up what :func:`pinned` locked."""
    runtime: Any = torch.cuda.cudart()
    with torch.cuda.device(device):
        runtime.cudaHostUnregister(address)


def forget_error(device: torch.device) -> None:
    """Have CUDA forget the error of a call that torch did not make: it would come out of the next kernel, which has none."""
    with suppress(RuntimeError):
        torch.ones(1, device=device)
        torch.cuda.synchronize(device)
