"""Which implementation of an op to use: asked once, when a model is loaded, never per call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from . import gated_residual, linear_w4, linear_w8a8, modulated_norm, qk_norm_rope, quantize_rows, swiglu
from .constraint import Dims, Format, Place, place_of
from .op import Function, Op
from .tables import order_of

OPS: Mapping[str, Op] = {
    op.name: op
    for module in (modulated_norm, gated_residual, qk_norm_rope, swiglu, quantize_rows, linear_w8a8, linear_w4)
    for op in module.OPS
}


class KernelUnavailable(RuntimeError):
    """The implementation that was asked for cannot run here; the message holds each implementation's reason."""


@dataclass(frozen=True)
class Choice:
    """A resolved op.

    Attributes:
        op: the op's name.
        implementation: the name of the implementation chosen.
        function: call this.
        rejected: name -> reason, of the implementations that were more wanted and cannot run here.
    """

    op: str
    implementation: str
    function: Function
    rejected: Mapping[str, str] = field(default_factory=dict)


def reasons(name: str, place: Place, form: Format, dims: Dims | None = None) -> dict[str, str | None]:
    """For each implementation of op ``name``, most wanted first: why it cannot run at ``place``, or None if it can."""
    op = _op(name)
    wanted = order_of(place.sm, name, form, [i.name for i in op.implementations])
    return {i: op.implementation(i).constraint.reason_against(place, form, dims or {}) for i in wanted}


def choose(
    name: str,
    device: torch.device | str | Place,
    form: Format | torch.dtype,
    dims: Dims | None = None,
    implementation: str = "auto",
) -> Choice:
    """Resolve op ``name`` for a device and a problem.

    Args:
        name: a key of :data:`OPS`.
        device: where it will run.
        form: the activations' dtype and, for ops with quantized rows, theirs; a bare dtype stands for no quantization.
        dims: the dimensions that are known, by the names of the op's cases (``width``, ``head_dim``, ``n``, ``k`` …).
        implementation: "auto" takes the first that can run, in the order kept for that SM; a name takes that one or fails.

    Raises:
        KernelUnavailable: the implementation named cannot run here, or none can.
        KeyError: no such op or implementation.
    """
    form = form if isinstance(form, Format) else Format(form)
    place = device if isinstance(device, Place) else place_of(device)
    op, why = _op(name), reasons(name, place, form, dims)
    if implementation == "auto":
        usable = next((i for i, reason in why.items() if reason is None), None)
    else:
        usable = op.implementation(implementation).name if why.get(implementation) is None else None
        op.implementation(implementation)
    if usable is None:
        raise KernelUnavailable(_message(name, implementation, why))
    rejected = {}
    for i, reason in why.items():
        if i == usable:
            break
        if reason is not None:
            rejected[i] = reason
    return Choice(name, usable, op.implementation(usable).load(), rejected)


def _op(name: str) -> Op:
    if name not in OPS:
        raise KeyError(f"no op {name!r}; there are: {', '.join(OPS)}")
    return OPS[name]


def _message(name: str, wanted: str, why: Mapping[str, str | None]) -> str:
    lines = [f"  {i}: {reason or 'can run; name it or ask for auto'}" for i, reason in why.items()]
    asked = "no implementation" if wanted == "auto" else f"implementation {wanted!r}"
    verb = "can run" if wanted == "auto" else "cannot run"
    return "\n".join([f"{asked} of {name} {verb} here:", *lines])
