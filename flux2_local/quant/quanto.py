"""optimum-quanto's weight-only formats."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .formats import Format


def empty(shape: torch.Size, form: Format, dtype: torch.dtype) -> Any:
    """quanto's layer without weights."""
    from optimum import quanto

    kind = {"quanto-int8": quanto.qint8, "quanto-int4": quanto.qint4, "quanto-fp8": quanto.qfloat8}[form.name]
    return quanto.QLinear(shape[1], shape[0], bias=False, dtype=dtype, device="cpu", weights=kind)


def quantize(weight: Tensor, form: Format, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A layer for ``weight`` [N, K], any float dtype, that computes in ``dtype``."""
    layer: Any = empty(weight.shape, form, dtype)
    layer.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    layer.freeze()
    frozen: nn.Module = layer
    return frozen


def parts(layer: nn.Module) -> dict[str, Tensor]:
    """The plain tensors inside the layer, for the disk."""
    return {name: value for name, value in layer.state_dict().items() if name.startswith("weight.")}


def restore(
    tensors: dict[str, Tensor], shape: torch.Size, form: Format, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """The layer whose :func:`parts` are ``tensors``; ``shape`` is the dense weight's.

    Raises:
        KeyError, ValueError: a tensor is missing or of another shape or type.
    """
    layer: Any = empty(shape, form, dtype)
    # quanto's int8 product crashes on the unaligned memory of a mapped file: every tensor is copied.
    state = {name: value.clone() for name, value in tensors.items()}
    scales = {name: layer.state_dict()[name] for name in ("input_scale", "output_scale")}
    try:
        layer.load_state_dict({**state, **scales}, assign=True)
    except (RuntimeError, AttributeError) as error:
        raise ValueError(str(error)) from error
    if tuple(layer.weight.shape) != tuple(shape):
        raise ValueError(f"its weight is {list(layer.weight.shape)}")
    frozen: nn.Module = layer
    return frozen
