"""Request + model + hardware -> :class:`Plan`: what will run, why, and what lost.

A plan is a frozen value. Loading builds exactly what it says, and nothing outside it changes behaviour.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from flux2_kernels import Place, place_of

from . import attention as attentions
from . import costs, quant
from .costs import Architecture, Work
from .errors import BudgetError
from .hardware import Hardware
from .model import kernels
from .presets import CachePolicy, Tier, show_bytes
from .request import Acceleration, Variant

Placement = Literal["resident", "staged", "streamed"]
SYSTEM_RESERVE = {"cuda": 600 * 2**20, "cpu": 512 * 2**20, "mps": 2 * 2**30}
"""Bytes left to the CUDA context or to the operating system."""

TILE = 512
"""Side in pixels of the tiles that pictures are decoded in where memory is short; not for the exact tier."""


@dataclass(frozen=True)
class Choice:
    """One decision: what was chosen, why, and every candidate that lost with its reason."""

    what: str
    value: str
    reason: str
    rejected: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class ComponentPlan:
    """How one network is held.

    Attributes:
        format: its weights' format, a compute type or one of :mod:`flux2_local.quant`.
        placement: where they are while it works and while it does not.
        keep: layers that are kept in the compute type although the format would cover them.
        stay: of a streamed network, numbers of the blocks that stay on the device while it works.
        mapped: of a streamed network, whether the other blocks come from their files rather than from host memory.
    """

    format: str
    placement: Placement
    keep: tuple[str, ...] = ()
    stay: tuple[int, ...] = ()
    mapped: bool = False


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before the first tensor is read.

    Attributes:
        model, variant, acceleration: what was asked for.
        device: torch's name of the device that computes.
        dtype: of activations.
        transformer, text_encoder, vae: format and placement of the three networks.
        attention: the attention backend.
        ops: the implementation of what lies between the matmuls.
        compile: "off", or what is compiled.
        cache: when steps may be skipped; None computes all.
        batch: pictures denoised together.
        vae_tile: side of a decoding tile in pixels, or 0 for whole pictures.
        channels_last: whether convolutions run in channels-last layout.
        load_seconds, encode_seconds, step_seconds, decode_seconds: predictions for ``work``.
        peak_bytes: predicted peak of device memory.
        work: the request that predictions are for.
        choices: every decision with its reason.
    """

    model: str
    variant: Variant
    acceleration: Acceleration
    device: str
    dtype: str
    transformer: ComponentPlan
    text_encoder: ComponentPlan
    vae: ComponentPlan
    attention: str
    ops: str
    compile: str
    cache: CachePolicy | None
    batch: int
    vae_tile: int
    channels_last: bool
    encode_seconds: float
    step_seconds: float
    decode_seconds: float
    peak_bytes: int
    work: Work
    choices: tuple[Choice, ...]

    @property
    def seconds(self) -> float:
        """Predicted seconds for one picture of ``work``, loading not included."""
        return self.encode_seconds + self.work.steps * self.step_seconds + self.decode_seconds

    def __str__(self) -> str:
        return explain(self)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values, for ``--json``."""
        from dataclasses import asdict

        return {**asdict(self), "seconds": self.seconds}


@dataclass(frozen=True)
class Need:
    """What is to be planned for: a model's architecture, a variant, a tier and a request's size."""

    model: str
    variant: Variant
    tier: Tier
    arch: Architecture
    work: Work


def make_plan(
    need: Need,
    hardware: Hardware,
    budget: int | None = None,
    dtype: str | None = None,
    attention: str = attentions.AUTO,
    quantize: str = "auto",
) -> Plan:
    """Choose how to run.

    Args:
        need: what is asked for.
        hardware: what there is.
        budget: bytes of device memory that must not be exceeded; what is free where None.
        dtype: compute type, where the caller insists on one.
        attention: "auto", or the attention backend that the caller insists on.
        quantize: "auto", "none", or the weights' format, where the caller insists on one.

    Raises:
        BackendUnavailableError: the backend or the format insisted on cannot be used on this hardware.
        BudgetError: nothing fits; it carries the smallest budget that would.
    """
    kind_choice, dtype = choose_dtype(need.tier, hardware, dtype)
    attention_choice = choose_attention(need, hardware, dtype, attention)
    ops_choice = choose_ops(need, hardware, dtype)
    limit = min(budget or hardware.free, hardware.free) - SYSTEM_RESERVE[hardware.kind]
    tiles = (0,) if need.tier.exact else (0, TILE)
    wanted = formats(need.tier, hardware, dtype, quantize)
    candidates = [
        Candidate(need, dtype, form, placement, tile)
        for form in wanted
        for placement in placements(hardware)
        for tile in tiles
    ]
    winner = next((c for c in candidates if c.peak <= limit), None)
    if winner is None:
        best = min(candidates, key=lambda c: c.peak)
        smallest = best.peak + SYSTEM_RESERVE[hardware.kind]
        raise BudgetError(
            f"{need.model} at {need.work.width}×{need.work.height} needs at least {show_bytes(smallest)} of "
            f"{'memory' if hardware.kind == 'cpu' else 'device memory'} on {hardware.name} in {best.format}, and "
            f"{show_bytes(max(0, limit + SYSTEM_RESERVE[hardware.kind]))} may be used. Give it more (--vram), free some, or use "
            f"a smaller model or picture.",
            smallest,
        )
    rejected = tuple(
        (c.name, f"needs {show_bytes(c.peak)}, {show_bytes(limit)} may be used")
        for c in candidates[: candidates.index(winner)]
    )
    rate = hardware.flops.get(dtype, hardware.flops["float32"])
    arch, work = need.arch, need.work
    cache_choice, cache = choose_cache(need)
    held = ComponentPlan(dtype, winner.placement)
    transformer, text_encoder = (component_plan(winner, name) for name in ("transformer", "text_encoder"))
    return Plan(
        model=need.model,
        variant=need.variant,
        acceleration=need.tier.name,
        device=hardware.device,
        dtype=dtype,
        transformer=transformer,
        text_encoder=text_encoder,
        vae=held,
        attention=attention_choice.value,
        ops=ops_choice.value,
        compile="off",
        cache=cache,
        batch=1,
        vae_tile=winner.tile,
        channels_last=not need.tier.exact,
        encode_seconds=costs.encode_flops(arch) / rate,
        step_seconds=costs.step_flops(arch, work) / rate,
        decode_seconds=costs.decode_flops(arch, work.width, work.height) / rate,
        peak_bytes=winner.peak,
        work=work,
        choices=(
            kind_choice,
            choose_format(need.tier, wanted, winner, quantize),
            Choice("placement", winner.name, winner.reason, rejected),
            attention_choice,
            ops_choice,
            layout_choice(need.tier),
            cache_choice,
        ),
    )


def built(plan: Plan) -> tuple[Any, ...]:
    """The part of a plan that loading turns into weights and functions."""
    networks = plan.transformer, plan.text_encoder, plan.vae
    return plan.device, plan.dtype, *networks, plan.channels_last, plan.attention, plan.ops


def choose_attention(need: Need, hardware: Hardware, dtype: str, asked: str) -> Choice:
    """The attention backend, one for every size that is asked for, chosen at a square megapixel.

    Raises:
        BackendUnavailableError: the one asked for cannot be used.
    """
    arch = need.arch
    shape = arch.tokens(1024, 1024) + arch.text_tokens, arch.transformer.num_attention_heads
    problem = attentions.problem_on(hardware, dtype, *shape, arch.transformer.attention_head_dim)
    picked = attentions.pick(asked, problem, need.tier)
    return Choice("attention", picked.name, picked.reason, picked.rejected)


def choose_ops(need: Need, hardware: Hardware, dtype: str) -> Choice:
    """What computes between the matmuls: Triton kernels where they run and rounding may differ."""
    here = place_of("cpu")
    place = Place(hardware.kind, hardware.sm or 0, here.triton or hardware.described, here.interpreter)
    against = kernels.reason_against(place, dtype, need.arch.transformer)
    if need.tier.exact:
        lost = against or "it rounds once where the reference rounds after every operation"
        return Choice(
            "ops", "reference", "the exact tier keeps the reference's operations, bit for bit", (("triton", lost),)
        )
    if against:
        return Choice("ops", "reference", "plain torch, which runs everywhere", (("triton", against),))
    return Choice(
        "ops",
        "triton",
        "fused kernels, each one pass over memory and within rounding of the reference",
        (("reference", "a pass over memory for every operation"),),
    )


def layout_choice(tier: Tier) -> Choice:
    if tier.exact:
        return Choice("convolutions", "as stored", "the exact tier keeps the reference's memory layout and rounding")
    return Choice("convolutions", "channels last", "the layout that fast convolutions want; it changes rounding only")


def choose_cache(need: Need) -> tuple[Choice, CachePolicy | None]:
    """Step caching, where the tier allows it, the model's thresholds are calibrated and there are steps to skip."""
    policy = need.tier.cache.get(need.model)
    if not need.tier.cache:
        return Choice("step cache", "off", f"the {need.tier.name} tier computes every step"), None
    if need.variant != "standard":
        return Choice("step cache", "off", f"{need.variant} has {need.work.steps} steps, each unlike the last"), None
    if policy is None:
        return Choice("step cache", "off", f"no thresholds are calibrated for {need.model}"), None
    reason = (
        f"the first block's change below {policy.threshold:g} skips the others, at most {policy.limit} steps in a row, "
        f"not in the first {policy.warmup} or the last {policy.tail}"
    )
    return Choice("step cache", "first block", reason), policy


def choose_dtype(tier: Tier, hardware: Hardware, asked: str | None) -> tuple[Choice, str]:
    """The compute type: what was asked for, or the first of the tier's that this device runs at full rate."""
    if asked is not None:
        return Choice("dtype", asked, "asked for"), asked
    wanted = tier.dtypes[hardware.kind]
    rejected: list[tuple[str, str]] = []
    for dtype in wanted:
        if dtype in hardware.fast_dtypes or dtype == wanted[-1]:
            why = "what the exact tier runs in" if tier.exact else f"{hardware.name} runs it at full rate"
            if dtype == "float32" and not tier.exact:
                why = "the only type that this device runs well"
            return Choice("dtype", dtype, why, tuple(rejected)), dtype
        rejected.append((dtype, f"{hardware.name} has no fast {dtype} matrix products"))
    raise AssertionError("a tier without dtypes")


def formats(tier: Tier, hardware: Hardware, dtype: str, asked: str) -> tuple[quant.Format | None, ...]:
    """Candidate formats of the weights, most wanted first; None is the compute type itself.

    Raises:
        BackendUnavailableError: the one asked for cannot be used here.
    """
    if asked == "none" or (asked == "auto" and tier.exact):
        return (None,)
    if asked != "auto":
        return (quant.find(asked, hardware, dtype),)
    usable = quant.automatic(hardware, dtype)
    faster = tuple(f for f in usable if tier.quantize and hardware.sm in f.faster)
    return (*faster, None, *(f for f in usable if f not in faster))


def choose_format(tier: Tier, wanted: tuple[quant.Format | None, ...], winner: Candidate, asked: str) -> Choice:
    """Why the weights of the transformer and the text encoder are held as they are."""
    form = winner.form
    before = wanted[: wanted.index(form)]
    rejected = tuple((winner.dtype if f is None else f.name, "does not fit in any placement") for f in before)
    if form is None:
        why = "asked for" if asked == "none" else "the exact tier quantizes nothing" if tier.exact else "it fits"
        return Choice("weights", winner.dtype, why, rejected)
    cost = f"{form.weight_bytes:.2f} bytes a weight, layers' outputs about {form.loss:.1%} off"
    if asked != "auto":
        why = "asked for" + (", although this tier promises the reference's pixels" if tier.exact else "")
    else:
        why = "the smallest loss that fits" if None in before else "measured faster on this device"
    return Choice("weights", form.name, f"{why}: {cost}" + (f"; it {form.note}" if form.note else ""), rejected)


def component_plan(winner: Candidate, component: str) -> ComponentPlan:
    """How the winner holds the transformer or the text encoder."""
    if winner.form is None:
        return ComponentPlan(winner.dtype, winner.placement)
    recipe = quant.recipe_for(winner.form, winner.need.model, component)
    return ComponentPlan(recipe.format, winner.placement, recipe.keep)


def placements(hardware: Hardware) -> tuple[Placement, ...]:
    """Candidate placements, fastest first. Where device and host share their memory, staging gains nothing."""
    return ("resident", "staged") if hardware.kind == "cuda" else ("resident",)


@dataclass(frozen=True)
class Candidate:
    """One way of holding the networks, with its peak of device memory."""

    need: Need
    dtype: str
    form: quant.Format | None
    placement: Placement
    tile: int

    @property
    def format(self) -> str:
        return self.dtype if self.form is None else self.form.name

    @property
    def name(self) -> str:
        weights = "" if self.form is None else f"{self.format} weights, "
        return f"{weights}{self.placement}, {f'decoded in {self.tile}-pixel tiles' if self.tile else 'decoded whole'}"

    @property
    def reason(self) -> str:
        where = (
            "everything stays on the device" if self.placement == "resident" else "one network at a time on the device"
        )
        return f"the fastest that fits: {where}, peak {show_bytes(self.peak)}"

    @property
    def peak(self) -> int:
        arch = self.need.arch
        held = costs.weight_bytes(arch, self.dtype, None if self.form is None else self.form.weight_bytes)
        step = costs.step_activations(arch, self.need.work, self.dtype)
        tiled = replace(self.need.work, width=self.tile, height=self.tile) if self.tile else self.need.work
        decode = costs.decode_activations(arch, tiled, self.dtype)
        if self.placement == "resident":
            return sum(held.values()) + max(step, decode)
        return max(held["text_encoder"], held["transformer"] + step, held["vae"] + decode)


def explain(plan: Plan) -> str:
    """The plan in words: what runs, each choice with its reason, and each candidate that lost."""
    work = plan.work
    lines = [
        f"{plan.model}, {plan.variant}, acceleration {plan.acceleration}, on {plan.device}",
        f"  predicted for {work.width}×{work.height}, {work.steps} steps: {plan.seconds:.1f} s "
        f"(prompt {plan.encode_seconds:.2f}, steps {work.steps} × {plan.step_seconds:.3f}, decode {plan.decode_seconds:.2f}), "
        f"peak {show_bytes(plan.peak_bytes)}",
    ]
    for choice in plan.choices:
        lines.append(f"  {choice.what}: {choice.value} — {choice.reason}")
        lines += [f"    not {name}: {why}" for name, why in choice.rejected]
    return "\n".join(lines)
