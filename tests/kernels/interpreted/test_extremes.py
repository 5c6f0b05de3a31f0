"""Zeros, one huge row, NaN, float16's limit: what comes out is what float64 says, and a bad row spoils no other."""

from __future__ import annotations

import pytest
import torch
from flux2_kernels import OPS, Format, Op, choose, place_of
from flux2_kernels.op import Inputs
from flux2_kernels.verify import draw, poisoned, shares
from torch import Tensor

HERE = place_of("cpu")
HUGE = {torch.float16: 40.0, torch.bfloat16: 1e12, torch.float32: 1e12}


def first(inputs: Inputs) -> Tensor:
    """The activations, or their scales where they are quantized: what an extreme is put into."""
    return inputs[next(name for name in ("x_scale", "x", "q") if name in inputs)]


def zeros(inputs: Inputs, form: Format) -> None:
    first(inputs).zero_()


def huge_row(inputs: Inputs, form: Format) -> None:
    first(inputs)[0, 1] *= HUGE[form.dtype]


def nan(inputs: Inputs, form: Format) -> None:
    spoil(first(inputs)[0, 1])


def nan_in_the_rest(inputs: Inputs, form: Format) -> None:
    """In every other float input, at one place."""
    for value in inputs.values():
        if isinstance(value, Tensor) and value.is_floating_point() and value is not first(inputs):
            spoil(value)


def spoil(x: Tensor) -> None:
    x[(*(0,) * (x.ndim - 1), -1)] = torch.nan


@pytest.mark.parametrize("change", [zeros, huge_row, nan, nan_in_the_rest], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["triton", "reference"])
@pytest.mark.parametrize(
    ("op", "form"), [pytest.param(op, form, id=f"{op.name}-{form}") for op in OPS.values() for form in op.formats]
)
def test_extremes(op: Op, form: Format, name: str, change: object) -> None:
    case = op.cases[0]
    inputs = draw(op, case, form)
    change(inputs, form)  # type: ignore[operator]
    with poisoned():
        outputs = choose(op.name, HERE, form, case.dims, name).function(**inputs)
    assert max(shares(op, form, case.dims, inputs, outputs)) <= 1


@pytest.mark.parametrize("name", ["triton", "reference"])
def test_float16_sums_saturate(name: str) -> None:
    op, form = OPS["gated_residual_norm"], Format(torch.float16)
    inputs = draw(op, op.cases[0], form)
    inputs["x"][0, 1, :2] = torch.tensor([60000.0, -60000.0])
    inputs["y"][0, 1, :2] = 60000.0
    inputs["gate"][..., :2] = torch.tensor([1.0, -1.0])
    total, norm = choose(op.name, HERE, form, implementation=name).function(**inputs)
    alone = choose("gated_residual", HERE, form, implementation=name).function(inputs["x"], inputs["gate"], inputs["y"])
    assert total[0, 1, :2].tolist() == [65504, -65504] == alone[0, 1, :2].tolist()
    assert norm.isfinite().all()


@pytest.mark.parametrize("quantized", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("name", ["triton", "reference"])
def test_rows_of_zeros_quantize_to_zeros(name: str, quantized: torch.dtype) -> None:
    values, scale = choose("quantize_rows", HERE, Format(torch.bfloat16, quantized), implementation=name).function(
        torch.zeros(1, 2, 64, dtype=torch.bfloat16), quantized
    )
    assert not values.float().any() and scale.gt(0).all() and scale.isfinite().all()


@pytest.mark.parametrize("quantized", [torch.int8, torch.float8_e4m3fn])
def test_triton_and_reference_quantize_alike(quantized: torch.dtype) -> None:
    """Bit for bit where the rows are the same float32 numbers: nothing is lost to another rounding."""
    op, form = OPS["quantize_rows"], Format(torch.float32, quantized)
    for case in op.cases[:4]:
        inputs = draw(op, case, form)
        ours, plain = (
            choose(op.name, HERE, form, implementation=i).function(**inputs) for i in ("triton", "reference")
        )
        assert torch.equal(ours[0].float(), plain[0].float()) and torch.equal(ours[1], plain[1])


def test_no_rows_at_all() -> None:
    for op in OPS.values():
        case = type(op.cases[0])("empty", {**op.cases[0].dims, "tokens": 0})
        form = op.formats[0]
        ours = choose(op.name, HERE, form, case.dims, "triton").function(**draw(op, case, form))
        parts = [ours] if isinstance(ours, Tensor) else ours
        assert all(part.numel() == 0 for part in parts)
