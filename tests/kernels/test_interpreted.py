"""Runs the tests of interpreted/ in a process of their own, where Triton interprets kernels on the CPU."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests" / "kernels" / "interpreted"
AT_LEAST = 1000

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@needs_triton
def test_interpreted_kernels() -> None:
    """All of them pass, none is skipped, and there are as many as there should be."""
    one_thread = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}  # the tensors are small
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER)]
    ran = subprocess.run(command, cwd=ROOT, env=os.environ | one_thread, capture_output=True, text=True, timeout=550)
    last = ran.stdout.strip().rpartition("\n")[2]
    print(last)
    assert ran.returncode == 0, ran.stdout[-20000:] + ran.stderr[-5000:]
    passed = re.search(r"(\d+) passed", last)
    assert passed and int(passed[1]) >= AT_LEAST and "skipped" not in last, last
