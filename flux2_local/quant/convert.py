"""A network with dense weights -> the same network with quantized ones."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from .. import mapping, weights
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


@torch.no_grad()
def convert(
    network: nn.Module, recipe: Recipe, dtype: torch.dtype, device: torch.device, merged: Merged = as_stored
) -> tuple[str, ...]:
    """Quantize ``network`` in place, a layer at a time, so that at most one layer is there in both forms.

    Adapters come first: what is quantized is the merged weight in full precision, never a rounding of it.

    Args:
        network: with its weights as stored.
        recipe: which layers become what.
        dtype: of everything that is not quantized, and of activations.
        device: where it will run. Weights stay where they are.
        merged: gives a layer's weight with adapters.

    Returns:
        The names of the quantized layers.
    """
    layers = recipe.layers(network)
    quantize = backend(recipe.form).quantize
    for name, layer in mapping.fetched(layers.items(), lambda one: [one[1].weight.detach()]):
        network.set_submodule(name, quantize(merged(name, layer.weight), recipe.form, dtype, device))
        layer.weight = nn.Parameter(layer.weight.new_empty(0), requires_grad=False)
    inside = tuple(f"{name}." for name in layers)
    for name, value in list(network.named_parameters()) + list(network.named_buffers()):
        if inside and name.startswith(inside):
            continue
        if name.endswith(".weight") and value.ndim == 2:
            value = merged(name.removesuffix(".weight"), value)
        weights.assign(network, name, value.to(dtype) if value.is_floating_point() else value)
    return tuple(layers)
