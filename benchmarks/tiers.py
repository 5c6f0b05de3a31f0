"""The acceleration tiers of a full-size model beside stock diffusers, on random weights that are drawn on the card.

    python -m benchmarks.tiers                                   # dev at 1024×1024, 28 steps; takes up to 130 GB of device memory
    python -m benchmarks.tiers --model klein-9b
    python -m benchmarks.tiers --model tiny --size 512x512 --device cpu    # the same code where there is no card

What is timed is denoising: from noise and a prompt's embedding to a picture's latents, with the weights on the device. All share
one set of weights, quantized where a tier's plan says so, and take turns. A step cache follows its recorded mask, since what
random weights draw says nothing about what may be skipped; for the same reason the error of the latents, against diffusers', says
only whether both compute the same where nothing is skipped and nothing is quantized.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
from torch import Tensor

from flux2_local import costs, load, rates, weights
from flux2_local.bench import environment
from flux2_local.cli.options import parse_size
from flux2_local.costs import Work
from flux2_local.errors import BackendUnavailableError, Flux2Error
from flux2_local.files import cache_folder
from flux2_local.hardware import Hardware, probe
from flux2_local.latents import image_positions, noise, pack, text_positions
from flux2_local.load import DTYPES
from flux2_local.model.blocks import SCHEDULE
from flux2_local.model.compiled import compile_blocks
from flux2_local.model.meta import meta
from flux2_local.model.transformer import Flux2Transformer
from flux2_local.presets import show_bytes
from flux2_local.quant.convert import convert
from flux2_local.quant.recipe import Recipe
from flux2_local.request import ACCELERATIONS, Acceleration, make_request
from flux2_local.sampler import Conditions, denoise
from flux2_local.schedule import make_schedule
from flux2_local.settings import choose, make_settings
from flux2_local.stages import synchronize
from flux2_local.store import Checkpoint, find

from . import synthetic

GUIDANCE = 4.0
Told = Callable[[], Any]
Run = Callable[[Told], Tensor]
"""Denoises one picture and tells after each step; packed latents [1, N, C]."""


@dataclass
class Contender:
    """One way to the same latents.

    Attributes:
        name, dtype: which, and of what type its activations are.
        run: denoises.
        choices: of our plans, what was decided.
        first, samples: seconds of the first picture, which compiles and warms up, and of the others.
        latents: of the last picture.
    """

    name: str
    dtype: str
    run: Run
    choices: dict[str, str] = field(default_factory=dict)
    first: float = 0.0
    samples: list[float] = field(default_factory=list)
    latents: Tensor | None = None


@dataclass(frozen=True)
class Bench:
    """What all contenders share.

    Attributes:
        checkpoint: the model's folder.
        hardware: of the device.
        work: size and steps.
        state: the transformer's weights in 16 bit (32 where the device knows no fast 16-bit type), on the device.
    """

    checkpoint: Checkpoint
    hardware: Hardware
    work: Work
    state: dict[str, Tensor]

    @property
    def dtype(self) -> str:
        return self.hardware.fast_dtypes[0]

    @property
    def device(self) -> torch.device:
        return torch.device(self.hardware.device)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        side = load.architecture(self.checkpoint).multiple
        return self.work.height // side, self.work.width // side

    def stock(self, place: Callable[[Any, torch.device], None] | None = None) -> Contender:
        """diffusers' pipeline as it comes, or with its transformer placed by ``place``."""
        folder, preset = self.checkpoint.folder, self.checkpoint.preset
        with torch.device("meta"):
            transformer = Flux2Transformer2DModel.from_config(self.checkpoint.config("transformer"))
        transformer.load_state_dict(self.state, assign=True)
        if place is not None:
            place(transformer, self.device)
        vae = AutoencoderKLFlux2.from_pretrained(folder / "vae", torch_dtype=DTYPES[self.dtype]).to(self.device)
        parts = {"text_encoder": None, "tokenizer": None, "transformer": transformer.eval(), "vae": vae}
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
        pipe = getattr(diffusers, preset.pipeline)(scheduler=scheduler, **parts)
        pipe.set_progress_bar_config(disable=True)
        arch = load.architecture(self.checkpoint)
        text = synthetic.prompt_embedding(arch.transformer, arch.text_tokens, DTYPES[self.dtype], self.device)
        start = noise(0, arch.transformer.in_channels, *self.grid).to(self.device, DTYPES[self.dtype])

        def run(told: Told) -> Tensor:
            def after(*arguments: Any) -> dict[str, Any]:
                synchronize(self.device)
                told()
                return dict(arguments[-1])

            found: Tensor = pipe(
                prompt_embeds=text,
                latents=start,
                width=self.work.width,
                height=self.work.height,
                num_inference_steps=self.work.steps,
                guidance_scale=GUIDANCE if preset.guidance == "embedded" else 1.0,
                output_type="latent",
                callback_on_step_end=after,
            ).images
            return found

        return Contender("diffusers", self.dtype, run)

    def tier(self, name: Acceleration) -> Contender:
        """Ours, as this machine's plan says; the weights stay on the device whatever it says of their place."""
        settings = make_settings("standard", name, dtype=self.dtype)
        _, plan = choose(self.checkpoint.folder, settings, self.hardware, self.work)
        arch, device, preset = load.architecture(self.checkpoint), self.device, self.checkpoint.preset
        with meta():
            net = Flux2Transformer(arch.transformer, load.operations(plan, arch.transformer, device))
        for key, value in self.state.items():
            weights.assign(net, key, value)
        if plan.transformer.format not in DTYPES:
            convert(net, Recipe(plan.transformer.format, keep=plan.transformer.keep), DTYPES[plan.dtype], device)
        for part in SCHEDULE:
            getattr(net, part).to(DTYPES[plan.schedule])
        net.eval().requires_grad_(False)
        if plan.compile == "blocks":
            compile_blocks(net, cache_folder("compiled"))
        text = synthetic.prompt_embedding(arch.transformer, arch.text_tokens, DTYPES[plan.dtype], device)
        start = pack(noise(0, arch.transformer.in_channels, *self.grid)).to(device, DTYPES[plan.dtype])
        schedule = make_schedule(preset.recipe("standard"), self.work.steps, start.shape[1])
        positions = torch.cat([text_positions(text.shape[1]), image_positions(*self.grid)]).to(device)

        def run(told: Told) -> Tensor:
            def after(*_: Any) -> None:
                synchronize(device)
                told()

            conditions = Conditions(
                text=text,
                negative=None,
                guidance=GUIDANCE,
                embedded=preset.guidance == "embedded",
                references=None,
                rotary=net.rotary(positions),
            )
            return denoise(net, start, schedule, conditions, after, plan.cache)

        return Contender(name, plan.dtype, run, {choice.what: choice.value for choice in plan.choices})


def prepare(folder: Path, hardware: Hardware, width: int, height: int, steps: int, home: torch.device) -> Bench:
    """Draw the weights, on the device or the host (``home``)."""
    checkpoint, dtype = find(folder, "standard"), hardware.fast_dtypes[0]
    config = load.architecture(checkpoint).transformer
    net = synthetic.transformer(config, load.REFERENCE, DTYPES[dtype], torch.device(hardware.device), home)
    return Bench(checkpoint, hardware, Work(width, height, steps), net.state_dict())


def check_memory(folder: Path, hardware: Hardware) -> None:
    """Make sure that all tiers fit at once.

    Raises:
        BackendUnavailableError: they do not.
    """
    arch, dtype = load.architecture(find(folder, "standard")), hardware.fast_dtypes[0]
    need = 2 * costs.parameters(arch)["transformer"] * DTYPES[dtype].itemsize
    if need > hardware.free:
        raise BackendUnavailableError(
            f"{folder.name}'s transformer and its copies of 8 bits take {show_bytes(need)}, and {show_bytes(hardware.free)} are free "
            f"on {hardware.device}. Name a smaller model with --model."
        )


def measure(contenders: list[Contender], device: torch.device, rounds: int) -> None:
    """A first picture each, then ``rounds`` in turn."""
    for number in range(rounds + 1):
        for contender in contenders:
            synchronize(device)
            start = time.perf_counter()
            contender.latents = contender.run(lambda: None)
            synchronize(device)
            seconds = time.perf_counter() - start
            if number == 0:
                contender.first = seconds
            else:
                contender.samples.append(seconds)
            print(f"{contender.name}: {seconds:.3f} s{'' if number else ', the first one'}", flush=True)


def figures(contenders: list[Contender], bench: Bench, measured: dict[str, float]) -> list[dict[str, Any]]:
    """A record each: ratios are medians over the rounds, FLOPs those of a step with nothing skipped."""
    arch, stock = load.architecture(bench.checkpoint), contenders[0]
    flops = bench.work.steps * costs.step_flops(replace(arch, passes=1), bench.work)
    rows = []
    for contender in contenders:
        assert contender.latents is not None and stock.latents is not None
        seconds = statistics.median(contender.samples)
        ratios = [a / b for a, b in zip(stock.samples, contender.samples, strict=True)]
        rows.append(
            {
                "name": contender.name,
                "dtype": contender.dtype,
                "seconds": seconds,
                "ratio": statistics.median(ratios),
                "step_seconds": seconds / bench.work.steps,
                "tflop_per_s": flops / seconds / 1e12,
                "share": flops / seconds / measured[contender.dtype],
                "error": synthetic.relative_error(contender.latents, stock.latents),
                "first_seconds": contender.first,
                "samples": contender.samples,
                "plan": contender.choices,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| | seconds | × diffusers | TFLOP/s | of the product rate | error |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {r['name']} | {r['seconds']:.3f} | {r['ratio']:.2f} | {r['tflop_per_s']:.1f} | {r['share']:.0%} | {r['error']:.2g} |"
        for r in rows
    ]
    return "\n".join(lines)


def options(kind: str, about: str | None) -> argparse.ArgumentParser:
    """The options of a benchmark of full-size models, ``kind`` its module's and its results' name."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{kind}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=synthetic.SIZES, default="dev")
    parser.add_argument("--device", help="cuda, cuda:1 or cpu (default: the best there is)")
    parser.add_argument("--size", type=pixels, default="1024x1024", metavar="WIDTHxHEIGHT")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--out", type=Path, help=f"the JSON file (default benchmarks/results/{kind}-DATE.json)")
    return parser


def pixels(text: str) -> tuple[int, int]:
    """Width and height that a request may have."""
    return make_request("standard", {"prompt": "a", "image_size": parse_size(text)}).size


def main() -> None:
    parser = options("tiers", __doc__)
    parser.add_argument("--rounds", type=int, default=3, help="pictures each, the first left out (default 3)")
    args = parser.parse_args()
    hardware, (width, height) = probe(args.device), args.size
    with tempfile.TemporaryDirectory() as scratch:
        folder = synthetic.folder(args.model, Path(scratch) / args.model)
        check_memory(folder, hardware)
        bench = prepare(folder, hardware, width, height, args.steps, torch.device(hardware.device))
        contenders = [bench.stock(), *(bench.tier(name) for name in ACCELERATIONS)]
        dtypes = {contender.dtype for contender in contenders}
        measured = rates.measure(hardware.device, dtypes, seconds=0.5)
        measure(contenders, bench.device, args.rounds)
        rows = figures(contenders, bench, measured)
    record = environment.record(hardware.device)
    record |= {"model": args.model, "size": [width, height], "steps": args.steps, "rates": measured, "rows": rows}
    path = environment.keep(record, "tiers", args.out)
    print(f"{table(rows)}\nwritten: {path}")


if __name__ == "__main__":
    try:
        main()
    except Flux2Error as error:
        raise SystemExit(f"{error}") from None
