"""Step-cache thresholds for a model: how fast and how faithful each policy is, against computing every step.

    python -m scripts.calibrate_cache --model tiny --pictures 8
    python -m scripts.calibrate_cache --model dev --size square_hd --thresholds 0.05,0.08,0.12 --warmups 4 --limits 1,2
    python -m scripts.calibrate_cache --steps 8           # what the same policies cost where there are few steps to skip

Any model that is on the disk will do, by name, hub id or folder, on the best device there is. Prints a row per policy: seconds of
denoising as a ratio to none skipped, PSNR of the pictures against none skipped (mean and worst). The fastest whose mean PSNR is above
``--bound`` is printed last, as a row for ``configs/tiers.toml``. All thresholds, warm-ups and limits together are 60 policies, each
drawn once per picture.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from dataclasses import replace

import numpy as np

from flux2_local import Flux2, Request
from flux2_local.bench.metrics import psnr
from flux2_local.bench.subject import PROMPTS
from flux2_local.presets import CachePolicy
from flux2_local.progress import Reporter
from flux2_local.stages import Run

THRESHOLDS = "0.08,0.1,0.15,0.25,inf"
LIMITS = "1,2,3,4"
WARMUPS = "3,4,5"


def measure(
    flux: Flux2, policy: CachePolicy | None, count: int, size: str, steps: int | None
) -> tuple[list[np.ndarray], float]:
    """Pictures of the first ``count`` prompts, and the median seconds of denoising one."""
    pictures, seconds = [], []
    for seed in range(count):
        request = Request(
            prompt=PROMPTS[seed % len(PROMPTS)], seed=seed, image_size=size, num_inference_steps=steps,
            enable_safety_checker=False,
        )  # fmt: skip
        run = Run(flux, replace(flux._plan_for(request, []), cache=policy), request, [], Reporter(None, None))
        (result,) = flux._work([run])
        pictures.append(np.asarray(result.images[0].image))
        seconds.append(result.timings.denoise)
    return pictures, statistics.median(seconds)


def numbers(text: str) -> list[float]:
    """ "0.1,inf" -> [0.1, inf]."""
    return [float(part) for part in text.split(",")]


def row(flux: Flux2, policy: CachePolicy, ratio: float) -> str:
    """``policy`` for ``configs/tiers.toml``; the share of steps that it skips follows from what it leaves of the seconds."""
    t = flux._components.transformer.config
    computed = 1 / (t.num_layers + t.num_single_layers)  # of a skipped step, where the first block decides
    share = 0.0 if policy.threshold == math.inf else max(0.0, 1 - ratio) / (1 - computed)
    expected = f", expected = {min(share, 1):.2f}" if share else ""
    return (
        f"cache.{flux.checkpoint.name} = {{ threshold = {policy.threshold:g}, warmup = {policy.warmup}, tail = {policy.tail}, "
        f"limit = {policy.limit}, steps = {policy.steps}{expected} }}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--size", default="square")
    parser.add_argument(
        "--steps", type=int, choices=range(4, 51), metavar="4..50", help="default: the model's own number"
    )
    parser.add_argument("--bound", type=float, default=30.0, help="PSNR in dB that a policy must keep (default 30)")
    for name, default in (("thresholds", THRESHOLDS), ("warmups", WARMUPS), ("limits", LIMITS)):
        parser.add_argument(
            f"--{name}", type=numbers, default=default, metavar="N,N,…", help=f"to try (default {default})"
        )
    args = parser.parse_args()
    flux = Flux2.load(args.model, acceleration="high")
    steps = args.steps or flux.plan.work.steps
    measure(flux, None, 1, args.size, args.steps)  # the first picture warms up
    want, base = measure(flux, None, args.pictures, args.size, args.steps)
    print("threshold warmup limit  time ratio  PSNR mean  worst", flush=True)
    best: tuple[float, CachePolicy] | None = None
    for threshold, warmup, limit in itertools.product(args.thresholds, args.warmups, args.limits):
        policy = CachePolicy(threshold, int(warmup), tail=1, limit=int(limit), steps=steps)
        got, seconds = measure(flux, policy, args.pictures, args.size, args.steps)
        figures = [psnr(a, b) for a, b in zip(got, want, strict=True)]
        mean, ratio = statistics.mean(figures), seconds / base
        print(
            f"{threshold:9g} {policy.warmup:6} {policy.limit:5} {ratio:11.2f} {mean:10.1f} {min(figures):6.1f}",
            flush=True,
        )
        if mean >= args.bound and (best is None or ratio < best[0]):
            best = ratio, policy
    print(f"best above {args.bound:g} dB: {row(flux, best[1], best[0]) if best else 'none'}")


if __name__ == "__main__":
    main()
