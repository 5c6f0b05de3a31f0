"""The acceleration tiers of a full-size model beside other people's pipelines, on random weights that are drawn on the card.

    python -m benchmarks.tiers                                   # dev at 1024×1024, 28 steps; takes up to 130 GB of device memory
    python -m benchmarks.tiers --model klein-9b --only high --only "torchao fp8"
    python -m benchmarks.tiers --model tiny --size 512x512 --device cpu    # the same code where there is no card

What is timed is denoising: from noise and a prompt's embedding to a picture's latents, with the weights on the device. All share
one set of 16-bit weights, and one after another takes turns with diffusers' stock pipeline and lets go of what it made of them;
those come first that aims are about, and the result is written anew after every picture. The others' pipelines are made as
`flux2-local bench` makes them. Tiers
run as the plan says; "mask" beside a tier replays the steps that the bundled model's step cache skipped in it
(``benchmarks/masks.py``), since what random weights draw says nothing about what may be skipped; a pipeline that decides by its own
activations, as cache-dit does, is at their mercy. For the same reason the error of the latents, against diffusers', says only
whether both compute the same where nothing is skipped and nothing is quantized.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
from torch import Tensor

from flux2_local import costs, load, rates, weights
from flux2_local.bench import environment, peers
from flux2_local.bench.contenders import BASE, CONTENDERS, blocks_skipped
from flux2_local.bench.subject import Subject
from flux2_local.cache import Course, watched
from flux2_local.cli.options import parse_size
from flux2_local.costs import Work
from flux2_local.errors import BackendUnavailableError, Flux2Error
from flux2_local.explore import family_architecture
from flux2_local.files import cache_folder, free_name
from flux2_local.hardware import Hardware, probe
from flux2_local.latents import image_positions, noise, pack, text_positions
from flux2_local.load import DTYPES
from flux2_local.model.blocks import SCHEDULE
from flux2_local.model.compiled import compile_blocks
from flux2_local.model.meta import meta
from flux2_local.model.transformer import Flux2Transformer
from flux2_local.plan import Plan
from flux2_local.presets import models, show_bytes
from flux2_local.quant.convert import convert
from flux2_local.quant.recipe import Recipe
from flux2_local.request import Acceleration, make_request
from flux2_local.sampler import Conditions, denoise
from flux2_local.schedule import make_schedule
from flux2_local.settings import choose, make_settings
from flux2_local.stages import synchronize
from flux2_local.store import Checkpoint, find

from . import masks, synthetic
from .verdicts import Verdict, tally
from .verdicts import told as told_verdicts

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
        tell: how many times its last picture left out a double and a single block; ``skipped`` is what it told.
        choices: of our plans, what was decided.
        first, samples: seconds of the first picture, which compiles and warms up, and of the others.
        beside: the stock pipeline's seconds in the same rounds as ``samples``.
        latents: of the last picture.
    """

    name: str
    dtype: str
    run: Run
    tell: Callable[[], tuple[int, int]]
    skipped: tuple[int, int] = (0, 0)
    choices: dict[str, str] = field(default_factory=dict)
    first: float = 0.0
    samples: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    latents: Tensor | None = None


@dataclass(frozen=True)
class Tier:
    """One of ours.

    Attributes:
        acceleration: the tier.
        quantize: a format by name, or "auto".
        mask: whether the recorded step cache of the tier is replayed.
    """

    acceleration: Acceleration
    quantize: str = "auto"
    mask: bool = False


OURS = {
    "none": Tier("none"),
    "regular, mask": Tier("regular", mask=True),
    "high, mask": Tier("high", mask=True),
    "regular": Tier("regular"),
    "high, int8, mask": Tier("high", "builtin-int8", mask=True),
    "high, fp8, mask": Tier("high", "builtin-fp8", mask=True),
    "high": Tier("high"),
    "high, int8": Tier("high", "builtin-int8"),
    "high, fp8": Tier("high", "builtin-fp8"),
}
"""What aims are about comes first: measuring may end early."""

PEERS = ("cache-dit", "diffusers, compiled", "cache-dit, compiled", "torchao int8", "torchao fp8")
"""Of ``flux2-local bench``'s contenders those that keep all weights on the device (offload is in :mod:`.budgets`)."""

AIMS = {"none": 1.4, "regular, mask": 2.2, "high, mask": 4.5}
BUSY = 0.75
"""Aims for dev at 1024×1024 and 28 steps on an H200: times diffusers' speed, and the share of the measured product rate that a 16-bit
step with nothing skipped reaches."""


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

    @property
    def subject(self) -> Subject:
        """What the contenders of `flux2-local bench` are told."""
        work = self.work
        return Subject(str(self.checkpoint.folder), self.hardware.device, work.width, work.height, work.steps)

    def stock(self, change: peers.Change = peers.plain, name: str = BASE) -> Contender:
        """diffusers' pipeline without its text encoder, made faster or smaller, and placed, by ``change``."""
        folder, preset = self.checkpoint.folder, self.checkpoint.preset
        with torch.device("meta"):
            transformer = Flux2Transformer2DModel.from_config(self.checkpoint.config("transformer"))
        transformer.load_state_dict(self.state, assign=True)
        vae = AutoencoderKLFlux2.from_pretrained(folder / "vae", torch_dtype=DTYPES[self.dtype])
        parts = {"text_encoder": None, "tokenizer": None, "transformer": transformer.eval(), "vae": vae}
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
        pipe = getattr(diffusers, preset.pipeline)(scheduler=scheduler, **parts)
        pipe.set_progress_bar_config(disable=True)
        change(pipe, self.subject)
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

        return Contender(name, self.dtype, run, lambda: peers.blocks_skipped(transformer))

    def peer(self, name: str) -> Contender:
        """One of :data:`PEERS`.

        Raises:
            BackendUnavailableError: it cannot run here.
        """
        known = CONTENDERS[name]
        if (obstacle := known.obstacle(self.subject)) is not None:
            raise BackendUnavailableError(obstacle)
        assert known.change is not None
        return self.stock(known.change, name)

    def plan(self, tier: Tier) -> Plan:
        """What this machine's plan says."""
        settings = make_settings("standard", tier.acceleration, dtype=self.dtype, quantize=tier.quantize)
        return choose(self.checkpoint.folder, settings, self.hardware, self.work)[1]

    def tier(self, name: str) -> Contender:
        """One of :data:`OURS`; the weights stay on the device whatever the plan says of their place.

        Raises:
            PlanError: this machine has no way to run it.
            RequestError: no step cache was recorded for so many steps.
        """
        tier = OURS[name]
        plan, cache = self.plan(tier), None
        if tier.mask:
            cache = masks.read(tier.acceleration, self.work.steps)
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
        seen: list[Course] = []
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
            with watched() as courses:
                latents = denoise(net, start, schedule, conditions, after, cache or plan.cache)
            seen[:] = courses
            return latents

        blocks = arch.transformer.num_layers, arch.transformer.num_single_layers
        choices = {choice.what: choice.value for choice in plan.choices}
        if cache is not None:
            choices["step cache"] = f"recorded: {len(cache.skips)} of {cache.steps} steps skipped"
        return Contender(name, plan.dtype, run, lambda: blocks_skipped(seen, blocks), choices=choices)


def prepare(folder: Path, hardware: Hardware, width: int, height: int, steps: int, home: torch.device) -> Bench:
    """Draw the weights, on the device or the host (``home``)."""
    checkpoint, dtype = find(folder, "standard"), hardware.fast_dtypes[0]
    config = load.architecture(checkpoint).transformer
    net = synthetic.transformer(config, load.REFERENCE, DTYPES[dtype], torch.device(hardware.device), home)
    return Bench(checkpoint, hardware, Work(width, height, steps), net.state_dict())


def check_memory(name: str, arch: costs.Architecture, hardware: Hardware) -> None:
    """Make sure that a model's weights and a quantized copy fit at once.

    Raises:
        BackendUnavailableError: they do not.
    """
    need = 2 * costs.parameters(arch)["transformer"] * DTYPES[hardware.fast_dtypes[0]].itemsize
    if need > hardware.free:
        raise BackendUnavailableError(
            f"{name}'s transformer, a copy of 8 bits and what making it takes are {show_bytes(need)}, and "
            f"{show_bytes(hardware.free)} are free on {hardware.device}. Name a smaller model with --model."
        )


def largest(hardware: Hardware) -> str:
    """The largest of :data:`.synthetic.FULL` that fits (:func:`check_memory`).

    Raises:
        BackendUnavailableError: none does; of the smallest.
    """
    for name in synthetic.FULL:
        try:
            check_memory(name, family_architecture(models()[name]), hardware)
            return name
        except BackendUnavailableError as error:
            refused = error
    raise refused


@dataclass
class Outcome:
    """Who was built, and why others were not or went no further."""

    contenders: list[Contender] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)

    def build(self, bench: Bench, name: str) -> Contender | None:
        """One that is there from now on; None if it cannot be built."""
        try:
            made = bench.stock() if name == BASE else bench.tier(name) if name in OURS else bench.peer(name)
        except Exception as error:  # whatever a contender fails with is its result
            self.refuse(name, error)
            return None
        self.contenders.append(made)
        return made

    @property
    def measured(self) -> list[Contender]:
        """Those with a sample."""
        return [one for one in self.contenders if one.samples]

    def refuse(self, name: str, error: Exception) -> None:
        self.refused[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        print(f"{name}: {self.refused[name]}", flush=True)


def measure(bench: Bench, names: Sequence[str], rounds: int) -> Iterator[Outcome]:
    """Each of ``names`` in turn with the stock pipeline, one after another; what is known, after every picture. Where the stock
    pipeline fails they go on alone."""
    outcome = Outcome()
    stock = outcome.build(bench, BASE)
    for name in names:
        if (one := outcome.build(bench, name)) is not None:
            pair = [one] if stock is None or BASE in outcome.refused else [stock, one]
            for _ in take_turns(pair, bench.device, rounds, outcome):
                yield outcome
            one.run = one.tell = nothing  # and with them its weights
        torch._dynamo.reset()  # the next one compiles the same code of other modules
        gc.collect()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
        yield outcome


def nothing(*_: Any) -> Any:
    raise RuntimeError("it has been let go")


def take_turns(pair: list[Contender], device: torch.device, rounds: int, outcome: Outcome) -> Iterator[None]:
    """A first picture each unless it was drawn before, then ``rounds`` in turn, the stock pipeline before the other one; yields after
    every picture. The stock pipeline is not asked again if it fails, and nothing is once the other one does."""
    stock, able = pair[0], list(pair)
    for number in range(rounds + 1):
        for contender in list(able):
            if number == 0 and contender.first:
                continue
            try:
                seconds = timed(contender, device)
            except Exception as error:  # such as what torch.compile or a package raises
                outcome.refuse(contender.name, error)
                able.remove(contender)
                if contender is pair[-1]:
                    return
                continue
            if number == 0:
                contender.first = seconds
            else:
                contender.samples.append(seconds)
                if stock in able and stock.name == BASE:
                    contender.beside.append(stock.samples[-1])
            print(f"{contender.name}: {seconds:.3f} s{'' if number else ', the first one'}", flush=True)
            yield


def timed(contender: Contender, device: torch.device) -> float:
    """Seconds of one picture, which it keeps the latents of."""
    synchronize(device)
    start = time.perf_counter()
    contender.latents = contender.run(lambda: None)
    synchronize(device)
    seconds = time.perf_counter() - start
    contender.skipped = contender.tell()
    return seconds


def figures(contenders: list[Contender], bench: Bench, measured: dict[str, float]) -> list[dict[str, Any]]:
    """A record each: ratios are medians over the rounds; ``tflop_per_s`` is of all steps' arithmetic, and the shares of the product
    and the copy rate are of what was computed. Formats other than the activations' are held to the rate of these. Where the stock
    pipeline failed there is no ratio and no error."""
    arch = replace(load.architecture(bench.checkpoint), passes=1)
    stock = next((one.latents for one in contenders if one.name == BASE), None)
    tokens = arch.tokens(bench.work.width, bench.work.height) + arch.text_tokens
    step, blocks = costs.step_flops(arch, bench.work), costs.one_block_flops(arch, tokens, tokens)
    rows = []
    for contender in contenders:
        assert contender.latents is not None
        seconds, skipped = statistics.median(contender.samples), contender.skipped
        ratios = [a / b for a, b in zip(contender.beside, contender.samples, strict=False)]  # it may have failed since
        flops = bench.work.steps * step
        computed = flops - sum(count * one for count, one in zip(skipped, blocks, strict=True))
        moved = bench.work.steps * computed / flops * costs.step_bytes(arch, bench.work, contender.dtype)
        rows.append(
            {
                "name": contender.name,
                "dtype": contender.dtype,
                "seconds": seconds,
                "ratio": statistics.median(ratios) if ratios else None,
                "step_seconds": seconds / bench.work.steps,
                "tflop_per_s": flops / seconds / 1e12,
                "share": computed / seconds / measured[contender.dtype],
                "copy_share": moved / seconds / measured["copy"],
                "skipped": skipped,
                "error": None if stock is None else synthetic.relative_error(contender.latents, stock),
                "first_seconds": contender.first,
                "samples": contender.samples,
                "plan": contender.choices,
            }
        )
    return rows


def aims(rows: Sequence[dict[str, Any]]) -> Iterator[Verdict]:
    """Whether :data:`AIMS` were reached."""
    found = {row["name"]: row for row in rows}

    def held(name: str, figure: str, least: float) -> bool | None:
        value = found.get(name, {}).get(figure)
        return None if value is None else value >= least

    for name, ratio in AIMS.items():
        yield name, f"{ratio} times diffusers", held(name, "ratio", ratio)
    for name in ("none", "regular"):
        yield name, f"{BUSY:.0%} of the product rate", held(name, "share", BUSY)


def table(rows: list[dict[str, Any]]) -> str:
    head = ("", "seconds", "× diffusers", "TFLOP/s", "of products", "of copies", "error")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for r in rows:
        ratio, error = (
            "" if r[key] is None else f"{r[key]:{form}}" for key, form in (("ratio", ".2f"), ("error", ".2g"))
        )
        lines.append(
            f"| {r['name']} | {r['seconds']:.3f} | {ratio} | {r['tflop_per_s']:.3g} | {r['share']:.0%} "
            f"| {r['copy_share']:.0%} | {error} |"
        )
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
    parser.add_argument("--out", type=Path, help=f"the JSON file (default: a new benchmarks/results/{kind}-DATE.json)")
    return parser


def pixels(text: str) -> tuple[int, int]:
    """Width and height that a request may have."""
    return make_request("standard", {"prompt": "a", "image_size": parse_size(text)}).size


def main() -> None:
    parser = options("tiers", __doc__)
    parser.add_argument("--rounds", type=int, default=3, help="pictures each, the first left out (default 3)")
    names = (*OURS, *PEERS)
    parser.add_argument(
        "--only", action="append", choices=names, metavar="NAME", help="may be given again: " + "; ".join(names)
    )
    args = parser.parse_args()
    hardware, (width, height) = probe(args.device), args.size
    record = environment.record(hardware.device)
    record |= {"model": args.model, "size": [width, height], "steps": args.steps, "rows": [], "refused": {}}
    record |= {"not_asked": [n for n in names if args.only and n not in args.only]}
    path = args.out or free_name(environment.place(record, "tiers"))
    with tempfile.TemporaryDirectory() as scratch:
        folder = synthetic.folder(args.model, Path(scratch) / args.model)
        check_memory(args.model, load.architecture(find(folder, "standard")), hardware)
        bench = prepare(folder, hardware, width, height, args.steps, torch.device(hardware.device))
        record["rates"] = rates.measure(hardware.device, {"float32", bench.dtype}, seconds=0.5)
        for outcome in measure(bench, args.only or names, args.rounds):
            record |= {"rows": figures(outcome.measured, bench, record["rates"]), "refused": outcome.refused}
            if (args.model, width, height, args.steps, hardware.kind) == ("dev", 1024, 1024, 28, "cuda"):
                record["aims"] = tally(aims(record["rows"]))
            environment.keep(record, "tiers", path)
    print(table(record["rows"]))
    if "aims" in record:
        print(told_verdicts(record["aims"]))
    if record["not_asked"]:
        print(f"not asked for: {'; '.join(record['not_asked'])}")
    print(f"written: {path}")


if __name__ == "__main__":
    try:
        main()
    except Flux2Error as error:
        raise SystemExit(f"{error}") from None
