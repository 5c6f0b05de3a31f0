"""A module's tensors: where they hang, what plain tensors a quantized one is made of, and how they lie in one flat buffer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..mapping import SLICE, backed, fetched, populate, release

ALIGNMENT = 256
"""Of every tensor in a buffer, in bytes: what CUDA's own allocations have."""

Place = tuple[dict[str, Any], str]
"""The table of parameters or buffers that a tensor hangs in, and its name there."""


def hung(module: nn.Module) -> list[tuple[Place, Tensor]]:
    """Every parameter and buffer of ``module`` with its place."""
    return [
        ((cast("dict[str, Any]", table), name), value)
        for part in module.modules()
        for table in (part._parameters, part._buffers)
        for name, value in table.items()
        if value is not None
    ]


def hang(places: Iterable[tuple[Place, Tensor]]) -> None:
    """Put tensors in their places."""
    for (table, name), value in places:
        table[name] = value


def arriving(entries: list[tuple[Place, Tensor]]) -> Iterator[tuple[Place, Tensor]]:
    """``entries`` of :func:`hung` in the order of addresses, which is that of the disk; each once it is in host memory, if it
    belongs there.

    The list is emptied: what has been given and put elsewhere is held no longer.
    """
    waiting = sorted(entries, key=lambda entry: leaves(entry[1])[0].data_ptr(), reverse=True)
    entries.clear()
    return fetched((waiting.pop() for _ in range(len(waiting))), lambda entry: on_host(entry[1]))


def on_host(value: Tensor) -> list[Tensor]:
    """Those of :func:`leaves` that are in host memory."""
    return [leaf for leaf in leaves(value) if leaf.device.type == "cpu"]


def moved(value: Tensor, device: torch.device) -> Tensor:
    """A copy on ``device``. Quantized weights are tensors around tensors, for which setting ``.data`` would not do; these move as they
    are, since their own way of moving may pack them anew, by code that quanto compiles on the spot."""
    return around(value, (leaf.to(device) for leaf in leaves(value)))


def leaves(value: Tensor) -> list[Tensor]:
    """The plain tensors that ``value`` is made of: itself, or those inside a quantized one."""
    if not is_traceable_wrapper_subclass(value):
        return [value.detach()]
    names, _ = value.__tensor_flatten__()
    return [leaf for name in names for leaf in leaves(getattr(value, name))]


def around(value: Tensor, plain: Iterator[Tensor]) -> Tensor:
    """A tensor like ``value`` made of other plain tensors, in the order of :func:`leaves`."""
    if is_traceable_wrapper_subclass(value):
        names, facts = value.__tensor_flatten__()
        inner = {name: around(getattr(value, name), plain) for name in names}
        made = type(value).__tensor_unflatten__(inner, facts, value.shape, value.stride())  # type: ignore[attr-defined]
    else:
        made = next(plain)
    return nn.Parameter(made, requires_grad=False) if isinstance(value, nn.Parameter) else made


class Packed:
    """A module whose tensors can be moved as one flat buffer of bytes.

    Attributes:
        size: bytes of such a buffer.
        host: the flat host buffer that the tensors lie in after :meth:`pack`; None while they lie where loading left them.
        files: the tensors and their places as loading left them, where all are mapped from files and a copy is in ``host``.
    """

    def __init__(self, module: nn.Module) -> None:
        self.home = hung(module)
        self.plain = [leaf for _, value in self.home for leaf in leaves(value)]
        self.offsets, self.size = [], 0
        for leaf in self.plain:
            self.offsets.append(self.size)
            self.size += -(-leaf.nbytes // ALIGNMENT) * ALIGNMENT
        self.host: Tensor | None = None
        self.files: tuple[list[Tensor], list[tuple[Place, Tensor]]] | None = None
        self._built: dict[int, list[tuple[Place, Tensor]]] = {}

    def views(self, buffer: Tensor) -> list[Tensor]:
        """The plain tensors' places in ``buffer``, uint8 [at least size], with their own strides where they are dense."""
        out = []
        for leaf, start in zip(self.plain, self.offsets, strict=True):
            strides = torch.empty_like(leaf, device="meta").stride()
            flat = buffer[start : start + prod(leaf.shape) * leaf.element_size()].view(leaf.dtype)
            out.append(flat.as_strided(leaf.shape, strides, flat.storage_offset()))
        return out

    def fill(self, buffer: Tensor) -> None:
        """Copy the tensors into ``buffer``."""
        pairs: Iterable[tuple[Tensor, Tensor]] = zip(self.views(buffer), self.plain, strict=True)
        for view, leaf in pairs if self.host is not None else fetched(pairs, lambda pair: [pair[1]]):
            view.copy_(leaf)

    def pack(self, host: Tensor) -> None:
        """Move the tensors into ``host``, a flat buffer, and let go of where they were."""
        self.fill(host)
        if all(backed(leaf) for leaf in self.plain):
            self.release()
            self.files = self.plain, self.home
        self.plain = self.views(host)
        inner = iter(self.plain)
        self.home = [(place, around(value, inner)) for place, value in self.home]
        self.host = host
        hang(self.home)

    def unpack(self) -> bool:
        """Give the host buffer up for the files that the tensors came from; whether that could be done."""
        if self.files is None:
            return False
        (self.plain, self.home), self.files, self.host = self.files, None, None
        hang(self.home)
        return True

    def read(self, readers: ThreadPoolExecutor) -> list[Future[None]]:
        """Have ``readers`` bring the files' pages that the tensors are mapped from."""
        spans = [(leaf.data_ptr(), leaf.nbytes) for leaf in self.plain]
        slices = [(start + i, min(SLICE, size - i)) for start, size in spans for i in range(0, size, SLICE)]
        return [readers.submit(populate, *one) for one in slices]

    def release(self) -> None:
        """Let go of the files' pages; those that are used again come again."""
        for leaf in self.plain:
            release(leaf)

    def use(self, buffer: Tensor) -> None:
        """Let the module compute with what lies in ``buffer``."""
        key = buffer.data_ptr()
        if key not in self._built:
            inner = iter(self.views(buffer))
            self._built[key] = [(place, around(value, inner)) for place, value in self.home]
        hang(self._built[key])

    def leave(self) -> None:
        """Let the module have its host tensors again."""
        hang(self.home)

    def forget(self) -> None:
        """Leave, and let go of every buffer that was used."""
        self.leave()
        self._built.clear()
