"""How fast each tier and variant is beside diffusers' own pipeline, on the same components in the same run.

    python -m benchmarks.speed                         # the bundled model at 512x512 and 1024x768
    python -m benchmarks.speed --size 512 512 --rounds 5

Every contender draws the same prompts with the same seeds in turn, round after round, so that a machine that slows down slows
all of them down. Seconds are medians of whole calls, loading and the first call left out; the ratio is to diffusers in the same
round. Beside them stand PSNR against diffusers' pictures and the share of pixels that differ at all and by more than one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flux2_local import Flux2, store

from . import environment
from .metrics import psnr
from .quality import CONTENDERS, SHEET, Contender

Draw = Callable[[str, int], np.ndarray]
"""(prompt, seed) -> a picture, uint8 [H, W, 3]."""


@dataclass(frozen=True)
class Row:
    """One contender at one size.

    Attributes:
        seconds: median of whole calls; ``fastest`` and ``slowest`` are the spread.
        ratio: median over the rounds of diffusers' seconds to this one's.
        psnr: mean over the prompts against diffusers' pictures, dB; 99 for equal ones.
        differ, differ_more: share of values that differ at all, and by more than one, in percent.
    """

    size: str
    name: str
    seconds: float
    fastest: float
    slowest: float
    ratio: float
    psnr: float
    differ: float
    differ_more: float


def diffusers_pipeline(model: str, size: tuple[int, int], steps: int) -> Draw:
    """Stock diffusers, eager, in float32 on a CPU and bfloat16 elsewhere."""
    from diffusers import Flux2KleinPipeline, Flux2Pipeline

    checkpoint = store.find(model, "standard")
    preset = checkpoint.preset
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = {"Flux2Pipeline": Flux2Pipeline, "Flux2KleinPipeline": Flux2KleinPipeline}[preset.pipeline]
    pipe = kind.from_pretrained(checkpoint.folder, torch_dtype=torch.float32 if device == "cpu" else torch.bfloat16)
    pipe.to(device).set_progress_bar_config(disable=True)
    width, height = size

    def draw(prompt: str, seed: int) -> np.ndarray:
        picture = pipe(
            prompt=prompt,
            width=width,
            height=height,
            num_inference_steps=steps,
            guidance_scale=2.5,
            generator=torch.Generator().manual_seed(seed),
            max_sequence_length=preset.text_tokens,
            text_encoder_out_layers=preset.text_layers,
        ).images[0]
        return np.asarray(picture)

    return draw


def ours(contender: Contender, model: str, size: tuple[int, int], steps: int) -> Draw:
    flux = Flux2.load(model, contender.variant, acceleration=contender.acceleration)  # type: ignore[arg-type]
    width, height = size
    fields: dict[str, Any] = {"image_size": {"width": width, "height": height}, "enable_safety_checker": False}
    if contender.variant == "standard":
        fields["num_inference_steps"] = steps

    def draw(prompt: str, seed: int) -> np.ndarray:
        return np.asarray(flux.generate(prompt, seed=seed, **fields).images[0].image)

    return draw


def measure(
    contenders: Sequence[Contender], model: str, size: tuple[int, int], steps: int, rounds: int
) -> Iterator[Row]:
    draws = {"diffusers": diffusers_pipeline(model, size, steps)}
    draws |= {str(c): ours(c, model, size, steps) for c in contenders}
    seconds: dict[str, list[float]] = {name: [] for name in draws}
    pictures: dict[str, list[np.ndarray]] = {name: [] for name in draws}
    for draw in draws.values():
        draw(SHEET[0], 0)
    for i in range(rounds):
        for name, draw in draws.items():
            start = time.perf_counter()
            pictures[name].append(draw(SHEET[i % len(SHEET)], i))
            seconds[name].append(time.perf_counter() - start)
    for name in draws:
        times = seconds[name]
        ratios = [a / b for a, b in zip(seconds["diffusers"], times, strict=True)]
        pairs = list(zip(pictures["diffusers"], pictures[name], strict=True))
        apart = np.stack([np.abs(a.astype(int) - b) for a, b in pairs])
        yield Row(
            size=f"{size[0]}×{size[1]}",
            name=name,
            seconds=statistics.median(times),
            fastest=min(times),
            slowest=max(times),
            ratio=statistics.median(ratios),
            psnr=statistics.mean(psnr(a, b) for a, b in pairs),
            differ=100 * float((apart > 0).mean()),
            differ_more=100 * float((apart > 1).mean()),
        )


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| size | | seconds | spread | × diffusers | PSNR | differ % | by more than 1 % |", "|---" * 8 + "|"]
    lines += [
        f"| {r.size} | {r.name} | {r.seconds:.2f} | {r.fastest:.2f}–{r.slowest:.2f} | {r.ratio:.2f} | {r.psnr:.1f} "
        f"| {r.differ:.3f} | {r.differ_more:.3f} |"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny", help="a name or a folder (default tiny)")
    parser.add_argument(
        "--size", type=int, nargs=2, action="append", metavar=("WIDTH", "HEIGHT"), help="default 512 512 and 1024 768"
    )
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--rounds", type=int, default=5, help="pictures per contender and size (default 5)")
    parser.add_argument("--only", nargs="+", help='contenders by name, such as "standard, none" or flash')
    parser.add_argument("--out", type=Path, help="the JSON file (default benchmarks/results/speed-DATE.json)")
    args = parser.parse_args()
    chosen = [c for c in CONTENDERS if not args.only or str(c) in args.only]
    record = environment.record() | {
        "steps": args.steps,
        "rounds": args.rounds,
    }
    rows: list[Row] = []
    for size in args.size or [(512, 512), (1024, 768)]:
        rows += measure(chosen, args.model, tuple(size), args.steps, args.rounds)
        print(table(rows), flush=True)
    record["rows"] = [asdict(row) for row in rows]
    path = environment.keep(record, "speed", args.out)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
