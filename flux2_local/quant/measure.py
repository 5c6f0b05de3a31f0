"""What quantization does to each layer of a network, on the activations of a real run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .convert import backend
from .recipe import Recipe


@dataclass
class Sums:
    """Squared norms of a layer's outputs and of their errors, over all calls so far."""

    error: float = 0.0
    output: float = 0.0


@torch.no_grad()
def errors(
    network: nn.Module, recipe: Recipe, run: Callable[[], object], dtype: torch.dtype, device: torch.device
) -> dict[str, float]:
    """Relative output error of every layer that ``recipe`` quantizes: ‖q(x) - W x‖ / ‖W x‖ over all calls of a run.

    Each layer sees the activations of the unquantized network, so errors do not add up along it; no activations are stored.

    Args:
        network: with dense weights, on ``device``.
        recipe: what to measure.
        run: does whatever is representative, such as generating a few pictures.
        dtype: of the activations.
        device: where ``network`` is.

    Returns:
        Layer name -> error, the worst first. Layers that the run did not call are left out.
    """
    sums: dict[str, Sums] = {}
    quantize, hooks = backend(recipe.form).quantize, []
    for name, layer in recipe.layers(network).items():
        quantized = quantize(layer.weight, recipe.form, dtype, device)
        hooks.append(layer.register_forward_hook(_compare(quantized.to(device), sums.setdefault(name, Sums()))))
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    found = {name: (s.error / s.output) ** 0.5 for name, s in sums.items() if s.output}
    return dict(sorted(found.items(), key=lambda row: -row[1]))


def _compare(quantized: nn.Module, sums: Sums) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Any]:
    @torch.no_grad()
    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        wanted = output.float()
        sums.error += float((quantized(inputs[0]).float() - wanted).square().sum())
        sums.output += float(wanted.square().sum())

    return hook
