"""scripts/gpu.py without a card: the whole of it on tiny shapes, and what it says where it cannot run."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flux2_kernels import OPS

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
        assert float(row["eager_ms"]) > 0 and float(row["inductor_ms"]) > 0
        assert bool(row["cublas_bf16_ms"]) == row["op"].startswith("linear")
    assert {"layer_norm", "addcmul", "int_mm"} <= {row["library"] for row in rows}
    record = json.loads(table.with_suffix(".json").read_text())
    assert record == json.loads(ran.stdout.strip().rpartition("\n")[2])
    assert {"torch", "triton", "commit", "date", "sanitizer", "rates", "aims", "tuned"} <= set(record)
    assert record["failed"] == [] and record["checks"] > 100
    tuned = json.loads((tmp_path / record["tuned"]).read_text())
    assert tuned["measured_on"] == "dry run" and tuned["configs"]["linear_w4a8"][0]["BLOCK_M"] > 0
    assert sorted(tuned["order"]["linear_w8a8"]["int8"]) == ["int_mm", "triton"]
    assert (sorted(p.name for p in (ROOT / "benchmarks").rglob("*")) if (ROOT / "benchmarks").exists() else []) == kept


@needs_triton
def test_dry_run_of_the_models_parts(tmp_path: Path) -> None:
    ran = run("--dry-run", "--part", "tiers", "--part", "budgets", "--out", str(tmp_path))
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-5000:]
    found = {path.name.partition("-")[0]: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
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
    card: str, model: str | None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    found = replace(hardware.from_preset("rtx-4090"), free=2**33) if model is None else hardware.from_preset(card)
    commands: list[list[str]] = []

    def started(command: list[str], **_: Any) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(hardware, "probe", lambda _: found)
    monkeypatch.setattr(gpu.subprocess, "run", started)
    here = gpu.Run((), None, torch.device("cuda:0"), Path(), dry=False, tune=False, check_only=False)
    assert all(gpu.models(here, part) for part in gpu.PARTS[1:])
    modules = [command[2] for command in commands]
    if model is None:
        assert modules == ["benchmarks.scaling"] and "tiers left out: klein-4b" in capsys.readouterr().out
    else:
        assert modules == ["benchmarks.tiers", "benchmarks.budgets", "benchmarks.scaling"]
        assert [command[-1] for command in commands] == [model, model, "cuda:0"]


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_so() -> None:
    ran = run()
    assert ran.returncode == 1 and "sees no NVIDIA card" in ran.stderr and "--dry-run" in ran.stderr


@needs_triton
def test_an_unknown_op_is_named() -> None:
    ran = run("--dry-run", "--op", "layer_norm")
    assert ran.returncode == 1 and "modulated_norm" in ran.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA card")
def test_correct_on_this_card() -> None:
    command = [sys.executable, str(SCRIPT), "--check-only"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=550)
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-5000:]
