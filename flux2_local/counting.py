"""Counting what operations allocate, on the meta device, and remembering the counts."""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import flux2_kernels
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from .errors import OutputError
from .files import cache_folder, write
from .offload.tensors import hung

Count = TypeVar("Count", bound=Callable[..., int])


def remembered(count: Count) -> Count:
    """Keep what ``count`` returns on disk. For what runs on the meta device torch imports its compiler, which takes longer than
    a small picture; a process that asks for nothing new need not."""

    @cache
    def known(*arguments: Any) -> int:
        path, key = counts_file(), f"{count.__name__}{arguments!r}"
        table = read_counts(path)
        if key not in table:
            value = count(*arguments)
            # Read again: another process may have counted meanwhile.
            with suppress(OutputError):
                write(path, json.dumps({**read_counts(path), key: value}).encode())
            return value
        return table[key]

    return known  # type: ignore[return-value]


@cache
def counts_file() -> Path:
    """Counts made by this version of torch and of the code that they follow from."""
    here = Path(__file__).parent
    sources = sorted(
        p for name in ("*.py", "attention/*.py", "model/*.py", "offload/*.py", "quant/*.py") for p in here.glob(name)
    )
    sources += sorted(p for name in ("*.py", "gpu/*.py") for p in Path(flux2_kernels.__file__).parent.glob(name))
    digest = hashlib.sha256(torch.__version__.encode())
    for source in sources:
        digest.update(source.read_bytes())
    return cache_folder("counts") / f"{digest.hexdigest()[:16]}.json"


def read_counts(path: Path) -> dict[str, int]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class Peak(TorchDispatchMode):
    """Counts the bytes of tensors that operations make, while they live.

    Attributes:
        now, peak: bytes alive, and the most that were at once.
    """

    def __init__(self, known: nn.Module | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._live = {value.untyped_storage()._cdata for _, value in ([] if known is None else hung(known))}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: torch would import its compiler for it, which takes a second."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return tree_map_only(Tensor, self._seen, func(*args, **(kwargs or {})))

    def _seen(self, value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage._cdata not in self._live:
            self._live.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return value

    def _gone(self, key: int, size: int) -> None:
        self._live.discard(key)
        self.now -= size


class Workspaces(TorchFunctionMode):
    """What kernels allocate beside their results and the meta device does not show.

    Fused attention gives [B, H, T, d] in the layout of [B, T, H, d] and allocates the logarithms of its sums, a mask of booleans in
    q's type, and on a CPU each thread's scores. A CPU's convolutions of contiguous pictures work in a layout of their own, to which
    the picture is copied and from which the result is; a card's work channels-last, and group norms give contiguous pictures there.
    Where a CPU's library has no convolutions of a type, torch writes out every value once for each place of the kernel that it is
    under, and multiplies matrices. Source: ``slow_conv2d_forward_out_cpu`` in ``aten/src/ATen/native/ConvolutionMM2d.cpp``. Attention
    that is widened has what it is given and its result in float32 beside.

    Args:
        threads: of a CPU; 0 on a card.
        copying: whether convolutions copy their pictures so.
        unfolding: whether they write them out so, which is instead.
        widened: whether attention is (:func:`flux2_local.hardware.widens_attention`).
    """

    def __init__(self, threads: int, copying: bool, unfolding: bool = False, widened: bool = False) -> None:
        super().__init__()
        self.threads, self.copying, self.unfolding, self.widened = threads, copying, unfolding, widened

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q, k, v = args[:3]
            return self.attention(q, k, v, kwargs.get("attn_mask"))
        result = func(*args, **kwargs)
        if func is F.conv2d and self.unfolding:
            weight = args[1]
            if weight[0, 0].numel() > 1:
                torch.empty(result.numel() // len(weight) * weight[0].numel(), dtype=result.dtype)
        elif func is F.conv2d and self.copying:
            torch.empty(max(args[0].nbytes, result.nbytes), dtype=torch.uint8)
        return result

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        wide = torch.float32 if self.widened else q.dtype
        beside = [] if mask is None else [torch.empty(mask.shape, dtype=wide)]
        beside += [torch.empty(x.shape, dtype=wide) for x in (q, k, v, q) if self.widened]
        beside.append(torch.empty(q.shape[:-1], dtype=torch.float32))
        beside.append(torch.empty(self.threads * scores_of_a_thread(q), dtype=torch.uint8))
        result = torch.empty_like(q.transpose(1, 2)).transpose(1, 2)
        del beside
        return result


def scores_of_a_thread(q: Tensor) -> int:
    """Bytes that a thread of torch's fused attention on a CPU works in. Source: the block sizes of ``cpu_flash_attention`` in
    ``aten/src/ATen/native/cpu/FlashAttentionKernel.cpp``."""
    rows, columns = next(size for least, size in ((768, 256), (192, 64), (0, 32)) if q.shape[2] >= least), 512
    reduced = 0 if q.dtype == torch.float32 else rows * columns * q.element_size()
    return 4 * rows * (columns + 2 + q.shape[3]) + reduced
