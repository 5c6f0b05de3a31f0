"""Every implementation of every op against float64, within the bound that verify.py states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flux2_kernels import OPS, Case, Format, Op, Place, choose, place_of, reasons
from flux2_kernels.tables import config_of, imposed, kept_sms, table
from flux2_kernels.verify import draw, poisoned, shares

HERE = place_of("cpu")


def runs_here(op: Op, case: Case, form: Format) -> list[str]:
    return [name for name, reason in reasons(op.name, HERE, form, case.dims).items() if reason is None]


EVERYTHING = [
    pytest.param(op, case, form, name, id=f"{op.name}-{case.name}-{form}-{name}")
    for op in OPS.values()
    for case in op.cases
    for form in op.formats
    for name in runs_here(op, case, form)
]


@pytest.mark.parametrize(("op", "case", "form", "name"), EVERYTHING)
def test_result_is_exact_but_for_rounding(op: Op, case: Case, form: Format, name: str, launches: list[Any]) -> None:
    choice = choose(op.name, HERE, form, case.dims, name)
    inputs = draw(op, case, form)
    with poisoned():
        outputs = choice.function(**inputs)
    assert max(shares(op, form, case.dims, inputs, outputs, name)) <= 1
    assert bool(launches) == (name != "reference")


def test_every_op_runs_in_triton_in_every_format() -> None:
    seen = {(p.values[0].name, p.values[2]) for p in EVERYTHING if p.values[3] == "triton"}
    assert seen == {(op.name, form) for op in OPS.values() for form in op.formats}
    assert "int_mm" in {p.values[3] for p in EVERYTHING}


def linear_configs() -> list[Any]:
    """The matmuls' distinct kept configurations, of all SMs."""
    kept: dict[str, Any] = {}
    for sm in kept_sms():
        for kernel, entries in table(sm)["configs"].items():
            for entry in entries if kernel.startswith("linear") else ():
                config = {k: v for k, v in entry.items() if k not in ("equal", "at_most")}
                what = "x".join(str(config[k]) for k in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if k in config)
                kept[f"{kernel}-{what}-{'descriptors' if config.get('descriptors') else 'pointers'}"] = (kernel, config)
    return [pytest.param(*value, id=name) for name, value in kept.items()]


@pytest.mark.parametrize(("kernel", "config"), linear_configs())
def test_kept_matmul_configurations(kernel: str, config: dict[str, Any], launches: list[Any]) -> None:
    """With rows, columns and depth that end inside a block of the tile, gated and not."""
    quantized = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "w4a8": torch.int8, "w4a16": None}
    name, _, ending = kernel.rpartition("_")
    names = [name, f"{name}_gated"] if name == "linear_w8a8" else [kernel]
    form = Format(torch.bfloat16, quantized[ending])
    n, k = (272, 384) if "w4" in kernel else (264, 336)
    case = Case("", {"batch": 2, "tokens": 141, "n": n, "k": k, "group": 128})
    for op in map(OPS.__getitem__, names):
        inputs = draw(op, case, form)
        with imposed(kernel, config), poisoned():
            outputs = choose(op.name, HERE, form, case.dims, "triton").function(**inputs)
        assert max(shares(op, form, case.dims, inputs, outputs)) <= 1
    assert {launch.constants["BLOCK_M"] for launch in launches} == {config["BLOCK_M"]}
    assert {"descriptor" in launch.kernel.__name__ for launch in launches} == {bool(config.get("descriptors"))}


@pytest.mark.parametrize("name", ["swiglu", "gated_residual", "swiglu_quantized"])
@pytest.mark.parametrize("block", [32, 512])
def test_rows_longer_than_a_block(name: str, block: int, launches: list[Any]) -> None:
    op, form = OPS[name], OPS[name].formats[0]
    for case in op.cases[:2]:
        inputs = draw(op, case, form)
        with imposed(name, {**config_of(89, name, mlp=1), "BLOCK": block}), poisoned():
            outputs = choose(name, HERE, form, case.dims, "triton").function(**inputs)
        assert max(shares(op, form, case.dims, inputs, outputs)) <= 1
    assert launches


def test_fused_and_separate_calls_agree_bit_for_bit() -> None:
    op, form = OPS["gated_residual_norm"], Format(torch.bfloat16)
    inputs = draw(op, op.cases[1], form)
    total, norm = choose(op.name, HERE, form).function(**inputs)
    alone = choose("gated_residual", HERE, form).function(inputs["x"], inputs["gate"], inputs["y"])
    assert torch.equal(total, alone)
    assert torch.equal(norm, choose("modulated_norm", HERE, form).function(alone, inputs["shift"], inputs["scale"]))


def test_scaled_mm_gets_its_arguments_as_it_wants_them(monkeypatch: pytest.MonkeyPatch, launches: list[Any]) -> None:
    """The library's fp8 matmul needs a card; what is put around it does not."""

    def scaled_mm(a: Any, b: Any, scale_a: Any, scale_b: Any, out_dtype: Any, use_fast_accum: bool) -> Any:
        assert a.is_contiguous() and b.t().is_contiguous() and use_fast_accum
        assert scale_a.shape == (a.shape[0], 1) and scale_b.shape == (1, b.shape[1])
        return ((a.double() @ b.double()) * scale_a * scale_b).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    form, card = Format(torch.bfloat16, torch.float8_e4m3fn), Place("cuda", 90, triton=True)
    for op in (OPS["linear_w8a8"], OPS["linear_w8a8_gated"]):
        choice = choose(op.name, card, form, op.cases[2].dims, "scaled_mm")
        inputs = draw(op, op.cases[2], form)
        assert max(shares(op, form, op.cases[2].dims, inputs, choice.function(**inputs), "scaled_mm")) <= 1
    assert len(launches) == 1, "the gate and the residual"
