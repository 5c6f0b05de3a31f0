"""How the time of a denoising step grows with tokens, width and depth, without any weights.

    python -m benchmarks.scaling                   # a scaled-down family, hidden 256 to 2048: minutes on a CPU
    python -m benchmarks.scaling --device cuda     # dev and klein at full size, filled with random values on the card

Each of the family's three sweeps doubles one thing and holds the others: its exponent is the slope of the logarithms by least
squares, beside the same of the arithmetic, which is what a device that always ran at one rate would show. Points take turns,
round after round. Writes a JSON file with the environment and every sample, and a Markdown page with a plot beside it, anew after
every model. What the device has no memory for is left out, and that is written too.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flux2_local import costs, rates
from flux2_local.bench import environment
from flux2_local.costs import Work
from flux2_local.errors import BackendUnavailableError, Flux2Error
from flux2_local.explore import family_architecture
from flux2_local.files import free_name, replacing, write
from flux2_local.hardware import Hardware, probe
from flux2_local.model.transformer import TransformerConfig
from flux2_local.presets import families, models, show_bytes
from flux2_local.stages import synchronize

from . import synthetic

TEXT, GRID = 64, (16, 32)
"""The family's text tokens, and its picture's tokens where they are not what grows."""

GRIDS = ((16, 16), (16, 32), (32, 32), (32, 64), (64, 64))
WIDTHS, DEPTHS = (256, 512, 1024, 2048), (1, 2, 4, 8)
FULL_TEXT, FULL_GRIDS = 512, ((32, 32), (64, 64), (128, 128))
"""At full size: 512², 1024² and 2048² pixels."""


@dataclass(frozen=True)
class Point:
    """One step that is measured.

    Attributes:
        sweep: what grows: "tokens" (of picture and text), "width" (hidden) or "depth" (blocks); a model's name at full size.
        value: of what grows; at full size, of tokens.
        config: the transformer's shape.
        grid: the picture's tokens, rows and columns.
        text: the prompt's tokens.
        samples: seconds.
    """

    sweep: str
    value: int
    config: TransformerConfig
    grid: tuple[int, int]
    text: int
    samples: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return statistics.median(self.samples)

    @property
    def flops(self) -> float:
        """Of the step's linear layers and attention."""
        arch = replace(family_architecture(models()["klein-4b"]), transformer=self.config, text_tokens=self.text)
        side = arch.multiple
        return costs.step_flops(arch, Work(self.grid[1] * side, self.grid[0] * side))

    def record(self, rate: float) -> dict[str, Any]:
        """For the result: its shape, seconds, and the share of the measured matrix product rate that it reaches."""
        reached = self.flops / self.seconds
        shape = {"hidden": self.config.width, "double": self.config.num_layers, "single": self.config.num_single_layers}
        facts = {k: v for k, v in asdict(self).items() if k != "config"} | shape
        return facts | {"seconds": self.seconds, "tflop_per_s": reached / 1e12, "share": reached / rate}


def family() -> Iterator[Point]:
    """The scaled-down points: three sweeps that share their middle's shape."""
    for grid in GRIDS:
        yield Point("tokens", grid[0] * grid[1] + TEXT, synthetic.small(), grid, TEXT)
    for width in WIDTHS:
        yield Point("width", width, synthetic.small(width), GRID, TEXT)
    for depth in DEPTHS:
        yield Point("depth", 3 * depth, synthetic.small(depth=depth), GRID, TEXT)


def full(name: str) -> Iterator[Point]:
    """A published model at full size."""
    config = family_architecture(models()[name]).transformer
    for grid in FULL_GRIDS:
        yield Point(name, grid[0] * grid[1] + FULL_TEXT, config, grid, FULL_TEXT)


def measure(points: Sequence[Point], device: torch.device, rounds: int) -> list[str]:
    """Add ``rounds`` samples to every point, in turn, after one step of each that is not kept.

    Returns:
        What there was no memory for, and why.
    """
    refused: list[str] = []
    nets = {}
    try:
        for config in dict.fromkeys(point.config for point in points):
            dtype, ops = synthetic.fast(device, config)
            nets[config] = synthetic.transformer(config, ops, dtype, device)
        able = [(point, synthetic.step(nets[point.config], point.grid, point.text)) for point in points]
    except torch.OutOfMemoryError as error:
        return [without_memory(points[0].sweep, error)]
    for number in range(rounds + 1):
        for one in list(able):
            point, call = one
            synchronize(device)
            start = time.perf_counter()
            try:
                call()
            except torch.OutOfMemoryError as error:
                able.remove(one)
                refused.append(without_memory(f"{point.sweep} {point.value}", error))
                continue
            if number:
                synchronize(device)
                point.samples.append(time.perf_counter() - start)
    return refused


def without_memory(what: str, error: Exception) -> str:
    """What was left out and why, a line."""
    found = f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    print(f"left out: {found}", flush=True)
    return found


def exponents(points: Sequence[Point]) -> dict[str, dict[str, float]]:
    """By sweep of two points or more, of the seconds and of the FLOPs: the slope of their logarithms over that of what grows."""
    found = {}
    for sweep in dict.fromkeys(point.sweep for point in points):
        own = [point for point in points if point.sweep == sweep]
        if len(own) == 1:
            continue
        x = np.log([point.value for point in own])
        found[sweep] = {
            "seconds": float(np.polyfit(x, np.log([point.seconds for point in own]), 1)[0]),
            "flops": float(np.polyfit(x, np.log([point.flops for point in own]), 1)[0]),
        }
    return found


def page(record: dict[str, Any], plot_name: str) -> str:
    """The result as Markdown."""
    lines = [
        f"# A denoising step's time, {record.get('card') or record['device']}, {record['dtype']}",
        "",
        f"Random weights, medians of {record['rounds']} rounds, commit {record.get('commit', 'unknown')}.",
        "",
        f"![Seconds over tokens, width and depth]({plot_name})",
        "",
        "| what grows | exponent of the seconds | of the FLOPs |",
        "| --- | ---: | ---: |",
        *(f"| {name} | {own['seconds']:.2f} | {own['flops']:.2f} |" for name, own in record["exponents"].items()),
        "",
        "| | | hidden | blocks | tokens | ms | spread | TFLOP/s | share of matmul rate |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in record["points"]:
        tokens, spread = row["grid"][0] * row["grid"][1] + row["text"], [1e3 * f(row["samples"]) for f in (min, max)]
        lines.append(
            f"| {row['sweep']} | {row['value']} | {row['hidden']} | {row['double']} + {row['single']} | {tokens} "
            f"| {1e3 * row['seconds']:.1f} | {spread[0]:.1f}–{spread[1]:.1f} | {row['tflop_per_s']:.3g} | {row['share']:.0%} |"
        )
    if record.get("refused"):
        lines += ["", "Left out for want of memory:", "", *(f"- {one}" for one in record["refused"])]
    return "\n".join(lines) + "\n"


def plot(record: dict[str, Any], path: Path) -> None:
    """Seconds over what grows, a panel a sweep, both logarithmic, with the fitted slope."""
    from matplotlib.figure import Figure

    sweeps = record["exponents"]
    figure = Figure(figsize=(3.6 * len(sweeps), 3.4), layout="constrained")
    for axes, (name, own) in zip(figure.subplots(1, len(sweeps), squeeze=False)[0], sweeps.items(), strict=True):
        rows = [row for row in record["points"] if row["sweep"] == name]
        x, y = (np.array([row[key] for row in rows], float) for key in ("value", "seconds"))
        line = np.exp(np.log(y).mean() + own["seconds"] * (np.log(x) - np.log(x).mean()))
        axes.plot(x, line, color="#9ca3af", linewidth=1, zorder=1)
        axes.scatter(x, y, color="#2563eb", zorder=2)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("tokens" if name in models() else name)
        axes.set_title(f"{name}: exponent {own['seconds']:.2f}")
        axes.grid(alpha=0.3, which="both")
        axes.set_ylabel("seconds a step")
    with replacing(path) as part:
        figure.savefig(part, dpi=110, format="png")


def keep(record: dict[str, Any], path: Path) -> str:
    """Write the result with its page and its plot beside it; returns the page."""
    environment.keep(record, "scaling", path)
    picture = path.with_suffix(".png")
    if record["exponents"]:
        plot(record, picture)
    text = page(record, picture.name)
    write(path.with_suffix(".md"), text.encode())
    return text


def chosen(names: Sequence[str] | None, hardware: Hardware) -> list[list[Point]]:
    """The points to measure, those together that take turns: each model's that is named, at full size; else on a card every one's
    that fits; the family's where that leaves none.

    Raises:
        BackendUnavailableError: a model that is named does not fit into the device's memory.
    """
    fitting = []
    for name in names or (synthetic.FULL[::-1] if hardware.kind == "cuda" else ()):
        need = 2 * costs.parameters(family_architecture(models()[name]))["transformer"]
        if need <= 0.9 * hardware.free:
            fitting.append(name)
            continue
        why = f"{name} takes {show_bytes(need)} in 16 bit and {show_bytes(hardware.free)} are free on {hardware.device}"
        if names:
            raise BackendUnavailableError(f"{why}. Name smaller ones with --model.")
        print(f"left out: {why}")
    return [list(full(name)) for name in fitting] or [list(family())]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sized = [name for name, preset in models().items() if preset.family in families()]
    parser.add_argument("--device", help="cuda, cuda:1 or cpu (default: the best there is)")
    parser.add_argument(
        "--model", action="append", choices=sized, help="at full size instead of the family; may be given again"
    )
    parser.add_argument("--rounds", type=int, default=5, help="samples a point (default 5)")
    parser.add_argument("--out", type=Path, help="the JSON file (default: a new benchmarks/results/scaling-DATE.json)")
    args = parser.parse_args()
    hardware = probe(args.device)
    device = torch.device(hardware.device)
    groups = chosen(args.model, hardware)
    dtype = hardware.fast_dtypes[0]
    record = environment.record(hardware.device)
    record |= {"dtype": dtype, "rounds": args.rounds, "rates": rates.measure(hardware.device, [dtype], seconds=0.5)}
    record |= {"points": [], "exponents": {}, "refused": []}
    path, text = args.out or free_name(environment.place(record, "scaling")), ""
    for group in groups:
        record["refused"] += measure(group, device, args.rounds)
        done = [point for point in group if point.samples]
        record["points"] += [point.record(record["rates"][dtype]) for point in done]
        record["exponents"] |= exponents(done)
        text = keep(record, path)
    print(f"{text}\nwritten: {path}, {path.stem}.md and {path.stem}.png")


if __name__ == "__main__":
    try:
        main()
    except Flux2Error as error:
        raise SystemExit(f"{error}") from None
