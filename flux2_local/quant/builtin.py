"""Our own formats over :mod:`flux2_kernels`: int8 or fp8 rows times int8 or fp8 weights, and int4 weights.

W8A8: a scale per row of activations, found at every call, and one per output channel of weights; ``y = (q(x) · q(w)ᵀ) · s_x ·
s_w``. With a rotation, blocks of input channels of both are multiplied with an orthonormal Hadamard matrix first, which
spreads outliers and leaves the product as it was (QuaRot, arXiv 2404.00456). int4: a scale per 128 input channels of
weights, activations as they are or, in builtin-int4-int8, int8 with a scale per row.

On a CPU int8 goes through ``torch._int_mm`` (oneDNN's int8 instructions); what neither it nor a kernel covers is plain torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from flux2_kernels import Format as Kinds
from flux2_kernels import Place, choose, linear_w4, place_of, quantize_rows
from torch import Tensor, nn

from ..model.ops import Input, Quantizer, Rows
from .formats import Format

LEAST_ROTATION = 16

PART = 2**20
"""Weights that are quantized at once."""

VALUES = {"builtin-int8": torch.int8, "builtin-fp8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Arithmetic:
    """How one layer multiplies, resolved for its device when it is made.

    Attributes:
        quantizer: of the rows; None leaves them as they are.
        product: the matching product of :mod:`flux2_kernels.linear_w8a8` or :mod:`flux2_kernels.linear_w4`.
        dtype: of the results.
    """

    quantizer: Quantizer | None
    product: Callable[..., Tensor]
    dtype: torch.dtype


class QuantizedLinear(nn.Module):
    """A linear layer without bias on quantized weights.

    Args:
        weight: int8 or float8_e4m3fn [N, K], or packed int4 pairs [N, K / 2] in int8.
        scale: float32 [N], or [N, K / group] for int4.
        arithmetic: of the device that the layer will run on.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, scale: Tensor, arithmetic: Arithmetic) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.arithmetic = arithmetic

    @property
    def quantizer(self) -> Quantizer | None:
        """What makes the quantized rows that :meth:`forward` takes; None if it takes none."""
        return self.arithmetic.quantizer

    def forward(self, x: Input) -> Tensor:
        """[B, T, K] or [T, K], any float dtype, or what :attr:`quantizer` makes of it -> the same with N channels."""
        if isinstance(x, Rows):
            return self.arithmetic.product(*x, self.weight, self.scale, self.arithmetic.dtype)
        rows = x if x.ndim == 3 else x[None]
        if self.quantizer is None:
            # Of more than one batch, text's and image's parts of attention's answer are not evenly spaced.
            y = self.arithmetic.product(rows.contiguous(), self.weight, self.scale)
        else:
            y = self.arithmetic.product(*self.quantizer(rows), self.weight, self.scale, x.dtype)
        return y if x.ndim == 3 else y[0]


def quantize(weight: Tensor, form: Format, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A layer for ``weight`` [N, K], any float dtype; it stays on the weight's device until it is moved.

    Args:
        weight: as the checkpoint and its adapters have it.
        form: one of the builtin formats.
        dtype: of the activations to come.
        device: where the layer will run. A card quantizes, too: the same numbers, but for how a rotation's products round.
    """
    channels = weight.shape[1]
    how = arithmetic(form, channels, weight.shape[0], dtype, device)
    there = device if device.type == "cuda" else weight.device
    if form.group:
        return QuantizedLinear(*by_rows(weight, lambda part: linear_w4.pack(part, form.group), there), how)
    rotation = 0 if how.quantizer is None else how.quantizer.rotation
    values, scale = by_rows(weight, lambda part: quantize_rows.reference(part, values_of(form), rotation), there)
    return QuantizedLinear(values, scale[:, 0].contiguous(), how)


def by_rows(
    weight: Tensor, quantized: Callable[[Tensor], tuple[Tensor, Tensor]], there: torch.device
) -> tuple[Tensor, Tensor]:
    """What ``quantized``, which takes each row by itself, makes of [N, K] on the device ``there``, some rows at a time: it works in
    float32. The result is where the weight is."""
    wholes: tuple[Tensor, ...] = ()
    count = max(1, PART // weight.shape[1])
    for start in range(0, weight.shape[0], count):
        made = quantized(weight[start : start + count].to(there))
        wholes = wholes or tuple(
            torch.empty(weight.shape[0], *one.shape[1:], dtype=one.dtype, device=weight.device) for one in made
        )
        for whole, one in zip(wholes, made, strict=True):
            whole[start : start + count].copy_(one)
    values, scales = wholes
    return values, scales


def parts(layer: nn.Module) -> dict[str, Tensor]:
    """The layer's tensors, for the disk."""
    assert isinstance(layer, QuantizedLinear)
    return {"weight": layer.weight, "scale": layer.scale}


def restore(
    tensors: dict[str, Tensor], shape: torch.Size, form: Format, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """The layer whose :func:`parts` are ``tensors``; ``shape`` is the dense weight's.

    Raises:
        KeyError, ValueError: a tensor is missing or of another shape or type.
    """
    rows, channels = shape
    want = {"weight": (rows, channels), "scale": (rows,)}
    if form.group:
        want = {"weight": (rows, channels // 2), "scale": (rows, channels // form.group)}
    for name, size in want.items():
        kind = torch.float32 if name == "scale" else values_of(form)
        if tuple(tensors[name].shape) != size or tensors[name].dtype != kind:
            raise ValueError(f"{name} is {tensors[name].dtype} {list(tensors[name].shape)}")
    return QuantizedLinear(tensors["weight"], tensors["scale"], arithmetic(form, channels, rows, dtype, device))


def values_of(form: Format) -> torch.dtype:
    """The dtype that weights are stored in; pairs of int4 lie in int8."""
    return torch.int8 if form.group else VALUES[form.name.removesuffix("-rotated")]


def rotation_for(channels: int, largest: int) -> int:
    """The largest block, a power of two up to ``largest``, that divides ``channels``; 0 where 16 does not."""
    block = min(largest, channels & -channels)
    return block if block >= LEAST_ROTATION else 0


def arithmetic(form: Format, channels: int, rows: int, dtype: torch.dtype, device: torch.device | Place) -> Arithmetic:
    """The fastest implementation there is for layers of ``channels`` inputs and ``rows`` outputs on ``device``."""
    place = device if isinstance(device, Place) else place_of(device)
    dims = {"k": channels, "n": rows, "width": channels}
    kinds, rotation = Kinds(dtype, values_of(form)), rotation_for(channels, form.rotation)
    if form.group and not form.rounded:
        if place.device != "cuda" or dtype == torch.float32:
            return Arithmetic(None, linear_w4.reference, dtype)
        choice = choose("linear_w4a16", place, Kinds(dtype), {**dims, "group": form.group})
        return Arithmetic(None, choice.function, dtype)
    function = choose("quantize_rows", place, kinds, {**dims, "hadamard": rotation}).function
    quantizer = Quantizer(values_of(form), rotation, function)
    if form.rounded:
        return Arithmetic(quantizer, choose("linear_w4a8", place, kinds, {**dims, "group": form.group}).function, dtype)
    if place.device == "cpu" and values_of(form) == torch.int8:
        return Arithmetic(quantizer, int8_on_cpu, dtype)
    return Arithmetic(quantizer, choose("linear_w8a8", place, kinds, dims).function, dtype)


def int8_on_cpu(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """As :func:`flux2_kernels.linear_w8a8.reference` for int8, with sums exact in int32."""
    total = torch._int_mm(x.flatten(0, 1), w.t()).float()
    total.mul_(x_scale.flatten(0, 1)).mul_(w_scale)
    return total.to(dtype).unflatten(0, x.shape[:2])
