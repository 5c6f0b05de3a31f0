"""Where the time of one picture goes, kernel by kernel: every denoising step, and decoding.

    python scripts/profile_step.py                                         # the bundled model on this machine
    python scripts/profile_step.py --model klein-4b --acceleration high --size 1024x1024 --device cuda
    python scripts/profile_step.py --steps 4 --trace build/step.json       # the trace opens in Perfetto or chrome://tracing

A picture is drawn once to warm up and once under torch's profiler. Each stage's milliseconds are shared among its parts (the
transformer's operations by name, every linear layer by its place in a block, the step cache, the autoencoder's modules), and
each part's among its kernels: on a card the kernels themselves, on a CPU torch's operators without those that they call.
Denoising is given per step, the mean over its steps, skipped ones included. Times on the host are a little longer than without
the profiler: shares are what counts. Blocks that torch.compile has fused are one part each.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from flux2_local import Flux2, files
from flux2_local.bench import environment
from flux2_local.cache import StepCache
from flux2_local.errors import Flux2Error
from flux2_local.load import Components
from flux2_local.request import ACCELERATIONS, VARIANTS, parse_size
from flux2_local.stages import Run

STAGE, PART = "stage: ", "part: "
OTHER = "other"
SMALL = 0.003
"""Kernels, and parts, below this share of their stage are summed up in one line."""


@dataclass(frozen=True)
class Kernel:
    """What one kernel took in one part of one stage: milliseconds and calls."""

    stage: str
    part: str
    name: str
    calls: int
    ms: float


def ranged(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with its work recorded as a range of the profile."""

    @wraps(function)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return function(*args, **kwargs)

    return recorded


def label(components: Components, compiled: bool) -> None:
    """Have every part of a loaded model record itself. Innermost ranges count."""
    for name, network in (
        ("transformer", components.transformer),
        ("text", components.text_encoder),
        ("vae", components.vae),
    ):
        whole = compiled and name == "transformer"
        for path, module in network.named_modules():
            inside = re.match(r"(single_)?transformer_blocks\.\d+\.", path)
            if path and not isinstance(module, nn.ModuleList) and not (whole and inside):
                module.forward = ranged(PART + part_of(path), module.forward)
    ops = components.transformer.ops
    if not compiled:
        components.transformer.ops = replace(
            ops, **{f.name: ranged(PART + f.name, getattr(ops, f.name)) for f in fields(ops)}
        )


def part_of(path: str) -> str:
    """A module's place without the numbers, so that the same layer of every block is one part."""
    return re.sub(r"\.\d+(?=\.|$)", "", path)


@contextmanager
def recording() -> Iterator[None]:
    """Let the pipeline's stages and the step cache record themselves."""
    original = Run.stage

    @contextmanager
    def stage(self: Run, name: str, together: Sequence[Run] = ()) -> Iterator[None]:
        with record_function(STAGE + name), original(self, name, together):
            yield

    with ExitStack() as stack:
        stack.enter_context(patch.object(Run, "stage", stage))
        for name in ("rest", "keep"):
            stack.enter_context(patch.object(StepCache, name, ranged(PART + "cache", getattr(StepCache, name))))
        yield


def place(event: Any) -> tuple[str, str]:
    """The stage and the innermost part that an event of the profile belongs to."""
    stage, part = "", ""
    while event is not None:
        if event.name.startswith(PART):
            part = part or event.name.removeprefix(PART)
        elif event.name.startswith(STAGE):
            stage = event.name.removeprefix(STAGE)
        event = event.cpu_parent
    return stage, part or OTHER


def kernels(events: Iterable[Any], on_card: bool) -> list[Kernel]:
    """The profile's kernels by stage and part, those of one name together, the longest first."""
    found: dict[tuple[str, str, str], tuple[int, float]] = {}
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue
        own = [(k.name, k.duration) for k in event.kernels] if on_card else [(event.name, event.self_cpu_time_total)]
        for name, microseconds in own:
            stage, part = place(event)
            if not stage or (on_card and name.startswith((PART, STAGE))):
                continue
            if name.startswith((PART, STAGE)):
                name = "python"  # between operators
            calls, ms = found.get((stage, part, name), (0, 0.0))
            found[stage, part, name] = calls + 1, ms + microseconds / 1000
    rows = [Kernel(*key, *value) for key, value in found.items() if value[1] > 0]
    return sorted(rows, key=lambda row: -row.ms)


def table(rows: Sequence[Kernel], wall: float, stage: str, runs: int) -> str:
    """One stage as a Markdown table, per run: its parts, the longest first, each with its kernels.

    Args:
        rows: of this stage.
        wall: its milliseconds from beginning to end.
        stage: its name.
        runs: how often it ran: denoising steps, else 1.
    """
    total = sum(row.ms for row in rows)
    each = " a step" if runs > 1 else ""
    lines = [
        f"## {stage}: {wall / runs:.2f} ms{each}, {total / wall:.0%} of it in kernels",
        "",
        f"| part, kernel | share | calls{each} | ms{each} |",
        "| --- | ---: | ---: | ---: |",
    ]

    def line(name: str, some: Sequence[Kernel]) -> str:
        ms = sum(row.ms for row in some)
        return f"| {name} | {ms / total:.1%} | {sum(row.calls for row in some) / runs:g} | {ms / runs:.3f} |"

    parts: dict[str, list[Kernel]] = {}
    for row in rows:
        parts.setdefault(row.part, []).append(row)
    rest = []
    for part, own in sorted(parts.items(), key=lambda item: -sum(row.ms for row in item[1])):
        if sum(row.ms for row in own) < SMALL * total:
            rest += own
            continue
        lines.append(line(f"**{part}**", own))
        large = [row for row in own if row.ms >= SMALL * total]
        small = [row for row in own if row.ms < SMALL * total]
        lines += [line(f"— {short(row.name)}", [row]) for row in large]
        lines += [line(f"— {len(small)} smaller", small)] if large and small else []
    lines += [line(f"{len({row.part for row in rest})} smaller parts", rest)] if rest else []
    return "\n".join(lines)


def short(name: str) -> str:
    """A kernel's name without template arguments that fill the page."""
    return name.replace("|", "/") if len(name) <= 80 else name.replace("|", "/")[:79] + "…"


def profiled(flux: Flux2, fields_: dict[str, Any], trace: Path) -> tuple[list[Kernel], dict[str, float], int]:
    """Draw a picture to warm up and one under the profiler, and write the trace.

    Returns:
        Its kernels, the milliseconds of every stage from beginning to end, and the number of denoising steps.
    """
    flux.generate(**fields_)
    label(flux._components, flux.plan.compile == "blocks")
    on_card = flux._components.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_card else [])]
    steps: list[Any] = []

    def count(progress: Any) -> None:
        if progress.stage == "denoise" and progress.step:
            steps.append(progress.step)

    with recording(), profile(activities=activities, acc_events=True) as recorded:
        flux.generate(**fields_, progress=count)
    with files.replacing(trace) as part:
        recorded.export_chrome_trace(str(part))
    events = recorded.events()
    walls = {
        e.name.removeprefix(STAGE): e.cpu_time_total / 1000
        for e in events
        if e.name.startswith(STAGE) and e.device_type == torch.autograd.DeviceType.CPU
    }
    return kernels(events, on_card), walls, len(steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a name, a hub id, a folder or a file (default tiny)")
    parser.add_argument("--variant", choices=VARIANTS, default="standard")
    parser.add_argument("--acceleration", choices=ACCELERATIONS, default="regular")
    parser.add_argument("--size", type=parse_size, default="512x512", metavar="WIDTHxHEIGHT")
    parser.add_argument("--steps", type=int, help="of the standard variant (default: the model's own)")
    parser.add_argument("--device", help="cuda, cuda:1 or cpu (default: the best there is)")
    parser.add_argument("--quantize", default="auto", help="a weight format (default auto)")
    parser.add_argument("--attention", default="auto", help="an attention backend (default auto)")
    parser.add_argument("--compile", action="store_true", help="have torch.compile take the blocks")
    parser.add_argument("--trace", type=Path, default=Path("build/step.trace.json"), help="the Chrome trace to write")
    options = parser.parse_args()
    files.check_folder(options.trace.absolute().parent, 2**27, "--trace")
    flux = Flux2.load(
        options.model,
        options.variant,
        acceleration=options.acceleration,
        device=options.device,
        quantize=options.quantize,
        attention=options.attention,
        compile=options.compile or None,
    )
    request = {"prompt": "a lighthouse at dusk", "seed": 0, "image_size": options.size, "enable_safety_checker": False}
    if options.steps:
        request["num_inference_steps"] = options.steps
    rows, walls, steps = profiled(flux, request, options.trace)
    plan = ", ".join(f"{choice.what} {choice.value}" for choice in flux.plan.choices)
    print(f"{options.model}, {options.variant}, {options.acceleration}, {environment.processor()}: {plan}")
    for stage in ("denoise", "decode"):
        own = [row for row in rows if row.stage == stage]
        print(f"\n{table(own, walls[stage], stage, steps if stage == 'denoise' else 1)}")
    print(f"\nwritten: {options.trace}")


if __name__ == "__main__":
    try:
        main()
    except Flux2Error as error:
        raise SystemExit(str(error)) from None
