"""Int8 linear layers against the compute types on this CPU: is ``torch._int_mm`` worth its quantizing?

python scripts/measure_int8.py [--threads N]

Per shape: milliseconds of ``F.linear`` in float32 and bfloat16, of ``torch._int_mm`` alone, of quantizing the rows alone, and
of the whole builtin-int8 layer; the best of several runs, the layer's speed as a ratio to the faster compute type, and the
layer's relative error in the same run. The last line is JSON with the environment.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from flux2_local.hardware import cpu_name
from flux2_local.quant import FORMATS
from flux2_local.quant.builtin import quantize

SHAPES = ((1100, 256, 2304), (1100, 1024, 256), (1024, 3072, 9216))
"""Tokens, input and output channels: the bundled model's, and klein-4b's."""

RUNS, SECONDS = 30, 5.0


def milliseconds(call: Callable[[], object]) -> tuple[float, float]:
    """The best and the median of up to :data:`RUNS` runs or :data:`SECONDS` seconds."""
    call()
    taken: list[float] = []
    while len(taken) < RUNS and sum(taken) < SECONDS * 1e3:
        start = time.perf_counter()
        call()
        taken.append((time.perf_counter() - start) * 1e3)
    return min(taken), statistics.median(taken)


def row(tokens: int, channels: int, columns: int) -> dict[str, float]:
    """All figures of one shape."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn((columns, channels), generator=draw) / channels**0.5
    x = torch.randn((1, tokens, channels), generator=draw)
    half, half_weight = x.bfloat16(), weight.bfloat16()
    layer = quantize(weight, FORMATS["builtin-int8"], torch.bfloat16, torch.device("cpu"))
    values, _ = layer.quantizer(half)
    flat, turned = values[0], layer.weight.t()
    calls: dict[str, Callable[[], object]] = {
        "float32": lambda: F.linear(x, weight),
        "bfloat16": lambda: F.linear(half, half_weight),
        "int_mm": lambda: torch._int_mm(flat, turned),
        "quantize": lambda: layer.quantizer(half),
        "layer": lambda: layer(half),
    }
    best = {name: milliseconds(call)[0] for name, call in calls.items()}
    want = F.linear(half.float(), weight)
    error = float((layer(half).float() - want).norm() / want.norm())
    return {**best, "speedup": min(best["float32"], best["bfloat16"]) / best["layer"], "error": error}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    found = {}
    for shape in SHAPES:
        found["x".join(map(str, shape))] = figures = row(*shape)
        print(shape, "  ".join(f"{name} {value:.3f}" for name, value in figures.items()), flush=True)
    where = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(json.dumps({"environment": where, "milliseconds": found}))


if __name__ == "__main__":
    main()
