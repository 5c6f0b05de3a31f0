"""scripts/gpu.py without a card: the whole of it on tiny shapes, and what it says where it cannot run."""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flux2_kernels import OPS, Format, Implementation, Op, Place, tables
from flux2_kernels.bench import checks, report, timing
from flux2_kernels.bench.stock import STOCK
from flux2_kernels.constraint import Constraint
from flux2_kernels.verify import draw
from torch import Tensor

from benchmarks import tiers
from flux2_local import hardware
from scripts import gpu

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "gpu.py"
WITHOUT_CARD = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | WITHOUT_CARD
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=550)


@needs_triton
def test_dry_run_goes_all_the_way(tmp_path: Path) -> None:
    kept = sorted(p.name for p in (ROOT / "benchmarks").rglob("*")) if (ROOT / "benchmarks").exists() else []
    ran = run("--dry-run", "--tune", "--part", "kernels", "--out", str(tmp_path))
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-5000:]
    (table,) = tmp_path.glob("*.csv")
    rows = list(csv.DictReader(table.open()))
    assert {row["op"] for row in rows} == set(OPS)
    for row in rows:
        assert float(row["error"]) <= 1 and float(row["ours_ms"]) > 0 and float(row["gb_per_s"]) > 0
        assert float(row["host_us"]) > 0 and not row["problem"]
        assert float(row["eager_ms"]) > 0 and float(row["inductor_ms"]) > 0
        assert bool(row["cublas_bf16_ms"]) == row["op"].startswith("linear")
    assert {"layer_norm", "addcmul", "int_mm"} <= {row["library"] for row in rows}
    record = json.loads(table.with_suffix(".json").read_text())
    assert record == json.loads(ran.stdout.strip().rpartition("\n")[2])
    assert {"torch", "triton", "commit", "date", "rates", "aims", "tuned"} <= set(record)
    assert record["failed"] == [] and record["checks"] > 100
    tuned = json.loads((tmp_path / record["tuned"]).read_text())
    assert tuned["measured_on"] == "dry run" and tuned["configs"]["linear_w4a8"][0]["BLOCK_M"] > 0
    assert [entry.get("equal") for entry in tuned["configs"]["modulated_norm"]] == [{"size": 4}, None, None, None]
    assert sorted(tuned["order"]["linear_w8a8"]["int8"]) == ["int_mm", "triton"]
    assert (sorted(p.name for p in (ROOT / "benchmarks").rglob("*")) if (ROOT / "benchmarks").exists() else []) == kept


@needs_triton
def test_dry_run_of_the_models_parts(tmp_path: Path) -> None:
    ran = run("--dry-run", "--part", "tiers", "--part", "budgets", "--part", "sanitizer", "--out", str(tmp_path))
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-5000:]
    found = {path.name.partition("-")[0]: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert found["sanitizer"]["sanitizer"] == "not run: dry run"
    assert [row["name"] for row in found["tiers"]["rows"]] == ["diffusers", "none", "high, int8"]
    assert len(found["budgets"]["rows"]) == 2 and not any("error" in row for row in found["budgets"]["rows"])


@needs_triton
def test_dry_run_of_the_steps(tmp_path: Path) -> None:
    ran = run("--dry-run", "--part", "scaling", "--out", str(tmp_path))
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-5000:]
    (kept,) = tmp_path.glob("scaling-*.json")
    assert list(json.loads(kept.read_text())["exponents"]) == ["tokens", "width", "depth"]


@pytest.mark.parametrize(("card", "model"), [("h200", "dev"), ("rtx-4090", "klein-4b"), ("none", None)])
def test_the_models_parts_fit_the_card(
    card: str, model: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    found = replace(hardware.from_preset("rtx-4090"), free=2**33) if model is None else hardware.from_preset(card)
    started: list[tuple[list[str], dict[str, Any]]] = []

    def ended(command: list[str], seconds: float, **how: Any) -> SimpleNamespace:
        started.append((command, how))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(hardware, "probe", lambda _: found)
    monkeypatch.setattr(gpu, "ended", ended)
    monkeypatch.setenv("PYTHONPATH", "/where/packages/are")
    here = gpu.Run((), None, torch.device("cuda:0"), tmp_path, dry=False, budgets=("8GB",))
    assert all(gpu.models(here, part) for part in gpu.MODULES)
    asked = {command[2]: command for command, _ in started}
    if model is None:
        assert list(asked) == ["benchmarks.scaling"] and "tiers left out: klein-4b" in capsys.readouterr().out
        return
    parts = [Path(command[command.index("--out") + 1]).name.rpartition("-20")[0] for command, _ in started]
    assert parts == ["tiers", "budgets", "scaling", "peers", "more-budgets"] == list(gpu.MODULES)
    names = [set(tiers.OURS), None, None, set(tiers.PEERS), None]
    for (command, how), only in zip(started, names, strict=True):
        assert {a for flag, a in pairwise(command) if flag == "--only"} == (only or set())
        wanted = set() if command[2] == "benchmarks.scaling" else {model}
        assert {a for flag, a in pairwise(command) if flag == "--model"} == wanted
        assert ("8GB" in command) == (command[2] == "benchmarks.budgets")
        assert how["env"]["PYTHONPATH"].split(os.pathsep) == [*gpu.PLACES, "/where/packages/are"]


def test_a_part_that_is_run_again_adds_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[Path] = []

    def ended(command: list[str], *_: Any, **__: Any) -> SimpleNamespace:
        places.append(Path(command[command.index("--out") + 1]))
        places[-1].write_text("{}")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(gpu, "ended", ended)
    assert all(gpu.models(dry(tmp_path, OPS["swiglu"]), "tiers") for _ in range(2))
    assert len({*places}) == 2 and {path.parent for path in places} == {tmp_path}


def test_what_takes_too_long_is_interrupted_with_what_it_started(tmp_path: Path, capsys: Any) -> None:
    """A part that waits for a case of its own, as the budgets' does."""
    sign = tmp_path / "case"
    case = f"import pathlib, time; time.sleep(2); pathlib.Path({str(sign)!r}).touch()"
    part = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {case!r}])"
    slow = replace(dry(tmp_path, OPS["swiglu"]), seconds=0.6)
    assert not gpu.apart(slow, "budgets", ["-c", part]) and "ended after 0.01 minutes" in capsys.readouterr().out
    time.sleep(2)
    assert not sign.exists()


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_so() -> None:
    ran = run()
    assert ran.returncode == 1 and "sees no NVIDIA card" in ran.stderr and "--dry-run" in ran.stderr


@needs_triton
def test_an_unknown_op_is_named() -> None:
    ran = run("--dry-run", "--op", "layer_*")
    assert ran.returncode == 1 and "modulated_norm" in ran.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA card")
def test_correct_on_this_card() -> None:
    command = [sys.executable, str(SCRIPT), "--check-only"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=550)
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-5000:]


BF16 = Format(torch.bfloat16)


@pytest.fixture
def norm(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], Op]:
    """An op whose kernel is the function given, which needs no Triton."""

    def made(function: Callable[..., Any]) -> Op:
        anywhere = Constraint((torch.bfloat16,))
        kernel = Implementation("triton", lambda: function, anywhere)
        op = replace(OPS["modulated_norm"], formats=(BF16,), implementations=(kernel,))
        monkeypatch.setitem(OPS, op.name, op)  # type: ignore[arg-type]
        return op

    return made


def dry(folder: Path, op: Op, **changes: bool) -> gpu.Run:
    return gpu.Run((op,), Place("cpu"), torch.device("cpu"), folder, **{"dry": True} | changes)


def wrong_if(wrong: Callable[[Tensor], bool], how: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """The norm, spoilt for some inputs."""

    def function(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        y = OPS["modulated_norm"].reference(x, shift, scale)
        return how(y) if wrong(x) else y

    return function


def fail(_: object) -> Any:
    raise RuntimeError("no kernel image\nfor this card")


def kept(folder: Path) -> tuple[list[dict[str, str]], dict[str, Any]]:
    (table,) = folder.glob("*.csv")
    return list(csv.DictReader(table.open())), json.loads(table.with_suffix(".json").read_text())


def test_only_checking_captures_and_compiles_nothing(
    norm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a caching allocator, as it runs under compute-sanitizer, a graph cannot be captured."""
    for name in ("captured", "traced", "replayed"):
        monkeypatch.setattr(checks, name, fail)
    op = norm(OPS["modulated_norm"].reference)
    done = gpu.check(dry(tmp_path, op, dry=False, check_only=True), op)
    assert [one.case for one in done] == [case.name for case in op.cases] and all(one.passed for one in done)


def test_the_record_names_what_was_sanitized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = dry(tmp_path, OPS["swiglu_quantized"], dry=False)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: name)
    refused = "========= Error: Device not supported. RuntimeError: CUDA error 999. ERROR SUMMARY: 1 error"
    found = "out of bounds ========= ERROR SUMMARY: 3 errors"
    wrong = f"  {gpu.FAILED} a case ========= ERROR SUMMARY: 0 errors"
    for code, text, said in (
        (0, "", "clean: swiglu_quantized"),
        (3, found, f"failed with 3 in swiglu_quantized: {found}"),
        (1, refused, f"not run: it ended with 1: {refused}"),
        (1, "ERROR SUMMARY: 0 errors", "not run: it ended with 1: ERROR SUMMARY: 0 errors"),
        (1, wrong, f"failed with 1 in swiglu_quantized: {wrong}"),
    ):
        ran = subprocess.CompletedProcess([], code, text)
        monkeypatch.setattr(gpu, "ended", lambda *_, ran=ran, **__: ran)
        assert gpu.sanitize(asked) == said
    monkeypatch.setattr(gpu, "ended", lambda *_, **__: None)
    assert gpu.sanitize(asked) == "not run: it was not done after 60 minutes"


@pytest.mark.parametrize("name", ["replayed", "traced"])
def test_an_exception_fails_one_check(name: str, norm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, name, lambda *_: fail(_))
    check = {"replayed": checks.check_graph, "traced": checks.check_compiled}[name]
    one = check(norm(OPS["modulated_norm"].reference), BF16, Place("cpu"), torch.device("cpu"))
    assert not one.passed and one.fault == "RuntimeError: no kernel image for this card"


@pytest.mark.parametrize(
    ("how", "said"), [(lambda y: 1.5 * y, "of its bound"), (fail, "RuntimeError: no kernel image for this card")]
)
def test_a_wrong_result_at_a_models_shape_fails_the_run(how: Any, said: str, norm: Any, tmp_path: Path) -> None:
    """The checks see the first case only; the row of the other one is kept, and so is the row after it."""
    op = norm(wrong_if(lambda x: x.shape[-1] == 6144, how))
    assert not gpu.kernels(dry(tmp_path, op))
    rows, record = kept(tmp_path)
    assert [row["shape"] for row in rows] == ["dev", "klein-4b"] and not rows[1]["problem"]
    assert said in rows[0]["problem"] and rows[0]["error"] and bool(rows[0]["ours_ms"]) == (how is not fail)
    assert record["failed"] == [f"modulated_norm dev bfloat16 triton: {rows[0]['problem']}"]
    assert sum(len(found) for found in (record["aims"]["missed"], record["aims"]["unjudged"])) <= 1


def test_a_failure_while_measuring_is_a_row(norm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "prepared", lambda *_: fail(_))
    assert not gpu.kernels(dry(tmp_path, norm(OPS["modulated_norm"].reference)))
    rows, record = kept(tmp_path)
    assert {row["problem"] for row in rows} == {"RuntimeError: no kernel image for this card"} and len(rows) == 2
    assert {row["ours_ms"] for row in rows} == {""} and len(record["failed"]) == 2


def test_a_rival_that_fails_is_left_out(norm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STOCK, "modulated_norm", lambda **_: fail(_))
    assert gpu.kernels(dry(tmp_path, norm(OPS["modulated_norm"].reference)))
    rows, _ = kept(tmp_path)
    assert not any(row["eager_ms"] or row["inductor_ms"] for row in rows) and all(row["ours_ms"] for row in rows)
    assert [row["library"] for row in rows if row["library_ms"]] == ["layer_norm"], "for the one picture"


def test_results_of_a_graphs_calls_lie_apart() -> None:
    places: list[int] = []

    def function(x: Tensor) -> Tensor:
        places.append((y := x + 1).data_ptr())
        return y

    timing.prepared(function, [{"x": torch.ones(1 << 20)} for _ in range(4)])
    assert len(places) == len(set(places)) == 4


def test_what_is_compared_takes_turns_once_the_card_is_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    ran, now = [], [0.0]

    def run(name: str, seconds: float) -> float:
        ran.append(name)
        now[0] += seconds
        return seconds if now[0] > timing.WARM else 1.0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    took = timing.in_turn({"a": lambda: run("a", 0.001), "b": lambda: run("b", 0.004)}, replays=5)
    assert took == {"a": timing.Times(1.0, 1.0, 1.0), "b": timing.Times(4.0, 4.0, 4.0)}
    assert ran == ["a", "b"] * 15


def test_rows_are_kept_as_they_come(norm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = gpu.line
    monkeypatch.setattr(gpu, "line", lambda row: fail(row) if row.shape == "klein-4b" else line(row))
    assert not gpu.well(dry(tmp_path, norm(OPS["modulated_norm"].reference)), "kernels", alone=True)
    rows, record = kept(tmp_path)
    assert [row["shape"] for row in rows] == ["dev"] and record["checks"] == 2 and record["failed"] == []


def test_checks_are_kept_before_anything_is_measured(
    norm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report.Bench, "rows", lambda *_: fail(_))
    assert not gpu.well(dry(tmp_path, norm(OPS["modulated_norm"].reference)), "kernels", alone=True)
    rows, record = kept(tmp_path)
    assert not rows and record["checks"] == 2


def test_a_part_that_fails_takes_no_other_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels' is in a process of its own then: an illegal access leaves a process without the card."""
    ran: list[str] = []
    options = argparse.Namespace(part=None, op=None, check_only=False)
    monkeypatch.setattr(gpu, "parse", lambda: options)
    monkeypatch.setattr(gpu, "prepare", lambda _: dry(tmp_path, OPS["swiglu"]))
    monkeypatch.setattr(gpu, "kernels", lambda _: ran.append("here") is None)
    monkeypatch.setattr(gpu, "apart", lambda _, part, arguments: ran.append(f"{part} apart") is not None)
    monkeypatch.setattr(gpu, "models", lambda _, part: fail(_) if part == "tiers" else ran.append(part) is None)
    monkeypatch.setattr(gpu, "sanitizer", lambda _: ran.append("sanitizer") is None)
    assert gpu.main() == 1 and ran == ["kernels apart", *gpu.PARTS[2:]]


@needs_triton
def test_only_the_kernels_of_the_ops_asked_for_are_tuned_and_each_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flux2_kernels.bench import tuning

    def entry(tuner: Any, kernel: str, group: Any) -> Any:
        return fail(kernel) if kernel == "linear_w4a8" else {"num_warps": 32}

    monkeypatch.setattr(tuning.Tuner, "entry", entry)
    asked = replace(dry(tmp_path, OPS["linear_w4a8"]), ops=(OPS["modulated_norm"], OPS["linear_w4a8"]))
    with pytest.raises(RuntimeError):
        gpu.tune(asked)
    (file,) = tmp_path.glob("sm_*.json")
    before, after = tables.table(89)["configs"], json.loads(file.read_text())["configs"]
    assert {kernel for kernel in before if after[kernel] != before[kernel]} == {"modulated_norm"}


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_the_stock_form_computes_the_op(op: Op) -> None:
    """In bf16 all along, so it is further from the exact result than a kernel may be."""
    form = next(form for form in op.formats if form.dtype == torch.bfloat16)
    for case in op.cases:
        inputs = draw(op, case, form)
        found, wanted = STOCK[op.name](**inputs), op.reference(**inputs)
        if op.outputs[-1] == "quantized":
            found, wanted = (whole[-2].float() * whole[-1] for whole in (found, wanted))
        for ours, plain in zip(*((x,) if isinstance(x, Tensor) else x for x in (found, wanted)), strict=True):
            assert ours.shape == plain.shape and (ours - plain).float().norm() <= 0.02 * plain.float().norm()
            assert form.quantized is not None or ours.dtype == plain.dtype == torch.bfloat16
