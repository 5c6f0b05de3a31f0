"""What a plan decides one by one, each with its reason and what it was chosen over."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from . import attention as attentions
from . import costs, heap, quant
from .candidates import GUIDED, Candidate, Draft, Need, Terms, ways
from .errors import BackendUnavailableError
from .hardware import Hardware
from .model import kernels
from .model.compiled import mark, reason_against
from .presets import EIGHT_BIT, CachePolicy, Tier, show_bytes

COMPILING, TRACING = 20.0, 3.0
"""Seconds before the first picture where the blocks are compiled, or only traced because the code was kept. Compiling two blocks took
12 to 23 s on a CPU; assumed elsewhere."""

SPARED = {("cuda", "reference"): 0.07}
"""The share of a step that compiled blocks spare, by device and by the operations there are without: what is known. It is from
SGLang's published 0.4605 and 0.4280 s a step of FLUX.2 dev at 80 GB. Fused operations ("native", which a CPU always has, and "triton")
do what a compiler would, and nothing was measured to be gained beside them."""

MOST_TOGETHER = 4
"""Pictures denoised together at most; what a batch gains is nearly all in the first few."""


@dataclass(frozen=True)
class Choice:
    """One decision: what was chosen, why, and every candidate that lost with its reason."""

    what: str
    value: str
    reason: str
    rejected: tuple[tuple[str, str], ...] = ()


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
    """Candidate formats of the weights, most wanted first: None, which is the compute type itself, then by their loss. A tier that
    takes formats for their speed wants the one that the device's 8-bit units are made for before the others: losses were measured
    on normal numbers, and rows with outliers, whose largest value sets int8's scale, cost fp8 nothing.

    Raises:
        BackendUnavailableError: the one asked for cannot be used here.
    """
    if asked == "none" or (asked == "auto" and tier.exact):
        return (None,)
    if asked != "auto":
        return (quant.find(asked, hardware, dtype),)
    usable = quant.automatic(hardware, dtype)
    if tier.quantize:
        usable = tuple(sorted(usable, key=lambda form: form.name != quant.eight_bit(hardware)))
    else:  # for memory alone, not what another betters in loss and in bytes
        usable = tuple(f for n, f in enumerate(usable) if all(f.weight_bytes < g.weight_bytes for g in usable[:n]))
    return (None, *usable)


def choose_format(
    tier: Tier, dtype: str, wanted: tuple[quant.Format | None, ...], winner: Candidate, asked: str, gain: str
) -> Choice:
    """Why the weights of the transformer and the text encoder are held as they are; ``gain``: as :func:`gained`."""
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
        smaller = any(f is not None and f.loss < form.loss for f in wanted[wanted.index(form) :])
        why = "the 8-bit type of this device's units" if smaller else "the smallest loss that fits in time"
    return Choice("weights", form.name, f"{why}: {cost}" + (f"; it {form.note}" if form.note else "") + gain, rejected)


def gained(terms: Terms, winner: Candidate, fitting: list[Candidate]) -> str:
    """What the winner's format gains on 16 bit, what making its weights takes and when that has paid, where its products are faster;
    else ""."""
    need, hardware = terms.need, terms.hardware
    dense = next((c for c in fitting if c.form is None), None)
    if winner.form is None or winner.form.product not in hardware.flops or dense is None:
        return ""
    rates = "measured" if hardware.measured else "public"
    before, after = dense.seconds.total(need.work), winner.seconds.total(need.work)
    if after >= before:
        return ""
    seconds = costs.conversion_seconds(need.arch, hardware, winner.form)
    return (
        f"; {before / after:.1f} times as fast as {terms.dtype}, predicted from {rates} rates; "
        f"made once, which takes about {seconds:.0f} s and pays after {math.ceil(seconds / (before - after))} such requests"
    )


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


def choose_compile(terms: Terms, winner: Candidate, asked: bool | None, requests: int) -> Choice:
    """Whether torch.compile takes the blocks: where it is asked for, or what it spares of the requests to come is more than it takes.

    Args:
        terms: with the operations that there are without.
        winner: the way of holding the networks that is taken.
        asked: what the user insists on.
        requests: like this one that are expected.

    Raises:
        BackendUnavailableError: it is asked for, and there is no compiler.
    """
    need, hardware = terms.need, terms.hardware
    problem = reason_against(hardware)
    if asked:
        if problem:
            raise BackendUnavailableError(
                f"The blocks cannot be compiled on {hardware.name}: {problem}. Leave compile out."
            )
        return Choice("compile", "blocks", "asked for", (("off", "asked for"),))
    form = winner.form.name if winner.form else terms.dtype
    share = SPARED.get((hardware.kind, terms.ops), 0.0)
    kept = mark(need.arch.transformer, hardware, terms.dtype, form, terms.ops, terms.attention).exists()
    once, again = (TRACING, "kept from before, and traced") if kept else (COMPILING, "nothing is kept from before")
    spared = share * winner.seconds.step * need.work.steps * need.work.images
    if asked is False:
        lost = "asked not to"
    elif need.tier.exact:
        lost = "the exact tier keeps the reference's rounding"
    elif not share:
        what = "our operations" if terms.ops != "reference" else "the operations"
        lost = f"seconds of tracing in every process, {COMPILING:.0f} in the first, and nothing is known to be gained on {what} here"
    elif problem:
        lost = problem
    elif spared * requests <= once:
        lost = (
            f"about {once:.0f} s in this process ({again}) for {spared:.2g} s of a request, predicted: it pays after "
            f"{math.ceil(once / spared)}, and {requests} {'is' if requests == 1 else 'are'} expected"
        )
    else:
        why = f"about {spared:.2g} s of each of {requests} requests, predicted, for {once:.0f} s once ({again})"
        return Choice("compile", "blocks", why, (("off", "a pass over memory for every operation"),))
    return Choice("compile", "off", "fused operations leave it little", (("blocks", lost),))


def choose_ops(need: Need, hardware: Hardware, dtype: str, compiled: bool = False) -> Choice:
    """What computes between the matmuls: Triton kernels where they run and rounding may differ."""
    against = kernels.reason_against(kernels.place_on(hardware), dtype, need.arch.transformer)
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
        why = "4/9 of the multiplications, within rounding"
        return Choice("upsampling", "folded", why, (("plain", "it computes every doubled pixel"),))
    lost = "its weights are rounded sums" if tier.exact else f"it has not been measured on a {hardware.kind} device"
    return Choice(
        "upsampling", "plain", "nearest neighbour, then a convolution, as the model's makers do", (("folded", lost),)
    )


def expansion_choice(terms: Terms, winner: Candidate) -> list[Choice]:
    """How the language model is held that expands the prompt; nothing where it does not."""
    if not terms.need.work.chat:
        return []
    arch = terms.need.arch
    layers = max(arch.text_layers), arch.language.num_hidden_layers - max(arch.text_layers)
    why = f"the text encoder's own {layers[0]} layers, then {layers[1]} more and the head, which are read for it and leave after it"
    if winner.expansion == "resident":
        return [Choice("expansion", "resident", why)]
    own = layers[0] if winner.layout.text_encoder != "streamed" else len(winner.text_stay)
    staying = own + len(winner.expansion_stay)
    return [
        Choice("expansion", f"{staying} of {sum(layers)} layers stay", f"{why}; {winner.seconds.expand:.0f} s, roughly")
    ]


def choose_freed(hardware: Hardware) -> Choice:
    """Whether host memory that is freed stays with the process."""
    if against := heap.reason_against(hardware):
        return Choice("freed memory", "returned", "the C library's own way", (("kept", against),))
    why = f"up to {show_bytes(heap.KEPT)}, so that large results need not be mapped and cleared anew"
    return Choice("freed memory", "kept", why, (("returned", "the system would clear every page again"),))


def choose_cache(need: Need) -> tuple[Choice, CachePolicy | None]:
    """Step caching, where the tier allows it, the model has thresholds and there are steps to skip."""
    policy = need.tier.cache.get(need.model)
    if not need.tier.cache:
        return Choice("step cache", "off", f"the {need.tier.name} tier computes every step"), None
    if need.variant != "standard":
        return Choice("step cache", "off", f"{need.variant} has {need.work.steps} steps, each unlike the last"), None
    if policy is None:
        return Choice("step cache", "off", f"the {need.tier.name} tier has no thresholds for {need.model}"), None
    policy = policy.at(need.work.steps)
    spared = f"not in the first {policy.warmup} or the last {policy.tail}"
    if policy.threshold == math.inf:
        return Choice("step cache", "mask", f"{policy.limit} steps in a row are skipped whole, {spared}"), policy
    reason = f"the first block's change below {policy.threshold:g} skips the others, at most {policy.limit} steps in a row, {spared}"
    reason += f"; about {policy.skipped(need.work.steps):.0f} steps are expected to be"
    if not policy.measured:
        reason += (
            f". Not calibrated on {need.model}: the threshold and that number follow published figures (configs/tiers.toml), "
            f"and `python -m scripts.calibrate_cache --model {need.model}` measures what they cost"
        )
    return Choice("step cache", "first block", reason), policy


def choose_guidance(winner: Candidate, candidates: list[Candidate], need: Need) -> tuple[Choice, ...]:
    """How the two passes of classifier-free guidance run; nothing for models without.

    Args:
        winner: the way of holding the networks that is taken.
        candidates: every one that was weighed.
        need: what is planned for.
    """
    if need.arch.passes == 1:
        return ()
    value = GUIDED[winner.together]
    if len(ways(need)) == 1:
        return (Choice("guidance", value, "the exact tier computes each by itself, as the reference does"),)
    other = next(
        c for c in candidates if (c.form, c.layout) == (winner.form, winner.layout) and c.together != winner.together
    )
    told = f"{other.seconds.total(need.work):.1f} s and {show_bytes(other.peak)}"
    against = other.problem or f"{told} against {winner.seconds.total(need.work):.1f} s and {show_bytes(winner.peak)}"
    if winner.together:
        why = "blocks that pass through the device come once for both"
    else:
        why = "each fills the device by itself, and both at once take more memory"
    return (Choice("guidance", value, why, ((GUIDED[other.together], against),)),)


def choose_batch(terms: Terms, winner: Candidate) -> tuple[Choice, int, int]:
    """How many pictures are denoised together: as many as fill the device, within :data:`MOST_TOGETHER` and memory.

    Returns:
        The choice, the number, and the peak of device memory with so many.
    """
    need, work = terms.need, terms.need.work
    if need.tier.exact:
        why = "the exact tier denoises every picture by itself, as the reference does"
        return Choice("batch", "1", why), 1, winner.peak
    tokens = need.arch.step_tokens(work) + need.arch.text_tokens
    full = costs.full_tokens(terms.hardware, terms.dtype)
    batch = min(MOST_TOGETHER, -(-full // tokens))
    if batch == 1:
        why = f"the {tokens} tokens of one picture fill the device, which takes {full}"
        return Choice("batch", "1", why), 1, winner.peak
    for count in range(batch, 1, -1):
        larger = replace(terms, need=replace(need, work=replace(work, batch=count)))
        several = Draft(larger, winner.form, winner.layout, winner.together).candidate()
        if not several.problem and held(several) == held(winner):
            why = f"one picture has {tokens} tokens and the device takes {full}"
            return Choice("batch", str(count), why), count, several.peak
    return Choice("batch", "1", "there is no memory for more"), 1, winner.peak


def held(candidate: Candidate) -> tuple[object, ...]:
    """What may not differ between one picture and several."""
    return candidate.stay, candidate.tile, candidate.text_stay, candidate.expansion_stay


def figures_choice(hardware: Hardware) -> Choice:
    """What the predictions rest on."""
    rates = f"{hardware.flops[hardware.fast_dtypes[0]] / 1e12:.3g} TFLOP/s"
    eight = [
        f"{'fp8' if n.startswith('float8') else n} {hardware.flops[n] / 1e12:.3g}"
        for n in EIGHT_BIT
        if n in hardware.flops
    ]
    rates += f" ({', '.join(eight)})" if eight else ""
    if hardware.kind == "cuda":
        rates += f", {hardware.link_rate / 1e9:.3g} GB/s from the host"
    if hardware.measured:
        return Choice("figures", "measured", f"{rates}; kept here, and `flux2-local doctor --measure` measures again")
    if hardware.described:
        given = f"{hardware.disk_rate / 1e9:g} GB/s from the disk"
        if hardware.kind != "mps":  # whose own memory is the host's
            given = f"{show_bytes(hardware.ram)} of host memory (--ram) and {given}"
        return Choice("figures", "public", f"{rates}; source: {hardware.source}; {given} are taken for given")
    replaced = "`flux2-local doctor --measure` replaces them by what is reached here"
    return Choice("figures", "public", f"{rates}; source: {hardware.source}; {replaced}")
