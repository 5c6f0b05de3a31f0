"""The roofline table: by hand for one op, and the script as a person starts it."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from flux2_kernels import OPS, Cost, Format
from flux2_kernels.constraint import FP8
from flux2_kernels.rates import rates_of

SCRIPT = Path(__file__).parents[2] / "scripts" / "roofline.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=120)


def test_the_longer_of_moving_and_multiplying() -> None:
    rates = rates_of(90, bf16=800e12, memory=4e12)
    assert rates.seconds(Cost(4_000_000, 1)) == pytest.approx(1e-6)
    assert rates.seconds(Cost(4_000_000, 1_600_000_000, torch.bfloat16)) == pytest.approx(2e-6)
    assert rates.seconds(Cost(4_000_000, 1_600_000_000, FP8)) == pytest.approx(1e-6)
    assert rates.bound(Cost(1, 10**9, torch.int8)) == "matmul" and rates.bound(Cost(10**9, 1, torch.int8)) == "memory"
    assert rates_of(86, 71e12, 9e11).seconds(Cost(1, 1, FP8)) is None, "no fp8 before SM 89"


def test_every_op_at_dev_and_klein_shapes_for_every_card() -> None:
    ran = run("--csv")
    assert ran.returncode == 0, ran.stderr
    head, *rows = csv.reader(io.StringIO(ran.stdout))
    assert head[:5] == ["op", "shape", "format", "MB", "Gop"] and {"h200 us", "rtx-4090 us", "rtx-3060 us"} <= set(head)
    assert {row[0] for row in rows} == set(OPS)
    for name in OPS:
        shapes = " ".join(row[1] for row in rows if row[0] == name)
        assert "dev" in shapes and "klein" in shapes
    by_hand = OPS["modulated_norm"].cost({"batch": 1, "tokens": 4608, "width": 6144}, Format(torch.bfloat16)).bytes
    row = next(row for row in rows if row[:3] == ["modulated_norm", "dev", "bfloat16"])
    assert row[head.index("h200 us")] == f"{by_hand / 4800e9 * 1e6:.1f} mem"


def test_one_device_and_an_unknown_one() -> None:
    assert "h200" not in run("--device", "rtx-4090").stdout
    wrong = run("--device", "rtx-9999")
    assert wrong.returncode == 2 and "rtx-4090" in wrong.stderr
