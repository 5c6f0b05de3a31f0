"""LoRA files -> low-rank updates of the transformer's weights."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from . import mapping, weights
from .errors import WeightsDamagedError

PREFIX = "transformer."
DORA = re.compile(r"lora_magnitude_vector|dora_scale")
"""In the names of what a weight-decomposed adapter (arXiv:2402.09353) has beside its low-rank updates."""


@dataclass(frozen=True)
class Update:
    """``scale · up @ down`` is added to a weight: down [rank, in], up [out, rank]."""

    down: Tensor
    up: Tensor
    scale: float


Adapted = tuple[dict[str, Update], float]
"""An adapter's updates by the hub names of layers, and what they are multiplied by."""


@dataclass(frozen=True)
class Scaling:
    """What a file's updates are scaled by, as PEFT does it.

    Attributes:
        alpha: of every module, None where it is the module's rank.
        patterns: what is matched by a module's name, or by its end after a dot, and alpha there; the first counts.
        rooted: whether alpha is divided by the rank's square root (rank-stabilized LoRA) and not by the rank.
    """

    alpha: float | None
    patterns: tuple[tuple[re.Pattern[str], float], ...]
    rooted: bool

    def of(self, name: str, rank: int) -> float:
        alpha = next((alpha for pattern, alpha in self.patterns if pattern.fullmatch(name)), self.alpha)
        return (rank if alpha is None else alpha) / (rank**0.5 if self.rooted else rank)


@dataclass(frozen=True)
class Lora:
    """A LoRA to apply: its file and the strength it is applied at."""

    path: Path
    strength: float = 1.0


def read(path: Path) -> dict[str, Update]:
    """Read a LoRA file in any layout that diffusers' Flux2 loader reads: hub name of the module -> update.

    Raises:
        PickleRefusedError: not a safetensors file.
        WeightsDamagedError: unreadable, or nothing in it is a LoRA for FLUX.2.
    """
    weights.refuse_pickle(path)
    state = dict(weights.read_files([path]))
    if any(DORA.search(key) for key in state):
        raise WeightsDamagedError(
            f"{path.name} is a DoRA adapter, which is not supported yet; convert it to a plain LoRA."
        )
    scaling = _scaling(path)
    if not all(k.startswith(PREFIX) and k.endswith((".lora_A.weight", ".lora_B.weight")) for k in state):
        state = _convert(path)
    updates = {}
    for key in (k for k in state if k.endswith(".lora_A.weight")):
        stem = key.removesuffix(".lora_A.weight")
        up = state.get(f"{stem}.lora_B.weight")
        if up is None:
            raise WeightsDamagedError(f"{path}: {key} has no lora_B beside it. {weights.FETCH_AGAIN}")
        name = stem.removeprefix(PREFIX)
        updates[name] = Update(state[key], up, scaling.of(name, rank=state[key].shape[0]))
    if not updates:
        raise WeightsDamagedError(
            f"{path.name} holds no LoRA for the FLUX.2 transformer that can be read. Give "
            "one that was made for FLUX.2, in the layout of diffusers, ai-toolkit, Black Forest Labs or Kohya."
        )
    return updates


def _scaling(path: Path) -> Scaling:
    """Of the file's adapter metadata, where it has any."""
    from safetensors import safe_open

    with safe_open(path, "pt") as f:
        text = (f.metadata() or {}).get("lora_adapter_metadata", "{}")
    try:
        facts = {k.removeprefix(PREFIX): v for k, v in json.loads(text).items()}
        patterns = facts.get("alpha_pattern") or {}
        return Scaling(
            alpha=float(facts["lora_alpha"]) if "lora_alpha" in facts else None,
            patterns=tuple((re.compile(rf"(.*\.)?({key})"), float(alpha)) for key, alpha in patterns.items()),
            rooted=bool(facts.get("use_rslora")),
        )
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise WeightsDamagedError(
            f"{path.name} does not say how strong it is: its lora_adapter_metadata cannot be read ({error}). {weights.FETCH_AGAIN}"
        ) from error


def _convert(path: Path) -> dict[str, Tensor]:
    """BFL, ai-toolkit, Kohya and LyCORIS layouts, through diffusers' own converters."""
    from diffusers.loaders.lora_pipeline import Flux2LoraLoaderMixin

    try:
        state: dict[str, Tensor] = Flux2LoraLoaderMixin.lora_state_dict(
            str(path.parent), weight_name=path.name, use_safetensors=True, local_files_only=True
        )
    except Exception as error:
        raise WeightsDamagedError(f"{path.name} is not a LoRA for FLUX.2 that can be read: {error}") from error
    if any(".lokr_" in key for key in state):
        raise WeightsDamagedError(
            f"{path.name} is a LoKr adapter, which is not supported yet; convert it to a plain LoRA."
        )
    return state


def merge(module: nn.Module, adapters: list[Adapted], home: torch.device | None = None) -> None:
    """Add the updates of adapters to a dense module's weights, summed in float32 and rounded once.

    Args:
        module: changed in place; the updates fit (:func:`check`).
        adapters: what is added to it.
        home: where merged weights go; each stays where it was where None.
    """
    names = dict.fromkeys(name for updates, _ in adapters for name in updates)
    layers = ((name, module.get_submodule(name)) for name in names)
    for name, layer in mapping.fetched(layers, lambda one: [one[1].get_parameter("weight").detach()]):
        assert isinstance(layer, nn.Linear)
        merged = added(name, layer.weight, adapters).to(home or layer.weight.device, layer.weight.dtype)
        layer.weight = nn.Parameter(merged, requires_grad=False)


def added(name: str, weight: Tensor, adapters: list[Adapted]) -> Tensor:
    """The weight of layer ``name`` with every adapter's update of it at its strength, summed in float32; ``weight`` itself
    where there is none."""
    for updates, strength in adapters:
        update = updates.get(name)
        if update is not None:
            delta = (update.up.float() @ update.down.float()) * (update.scale * strength)
            weight = weight.float() + delta.to(weight.device)
    return weight


def check(module: nn.Module, updates: dict[str, Update], source: str) -> None:
    """Make sure that updates fit a dense module.

    Raises:
        WeightsDamagedError: an update names a module that is not there or has another shape.
    """
    layers = dict(module.named_modules())
    for name, update in updates.items():
        layer = layers.get(name)
        if not isinstance(layer, nn.Linear) or layer.weight.shape != (update.up.shape[0], update.down.shape[1]):
            raise WeightsDamagedError(
                f"{source} does not fit this model: it changes {name} ({update.up.shape[0]}×{update.down.shape[1]}), which the "
                f"model {'has in another shape' if layer is not None else 'has not'}. It was made for another FLUX.2 family."
            )


def load(source: str | Path) -> Path:
    """The file that a LoRA's name stands for: a path, or "owner/name:file" in the hub's cache.

    Raises:
        WeightsDamagedError: there is no such file here.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    repo, colon, name = str(source).partition(":")
    if colon:
        from .store import cached_file

        found = cached_file(repo, name)
        if found is not None:
            return found
    raise WeightsDamagedError(f"There is no LoRA file {source} here. Give the path of a .safetensors file.")
