"""The roofline table: by hand for one op, and the script as a person starts it."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from flux2_kernels import OPS, Cost, Format
from flux2_kernels.constraint import FP8
from flux2_kernels.rates import Rates
from flux2_kernels.shapes import MODELS

SCRIPT = Path(__file__).parents[2] / "scripts" / "roofline.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=120)


def test_the_longer_of_moving_and_multiplying() -> None:
    rates = Rates(4e12, {torch.bfloat16: 800e12, torch.int8: 1600e12, FP8: 1600e12})
    assert rates.seconds(Cost(4_000_000, 1)) == pytest.approx(1e-6)
    assert rates.seconds(Cost(4_000_000, 1_600_000_000, torch.bfloat16)) == pytest.approx(2e-6)
    assert rates.seconds(Cost(4_000_000, 1_600_000_000, FP8)) == pytest.approx(1e-6)
    assert rates.bound(Cost(1, 10**9, torch.int8)) == "matmul" and rates.bound(Cost(10**9, 1, torch.int8)) == "memory"
    assert Rates(9e11, {torch.bfloat16: 71e12}).seconds(Cost(1, 1, FP8)) is None, "no rate, no product"


def test_every_op_at_every_models_shapes_for_every_device() -> None:
    ran = run("--csv")
    assert ran.returncode == 0, ran.stderr
    head, *rows = csv.reader(io.StringIO(ran.stdout))
    named = tomllib.loads((SCRIPT.parents[1] / "configs" / "devices.toml").read_text("utf-8"))
    assert head == ["op", "shape", "format", "MB", "Gop", *(f"{name} us" for name in named)]
    assert {row[0] for row in rows} == set(OPS)
    for name in OPS:
        shapes = " ".join(row[1] for row in rows if row[0] == name)
        assert all(model in shapes for model in MODELS)
    by_hand = OPS["modulated_norm"].cost({"batch": 1, "tokens": 4608, "width": 6144}, Format(torch.bfloat16)).bytes
    row = next(row for row in rows if row[:3] == ["modulated_norm", "dev", "bfloat16"])
    for name in ("h200", "apple-m3-max", "cpu-8"):
        assert row[head.index(f"{name} us")] == f"{by_hand / (named[name]['memory_gbs'] * 1e9) * 1e6:.1f} mem"
    single_in = 2 * 4608 * 6144 * 55296  # on an RTX 4090 in int8 6771 us, at 660.6 TOP/s of which 70 % are reached
    for name, form, rate in (
        ("rtx-4090", "bfloat16+int8", 660.6e12 * 0.70),
        ("rtx-4090", "bfloat16+float8_e4m3fn", 330.3e12 * 0.945),
        ("a100", "bfloat16+int8", 624e12 * 0.76),
    ):
        row = next(row for row in rows if row[:3] == ["linear_w8a8", "dev-single-in", form])
        assert row[head.index(f"{name} us")] == f"{single_in / rate * 1e6:.1f} mat"
    products = {row[2]: row[head.index("cpu-8 us")] for row in rows if row[0].startswith("linear")}
    assert products["bfloat16"].endswith(" mat") and products["bfloat16+int8"] == "-"


def test_one_device_and_an_unknown_one() -> None:
    assert "h200" not in run("--device", "rtx-4090").stdout
    wrong = run("--device", "rtx-9999")
    assert wrong.returncode == 2 and "rtx-4090" in wrong.stderr
