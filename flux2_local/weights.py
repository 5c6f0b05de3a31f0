"""Reading weight files into modules made on the meta device; :mod:`flux2_local.single` reads those that have names of their own.

Only safetensors and GGUF are ever opened; what could run code when it is read is refused by name.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import mapping
from .errors import Flux2Error, PickleRefusedError, WeightsDamagedError
from .files import reason
from .mapping import Coded

if TYPE_CHECKING:
    from collections.abc import Callable

HEADER = 2**20
"""Bytes left for the header of a file that grows; some thousands of tensors' names."""

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
FETCH_AGAIN = "Fetch it again (`flux2-local download` repairs a model that it knows)."

Tensors = Iterator[tuple[str, Tensor | Coded]]
"""Names and values, each made when it is asked for."""


def refuse_pickle(path: Path) -> None:
    """Raise PickleRefusedError where ``path`` is named like a pickle."""
    if path.suffix.lower() in PICKLES:
        raise PickleRefusedError(
            f"{path.name} is a pickle file, which can run any code when it is loaded; flux2-local never opens one. Use the "
            f"model's .safetensors or .gguf file."
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model folder.

    Raises:
        WeightsDamagedError: missing, unreadable or not an object.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsDamagedError(f"{path} cannot be read: {reason(error)}. {FETCH_AGAIN}") from error
    if not isinstance(value, dict):
        raise WeightsDamagedError(f"{path} does not hold a JSON object. {FETCH_AGAIN}")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of one component's folder: those its index names, or all of them.

    Raises:
        WeightsDamagedError: a file that the index names is missing, or there is none.
        PickleRefusedError: the folder holds only pickles.
    """
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        names = sorted(set(read_json(indexes[0]).get("weight_map", {}).values()))
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            raise WeightsDamagedError(f"{folder} lacks {', '.join(missing)}, which its index names. {FETCH_AGAIN}")
        return [folder / name for name in names]
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        for path in sorted(folder.glob("*")):
            refuse_pickle(path)
        raise WeightsDamagedError(f"There is no .safetensors file in {folder}. {FETCH_AGAIN}")
    return found


def header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: tensor name -> dtype, shape, data_offsets. Checks the file's length against it.

    Raises:
        WeightsDamagedError: not a safetensors file, or shorter than its header says.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            if size < 8:
                raise ValueError(f"it has {size} bytes")
            (length,) = struct.unpack("<Q", f.read(8))
            if not 2 <= length <= min(size - 8, 100 * 2**20):
                raise ValueError("its header length makes no sense")
            entries = json.loads(f.read(length))
        entries.pop("__metadata__", None)
        end = max((e["data_offsets"][1] for e in entries.values()), default=0)
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError) as error:
        raise WeightsDamagedError(
            f"{path} is not a readable safetensors file: {reason(error)}. {FETCH_AGAIN}"
        ) from error
    if 8 + length + end != size:
        raise WeightsDamagedError(
            f"{path} is damaged: its header describes {8 + length + end} bytes and it has {size}. {FETCH_AGAIN}"
        )
    return entries


@cache
def stored(folder: Path) -> str:
    """The type of the matrices in a component's first file, by torch's name; "" where there are several, or no file that can be
    read, which loading will say."""
    try:
        entries = header(weight_files(folder)[0]).values()
        types = {mapping.DTYPES[entry["dtype"]] for entry in entries if len(entry["shape"]) > 1}
    except (Flux2Error, KeyError, TypeError):
        return ""
    return str(types.pop()).removeprefix("torch.") if len(types) == 1 else ""


def read_files(paths: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of some safetensors files, mapped from the disk rather than copied, in the order in which they lie there."""
    for path in paths:
        entries = header(path)
        try:
            end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
            yield from mapping.tensors(path, entries, path.stat().st_size - end)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise WeightsDamagedError(f"{path} cannot be read: {reason(error)}. {FETCH_AGAIN}") from error


def entry(value: Tensor, begin: int) -> dict[str, Any]:
    """What a safetensors header says of a tensor whose bytes begin at ``begin``."""
    kind = next(name for name, dtype in mapping.DTYPES.items() if dtype == value.dtype)
    return {"dtype": kind, "shape": list(value.shape), "data_offsets": [begin, begin + value.nbytes]}


def content(value: Tensor) -> memoryview:
    """A tensor's bytes, on the host."""
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_file(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, at most one tensor at a time on the host beside those that are there.

    Args:
        path: of the file.
        tensors: contiguous, on any device; the widest types come first, so that each is aligned.
        metadata: to go with them.

    Raises:
        OSError: it cannot be written.
    """
    order = sorted(tensors.items(), key=lambda one: (-one[1].element_size(), one[0]))
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, value in order:
        entries[name] = entry(value, end)
        end += value.nbytes
    head = json.dumps(entries, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as f:
        f.write(struct.pack("<Q", len(head)) + head)
        for _, value in order:
            f.write(content(value))


@contextmanager
def growing(path: Path, metadata: dict[str, str]) -> Iterator[Callable[[str, Tensor], None]]:
    """Write a safetensors file a tensor at a time: gives what takes each by name. The header comes last, into room left for it.

    Args:
        path: of the file, which is whole when the context is left.
        metadata: to go with the tensors.

    Raises:
        OSError: it cannot be written.
        ValueError: a tensor would leave the next one unaligned, or the header is too long.
    """
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    with path.open("wb") as f:
        f.seek(8 + HEADER)

        def add(name: str, value: Tensor) -> None:
            nonlocal end
            if value.nbytes % 8:
                raise ValueError(f"{name} has {value.nbytes} bytes")
            entries[name] = entry(value, end)
            end += value.nbytes
            f.write(content(value))

        yield add
        head = json.dumps(entries, separators=(",", ":")).encode()
        if len(head) > HEADER:
            raise ValueError(f"its header would have {len(head)} bytes")
        f.seek(0)
        f.write(struct.pack("<Q", HEADER) + head.ljust(HEADER))


def fitting(
    module: nn.Module, tensors: Tensors, source: str, rename: Callable[[str], str | None] | None = None
) -> Tensors:
    """Those of a checkpoint's tensors that belong into a module, under the module's names.

    Args:
        module: on the meta device.
        tensors: the checkpoint; names that the module has not are passed over.
        source: what to call the checkpoint in errors.
        rename: checkpoint name -> module name, or None to pass over.

    Raises:
        WeightsDamagedError: a tensor has another shape or, in the end, is missing.
    """
    wanted = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, value in tensors:
        target = rename(name) if rename else name
        if target is None or target not in wanted:
            continue
        expected = wanted.pop(target)
        if tuple(expected.shape) != tuple(value.shape):
            raise WeightsDamagedError(
                f"{source}: {name} has shape {list(value.shape)} where the architecture has {list(expected.shape)}. The file "
                f"belongs to another model, or its config.json does."
            )
        yield target, value
        del value  # whoever has taken it may let go of it before the next comes
    if wanted:
        some = ", ".join(sorted(wanted)[:3])
        raise WeightsDamagedError(
            f"{source} lacks {len(wanted)} tensors ({some}…). The download is incomplete. {FETCH_AGAIN}"
        )


def fill(
    module: nn.Module,
    tensors: Tensors,
    *,
    dtype: torch.dtype | None,
    keep_dtype: tuple[str, ...] = (),
    device: torch.device | None = None,
) -> None:
    """Give a module on the meta device its weights, one after the other.

    Args:
        module: parameters and buffers are replaced, not copied into.
        tensors: of :func:`fitting`.
        dtype: floating-point tensors are converted to it; None leaves them as stored (coded ones become float32).
        keep_dtype: names that start so keep their own type.
        device: where what is converted goes; the host where None.
    """

    def stays(target: str, value: Tensor) -> bool:
        own = target.startswith(keep_dtype or ("\0",))
        return dtype in (None, value.dtype) or not value.is_floating_point() or own

    def read(one: tuple[str, Tensor | Coded]) -> list[Tensor]:
        target, value = one
        return [] if isinstance(value, Tensor) and stays(target, value) else [mapping.read_from(value)]

    for target, value in mapping.fetched(tensors, read):
        same = isinstance(value, Tensor) and stays(target, value)
        assign(module, target, mapping.made(value, None if same else dtype, None if same else device))
        del value


def assign(module: nn.Module, name: str, value: Tensor) -> None:
    """Set a parameter or buffer by its dotted name."""
    *path, leaf = name.split(".")
    for part in path:
        module = getattr(module, part)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[leaf] = value
