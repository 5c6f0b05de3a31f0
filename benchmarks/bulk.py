"""Pictures per minute in bulk, beside a loop of single calls in the same run, with what that changes in the pictures.

    python -m benchmarks.bulk                                    # the bundled model, flash and standard, at 512x512
    python -m benchmarks.bulk --variant standard --pictures 16 --rounds 5

Every contender makes the same pictures and writes them to files, in turn, round after round, so that a machine that slows down
slows all of them down; models are loaded and each has made one group of pictures before. The ratio is to the loop in the same
round. Beside it stands the share of values in which the files' pictures differ from the loop's. A second table tells what a
denoising step takes per picture, one by one and together.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from flux2_local import Flux2
from flux2_local.batch.engines import Pool, ThisProcess, processes
from flux2_local.batch.job import Job, Sweep, make_job
from flux2_local.batch.lines import Line
from flux2_local.batch.run import Engine, Target, open_batch
from flux2_local.bench import environment
from flux2_local.bench.subject import PROMPTS
from flux2_local.hardware import usable_cores

Work = Callable[[Job, Path], None]
"""Make a job's pictures as files of the folder."""

TOGETHER = (1, 2, 4)


@dataclass(frozen=True)
class Row:
    """One contender.

    Attributes:
        per_minute: pictures, median over the rounds; ``slowest`` and ``fastest`` are the spread.
        ratio: median over the rounds of the loop's seconds to this one's.
        differ: share of the pictures' values that are not the loop's, in percent.
    """

    variant: str
    name: str
    per_minute: float
    slowest: float
    fastest: float
    ratio: float
    differ: float


def job_of(variant: str, side: int, steps: int, pictures: int) -> Job:
    """Different prompts, a picture each."""
    fields: dict[str, Any] = {"image_size": {"width": side, "height": side}, "enable_safety_checker": False}
    if variant == "standard":
        fields["num_inference_steps"] = steps
    prompts = [f"{PROMPTS[n % len(PROMPTS)]}, {n}" for n in range(pictures)]
    lines = [Line(n, {"prompt": prompt}) for n, prompt in enumerate(prompts, 1)]
    return make_job(lines, Sweep(variant, fields))  # type: ignore[arg-type]


def loop(flux: Flux2) -> Work:
    def work(job: Job, folder: Path) -> None:
        for picture in job.pictures():
            flux.generate(picture.request).images[0].save(folder / picture.file_name)

    return work


def many(flux: Flux2) -> Work:
    def work(job: Job, folder: Path) -> None:
        pictures = list(job.pictures())
        results = flux.generate_many(picture.request for picture in pictures)
        for picture, result in zip(pictures, results, strict=True):
            result.images[0].save(folder / picture.file_name)  # type: ignore[union-attr]

    return work


def batch(engine: Engine) -> Work:
    def work(job: Job, folder: Path) -> None:
        with open_batch(job, Target(folder)) as made:
            made.work(engine)
            assert not made.failures, made.failures

    return work


def measure(work: dict[str, Work], variant: str, job: Job, rounds: int) -> Iterator[Row]:
    """Rows in the order of ``work``, whose first is the loop."""
    first = make_job(job.lines[:4], job.sweep)
    seconds: dict[str, list[float]] = {name: [] for name in work}
    pictures: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as place:
        for number in range(rounds + 1):
            for name, make in work.items():
                folder = Path(place) / f"{number} {name}"
                folder.mkdir()
                start = time.perf_counter()
                make(job if number else first, folder)
                if number:
                    seconds[name].append(time.perf_counter() - start)
                    files = [folder / picture.file_name for picture in job.pictures()]
                    pictures[name] = np.stack([np.asarray(Image.open(path)) for path in files])
    own = next(iter(work))
    for name, times in seconds.items():
        rates = [60 * job.count / t for t in times]
        yield Row(
            variant=variant,
            name=name,
            per_minute=statistics.median(rates),
            slowest=min(rates),
            fastest=max(rates),
            ratio=statistics.median(a / b for a, b in zip(seconds[own], times, strict=True)),
            differ=100 * float((pictures[own] != pictures[name]).mean()),
        )


def steps_together(flux: Flux2, side: int, rounds: int) -> dict[int, float]:
    """Seconds of a denoising step per picture, median, by how many are denoised together."""
    from flux2_local import latents as layout

    c = flux._components
    net, grid = c.transformer, (side // c.vae.multiple, side // c.vae.multiple)
    positions = torch.cat([layout.text_positions(c.style.length), layout.image_positions(*grid)])
    seconds: dict[int, list[float]] = {count: [] for count in TOGETHER}
    with torch.inference_mode():
        rotary = net.rotary(positions.to(c.device))
        mod = net.modulation(torch.tensor(0.5, device=c.device).to(net.dtype), 2.5)
        noise = torch.cat([layout.pack(layout.noise(n, net.config.in_channels, *grid)) for n in range(max(TOGETHER))])
        noise = noise.to(c.device, net.dtype)
        context = torch.randn(len(noise), c.style.length, net.config.width).to(c.device, net.dtype)
        for _ in range(rounds + 1):
            for count, times in seconds.items():
                start = time.perf_counter()
                for i in range(0, len(noise), count):
                    net(noise[i : i + count], context[i : i + count], mod, rotary, noise.shape[1])
                if c.device.type == "cuda":
                    torch.cuda.synchronize(c.device)
                times.append((time.perf_counter() - start) / len(noise))
    return {count: statistics.median(times[1:]) for count, times in seconds.items()}


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| variant | | pictures a minute | spread | × loop | differ % |", "|---" * 6 + "|"]
    lines += [
        f"| {r.variant} | {r.name} | {r.per_minute:.1f} | {r.slowest:.1f}–{r.fastest:.1f} | {r.ratio:.2f} | {r.differ:.3f} |"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bulk", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny", help="a name or a folder (default tiny)")
    parser.add_argument("--variant", nargs="+", default=["flash", "standard"], help="default flash and standard")
    parser.add_argument("--side", type=int, default=512, help="of a picture, in pixels (default 512)")
    parser.add_argument("--steps", type=int, default=28, help="of the standard variant (default 28)")
    parser.add_argument("--pictures", type=int, default=16, help="per round (default 16)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="the JSON file (default benchmarks/results/bulk-DATE.json)")
    args = parser.parse_args()
    rows: list[Row] = []
    cores = usable_cores()
    record = environment.record() | {
        "side": args.side, "steps": args.steps, "pictures": args.pictures, "rounds": args.rounds
    }  # fmt: skip
    for variant in args.variant:
        flux = Flux2.load(args.model, variant)
        work = {"loop of generate": loop(flux), "generate_many": many(flux), "batch": batch(ThisProcess(flux))}
        with ExitStack() as stack:
            if flux.hardware.kind == "cpu" and cores > 1:
                loading = {"model": args.model, "variant": variant}
                pool = stack.enter_context(Pool(processes(["cpu"] * cores, loading, threads=1)))
                work[f"batch, {cores} processes of one thread"] = batch(pool)
            rows += measure(work, variant, job_of(variant, args.side, args.steps, args.pictures), args.rounds)
        print(table(rows), flush=True)
    record["rows"] = [asdict(row) for row in rows]
    record["step_seconds"] = {}
    for side in (512, 768, 1024):
        seconds = record["step_seconds"][str(side)] = steps_together(flux, side, args.rounds)
        said = ", ".join(f"{count} together {1000 * s:.1f} ms" for count, s in seconds.items())
        print(f"a step per picture at {side}×{side}: {said}", flush=True)
    print(f"written: {environment.keep(record, 'bulk', args.out)}")


if __name__ == "__main__":
    main()
