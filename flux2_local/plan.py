"""Request + model + hardware -> :class:`Plan`: what will run, why, and what lost.

A plan is a frozen value. Loading builds exactly what it says, and nothing outside it changes behaviour.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from flux2_kernels import Place, place_of

from . import attention as attentions
from . import costs, heap, quant
from .candidates import SYSTEM_RESERVE, Candidate, Draft, Need, Placement, Terms, layouts, least
from .costs import Work
from .errors import BackendUnavailableError, BudgetError
from .hardware import Hardware
from .model import kernels
from .model.compiled import reason_against
from .presets import CachePolicy, Tier, show_bytes
from .request import Acceleration, Variant

MOST_TOGETHER = 4
"""Pictures denoised together at most; what a batch gains is nearly all in the first few."""


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
        attention: the attention backend.
        ops: the implementation of what lies between the matmuls.
        compile: "off", or "blocks" where torch.compile makes one graph of each kind of block.
        cache: when steps may be skipped; None computes all.
        batch: pictures of one size that are denoised together, where so many are asked for.
        vae_tile: side of a decoding tile in pixels, or 0 for whole pictures.
        channels_last: whether convolutions run in channels-last layout.
        fold_upsampling: whether the decoder doubles pictures at the lower resolution.
        keep_freed: whether the process keeps host memory that it frees.
        encode_seconds, step_seconds: predictions for ``work``: reading the prompt, and a denoising step after the first.
        place_seconds, decode_seconds: predictions per picture: moving weights before and in the first step, and decoding.
        peak_bytes, host_bytes, disk_bytes: predicted peaks of device and host memory, and the size of the files.
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
    attention: str
    ops: str
    compile: str
    cache: CachePolicy | None
    batch: int
    vae_tile: int
    channels_last: bool
    fold_upsampling: bool
    keep_freed: bool
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
        each = self.place_seconds + self.work.steps * self.step_seconds + self.decode_seconds
        return self.encode_seconds + self.work.images * each

    def __str__(self) -> str:
        return explain(self)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values, for ``--json``."""
        return {**asdict(self), "seconds": self.seconds}


def make_plan(
    need: Need,
    hardware: Hardware,
    budget: int | None = None,
    dtype: str | None = None,
    attention: str = attentions.AUTO,
    quantize: str = "auto",
    compiled: bool | None = None,
) -> Plan:
    """Choose how to run.

    Args:
        need: what is asked for.
        hardware: what there is.
        budget: bytes of device memory that must not be exceeded; what is free where None.
        dtype: compute type, where the caller insists on one.
        attention: "auto", or the attention backend that the caller insists on.
        quantize: "auto", "none", or the weights' format, where the caller insists on one.
        compiled: whether the transformer's blocks are, where the caller insists on it.

    Raises:
        BackendUnavailableError: the backend, the format or the compiler insisted on cannot be used on this hardware.
        BudgetError: nothing fits; it carries the smallest budget that would.
    """
    kind_choice, dtype = choose_dtype(need.tier, hardware, dtype)
    attention_choice = choose_attention(need, hardware, dtype, attention)
    compile_choice = choose_compile(hardware, compiled)
    ops_choice = choose_ops(need, hardware, dtype, compile_choice.value != "off")
    cache_choice, cache = choose_cache(need)
    freed_choice = choose_freed(hardware)
    folded = folds(need.tier, hardware, dtype)
    limit = min(budget or hardware.free, hardware.free) - SYSTEM_RESERVE[hardware.kind]
    terms = Terms(need, hardware, dtype, limit, ops_choice.value, attention_choice.value, cache is not None, folded)
    wanted = formats(need.tier, hardware, dtype, quantize)
    drafts = [Draft(terms, form, layout) for form in wanted for layout in layouts(hardware)]
    candidates = sorted((draft.candidate() for draft in drafts), key=lambda c: c.seconds.total(need.work))
    fitting = [c for c in candidates if not c.problem]
    if not fitting:
        raise does_not_fit(terms, min(drafts, key=least))
    winner, reason = prefer(fitting, wanted, need)
    verdicts = {c.name: c.problem or lost(c, winner, need) for c in candidates if c is not winner}
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
        attention=attention_choice.value,
        ops=ops_choice.value,
        compile=compile_choice.value,
        cache=cache,
        batch=batch,
        vae_tile=winner.tile,
        channels_last=not need.tier.exact,
        fold_upsampling=folded,
        keep_freed=freed_choice.value == "kept",
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
            choose_format(need.tier, dtype, wanted, winner, quantize, conversion(terms, winner, fitting)),
            Choice("placement", winner.name, f"{reason}: {winner.reason}", tuple(verdicts.items())),
            attention_choice,
            ops_choice,
            compile_choice,
            layout_choice(need.tier),
            upsampling_choice(need.tier, hardware, dtype),
            freed_choice,
            cache_choice,
            batch_choice,
            figures_choice(hardware),
        ),
        options=tuple(option(c, need.work, verdicts.get(c.name, f"taken, {reason}")) for c in candidates),
    )


def prefer(fitting: list[Candidate], wanted: tuple[quant.Format | None, ...], need: Need) -> tuple[Candidate, str]:
    """The candidate to take, and why.

    The rule: formats whose loss is above the tier's are set aside while anything else fits. Of the rest, the first format in the
    order of ``wanted`` (those measured faster here where the tier permits them, then the smallest loss) whose quickest candidate
    takes no longer than the tier's patience times the quickest of all, or leaves nothing to wish (:func:`content`).

    Args:
        fitting: candidates that fit, the quickest first.
        wanted: formats, most wanted first.
        need: what is planned for.
    """
    tier, work = need.tier, need.work
    faithful = [c for c in fitting if c.form is None or c.form.loss <= tier.loss] or fitting
    quickest = faithful[0].seconds.total(work)
    for form in wanted:
        best = next((c for c in faithful if c.form is form), None)
        if best is not None and (best.seconds.total(work) <= tier.patience * quickest or content(best, tier)):
            break
    assert best is not None, "the quickest itself is within its own time"
    if best is faithful[0]:
        return best, "the fastest that fits" if best is fitting[
            0
        ] else "the fastest that fits with a loss that the tier allows"
    if content(best, tier):
        return best, "the fastest in 16 bit"
    return best, f"a smaller loss than the fastest's, in at most {tier.patience:g} times its seconds"


def content(candidate: Candidate, tier: Tier) -> bool:
    """Whether nothing but faster arithmetic could be gained by a format, and the tier does not want it for that."""
    return candidate.form is None and candidate.layout.name == "resident" and not tier.quantize


def lost(candidate: Candidate, winner: Candidate, need: Need) -> str:
    """Why a candidate that fits was not taken."""
    seconds, best = (c.seconds.total(need.work) for c in (candidate, winner))
    if candidate.form is not winner.form and candidate.form is not None and candidate.form.loss > need.tier.loss:
        return f"layers' outputs {candidate.form.loss:.1%} off, and {need.tier.name} takes at most {need.tier.loss:.0%} where it can"
    if seconds < best and content(winner, need.tier):
        return f"{seconds:.1f} s, but a larger loss, which {need.tier.name} takes for memory alone"
    if seconds < best:
        return f"{seconds:.1f} s, but a larger loss for less than {need.tier.patience:g} times the speed"
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


def built(plan: Plan) -> tuple[Any, ...]:
    """The part of a plan that loading turns into weights and functions. Which blocks stay may change between requests."""
    networks = (replace(held, stay=()) for held in (plan.transformer, plan.text_encoder, plan.vae))
    convolutions = plan.channels_last, plan.fold_upsampling
    return plan.device, plan.dtype, plan.schedule, *networks, *convolutions, plan.attention, plan.ops, plan.compile


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


def choose_compile(hardware: Hardware, asked: bool | None) -> Choice:
    """Whether torch.compile takes the blocks: only where it is asked for.

    Raises:
        BackendUnavailableError: it is asked for, and there is no compiler.
    """
    if asked:
        if problem := reason_against(hardware):
            raise BackendUnavailableError(
                f"The blocks cannot be compiled on {hardware.name}: {problem}. Leave compile out."
            )
        return Choice("compile", "blocks", "asked for", (("off", "asked for"),))
    if asked is None and hardware.kind == "cpu":
        lost = "7 s of tracing in every process and 30 s in the first, for 3 to 8 % of a step where that was measured"
    else:
        lost = "not asked for" if asked is None else "asked not to"
    return Choice("compile", "off", "fused operations leave it little", (("blocks", lost),))


def choose_ops(need: Need, hardware: Hardware, dtype: str, compiled: bool = False) -> Choice:
    """What computes between the matmuls: Triton kernels where they run and rounding may differ."""
    here = place_of("cpu")
    place = Place(hardware.kind, hardware.sm or 0, here.triton or hardware.described, here.interpreter)
    against = kernels.reason_against(place, dtype, need.arch.transformer)
    rounding = "it rounds once where the reference rounds after every operation"
    slower = "a pass over memory for every operation"
    if need.tier.exact and dtype != "float32":
        why = "the exact tier keeps the reference's operations, bit for bit"
        return Choice("ops", "reference", why, (("triton", against or rounding), ("native", rounding)))
    if not against and not need.tier.exact:
        why = "fused kernels, each one pass over memory and within rounding of the reference"
        return Choice("ops", "triton", why, (("native", "more passes over memory"), ("reference", slower)))
    lost = (("triton", against or "its products of float32 may be rounded to fewer bits"),)
    if compiled:
        return Choice("ops", "reference", "plain torch, of which the compiler makes few passes", lost)
    if hardware.kind == "cpu":
        why = "few of torch's own operators, within float32's rounding of the reference's"
        return Choice("ops", "native", why, (*lost, ("reference", slower)))
    return Choice("ops", "reference", "plain torch, which runs everywhere", lost)


def figures_choice(hardware: Hardware) -> Choice:
    """What the predictions rest on."""
    rates = f"{hardware.flops[hardware.fast_dtypes[0]] / 1e12:.3g} TFLOP/s"
    if hardware.kind == "cuda":
        rates += f", {hardware.link_rate / 1e9:.3g} GB/s from the host"
    if hardware.measured:
        return Choice("figures", "measured", f"kept by `flux2-local doctor --measure`: {rates}")
    if hardware.described:
        return Choice(
            "figures", "public", f"{rates}; {show_bytes(hardware.ram)} of host memory are taken for given (--ram)"
        )
    return Choice("figures", "public", f"{rates}; `flux2-local doctor --measure` replaces them by what is reached here")


def choose_freed(hardware: Hardware) -> Choice:
    """Whether host memory that is freed stays with the process."""
    if against := heap.reason_against(hardware):
        return Choice("freed memory", "returned", "the C library's own way", (("kept", against),))
    why = f"up to {show_bytes(heap.KEPT)}, so that large results need not be mapped and cleared anew"
    return Choice("freed memory", "kept", why, (("returned", "the system would clear every page again"),))


def schedule_choice(terms: Terms) -> Choice:
    """Rounded timesteps are other noise levels in every step, and the table of modulations costs the same in any type."""
    if terms.schedule == terms.dtype:
        return Choice("schedule", terms.dtype, "as everything else, and as in the exact tier")
    why = "timesteps and modulations as the exact tier has them here, made once for all steps"
    return Choice(
        "schedule", terms.schedule, why, ((terms.dtype, "it rounds the noise levels, which pictures show most"),)
    )


def layout_choice(tier: Tier) -> Choice:
    """The exact tier would lose its pixels: torch's group norm adds up a whole picture's values one by one in channels-last layout."""
    if tier.exact:
        return Choice("convolutions", "as stored", "the exact tier keeps the reference's memory layout and rounding")
    return Choice("convolutions", "channels last", "the layout that fast convolutions want; it changes rounding only")


def folds(tier: Tier, hardware: Hardware, dtype: str) -> bool:
    """Whether upsampling is folded: where that was measured, and not where sums of weights would round the exact tier's."""
    return hardware.kind == "cpu" and not (tier.exact and dtype != "float32")


def upsampling_choice(tier: Tier, hardware: Hardware, dtype: str) -> Choice:
    if folds(tier, hardware, dtype):
        why = (
            "4/9 of the multiplications, within rounding; its convolutions were measured to take half the time on a CPU"
        )
        return Choice("upsampling", "folded", why, (("plain", "it computes every doubled pixel"),))
    lost = "its weights are rounded sums" if tier.exact else f"it has not been measured on a {hardware.kind} device"
    return Choice(
        "upsampling", "plain", "nearest neighbour, then a convolution, as the model's makers do", (("folded", lost),)
    )


def choose_cache(need: Need) -> tuple[Choice, CachePolicy | None]:
    """Step caching, where the tier allows it, the model's thresholds are calibrated and there are steps to skip."""
    policy = need.tier.cache.get(need.model)
    if not need.tier.cache:
        return Choice("step cache", "off", f"the {need.tier.name} tier computes every step"), None
    if need.variant != "standard":
        return Choice("step cache", "off", f"{need.variant} has {need.work.steps} steps, each unlike the last"), None
    if policy is None:
        return Choice("step cache", "off", f"no thresholds are calibrated for {need.model}"), None
    policy = policy.at(need.work.steps)
    spared = f"not in the first {policy.warmup} or the last {policy.tail}"
    if policy.threshold == math.inf:
        return Choice("step cache", "mask", f"{policy.limit} steps in a row are skipped whole, {spared}"), policy
    reason = f"the first block's change below {policy.threshold:g} skips the others, at most {policy.limit} steps in a row, {spared}"
    return Choice("step cache", "first block", reason), policy


def choose_batch(terms: Terms, winner: Candidate) -> tuple[Choice, int, int]:
    """How many pictures are denoised together: as many as fill the device, within :data:`MOST_TOGETHER` and memory.

    Returns:
        The choice, the number, and the peak of device memory with so many.
    """
    need, work = terms.need, terms.need.work
    if need.tier.exact:
        why = "the exact tier denoises every picture by itself, as the reference does"
        return Choice("batch", "1", why), 1, winner.peak
    sizes = ((work.width, work.height), *work.references)
    tokens = sum(need.arch.tokens(*size) for size in sizes) + need.arch.text_tokens
    full = costs.full_tokens(terms.hardware, terms.dtype)
    batch = min(MOST_TOGETHER, -(-full // tokens))
    if batch == 1:
        why = f"the {tokens} tokens of one picture fill the device, which takes {full}"
        return Choice("batch", "1", why), 1, winner.peak
    for count in range(batch, 1, -1):
        together = replace(terms, need=replace(need, work=replace(work, batch=count)))
        several = Draft(together, winner.form, winner.layout).candidate()
        if not several.problem and (several.stay, several.tile) == (winner.stay, winner.tile):
            why = f"one picture has {tokens} tokens and the device takes {full}"
            return Choice("batch", str(count), why), count, several.peak
    return Choice("batch", "1", "there is no memory for more"), 1, winner.peak


def choose_dtype(tier: Tier, hardware: Hardware, asked: str | None) -> tuple[Choice, str]:
    """The compute type: what was asked for, or the first of the tier's that this device runs at full rate."""
    if asked is not None:
        return Choice("dtype", asked, "asked for"), asked
    wanted = tier.dtypes[hardware.kind]
    rejected: list[tuple[str, str]] = []
    for dtype in wanted:
        if dtype in hardware.fast_dtypes or dtype == wanted[-1]:
            return Choice("dtype", dtype, dtype_reason(dtype, tier, hardware), tuple(rejected)), dtype
        rejected.append((dtype, f"{hardware.name} has no fast {dtype} matrix products"))
    raise AssertionError("a tier without dtypes")


def dtype_reason(dtype: str, tier: Tier, hardware: Hardware) -> str:
    if tier.exact:
        return "what the exact tier runs in"
    if dtype == "float32":
        return "the only type that this device runs well"
    if dtype in hardware.fast_dtypes:
        return f"{hardware.name} runs it at full rate"
    return (
        f"the type that the models are published in; {hardware.name} has no fast {dtype} matrix products, and "
        f"{' or '.join(hardware.fast_dtypes)}, which it runs at full rate, has a smaller range (--dtype insists on it)"
    )


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


def choose_format(
    tier: Tier, dtype: str, wanted: tuple[quant.Format | None, ...], winner: Candidate, asked: str, once: str
) -> Choice:
    """Why the weights of the transformer and the text encoder are held as they are; ``once``: what making them takes."""
    form = winner.form
    before = wanted[: wanted.index(form)]
    rejected = tuple((dtype if f is None else f.name, "does not fit, or takes much longer") for f in before)
    if form is None:
        why = "asked for" if asked == "none" else "the exact tier quantizes nothing" if tier.exact else "it fits"
        return Choice("weights", dtype, why, rejected)
    cost = f"{form.weight_bytes:.2f} bytes a weight, layers' outputs about {form.loss:.1%} off"
    if asked != "auto":
        why = "asked for" + (", although this tier promises the reference's pixels" if tier.exact else "")
    else:
        why = "the smallest loss that fits in time" if None in before else "measured faster on this device"
    return Choice("weights", form.name, f"{why}: {cost}" + (f"; it {form.note}" if form.note else "") + once, rejected)


def conversion(terms: Terms, winner: Candidate, fitting: list[Candidate]) -> str:
    """What making the winner's weights takes, and when that has paid, where it is taken for its speed; else ""."""
    need, hardware = terms.need, terms.hardware
    dense = next((c for c in fitting if c.form is None), None)
    if winner.form is None or winner.form.product not in hardware.flops or dense is None:
        return ""
    gain = dense.seconds.total(need.work) - winner.seconds.total(need.work)
    weights = sum(costs.parameters(need.arch)[name] for name in ("transformer", "text_encoder"))
    seconds = costs.CONVERTED * weights / hardware.memory_rate
    return f"; made once, which takes about {seconds:.0f} s and pays after {math.ceil(seconds / gain)} such requests"


def component_plan(winner: Candidate, model: str, dtype: str, component: str) -> ComponentPlan:
    """How the winner holds the transformer or the text encoder."""
    placement = winner.layout.transformer if component == "transformer" else winner.layout.text_encoder
    stay = winner.stay if component == "transformer" else ()
    mapped = placement == "streamed" and component in winner.mapped
    if winner.form is None:
        return ComponentPlan(dtype, placement, stay=stay, mapped=mapped)
    recipe = quant.recipe_for(winner.form, model, component)
    return ComponentPlan(recipe.format, placement, recipe.keep, stay, mapped)


def explain(plan: Plan) -> str:
    """The plan in words: what runs, each choice with its reason, and each candidate that lost."""
    work = plan.work
    count = f"{work.images} × " if work.images > 1 else ""
    lines = [
        f"{plan.model}, {plan.variant}, acceleration {plan.acceleration}, on {plan.device}",
        f"  predicted for {count}{work.width}×{work.height}, {work.steps} steps: {plan.seconds:.1f} s "
        f"(prompt {plan.encode_seconds:.2f}, placing {plan.place_seconds:.2f}, steps {work.steps} × {plan.step_seconds:.3f}, "
        f"decode {plan.decode_seconds:.2f})",
        f"  at most {show_bytes(plan.peak_bytes)} of device memory, {show_bytes(plan.host_bytes)} of host memory for weights, "
        f"{show_bytes(plan.disk_bytes)} of disk",
    ]
    for choice in plan.choices:
        lines.append(f"  {choice.what}: {choice.value} — {choice.reason}")
        if choice.what != "placement":
            lines += [f"    not {name}: {why}" for name, why in choice.rejected]
    lines += ["  weighed, quickest first (seconds, device, host, disk):"]
    for o in plan.options:
        sizes = ", ".join(show_bytes(n) for n in (o.peak_bytes, o.host_bytes, o.disk_bytes))
        lines.append(f"    {o.name}: {o.seconds:.1f} s, {sizes} — {o.verdict}")
    return "\n".join(lines)
