"""torch.compile traces every op in one graph, with shapes and dtypes as they come out, and leaves the results alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flux2_kernels import OPS, Format, Op, choose, place_of
from flux2_kernels.op import Inputs
from flux2_kernels.verify import draw
from torch import Tensor

HERE = place_of("cpu")
ALL = [
    pytest.param(op, form, id=f"{op.name}-{form}") for op in OPS.values() for form in (op.formats[0], op.formats[-1])
]


def flat(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def same(ours: Any, theirs: Any) -> bool:
    pairs = zip(flat(ours), flat(theirs), strict=True)
    return all(a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a.float(), b.float()) for a, b in pairs)


@pytest.mark.parametrize(("op", "form"), ALL)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_traces_in_one_graph(op: Op, form: Format, dynamic: bool, launches: list[Any]) -> None:
    function = choose(op.name, HERE, form, op.cases[0].dims, "triton").function
    inputs = draw(op, op.cases[0], form)
    expected = function(**inputs)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    launches.clear()
    assert same(compiled(**inputs), expected)
    assert launches


@pytest.mark.parametrize("name", ["int_mm"])
@pytest.mark.parametrize("op", ["linear_w8a8", "linear_w8a8_gated"])
def test_library_traces_in_one_graph(op: str, name: str) -> None:
    form, case = Format(torch.bfloat16, torch.int8), OPS[op].cases[1]
    function = choose(op, HERE, form, case.dims, name).function
    inputs = draw(OPS[op], case, form)
    assert same(torch.compile(function, fullgraph=True, backend="aot_eager")(**inputs), function(**inputs))


@pytest.mark.parametrize(("name", "outs"), [("swiglu", ["out"]), ("qk_norm_rope", ["q_out", "k_out"])])
def test_results_in_views_survive_compilation(name: str, outs: list[str]) -> None:
    """The compiler must know which argument an op writes: a block reads the buffer after it."""
    op, form = OPS[name], Format(torch.bfloat16)
    function = choose(name, HERE, form, implementation="triton").function
    inputs = draw(op, op.cases[0], form)

    def block(inputs: Inputs) -> Tensor:
        plain = flat(op.reference(**inputs))[0]
        buffer = plain.new_zeros((len(outs), plain.shape[0], plain.shape[1] + 1, *plain.shape[2:]))
        function(**inputs, **{out: buffer[i, :, 1:] for i, out in enumerate(outs)})
        return buffer * 2

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")(inputs)
    expected = block(inputs)
    assert torch.equal(compiled, expected)
    assert expected[:, :, 1:].any() and not expected[:, :, 0].any()


def test_a_block_of_ops_traces_in_one_graph() -> None:
    """Norm, quantise, matmul, activation, matmul, residual: as a single block runs them."""
    form = Format(torch.bfloat16, torch.int8)
    names = ("modulated_norm_quantized", "linear_w8a8", "swiglu_quantized", "linear_w8a8_gated")
    norm, first, swiglu, last = (choose(name, HERE, form, implementation="triton").function for name in names)
    given = draw(OPS["gated_residual_norm"], OPS["gated_residual_norm"].cases[2], Format(torch.bfloat16))
    x = given["x"][..., :64].contiguous()
    gate, shift, scale = (given[name][..., :64] for name in ("gate", "shift", "scale"))
    weights = [torch.randint(-127, 127, shape, dtype=torch.int8) for shape in ((256, 64), (64, 128))]
    scales = [torch.rand(w.shape[0]) / 1000 for w in weights]

    def block(x: Tensor) -> Tensor:
        packed = first(*norm(x, shift, scale, torch.int8), weights[0], scales[0], torch.bfloat16)
        return last(*swiglu(packed, torch.int8), weights[1], scales[1], gate, x)

    assert torch.equal(torch.compile(block, fullgraph=True, backend="aot_eager")(x), block(x))


@pytest.mark.parametrize(("op", "form"), ALL)
def test_registered_as_torch_wants_it(op: Op, form: Format) -> None:
    """torch's own check: schema against mutation and aliasing, fake kernel against the real one."""
    form = Format(form.dtype, torch.int8) if form.quantized else form  # the check itself cannot compare fp8
    inputs = draw(op, op.cases[0], form)
    choose(op.name, HERE, form, op.cases[0].dims, "triton").function(**inputs)
    overload = getattr(torch.ops.flux2_kernels, op.name).default
    given = tuple(inputs[argument.name] for argument in overload._schema.arguments)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(overload, given, test_utils=tests)
