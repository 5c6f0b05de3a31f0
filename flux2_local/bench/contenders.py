"""The table of contenders: what each is, how it is built from a subject's components, and why it may not run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np

from .. import load
from ..cache import Course, watched
from ..errors import RequestError
from ..hardware import package
from . import peers
from .subject import Loaded, Subject, Told

Group = Literal["ours", "peer", "floor"]


@dataclass(frozen=True)
class Contender:
    """One way of making the same pictures.

    Attributes:
        name: what the user and the results call it.
        group: "ours", "peer", or "floor": what nothing but rounding changes, to hold the others' quality against.
        note: what it is, in a line.
        build: loads it.
        kinds: devices it can run on.
        needs: distributions it needs.
        why_kinds: why it needs these devices, where it does.
        usual: whether it is measured where none is named.
        other_noise: it starts from noise of its own, so that its pictures are others and no measure of likeness says anything.
        change: what makes the stock pipeline it, where that is how it is built.
    """

    name: str
    group: Group
    note: str
    build: Callable[[Subject], Loaded]
    kinds: tuple[str, ...] = ("cuda", "cpu", "mps")
    needs: tuple[str, ...] = ()
    why_kinds: str = ""
    usual: bool = True
    other_noise: bool = False
    change: peers.Change | None = None

    def obstacle(self, subject: Subject) -> str | None:
        """Why it cannot run on ``subject``, as far as that is known beforehand; None where nothing speaks against it."""
        if subject.kind not in self.kinds:
            return f"needs {' or '.join(self.kinds)}, and this is {subject.kind}: {self.why_kinds}"
        missing = [found for found in map(package, self.needs) if not found.usable]
        return f"{missing[0].name} is {missing[0].problem}" if missing else None


def ours(subject: Subject, variant: str, acceleration: str, **wishes: Any) -> Loaded:
    """:class:`flux2_local.Flux2` as a user loads it.

    Args:
        wishes: further arguments of :meth:`Flux2.load`.
    """
    from ..pipeline import Flux2
    from ..progress import Reporter

    flux = Flux2.load(subject.model, variant, acceleration=acceleration, device=subject.device, **wishes)  # type: ignore[arg-type]
    size = {"width": subject.width, "height": subject.height}
    fields: dict[str, Any] = {"image_size": size, "enable_safety_checker": False}
    if variant == "standard":
        fields["num_inference_steps"] = subject.steps

    def draw(prompt: str, seed: int, steps: int | None = None) -> tuple[np.ndarray, Told]:
        run = flux._run({"prompt": prompt, "seed": seed, **fields}, Reporter())
        if steps is not None:  # fewer than a request may ask for
            run.request = run.request.model_copy(update={"num_inference_steps": steps})
        with watched() as courses:
            (result,) = flux._work([run])
        stages = {k: v for k, v in result.timings.to_dict().items() if v and k not in ("inference", "total")}
        choices = {choice.what: choice.value for choice in run.plan.choices}
        return np.asarray(result.images[0].image), Told(stages, blocks_skipped(courses, blocks), choices)

    plan, config = flux.plan, load.architecture(flux.checkpoint).transformer
    blocks = config.num_layers, config.num_single_layers
    steps = fields.get("num_inference_steps") or flux.checkpoint.preset.recipe(flux.settings.variant).steps
    held = plan.transformer.format
    facts = {"dtype": plan.dtype, "steps": steps, "compiles": plan.compile != "off"}
    return Loaded(draw, facts | {"products": plan.dtype if held in load.DTYPES else held})


def blocks_skipped(courses: Sequence[Course], blocks: tuple[int, int]) -> tuple[int, int]:
    """How many times a double and a single block were left out, of so many ``blocks``; where a cache probes, the first is not."""
    double = sum(len(skipped) * (blocks[0] - probes) for probes, skipped in courses)
    return double, sum(len(skipped) for _, skipped in courses) * blocks[1]


def in_another_dtype(subject: Subject) -> Loaded:
    """The exact tier in the type that it would not take by itself."""
    from ..presets import tiers

    usual = tiers()["none"].dtypes[subject.kind][0]
    return ours(subject, "standard", "none", dtype="bfloat16" if usual == "float32" else "float32")


def mine(name: str, note: str, variant: str, acceleration: str, group: Group = "ours", **wishes: Any) -> Contender:
    return Contender(name, group, note, partial(ours, variant=variant, acceleration=acceleration, **wishes))


def theirs(name: str, note: str, change: peers.Change, **needs: Any) -> Contender:
    return Contender(name, "peer", note, partial(peers.pipeline, change=change), change=change, **needs)


OFFLOAD = {
    "kinds": ("cuda",),
    "why_kinds": "offloading moves weights between host and card, and without a card there is nothing to move",
}
REFERENCE, BASE, IN_16_BIT = "standard, none", "diffusers", "diffusers, 16 bit"
"""Quality is held against the pictures of the first, speed against the seconds of the second, or the third where that is too
large."""

CONTENDERS: dict[str, Contender] = {
    contender.name: contender
    for contender in (
        Contender(BASE, "peer", "stock pipeline, eager, float32 on a CPU and bfloat16 elsewhere", peers.pipeline),
        mine(REFERENCE, "the pixels of diffusers' pipeline", "standard", "none"),
        mine("standard, regular", "the default", "standard", "regular"),
        mine("standard, high", "the fastest within the stated bound", "standard", "high"),
        mine("standard, high, int8", "with 8-bit weights", "standard", "high", quantize="builtin-int8"),
        mine("turbo", "the turbo variant (8 steps), regular", "turbo", "regular"),
        mine("flash", "the flash variant (4 steps), regular", "flash", "regular"),
        *(
            replace(mine(f"{variant}, {tier}", f"the {variant} variant, {tier}", variant, tier), usual=False)
            for variant in ("turbo", "flash") for tier in ("none", "high")
        ),
        Contender("none, another dtype", "floor", "rounding: none in bfloat16 (float32 where none is 16 bit)", in_another_dtype),
        mine("none, another kernel", "rounding: none with attention written out", "standard", "none", "floor",
             attention="sdpa-math"),
        theirs(IN_16_BIT, "eager, in the device's fast 16-bit type", peers.plain),
        theirs("diffusers, compiled", "16 bit, compile_repeated_blocks(fullgraph=True)", peers.compiled),
        theirs("cache-dit", "16 bit, eager, DBCache defaults (small models: one first block)", peers.cache_dit, needs=("cache-dit",)),
        theirs("cache-dit, compiled", "the same, then compile_repeated_blocks", peers.cache_dit_compiled,
               needs=("cache-dit",)),
        theirs("torchao int8", "int8 dynamic activations and weights, compiled", peers.torchao_int8, needs=("torchao",)),
        theirs("torchao fp8", "fp8 dynamic activations and weights per row, compiled", peers.torchao_fp8, kinds=("cuda",),
               needs=("torchao",), why_kinds="torchao multiplies in fp8 on cards of compute capability 8.9 and newer"),
        Contender("stable-diffusion.cpp", "peer", "q8_0 weights; its own noise and rounding", peers.stable_diffusion_cpp, ("cpu",),
                  ("stable-diffusion-cpp-python",), "it is measured where it is at home", other_noise=True),
        theirs("diffusers, model offload", "16 bit, enable_model_cpu_offload", peers.model_offload, **OFFLOAD),
        theirs("diffusers, sequential offload", "16 bit, enable_sequential_cpu_offload", peers.sequential_offload, **OFFLOAD),
        theirs("diffusers, group offload", "16 bit, block-level groups prefetched on a stream", peers.group_offload, **OFFLOAD),
    )
}  # fmt: skip
"""Every contender by name, in the order of the results."""


def select(names: list[str] | None, every: bool = False) -> list[Contender]:
    """The contenders that are named, with the two that the others are held against; where none is named the usual ones, or
    ``every`` one.

    Raises:
        RequestError: a name that there is not.
    """
    unknown = [name for name in names or () if name not in CONTENDERS]
    if unknown:
        raise RequestError(f"There is no contender {unknown[0]!r}. There are: {'; '.join(CONTENDERS)}.")
    if names:
        return [c for c in CONTENDERS.values() if c.name in (*names, REFERENCE, BASE)]
    return [c for c in CONTENDERS.values() if c.usual or every]
