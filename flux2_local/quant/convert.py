"""A network with dense weights -> the same network with quantized ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from .. import mapping, weights
from ..mapping import Coded
from ..offload import resident
from .formats import Format
from .recipe import Recipe

Merged = Callable[[str, Tensor], Tensor]
"""(layer's name, its weight as stored) -> the weight with its adapters, in float32 where there are any."""


class Backend(Protocol):
    """What each backend's module offers; see :mod:`flux2_local.quant.builtin` for the terms."""

    def quantize(self, weight: Tensor, form: Format, dtype: torch.dtype, device: torch.device) -> nn.Module: ...

    def parts(self, layer: nn.Module) -> dict[str, Tensor]: ...

    def restore(
        self, tensors: dict[str, Tensor], shape: torch.Size, form: Format, dtype: torch.dtype, device: torch.device
    ) -> nn.Module: ...


def backend(form: Format) -> Backend:
    """The module that implements a format, imported now."""
    return cast(Backend, import_module(f".{form.backend}", __package__))


def as_stored(name: str, weight: Tensor) -> Tensor:
    """Without adapters."""
    return weight


READ_AHEAD = 128 * 2**20
"""Bytes read before they are asked for: quantizing takes longer than reading, and what waits is memory."""


@dataclass(frozen=True)
class Coming:
    """Weights on their way into a network.

    Attributes:
        tensors: under the network's names, read as they are asked for.
        home: where what is made of them goes; it stays on the host where None.
    """

    tensors: weights.Tensors
    home: torch.device | None = None


@torch.no_grad()
def convert(
    network: nn.Module,
    recipe: Recipe,
    dtype: torch.dtype,
    device: torch.device,
    merged: Merged = as_stored,
    coming: Coming | None = None,
) -> tuple[str, ...]:
    """Quantize ``network`` in place, a tensor at a time, so that at most one layer is there in both forms.

    Adapters come first: what is quantized is the merged weight in full precision, never a rounding of it.

    Args:
        network: with its weights as stored, or on the meta device where they are ``coming``.
        recipe: which layers become what.
        dtype: of everything that is not quantized, and of activations.
        device: where it will run.
        merged: gives a layer's weight with adapters.
        coming: weights that are not in the network yet.

    Returns:
        The names of the quantized layers.
    """
    coming = coming or Coming(own(network))
    layers = frozenset(recipe.layers(network))
    quantize = backend(recipe.form).quantize

    def read(one: tuple[str, Tensor | Coded]) -> list[Tensor]:
        name, value = one
        stays = isinstance(value, Tensor) and value.dtype == dtype and name.removesuffix(".weight") not in layers
        return [] if stays else [mapping.read_from(value)]

    for name, value in mapping.fetched(coming.tensors, read, READ_AHEAD):
        layer = name.removesuffix(".weight")
        weight = mapping.made(value, None)
        del value
        if layer != name and weight.ndim == 2:
            weight = merged(layer, weight)
        if layer in layers:
            quantized = quantize(weight, recipe.form, dtype, device)
            if coming.home is not None:
                resident.hold(quantized, coming.home)
            network.set_submodule(layer, quantized)
        elif weight.is_floating_point() and weight.dtype != dtype:
            weights.assign(network, name, mapping.made(weight, dtype, coming.home))
        else:
            weights.assign(network, name, weight)
        del weight
    return tuple(sorted(layers))


def own(network: nn.Module) -> weights.Tensors:
    """A network's tensors, each let go of when it is given."""
    waiting = [(name, value.detach()) for name, value in (*network.named_parameters(), *network.named_buffers())][::-1]
    return (waiting.pop() for _ in range(len(waiting)))
