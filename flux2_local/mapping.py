"""Tensors mapped from safetensors files, and the whole rate of the disk for them.

A mapped tensor takes no memory until it is used, and then only what the system can take back at any time; processes share it. But
pages that come when they are first used come one after another, at a fraction of the disk's rate: :func:`fetched` has them read
before. What becomes something else (another type, a quantized layer, a copy on a card) is let go of tensor by tensor, so that
loading never has two whole copies in memory.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
}  # fmt: skip
"""The format's names of types. Source: github.com/huggingface/safetensors, ``bindings/python/py_src/safetensors/torch.py``."""

READERS = 4
"""Threads that read: disks answer several questions at once."""

SLICE = 32 * 2**20
"""Bytes that a thread asks for at once."""

AHEAD = 512 * 2**20
"""Bytes that are read before they are asked for."""

DECODED = 2**22
"""Values that a coded tensor is decoded by."""

POPULATE_READ = 22
"""Linux's ``MADV_POPULATE_READ``, from 5.14 on (include/uapi/asm-generic/mman-common.h); older ones refuse it, which is no harm."""

REGIONS: dict[int, int] = {}
"""Addresses of the files that are mapped: first byte -> one after the last. Weights there are never written to."""

T = TypeVar("T")


def tensors(path: Path, entries: dict[str, Any], start: int) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a safetensors file, in the order in which they lie there.

    Args:
        path: the file.
        entries: its header: name -> dtype, shape, data_offsets.
        start: where offsets count from, in bytes.

    Raises:
        OSError: it cannot be mapped.
        ValueError: the header does not describe tensors that can be read.
    """
    whole = mapped(path)
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = (start + offset for offset in entry["data_offsets"])
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{name} is of the type {entry['dtype']}, which cannot be read here")
        kind, shape = DTYPES[entry["dtype"]], entry["shape"]
        value = torch.empty(shape, dtype=kind, device="meta")
        if value.nbytes != end - begin:
            raise ValueError(f"{name} has {end - begin} bytes where {entry['dtype']} {shape} takes {value.nbytes}")
        if not value.nbytes:
            yield name, torch.empty(shape, dtype=kind)
            continue
        yield name, part(whole, begin, end).view(kind).view(shape)


def part(whole: mmap.mmap, begin: int, end: int) -> Tensor:
    """Some bytes of a mapped file, uint8 [end - begin], whose pages leave when nobody has them any more."""
    view = memoryview(whole)[begin:end]
    weakref.finalize(view, let_go, whole, begin, end).atexit = False
    with warnings.catch_warnings():  # of a buffer that cannot be written to
        warnings.simplefilter("ignore")
        return torch.frombuffer(view, dtype=torch.uint8)


@dataclass(frozen=True)
class Coded:
    """A tensor that its file has in another form. It is decoded when it is asked for, some rows at a time.

    Attributes:
        rows: as the file has them, [N, …], mapped at best.
        shape: of the tensor, whose rows (all but its last dimension) are those of ``rows``.
        decode: some of the rows -> the same in float32.
    """

    rows: Tensor
    shape: tuple[int, ...]
    decode: Callable[[Tensor], Tensor]

    def tensor(self, dtype: torch.dtype | None, device: torch.device | None = None) -> Tensor:
        """All of it, in ``dtype`` (float32 where None) on ``device`` (the host where None)."""
        made = torch.empty(self.shape, dtype=dtype or torch.float32, device=device)
        count = max(1, DECODED // self.shape[-1])
        for there, rows in zip(made.view(-1, self.shape[-1]).split(count), self.rows.split(count), strict=True):
            there.copy_(self.decode(rows).view(there.shape))
        return made


def chunks(value: Tensor | Coded, count: int) -> list[Tensor | Coded]:
    """Equal parts of a matrix's rows, read from where the whole lies."""
    if isinstance(value, Tensor):
        return list(value.chunk(count))
    shape = (value.shape[0] // count, *value.shape[1:])
    return [Coded(rows, shape, value.decode) for rows in value.rows.chunk(count)]


def joined(values: list[Tensor | Coded]) -> Tensor | Coded:
    """The matrix that has these parts' rows, one after the other, copied."""
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat([value for value in values if isinstance(value, Tensor)])
    rows = torch.cat([value.rows for value in values if isinstance(value, Coded)])
    return Coded(rows, (len(values) * first.shape[0], *first.shape[1:]), first.decode)


def made(value: Tensor | Coded, dtype: torch.dtype | None, device: torch.device | None = None) -> Tensor:
    """``value`` in ``dtype`` (as it is, or decoded to float32, where None), on ``device`` (where it is, or the host, where None)."""
    if isinstance(value, Coded):
        return value.tensor(dtype, device)
    return value.to(device=device or value.device, dtype=dtype or value.dtype)


def read_from(value: Tensor | Coded) -> Tensor:
    """The tensor whose bytes are read for ``value``."""
    return value.rows if isinstance(value, Coded) else value


def mapped(path: Path) -> mmap.mmap:
    """A file's bytes, which nobody writes to; where somebody could, that would stay in this process."""
    with path.open("rb") as f:
        if sys.platform == "win32":  # which sets memory aside for all of a file that could be written to
            return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        # Nothing is reserved for pages that could be written to: files may be larger than memory.
        flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
        whole = mmap.mmap(f.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(whole))
    REGIONS[start] = start + len(whole)
    weakref.finalize(whole, REGIONS.pop, start).atexit = False
    return whole


def backed(value: Tensor) -> bool:
    """Whether a plain host tensor lies in a mapped file, from which its pages come again once they were let go of."""
    begin = value.data_ptr()
    return any(start <= begin and begin + value.nbytes <= end for start, end in REGIONS.items())


def release(value: Tensor) -> None:
    """Take a tensor's pages out of this process where they are a file's (:func:`backed`); they come again when they are used."""
    first = -(-value.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (value.data_ptr() + value.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first and backed(value) and (function := advise()) is not None:
        function(first, last - first, mmap.MADV_DONTNEED)


def let_go(whole: mmap.mmap, begin: int, end: int) -> None:
    """Take the pages of a tensor that nobody has any more out of this process; those that it shares with its neighbours stay."""
    first, last = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first and hasattr(mmap, "MADV_DONTNEED"):
        whole.madvise(mmap.MADV_DONTNEED, first, last - first)


@cache
def advise() -> Callable[[int, int, int], int] | None:
    """The system's ``madvise(address, bytes, advice)``, which lets other threads run meanwhile; None but on Linux."""
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return function  # type: ignore[no-any-return]


def populate(address: int, size: int) -> None:
    """Return when bytes of this process are in memory; those that are there already cost next to nothing."""
    first = address // mmap.PAGESIZE * mmap.PAGESIZE
    if (function := advise()) is not None:
        function(first, address + size - first, POPULATE_READ)


def fetched(items: Iterable[T], parts: Callable[[T], Iterable[Tensor]], most: int | None = None) -> Iterator[T]:
    """The same items, each once its tensors are in memory; meanwhile those after it are read.

    Where the system has no way to ask for that, items pass through, and their pages come as they are used.

    Args:
        items: in the order in which they lie on the disk, at best.
        parts: the plain tensors of an item that will be read from end to end; those on a device are passed over.
        most: bytes to read ahead, :data:`AHEAD` where None; one item is read ahead, however large.
    """
    if advise() is None:
        yield from items
        return
    waiting: deque[tuple[T, int, list[Future[None]]]] = deque()
    ahead, most = 0, AHEAD if most is None else most
    with ThreadPoolExecutor(READERS, "disk") as readers:

        def ready() -> T:
            nonlocal ahead
            item, size, reading = waiting.popleft()
            ahead -= size
            for part in reading:
                part.result()
            return item

        for item in items:
            host = [value for value in parts(item) if value.device.type == "cpu" and value.nbytes]
            spans = [(value.data_ptr(), value.nbytes) for value in host]
            del host
            slices = [(a + i, min(SLICE, size - i)) for a, size in spans for i in range(0, size, SLICE)]
            total = sum(size for _, size in spans)
            waiting.append((item, total, [readers.submit(populate, *one) for one in slices]))
            del item  # whoever takes it may be the last to have it
            ahead += total
            while ahead > most and len(waiting) > 1:
                yield ready()
        while waiting:
            yield ready()
