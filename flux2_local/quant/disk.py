"""Quantized once, kept: safetensors in the user's cache folder, read at the disk's speed the next time.

A file's name carries a digest of all that its content follows from: the recipe, the compute type, the source files and the
adapters. Anything else there is stale and never read; what cannot be read is made anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import weights
from ..errors import OutputError, WeightsDamagedError
from ..files import cache_folder, check_folder, reason, replacing
from ..hardware import package
from .convert import Keep, backend
from .recipe import Recipe

LAYOUT = 2
"""Of the kept files; changes when what is in them does."""

SAMPLES, CHUNK = 256, 64 * 2**10
"""A large source file is recognised by its size, its time and this many evenly spaced chunks of this many bytes."""

KEPT_PER_NETWORK = 2
"""Files of one network of one model that may be there, the newest: a model with and without a variant's LoRA."""


def folder() -> Path:
    """Where quantized weights are kept."""
    return cache_folder("quantized")


def fingerprint(path: Path) -> str:
    """What recognises a file without reading tens of gigabytes: a digest of its size, time and evenly spaced chunks.

    Files up to 16 MiB are read whole.

    Raises:
        WeightsDamagedError: it cannot be read.
    """
    try:
        facts = path.stat()
        digest = hashlib.sha256(f"{facts.st_size} {facts.st_mtime_ns}".encode())
        with path.open("rb") as f:
            for start in range(0, facts.st_size, max(CHUNK, facts.st_size // SAMPLES)):
                f.seek(start)
                digest.update(f.read(CHUNK))
    except OSError as error:
        raise WeightsDamagedError(f"{path} cannot be read: {reason(error)}. {weights.FETCH_AGAIN}") from error
    return digest.hexdigest()


def facts(recipe: Recipe, dtype: torch.dtype, sources: list[Path], adapters: list[tuple[Path, float]]) -> str:
    """All that a quantized network's content follows from, as JSON.

    Args:
        recipe, dtype: how it is made.
        sources: the files that its weights come from.
        adapters: files and strengths of the LoRAs merged into it, in order.
    """
    known = {
        "layout": LAYOUT,
        "recipe": recipe.to_dict(),
        "dtype": str(dtype),
        "packages": {name: package(name).version for name, _ in recipe.form.packages},
        "sources": [fingerprint(path) for path in sources],
        "adapters": [[fingerprint(path), strength] for path, strength in adapters],
    }
    return json.dumps(known, sort_keys=True)


@dataclass(frozen=True)
class Kept:
    """One network's place on the disk.

    Attributes:
        stem: what files of this network of this model are called, before their digest.
        recipe: how it is quantized.
        dtype: of everything else in it.
        facts: all that the content follows from.
    """

    stem: str
    recipe: Recipe
    dtype: torch.dtype
    facts: str

    @property
    def path(self) -> Path:
        return folder() / f"{self.stem}-{hashlib.sha256(self.facts.encode()).hexdigest()[:20]}.safetensors"

    def read(self, network: nn.Module, device: torch.device) -> bool:
        """Fill ``network``, whose weights are on the meta device, from the disk.

        Returns:
            Whether it was there and whole. Where not, ``network`` is as it was.
        """
        if self.recipe.form.not_kept or not self.path.exists():
            return False
        try:
            if self._metadata() != self.facts:
                return False
            found = dict(weights.read_files([self.path]))
            made = self._made(network, found, device)
        except (WeightsDamagedError, KeyError, ValueError):
            return False
        with suppress(OSError):
            os.utime(self.path)  # the time of use, by which files go
        for name, value in made.items():
            if isinstance(value, nn.Module):
                network.set_submodule(name, value)
            else:
                weights.assign(network, name, value)
        return True

    def write(self, network: nn.Module, layers: tuple[str, ...]) -> str:
        """Keep a quantized network.

        Args:
            network: as :func:`~flux2_local.quant.convert.convert` left it.
            layers: the names of its quantized layers.

        Returns:
            "", or why it could not be kept; the network works all the same.
        """
        form = self.recipe.form
        if form.not_kept:
            return f"The {form.name} weights are quantized at every loading: {form.not_kept}."
        tensors = self._tensors(network, layers)
        try:
            check_folder(folder(), sum(t.numel() * t.element_size() for t in tensors.values()) + 2**20)
            with replacing(self.path) as part:
                weights.write_file(part, tensors, {"flux2-local": self.facts})
        except OutputError as error:
            return f"The quantized weights could not be kept, and will be made again: {error}"
        self._prune()
        return ""

    def make(self, size: int, convert: Callable[[Keep], object]) -> str:
        """Keep a quantized network as it is made, so that memory never has all of it.

        Args:
            size: its bytes, about.
            convert: makes it, and gives what it is called with every layer and tensor.

        Returns:
            "", or why it could not be kept.
        """
        parts = backend(self.recipe.form).parts
        try:
            check_folder(folder(), size + weights.HEADER)
            with replacing(self.path) as part, weights.growing(part, {"flux2-local": self.facts}) as add:

                def keep(name: str, made: nn.Module | Tensor) -> None:
                    if isinstance(made, Tensor):
                        add(name, made)
                        return
                    for own, value in parts(made).items():
                        add(f"{name}.{own}", value)

                convert(keep)
        except OutputError as error:
            return str(error)
        self._prune()
        return ""

    def _tensors(self, network: nn.Module, layers: tuple[str, ...]) -> dict[str, Tensor]:
        parts = backend(self.recipe.form).parts
        inside = tuple(f"{name}." for name in layers)
        found = {
            name: value
            for name, value in (*network.named_parameters(), *network.named_buffers())
            if not (inside and name.startswith(inside))
        }
        for name in layers:
            found |= {f"{name}.{part}": value for part, value in parts(network.get_submodule(name)).items()}
        return {name: value.detach().contiguous() for name, value in found.items()}

    def _made(
        self, network: nn.Module, found: dict[str, Tensor], device: torch.device
    ) -> dict[str, nn.Module | Tensor]:
        layers, form = self.recipe.layers(network), self.recipe.form
        restore = backend(form).restore
        made: dict[str, nn.Module | Tensor] = {}
        for name, layer in layers.items():
            parts = {k.removeprefix(f"{name}."): v for k, v in found.items() if k.startswith(f"{name}.")}
            made[name] = restore(parts, layer.weight.shape, form, self.dtype, device)
        inside = tuple(f"{name}." for name in layers)
        for name, value in (*network.named_parameters(), *network.named_buffers()):
            if inside and name.startswith(inside):
                continue
            if found[name].shape != value.shape:
                raise ValueError(f"{name} is {list(found[name].shape)}")
            made[name] = found[name]
        return made

    def _metadata(self) -> str:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, "pt") as f:
                return str((f.metadata() or {}).get("flux2-local"))
        except (SafetensorError, OSError) as error:
            raise WeightsDamagedError(str(error)) from error

    def _prune(self) -> None:
        """Delete the files of this network that were not used for longest, beyond :data:`KEPT_PER_NETWORK`."""
        names = re.compile(re.escape(self.stem) + r"-[0-9a-f]{20}\.safetensors")
        mine = [path for path in folder().iterdir() if names.fullmatch(path.name)]
        for path in sorted(mine, key=lambda p: p.stat().st_mtime)[:-KEPT_PER_NETWORK]:
            with suppress(OSError):  # on Windows a file that another process has mapped stays
                path.unlink()
