"""How far outputs are from the exact result, as a share of what their dtype allows: one bound for tests and for a chip.

A dense element may be off by the rounding of its dtype, plus :data:`SUMS` float32 roundoffs (:data:`FP8_SUMS` where fp8 is
multiplied) and the op's ``slack`` at the largest magnitude of its row. An element of a quantized row may be off by half a
step of its format on top of that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .constraint import FP8, Dims, Format
from .op import Case, Inputs, Op
from .quantize_rows import LARGEST, SMALLEST_ROW

SUMS = 32 * 2.0**-24
FP8_SUMS = 2.0**-10  # matrix units keep as few as 14 bits of an fp8 sum
HALF_STEP = 0.501  # half, and the rounding of the division before it


def draw(op: Op, case: Case, form: Format, device: torch.device | str = "cpu", seed: int = 0) -> Inputs:
    """The inputs of a case; the same for the same seed and device."""
    device = torch.device(device)
    return op.inputs(case, form, device, torch.Generator(device).manual_seed(seed))


def exactly(op: Op, inputs: Inputs) -> tuple[Tensor, ...]:
    """The outputs without any rounding but float64's."""
    wide = {
        name: value.double() if isinstance(value, Tensor) and value.dtype not in (torch.int8, FP8) else value
        for name, value in inputs.items()
    }
    return tuple(op.exact(**wide))


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill memory with NaN, or the largest integer, as it is allocated, so that an element never written is seen."""
    memory: Any = torch.utils.deterministic
    fill, deterministic = memory.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn)
        memory.fill_uninitialized_memory = fill


def shares(
    op: Op, form: Format, dims: Dims, inputs: Inputs, outputs: object, implementation: str = "reference"
) -> list[float]:
    """For each output of ``op``, the largest error as a share of its bound: at most 1 is right, NaN never is.

    Args:
        op, form, dims: what was computed.
        inputs: the keyword arguments it was computed from.
        outputs: what the implementation returned: one tensor or a tuple of them.
        implementation: the one whose slack is allowed.
    """
    given = [outputs] if isinstance(outputs, Tensor) else list(outputs)  # type: ignore[call-overload]
    sums = FP8_SUMS if op.cost(dims, form).matmul == FP8 else SUMS
    slack = op.slack + op.implementation(implementation).slack
    noise = sums + slack * torch.finfo(form.dtype).eps / 2
    result = []
    for kind, exact in zip(op.outputs, exactly(op, inputs), strict=True):
        if kind == "dense":
            result.append(_dense(given.pop(0), exact, form.dtype, noise))
        else:
            result.append(_quantized(given.pop(0), given.pop(0), exact, noise))
    if given:
        raise ValueError(f"{op.name} returned {len(given)} tensors too many")
    return result


def _largest(exact: Tensor) -> Tensor:
    """Largest magnitude of each row, NaN left out."""
    return exact.nan_to_num(0, 0, 0).abs().amax(-1, keepdim=True)


def _worst(error: Tensor, bound: Tensor) -> float:
    """The largest share; infinite where an error is NaN."""
    share = error / bound
    return float(torch.where(share.isnan(), torch.inf, share).max()) if share.numel() else 0.0


def _dense(out: Tensor, exact: Tensor, dtype: torch.dtype, noise: float) -> float:
    if out.dtype != dtype or out.shape != exact.shape or not torch.equal(out.isnan(), exact.isnan()):
        return float("inf")
    limits = torch.finfo(dtype)
    bound = limits.eps / 2 * exact.abs() + noise * _largest(exact) + limits.smallest_normal * limits.eps
    error = (out.double() - exact).abs()
    return _worst(error[~exact.isnan()], bound[~exact.isnan()])


def _quantized(values: Tensor, scale: Tensor, exact: Tensor, noise: float) -> float:
    rows = (*exact.shape[:-1], 1)
    if values.shape != exact.shape or scale.shape != rows or scale.dtype != torch.float32:
        return float("inf")
    spoilt = exact.isnan().any(-1, keepdim=True)
    if not torch.equal(scale.isnan(), spoilt):
        return float("inf")
    most, largest = _largest(exact), LARGEST[values.dtype]
    step = most.clamp(min=SMALLEST_ROW) / largest
    noise_here = noise * most + SMALLEST_ROW * 2.0**-20
    rounding = HALF_STEP * step if values.dtype == torch.int8 else exact.abs() * 2.0**-4 + step * 2.0**-10
    error = (values.double() * scale.double() - exact).abs()
    sound = ~spoilt.expand_as(exact)
    of_values = _worst(error[sound], (rounding + noise_here).expand_as(exact)[sound])
    of_scales = _worst((scale.double() - step).abs()[~spoilt] * largest, noise_here[~spoilt])
    return max(of_values, of_scales)
