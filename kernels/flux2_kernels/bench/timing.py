"""Times on a device, and the rates of the device itself."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from ..constraint import FP8
from ..op import Function, Inputs
from ..rates import Rates

REPLAYS = 20
WARM = 0.05  # seconds of replays that do not count: a card that has waited, for a compiler say, is slow to begin with
ROTATED = 512 << 20  # bytes over which calls are spread, so that no cache holds what they read and write until the next
MOST_SETS = 12


@dataclass(frozen=True)
class Times:
    """Milliseconds per call: the 20th, 50th and 80th percentile of the replays."""

    p20: float
    p50: float
    p80: float


def times_of(seconds: Sequence[float]) -> Times:
    """Percentiles of samples in seconds."""
    if len(seconds) == 1:
        return Times(*[seconds[0] * 1e3] * 3)
    parts = statistics.quantiles([s * 1e3 for s in seconds], n=5, method="inclusive")
    return Times(parts[0], statistics.median(seconds) * 1e3, parts[-1])


def measure(function: Function, sets: Sequence[Inputs], replays: int = REPLAYS) -> Times:
    """Time ``function`` over ``sets`` of inputs, as :func:`prepared`."""
    return in_turn({"": prepared(function, sets)}, replays)[""]


def prepared(function: Function, sets: Sequence[Inputs]) -> Callable[[], float]:
    """What computes ``function`` on each of ``sets`` of inputs and returns the seconds of one: on a card a replay of a CUDA graph,
    so that no launch is waited for; elsewhere it has run, once, and says what that took."""
    device = next(value.device for value in sets[0].values() if isinstance(value, torch.Tensor))

    def once() -> list[Any]:
        # All results are kept until the last: if one memory took them in turn, a cache would hold it.
        return [function(**inputs) for inputs in sets]

    if device.type != "cuda":
        spent = _wall(once) / len(sets)
        return lambda: spent
    replay = captured(once)

    def seconds() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / len(sets)  # the graph reads the sets' memory: this must hold them

    return seconds


def in_turn(runs: Mapping[str, Callable[[], float]], replays: int = REPLAYS) -> dict[str, Times]:
    """Times of what :func:`prepared` made. They take turns: whatever clocks and heat do meanwhile, they do to all alike."""
    end = time.perf_counter() + (WARM if torch.cuda.is_available() else 0)
    while time.perf_counter() < end:
        for run in runs.values():
            run()
    rounds = [[run() for run in runs.values()] for _ in range(replays)]
    return {name: times_of(samples) for name, samples in zip(runs, zip(*rounds, strict=True), strict=True)}


def host_us(function: Function, inputs: Inputs, calls: int = REPLAYS) -> float:
    """Median microseconds until a call returns, without a graph and not waiting for the card; off CUDA, of a whole call."""
    on_card = any(isinstance(value, torch.Tensor) and value.is_cuda for value in inputs.values())
    if on_card:
        torch.cuda.synchronize()
    seconds = [_wall(lambda: function(**inputs)) for _ in range(calls if on_card else 1)]
    return statistics.median(seconds) * 1e6


def captured(once: Callable[[], Any]) -> Callable[[], None]:
    """``once`` as a CUDA graph, after three calls on a side stream that compile and allocate what it needs."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            once()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def _wall(once: Callable[[], Any]) -> float:
    start = time.perf_counter()
    once()
    return time.perf_counter() - start


def sets_for(make: Callable[[int], Inputs], moved: int) -> list[Inputs]:
    """Sets of inputs by seed, as many as spread a call that moves ``moved`` bytes over :data:`ROTATED`; one off CUDA."""
    wanted = -(-ROTATED // max(moved, 1)) if torch.cuda.is_available() else 1
    return [make(seed) for seed in range(min(MOST_SETS, wanted))]


def measured_rates(device: torch.device, sm: int, size: int = 8192) -> Rates:
    """Copy bandwidth (bytes read and written) and the rates of ``size``³ matmuls in bf16, int8 and fp8, of normally distributed
    values as layers multiply them: what is in the bits decides a card's power, and with it its clocks."""
    source = torch.randint(0, 127, (size * size * 16,), dtype=torch.int8, device=device)
    copy = measure(lambda source: torch.empty_like(source).copy_(source), [{"source": source}])
    memory = 2 * source.numel() / (copy.p50 / 1e3)
    operations, drawn = 2 * size**3, [torch.randn(size, size, device=device) for _ in range(2)]
    bf16 = _rate(operations, torch.mm, *(part.to(torch.bfloat16) for part in drawn))
    matmul = {torch.bfloat16: bf16, torch.float16: bf16}
    with suppress(RuntimeError):  # this torch has no such product for this card
        whole = [(32 * part).clamp(-127, 127).to(torch.int8) for part in drawn]
        matmul[torch.int8] = _rate(operations, torch._int_mm, *whole)
    if sm >= 89:
        one, small = torch.ones((), device=device), [part.to(FP8) for part in drawn]
        scaled = lambda a, b: torch._scaled_mm(a, b, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)  # noqa: E731
        with suppress(RuntimeError):
            matmul[FP8] = _rate(operations, scaled, *small)
    return Rates(memory, matmul)


def _rate(operations: int, product: Callable[..., Any], a: torch.Tensor, b: torch.Tensor) -> float:
    """Operations per second of ``product(a, bᵀ)``, both operands contiguous along the summed axis."""
    return operations / (measure(lambda a, b: product(a, b.t()), [{"a": a, "b": b}]).p50 / 1e3)
