"""Request + model + hardware -> :class:`Plan`: what will run, why, and what lost.

A plan is a frozen value. Loading builds exactly what it says, and nothing outside it changes behaviour.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from . import quant
from .attention import AUTO
from .candidates import SYSTEM_RESERVE, Candidate, Draft, Need, Placement, Terms, layouts, least, ways
from .choices import (
    Choice,
    choose_attention,
    choose_batch,
    choose_cache,
    choose_compile,
    choose_dtype,
    choose_format,
    choose_freed,
    choose_guidance,
    choose_ops,
    expansion_choice,
    figures_choice,
    folds,
    formats,
    gained,
    layout_choice,
    schedule_choice,
    upsampling_choice,
)
from .costs import Work
from .errors import BudgetError
from .hardware import Hardware
from .presets import CachePolicy, models, show_bytes
from .request import Acceleration, Variant

if TYPE_CHECKING:
    from .lora import Lora


@dataclass(frozen=True)
class Wishes:
    """What a user insists on; the planner has its way with everything else.

    Attributes:
        vram: bytes of device memory that must not be exceeded; what is free where None.
        dtype: compute type, or None.
        attention: "auto", or the attention backend.
        quantize: "auto", "none" or the format that the weights are to have.
        adapters: the user's LoRAs.
        compiled: whether torch.compile takes the transformer's blocks, or None.
        requests: that are expected, by which it is weighed whether compiling pays.
        settled: the choice about compiling that was made when the model was loaded, if it was.
    """

    vram: int | None = None
    dtype: str | None = None
    attention: str = AUTO
    quantize: str = "auto"
    adapters: tuple[Lora, ...] = ()
    compiled: bool | None = None
    requests: int = 1
    settled: Choice | None = None


NO_WISHES = Wishes()


@dataclass(frozen=True)
class ComponentPlan:
    """How one network is held.

    Attributes:
        format: its weights' format, a compute type or one of :mod:`flux2_local.quant`.
        placement: where they are while it works and while it does not.
        keep: layers that are kept in the compute type although the format would cover them.
        stay: of a streamed network, numbers of the blocks that stay on the device while it works.
        mapped: of a streamed network, numbers of the blocks that come from their files rather than from host memory.
    """

    format: str
    placement: Placement
    keep: tuple[str, ...] = ()
    stay: tuple[int, ...] = ()
    mapped: tuple[int, ...] = ()


@dataclass(frozen=True)
class Option:
    """One way of holding the networks that was weighed: what it would take, and why it was taken or not."""

    name: str
    seconds: float
    peak_bytes: int
    host_bytes: int
    disk_bytes: int
    verdict: str


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before the first tensor is read.

    Attributes:
        model, variant, acceleration: what was asked for.
        device: torch's name of the device that computes.
        dtype: of activations.
        schedule: the type that timesteps, guidance and modulations are computed in.
        transformer, text_encoder, vae: format and placement of the three networks.
        expansion: likewise, what prompt expansion needs of the language model beside the text encoder, where ``work`` has it; else
            None.
        attention: the attention backend.
        ops: the implementation of what lies between the matmuls.
        compile: "off", or "blocks" where torch.compile takes the transformer's blocks.
        cache: when steps may be skipped; None computes all.
        together: whether the two passes of classifier-free guidance run as one of a batch twice as large.
        batch: pictures of one size that are denoised together, where so many are asked for.
        vae_tile: side of a decoding tile in pixels, or 0 for whole pictures.
        channels_last: whether convolutions run in channels-last layout.
        fold_upsampling: whether the decoder doubles pictures at the lower resolution.
        keep_freed: whether the process keeps host memory that it frees.
        encode_seconds, step_seconds: predictions for ``work``: reading the prompt, and a denoising step after the first,
            on the average of those that are computed and those that the step cache is expected to skip.
        expand_seconds: prediction for ``work``: rewriting the prompt, roughly.
        place_seconds: prediction for ``work``: moving weights before and in the first step, and the autoencoder's, with reading the
            references where that is done once.
        decode_seconds: prediction per picture.
        peak_bytes: predicted peak of device memory.
        host_bytes: predicted peak of what weights that wait for their turn take of host memory. The process itself, its libraries
            and a tensor or two on their way come on top; :data:`~flux2_local.candidates.HOST_RESERVE` is left to them.
        disk_bytes: size of the files.
        work: the request that predictions are for.
        choices: every decision with its reason.
        options: every way of holding the networks that was weighed, the quickest first.
    """

    model: str
    variant: Variant
    acceleration: Acceleration
    device: str
    dtype: str
    schedule: str
    transformer: ComponentPlan
    text_encoder: ComponentPlan
    vae: ComponentPlan
    expansion: ComponentPlan | None
    attention: str
    ops: str
    compile: str
    cache: CachePolicy | None
    together: bool
    batch: int
    vae_tile: int
    channels_last: bool
    fold_upsampling: bool
    keep_freed: bool
    expand_seconds: float
    encode_seconds: float
    place_seconds: float
    step_seconds: float
    decode_seconds: float
    peak_bytes: int
    host_bytes: int
    disk_bytes: int
    work: Work
    choices: tuple[Choice, ...]
    options: tuple[Option, ...]

    @property
    def seconds(self) -> float:
        """Predicted seconds for ``work``, loading not included."""
        each = self.work.steps * self.step_seconds + self.decode_seconds
        return self.expand_seconds + self.encode_seconds + self.place_seconds + self.work.images * each

    def __str__(self) -> str:
        return explain(self)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values, for ``--json``."""
        return {**asdict(self), "seconds": self.seconds}


def make_plan(need: Need, hardware: Hardware, wishes: Wishes = NO_WISHES) -> Plan:
    """Choose how to run.

    Args:
        need: what is asked for.
        hardware: what there is.
        wishes: what the user insists on.

    Raises:
        BackendUnavailableError: the backend, the format or the compiler insisted on cannot be used on this hardware.
        BudgetError: nothing fits; it carries the smallest budget that would.
    """
    kind_choice, dtype = choose_dtype(need.tier, hardware, wishes.dtype)
    attention_choice = choose_attention(need, hardware, dtype, wishes.attention)
    ops_choice = choose_ops(need, hardware, dtype, wishes.compiled is True)
    cache_choice, cache = choose_cache(need)
    freed_choice = choose_freed(hardware)
    folded = folds(need.tier, hardware, dtype)
    limit = min(hardware.free if wishes.vram is None else wishes.vram, hardware.free) - SYSTEM_RESERVE[hardware.kind]
    computed = ops_choice.value, attention_choice.value, cache is not None, folded, spared(need, cache)
    terms = Terms(need, hardware, dtype, limit, *computed, merged=bool(wishes.adapters) or adapted(need))
    wanted = formats(need.tier, hardware, dtype, wishes.quantize)
    held_so = [(form, layout) for form in wanted for layout in layouts(terms, form)]
    drafts = [Draft(terms, form, layout, way) for form, layout in held_so for way in ways(need)]
    candidates = sorted((draft.candidate() for draft in drafts), key=lambda c: c.seconds.total(need.work))
    fitting = [c for c in candidates if not c.problem]
    if not fitting:
        raise does_not_fit(terms, min(drafts, key=least))
    wholly = need.tier.quantize or all(c.form or c.layout.transformer == "streamed" for c in fitting)
    winner, reason = prefer(fitting, wanted, need, wholly)
    verdicts = {c.name: c.problem or lost(c, winner, need, wholly) for c in candidates if c is not winner}
    compile_choice = choose_compile(terms, winner, wishes.compiled, wishes.requests)
    if wishes.settled is not None and not need.tier.exact:
        compile_choice = wishes.settled  # weights are not loaded anew because another number of steps would pay
    held = ComponentPlan(dtype, winner.layout.vae)
    batch_choice, batch, peak = choose_batch(terms, winner)
    return Plan(
        model=need.model,
        variant=need.variant,
        acceleration=need.tier.name,
        device=hardware.device,
        dtype=dtype,
        schedule=terms.schedule,
        transformer=component_plan(winner, need.model, dtype, "transformer"),
        text_encoder=component_plan(winner, need.model, dtype, "text_encoder"),
        vae=held,
        expansion=component_plan(winner, need.model, dtype, "expansion") if need.work.chat else None,
        attention=attention_choice.value,
        ops=ops_choice.value,
        compile=compile_choice.value,
        cache=cache,
        together=winner.together,
        batch=batch,
        vae_tile=winner.tile,
        channels_last=not need.tier.exact,
        fold_upsampling=folded,
        keep_freed=freed_choice.value == "kept",
        expand_seconds=winner.seconds.expand,
        encode_seconds=winner.seconds.encode,
        place_seconds=winner.seconds.place,
        step_seconds=winner.seconds.step,
        decode_seconds=winner.seconds.decode,
        peak_bytes=peak,
        host_bytes=winner.host,
        disk_bytes=winner.disk,
        work=need.work,
        choices=(
            kind_choice,
            schedule_choice(terms),
            choose_format(need.tier, dtype, wanted, winner, wishes.quantize, gained(terms, winner, fitting)),
            Choice("placement", winner.name, f"{reason}: {winner.reason}", tuple(verdicts.items())),
            *expansion_choice(terms, winner),
            attention_choice,
            ops_choice,
            compile_choice,
            layout_choice(need.tier),
            upsampling_choice(need.tier, hardware, dtype),
            freed_choice,
            cache_choice,
            *choose_guidance(winner, candidates, need),
            batch_choice,
            figures_choice(hardware),
        ),
        options=tuple(option(c, need.work, verdicts.get(c.name, f"taken, {reason}")) for c in candidates),
    )


def adapted(need: Need) -> bool:
    """Whether the variant itself comes from a LoRA; of a model that is not among the presets, every variant of its own is taken to."""
    known = models().get(need.model)
    return need.variant != "standard" and (known is None or known.recipe(need.variant).lora is not None)


def prefer(
    fitting: list[Candidate], wanted: tuple[quant.Format | None, ...], need: Need, wholly: bool
) -> tuple[Candidate, str]:
    """The candidate to take, and why.

    The rule: formats whose loss is above the tier's are set aside while anything else fits. Of the rest, the first format in the
    order of ``wanted`` whose quickest candidate takes no longer than the tier's patience times the quickest of all.

    Args:
        fitting: candidates that fit, the quickest first.
        wanted: formats, most wanted first.
        need: what is planned for.
        wholly: of :func:`weighed`.
    """
    tier = need.tier
    faithful = [c for c in fitting if c.loss <= tier.loss] or fitting
    quickest = min(weighed(c, need, wholly) for c in faithful)
    for form in wanted:
        best = next((c for c in faithful if c.form is form), None)
        if best is not None and weighed(best, need, wholly) <= tier.patience * quickest:
            break
    assert best is not None, "the quickest itself is within its own time"
    if best is fitting[0]:
        return best, "the fastest that fits"
    if best is faithful[0]:
        return best, "the fastest that fits with a loss that the tier allows"
    if best.form is None and weighed(best, need, wholly) == quickest:
        return best, "the fastest in 16 bit"
    if best.loss > faithful[0].loss:
        return (
            best,
            f"what this device's 8-bit units are made for, in at most {tier.patience:g} times the fastest's seconds",
        )
    return best, f"a smaller loss than the fastest's, in at most {tier.patience:g} times its seconds"


def weighed(candidate: Candidate, need: Need, wholly: bool) -> float:
    """Seconds by which formats are compared. What faster arithmetic gains counts ``wholly`` in tiers that want it, and in all where
    16-bit weights fit only by moving in every step, so that memory calls for smaller ones anyway."""
    return (candidate.seconds if wholly else candidate.plain).total(need.work)


def spared(need: Need, cache: CachePolicy | None) -> float:
    """The share of a step's seconds that a step cache is expected to spare on the average; the first block may be computed all the
    same."""
    if cache is None:
        return 0.0
    t = need.arch.transformer
    computed = 0.0 if cache.threshold == math.inf else 1 / (t.num_layers + t.num_single_layers)
    return cache.skipped(need.work.steps) / need.work.steps * (1 - computed)


def lost(candidate: Candidate, winner: Candidate, need: Need, wholly: bool) -> str:
    """Why a candidate that fits was not taken."""
    seconds, best = (c.seconds.total(need.work) for c in (candidate, winner))
    if candidate.form is not winner.form and candidate.loss > need.tier.loss:
        return f"layers' outputs {candidate.loss:.1%} off, and {need.tier.name} takes at most {need.tier.loss:.0%} where it can"
    if seconds < best and not need.tier.quantize:
        told = f"{seconds:.1f} s, but a larger loss, which {need.tier.name} takes for memory alone"
        gains = weighed(candidate, need, wholly) < weighed(winner, need, wholly)
        return f"{told}, and that gains less than {need.tier.patience:g} times the speed" if gains else told
    if seconds < best:
        return f"{seconds:.1f} s, but a larger loss for less than {need.tier.patience:g} times the speed"
    if seconds == best and (candidate.form, candidate.layout) == (winner.form, winner.layout):
        return "no faster, and its steps take more memory"
    return f"{seconds:.1f} s against {best:.1f} s"


def option(candidate: Candidate, work: Work, verdict: str) -> Option:
    seconds = candidate.seconds.total(work)
    return Option(candidate.name, seconds, candidate.peak, candidate.host, candidate.disk, verdict)


def does_not_fit(terms: Terms, smallest: Draft) -> BudgetError:
    """The error that names the smallest budget that would do."""
    need, hardware = terms.need, terms.hardware
    reserve = SYSTEM_RESERVE[hardware.kind]
    budget = least(smallest) + reserve
    form = terms.dtype if smallest.form is None else smallest.form.name
    if least(smallest) <= terms.limit:
        problem = smallest.candidate().problem
        return BudgetError(f"{need.model} does not fit on {hardware.name} in {form}: it {problem}.", budget)
    return BudgetError(
        f"{need.model} at {need.work.width}×{need.work.height} needs at least {show_bytes(budget)} of "
        f"{'memory' if hardware.kind == 'cpu' else 'device memory'} on {hardware.name} in {form}, and "
        f"{show_bytes(max(0, terms.limit + reserve))} may be used. Give it more (--vram), free some, or use a smaller model or "
        f"picture.",
        budget,
    )


def built(plan: Plan) -> dict[str, tuple[str, ...]]:
    """What loading makes of a plan, in words, by the part of the model (:data:`flux2_local.load.PARTS`): each is made again where it
    differs. Which blocks stay, and where the others wait, may change between requests."""

    def held(network: ComponentPlan) -> tuple[str, ...]:
        apart = f", {', '.join(network.keep)} in {plan.dtype}" if network.keep else ""
        return f"{network.format}{apart}", network.placement

    operations = f"{plan.ops} operations", f"{plan.attention} attention"
    compiled = ("compiled blocks", *operations) if plan.compile == "blocks" else ("blocks as they are",)
    layout = "channels-last convolutions" if plan.channels_last else "convolutions as stored"
    folded = "folded upsampling" if plan.fold_upsampling else "upsampling as stored"
    return {
        "transformer": (*held(plan.transformer), f"{plan.dtype} arithmetic", f"{plan.schedule} schedule", *compiled),
        "text_encoder": (*held(plan.text_encoder), f"{plan.dtype} arithmetic"),
        "vae": (*held(plan.vae), layout, folded),
        "operations": operations,
    }


def component_plan(winner: Candidate, model: str, dtype: str, component: str) -> ComponentPlan:
    """How the winner holds the transformer, the text encoder, or what expansion needs beside that."""
    placement, stay = {
        "transformer": (winner.layout.transformer, winner.stay),
        "text_encoder": (winner.layout.text_encoder, winner.text_stay),
        "expansion": (winner.expansion, winner.expansion_stay),
    }[component]
    mapped = winner.homes[component].mapped if placement == "streamed" else ()
    if winner.form is None:
        return ComponentPlan(dtype, placement, stay=stay, mapped=mapped)
    if component == "expansion":
        return ComponentPlan(winner.form.name, placement, stay=stay, mapped=mapped)
    recipe = quant.recipe_for(winner.form, model, component)
    return ComponentPlan(recipe.format, placement, recipe.keep, stay, mapped)


def explain(plan: Plan) -> str:
    """The plan in words: what runs, each choice with its reason, and each candidate that lost."""
    work = plan.work
    count = f"{work.images} × " if work.images > 1 else ""
    expansion = f"expansion {plan.expand_seconds:.1f}, " if work.chat else ""
    lines = [
        f"{plan.model}, {plan.variant}, acceleration {plan.acceleration}, on {plan.device}",
        f"  predicted for {count}{work.width}×{work.height}, {work.steps} steps: {plan.seconds:.1f} s "
        f"({expansion}prompt {plan.encode_seconds:.2f}, placing {plan.place_seconds:.2f}, "
        f"steps {work.steps} × {plan.step_seconds:.3f}, decode {plan.decode_seconds:.2f})",
        f"  at most {show_bytes(plan.peak_bytes)} of device memory, {show_bytes(plan.host_bytes)} of host memory for weights that "
        f"wait (the process's own comes on top), {show_bytes(plan.disk_bytes)} of disk",
    ]
    for choice in plan.choices:
        lines.append(f"  {choice.what}: {choice.value} — {choice.reason}")
        if choice.what != "placement":
            lines += [f"    not {name}: {why}" for name, why in choice.rejected]
    lines += ["  weighed, quickest first (seconds, device, waiting weights on the host, disk):"]
    for o in plan.options:
        sizes = ", ".join(show_bytes(n) for n in (o.peak_bytes, o.host_bytes, o.disk_bytes))
        lines.append(f"    {o.name}: {o.seconds:.1f} s, {sizes} — {o.verdict}")
    return "\n".join(lines)
