"""Every kernel in every kept configuration becomes machine code for every SM, and the binary spills nothing.

By default one launch a kernel and configuration; `-m slow` compiles every dtype and shape.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

import pytest

SMS = (80, 86, 89, 90, 100, 120)
WORKERS = 2

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def compiled(sm: int, everything: bool) -> list[Any]:
    """In a worker process: ahead.py imports Triton."""
    import ahead

    return ahead.compile_all(sm, everything)


def submitted(everything: bool) -> Iterator[dict[int, Future[list[Any]]]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn")) as pool:
            yield {sm: pool.submit(compiled, sm, everything) for sm in SMS}


@pytest.fixture(scope="module")
def kept() -> Iterator[dict[int, Future[list[Any]]]]:
    yield from submitted(everything=False)


@pytest.fixture(scope="module")
def everything() -> Iterator[dict[int, Future[list[Any]]]]:
    yield from submitted(everything=True)


def judge(sm: int, results: list[Any], at_least: int) -> None:
    most = max(results, key=lambda result: result.registers)
    largest = max(results, key=lambda result: result.shared)
    print(f"sm_{sm}: {len(results)} binaries, {sum(result.spills for result in results)} spills")
    print(f"  most registers: {most}\n  most shared memory: {largest}")
    assert len(results) >= at_least
    assert not [str(result) for result in results if result.wrong]


@pytest.mark.parametrize("sm", SMS)
def test_kept_configurations(sm: int, kept: dict[int, Future[list[Any]]]) -> None:
    judge(sm, kept[sm].result(), at_least=20)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("sm", SMS)
def test_every_launch(sm: int, everything: dict[int, Future[list[Any]]]) -> None:
    judge(sm, everything[sm].result(), at_least=100)
