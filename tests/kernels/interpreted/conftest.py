"""These tests run Triton's interpreter, which must be chosen before Triton is imported: `../test_interpreted.py` starts them.

By hand: TRITON_INTERPRET=1 pytest tests/kernels/interpreted
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    from flux2_kernels.gpu.interpreter import act_like_hardware

    act_like_hardware()
else:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The launches of a test, so that none passes on a silent fallback to torch."""
    from flux2_kernels.gpu.launch import Launch

    seen: list[Any] = []
    run = Launch.run

    def counted(self: Launch) -> None:
        seen.append(self)
        run(self)

    monkeypatch.setattr(Launch, "run", counted)
    return seen


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled in one test is found by the next."""
    yield
    torch.compiler.reset()
