"""Where results go: into views of larger buffers, past 2^31 elements, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flux2_kernels import OPS, Case, Format, choose, place_of
from flux2_kernels.op import Inputs
from flux2_kernels.tables import imposed, table
from flux2_kernels.verify import draw, shares
from torch import Tensor

HERE = place_of("cpu")
BF16 = Format(torch.bfloat16)


def room(like: Tensor) -> tuple[Tensor, Tensor]:
    """A buffer of NaN and a view into it of the shape of ``like`` with other rows and columns around it."""
    shape = [like.shape[0], like.shape[1] + 2, *like.shape[2:-1], like.shape[-1] + 24]
    buffer = torch.full(shape, torch.nan, dtype=like.dtype)
    return buffer, buffer[:, 1:-1, ..., 8:-16]


@pytest.mark.parametrize(
    ("name", "outs", "form"),
    [
        ("swiglu", ["out"], BF16),
        ("qk_norm_rope", ["q_out", "k_out"], BF16),
    ],
)
@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_out_is_written_and_nothing_around_it(name: str, outs: list[str], form: Format, implementation: str) -> None:
    op = OPS[name]
    for case in op.cases:
        function = choose(name, HERE, form, case.dims, implementation).function
        inputs = draw(op, case, form)
        plain = function(**inputs)
        rooms = [room(part) for part in ([plain] if isinstance(plain, Tensor) else plain)]
        views = dict(zip(outs, (view for _, view in rooms), strict=True))
        given = function(**inputs, **views)
        assert all(a is b for a, b in zip([given] if len(outs) == 1 else given, views.values(), strict=True))
        assert max(shares(op, form, case.dims, inputs, given)) <= 1
        for buffer, view in rooms:
            assert buffer.isnan().sum() == buffer.numel() - view.numel()


def test_text_and_image_land_in_one_sequence() -> None:
    """Both streams of a double block, each with its own weight, into one buffer without a copy."""
    op = OPS["qk_norm_rope"]
    text, image = (
        draw(op, Case("", {"batch": 2, "tokens": t, "heads": 3, "head_dim": 32}, True), BF16) for t in (2, 5)
    )
    q, k = (torch.full((2, 7, 3, 32), torch.nan, dtype=torch.bfloat16) for _ in range(2))
    function = choose(op.name, HERE, BF16, implementation="triton").function
    function(**text, q_out=q[:, :2], k_out=k[:, :2])
    function(**image, q_out=q[:, 2:], k_out=k[:, 2:])
    for buffer, *parts in zip((q, k), op.reference(**text), op.reference(**image), strict=True):
        assert torch.equal(buffer, torch.cat(parts, 1))


FAR = 2**31 + 64  # elements; untouched pages of so large a buffer take no memory


def spread(x: Tensor) -> Tensor:
    """The same numbers with the second picture more than 2^31 elements after the first."""
    far = torch.empty(FAR + x[0].numel(), dtype=x.dtype).as_strided(x.shape, (FAR, *x[0].contiguous().stride()))
    far.copy_(x)
    return far


def spread_inputs(inputs: Inputs, *names: str) -> Inputs:
    return {name: spread(value) if name in names else value for name, value in inputs.items()}


@pytest.mark.parametrize(
    ("name", "form", "far"),
    [
        ("modulated_norm", BF16, ["x"]),
        ("gated_residual", BF16, ["x", "y"]),
        ("gated_residual_norm", BF16, ["x", "y"]),
        ("qk_norm_rope", BF16, ["q", "k"]),
        ("swiglu", BF16, ["x"]),
        ("swiglu_quantized", Format(torch.bfloat16, torch.int8), ["x", "left"]),
        ("quantize_rows", Format(torch.bfloat16, torch.int8), ["x"]),
        ("linear_w8a8_gated", Format(torch.bfloat16, torch.int8), ["residual"]),
    ],
)
def test_offsets_past_32_bits(name: str, form: Format, far: list[str]) -> None:
    op, case = OPS[name], Case("", {**OPS[name].cases[0].dims, "batch": 2})
    inputs = draw(op, case, form)
    outputs = choose(name, HERE, form, case.dims, "triton").function(**spread_inputs(inputs, *far))
    assert max(shares(op, form, case.dims, inputs, outputs)) <= 1


def test_results_past_32_bits() -> None:
    op, case = OPS["swiglu"], Case("", {**OPS["swiglu"].cases[0].dims, "batch": 2})
    inputs = draw(op, case, BF16)
    function = choose(op.name, HERE, BF16, case.dims, "triton").function
    near = function(**inputs)
    assert torch.equal(function(**inputs, out=spread(torch.zeros_like(near))), near)


def test_matmul_rows_past_32_bits() -> None:
    op, form = OPS["linear_w8a8"], Format(torch.bfloat16, torch.int8)
    case = Case("", {"batch": 1, "tokens": 600, "n": 16, "k": 16})
    inputs = draw(op, case, form)
    x = torch.empty(600 * 2**22, dtype=torch.int8).as_strided((1, 600, 16), (600 * 2**22, 2**22, 1))
    x.copy_(inputs["x"])
    outputs = choose(op.name, HERE, form, case.dims, "triton").function(**{**inputs, "x": x})
    assert max(shares(op, form, case.dims, inputs, outputs)) <= 1


@pytest.mark.parametrize(
    ("start", "width"), [(0, 96), (8, 96), (0, 72)], ids=["aligned", "first row", "every other row"]
)
@pytest.mark.parametrize("name", ["linear_w8a8", "linear_w8a8_gated"])
def test_rows_that_a_descriptor_cannot_hold(name: str, start: int, width: int, launches: list[Any]) -> None:
    """Descriptors want rows that start at multiples of 16 bytes; a view of others is copied."""
    op, form = OPS[name], Format(torch.bfloat16, torch.int8)
    case = Case("", {"batch": 1, "tokens": 20, "n": 40, "k": 64})
    inputs = draw(op, case, form)
    inputs["x"] = torch.zeros(1, 20, width, dtype=torch.int8)[..., start : start + 64].copy_(inputs["x"])
    with imposed("linear_w8a8_int8", {**table(90)["configs"]["linear_w8a8_int8"][-1], "BLOCK_K": 64}):
        outputs = choose(name, HERE, form, case.dims, "triton").function(**inputs)
    assert max(shares(op, form, case.dims, inputs, outputs)) <= 1
    (launch,) = launches
    assert (launch.args["x"].base.data_ptr() == inputs["x"].data_ptr()) == (start == 0 and width == 96)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("modulated_norm", {"shift": torch.zeros(2, 1, 100)}, "shift must be"),
    ("modulated_norm", {"x": torch.zeros(1, 5, 200)[..., ::2]}, "contiguous in its last dimension"),
    ("modulated_norm", {"x": torch.zeros(5, 100)}, r"x must be \[B, T, D\]"),
    ("gated_residual", {"y": torch.zeros(1, 4, 100)}, "one shape"),
    ("qk_norm_rope", {"cos": torch.zeros(4, 8)}, "cos must be"),
    ("qk_norm_rope", {"q_out": torch.zeros(1, 5, 3, 16)}, "both q_out and k_out"),
    ("qk_norm_rope", {"k_weight": torch.ones(8)}, "weight must be"),
    ("swiglu", {"x": torch.zeros(1, 5, 99)}, r"x must be \[B, T, 2M\]"),
    ("swiglu", {"out": torch.zeros(1, 5, 99)}, "out must be"),
    ("swiglu_quantized", {"left": torch.zeros(1, 4, 36, dtype=torch.bfloat16)}, r"left must be .* the rows of x"),
    ("swiglu_quantized", {"left": torch.zeros(1, 5, dtype=torch.bfloat16)}, r"left must be \[B, T, L\]"),
    ("swiglu_quantized", {"left": torch.zeros(1, 5, 36)}, "left must be .* in torch.bfloat16"),
    ("swiglu_quantized", {"dtype": torch.float8_e5m2}, "not to torch.float8_e5m2"),
    ("modulated_norm_quantized", {"dtype": torch.int16}, "not to torch.int16"),
    ("gated_residual_norm_quantized", {"dtype": torch.uint8}, "not to torch.uint8"),
    ("quantize_rows", {"dtype": torch.float16}, "int8 or torch.float8_e4m3fn, not to torch.float16"),
    ("quantize_rows", {"hadamard": 48}, "hadamard must be"),
    ("quantize_rows", {"hadamard": 16}, "does not divide"),
    ("linear_w8a8", {"w": torch.zeros(40, 96, dtype=torch.int8)}, "w takes 96"),
    ("linear_w8a8", {"w_scale": torch.ones(39)}, "w_scale must be"),
    ("linear_w8a8", {"x_scale": torch.ones(1, 19)}, "x_scale must be"),
    ("linear_w8a8", {"x": torch.empty(1, dtype=torch.int8).expand(2, 19, 80)}, "contiguous in its last dimension"),
    (
        "linear_w8a8",
        {"x": torch.empty(2**25, dtype=torch.int8).as_strided((1, 3, 80), (0, 2**23, 1))},
        "at most 4194304",
    ),
    ("linear_w8a8", {"x": torch.zeros(1, 19, 80), "w": torch.zeros(40, 80)}, "x must be torch.int8 or"),
    ("linear_w8a8_gated", {"gate": torch.zeros(1, 1, 41)}, "gate must be"),
    ("linear_w4a16", {"w_scale": torch.ones(40, 6)}, "w_scale must be"),
    ("linear_w4a16", {"x": torch.zeros(1, 3, 194), "w": torch.zeros(40, 97, dtype=torch.int8)}, "w_scale must be"),
    ("linear_w4a16", {"x": torch.zeros(1, 19, 192)}, "x must be torch.bfloat16 or torch.float16, not torch.float32"),
    ("linear_w4a16", {"x": torch.zeros(1, 19, 192, dtype=torch.int8)}, "x must be .* not torch.int8"),
    ("linear_w4a16", {"w": torch.zeros(48, 96, dtype=torch.uint8)}, "w must be packed pairs in int8"),
    ("linear_w4a8", {"x": torch.zeros(1, 19, 192)}, "x must be torch.int8, not torch.float32"),
    ("linear_w4a8", {"x": torch.zeros(1, 19, 96, dtype=torch.int8)}, "w takes 192"),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSED)
def test_wrong_shapes_are_refused(name: str, change: dict[str, Any], message: str) -> None:
    op, form = OPS[name], OPS[name].formats[0]
    inputs = {**draw(op, op.cases[0], form), **change}
    with pytest.raises(ValueError, match=message):
        choose(name, HERE, form, op.cases[0].dims, "triton").function(**inputs)
