"""What the suites share: the device, timing that waits for it, and the bundled model.

    make bench-suites                                    # every suite on the best device there is
    python -m pytest benchmarks/suites/test_step.py --device cpu --benchmark-json build/step.json

pytest-benchmark does not wait for a card; :func:`timed` does, inside what it times.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from flux2_local import Flux2
from flux2_local.bench import environment
from flux2_local.hardware import probe
from flux2_local.stages import synchronize

ROUNDS = 5


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", help="cuda, cuda:1, mps or cpu (default: the best there is)")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """The same record of the environment as every other result's."""
    machine_info["flux2-local"] = environment.record(probe(config.getoption("--device")).device)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(probe(request.config.getoption("--device")).device)


@pytest.fixture
def timed(benchmark: Any, device: torch.device) -> Callable[..., Any]:
    """Measures a call so many rounds, one warm-up left out, until the device has finished; answers with the call's own result."""

    def measure(call: Callable[[], Any], rounds: int = ROUNDS) -> Any:
        def whole() -> Any:
            result = call()
            synchronize(device)
            return result

        return benchmark.pedantic(whole, rounds=rounds, warmup_rounds=1)

    return measure


@pytest.fixture(scope="session")
def load(device: torch.device) -> Callable[..., Flux2]:
    """Loads the bundled model, each variant and tier once."""
    loaded: dict[tuple[str, str], Flux2] = {}

    def one(variant: str = "standard", acceleration: str = "regular") -> Flux2:
        key = variant, acceleration
        if key not in loaded:
            loaded[key] = Flux2.load("tiny", variant, acceleration=acceleration, device=str(device))  # type: ignore[arg-type]
        return loaded[key]

    return one
