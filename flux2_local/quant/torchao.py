"""torchao's formats: the layer stays an ``nn.Linear`` whose weight is a tensor that unpacks or multiplies itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .formats import Format


def config(form: Format) -> Any:
    """torchao's own name for the format, as an instance."""
    from torchao import quantization as ao

    made: dict[str, Callable[[], Any]] = {
        "torchao-int8-dynamic": ao.Int8DynamicActivationInt8WeightConfig,
        "torchao-int8": ao.Int8WeightOnlyConfig,
        "torchao-fp8": ao.Float8WeightOnlyConfig,
        "torchao-fp8-dynamic": lambda: ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow()),
        # The default packing needs the package mslk.
        "torchao-int4": lambda: ao.Int4WeightOnlyConfig(group_size=form.group, int4_packing_format="tile_packed_to_4d"),
    }
    return made[form.name]()


def quantize(weight: Tensor, form: Format, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A layer for ``weight`` [N, K], any float dtype, that computes in ``dtype``."""
    from torchao.quantization import quantize_

    packs_on_card = form.backend == "torchao" and bool(form.not_kept)
    layer = dense(weight.to(device if packs_on_card else weight.device, dtype))
    quantize_(layer, config(form))
    layer.weight.requires_grad_(False)
    return layer.to(weight.device)


def dense(weight: Tensor) -> nn.Linear:
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def parts(layer: nn.Module) -> dict[str, Tensor]:
    """The plain tensors inside the layer's weight, for the disk."""
    assert isinstance(layer, nn.Linear)
    weight: Any = layer.weight
    names, _ = weight.__tensor_flatten__()
    return {name: getattr(weight, name) for name in names}


def restore(
    tensors: dict[str, Tensor], shape: torch.Size, form: Format, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """The layer whose :func:`parts` are ``tensors``; ``shape`` is the dense weight's.

    What torchao keeps besides tensors (block sizes, how activations are quantized) comes from quantizing zeros anew.

    Raises:
        KeyError, ValueError: a tensor is missing or of another shape or type.
    """
    template = quantize(torch.zeros(16, shape[1]), form, dtype, device)
    weight: Any = template.weight
    names, facts = weight.__tensor_flatten__()
    for name in names:
        like, got = getattr(weight, name), tensors[name]
        if (
            got.dtype != like.dtype
            or got.shape[1:] != like.shape[1:]
            or got.shape[:1] not in ((shape[0],), like.shape[:1])
        ):
            raise ValueError(f"{name} is {got.dtype} {list(got.shape)}")
    made = type(weight).__tensor_unflatten__({name: tensors[name] for name in names}, facts, None, None)
    return dense(made)
