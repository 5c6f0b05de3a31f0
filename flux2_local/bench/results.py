"""What a run keeps: one row per contender and size, with every sample that a figure is made of."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field, replace
from functools import cache

import numpy as np

from .. import costs, load, store
from ..costs import Work
from .contenders import BASE, CONTENDERS, IN_16_BIT, REFERENCE
from .metrics import decibels, gmsd, mse, ssim
from .runner import Drawn, Outcome, Samples
from .subject import Judged, Subject


@dataclass(frozen=True)
class Quality:
    """Pictures against others; as :class:`Row` has them, and ``mse``, the mean squared error that its PSNR is of."""

    mse: float | None = None
    ssim: float | None = None
    gmsd: float | None = None
    differ: float | None = None
    differ_more: float | None = None


@dataclass(frozen=True)
class Row:
    """One contender at one size.

    Attributes:
        size, name, group, note: which, and what it is.
        dtype, steps: of activations, and of denoising.
        seconds: median of whole calls, loading and the first picture left out; ``fastest`` and ``slowest`` of ``samples``.
        ratio: median over the rounds (``ratios``) of the stock pipeline's seconds to this one's; None where they share none.
        psnr, ssim, gmsd: against the exact tier's pictures: PSNR of the mean squared error over all of them, dB
            (:data:`.metrics.SAME` for equal ones), and means, 1 and 0 for equal ones.
        differ, differ_more: share of values that differ at all, and by more than one, in percent. None, like the three before
            them, where no picture was finished, and where the contender starts from other noise.
        load_seconds: from the start of the process until it is loaded.
        first_seconds: of the first picture, of ``first_steps`` steps: it compiles and warms up.
        host_bytes, device_bytes: peaks: resident memory of its process (mapped weights included), and allocated on a card; 0
            where it is not known.
        tflop_per_s: of the model's arithmetic, as if no step were skipped and nothing were computed twice.
        share: what was computed (``tflop_per_s`` less what was skipped) of the matrix product rate measured in its dtype; in
            results without ``skipped`` of ``tflop_per_s`` itself, and so at most that. None where its linear layers multiply in a
            type whose rate was not measured.
        stages: median seconds per stage, where it tells them.
        plan: of ours, what was decided for the last picture.
        adherence, asked: of the ``asked`` things that the prompts ask for, the share that a judge finds in the pictures, in
            percent; None and 0 where nobody judged. ``verdicts`` has a "1" or a "0" per thing and a text per picture.
        adherence_change, adherence_error: points that it has more than the exact tier in the same things, and the standard error
            of that, things of one picture taken together; None where there are fewer than two pictures.
        first_steps: None for all of them.
        limit: the last of ``samples`` where that is no picture's but the seconds at which it was stopped.
        more_than: the median falls on such a sample: it took more than ``seconds``, and ``ratio``, ``tflop_per_s`` and ``share``
            are at most what they say.
        skipped: how many times a picture left out a double and a single block, on the average; None where nobody kept that.
        copy_share: of the measured copy rate, the bytes that denoising cannot but move (:func:`costs.step_bytes`); None where its
            seconds are not told, or its linear layers' weights are of another type than its activations.
    """

    size: str
    name: str
    group: str
    note: str
    dtype: str
    steps: int
    seconds: float
    fastest: float
    slowest: float
    ratio: float | None
    psnr: float | None
    ssim: float | None
    gmsd: float | None
    differ: float | None
    differ_more: float | None
    load_seconds: float
    first_seconds: float
    host_bytes: int
    device_bytes: int
    tflop_per_s: float
    share: float | None
    samples: list[float]
    ratios: list[float]
    stages: dict[str, float] = field(default_factory=dict)
    plan: dict[str, str] = field(default_factory=dict)
    adherence: float | None = None
    asked: int = 0
    first_steps: int | None = None
    limit: float | None = None
    more_than: bool = False
    verdicts: list[str] = field(default_factory=list)
    adherence_change: float | None = None
    adherence_error: float | None = None
    skipped: list[float] | None = None
    copy_share: float | None = None


def references(outcome: Outcome) -> tuple[str, str] | None:
    """The contenders that quality and speed are held against; None where no picture was finished."""
    return first_of([name for name, taken in outcome.samples.items() if taken.drawn])


def first_of(drew: Sequence[str]) -> tuple[str, str] | None:
    """The same by the names of those that finished a picture.

    Where the stock pipeline does not fit, its 16-bit form takes its place, and without the exact tier quality is held against
    them; without those, against the first that ran.
    """
    if not drew:
        return None
    quality, speed = ([n for n in names if n in drew] for names in ((REFERENCE, BASE, IN_16_BIT), (BASE, IN_16_BIT)))
    return (*quality, drew[0])[0], (*speed, drew[0])[0]


def rows(outcome: Outcome, subject: Subject, rates: dict[str, float]) -> list[Row]:
    """The figures of every contender that ran, held against :func:`references`."""
    names = references(outcome)
    nothing = Samples({}, 0.0)
    against, base = (nothing, nothing) if names is None else (outcome.samples[name] for name in names)
    seen = {name: taken for name, taken in outcome.samples.items() if taken.seconds}
    return [likened(row(name, taken, against, base, subject, rates)) for name, taken in seen.items()]


def row(
    name: str,
    taken: Samples,
    against: Samples,
    base: Samples,
    subject: Subject,
    rates: dict[str, float],
) -> Row:
    contender, dtype, steps = CONTENDERS[name], taken.facts["dtype"], taken.facts["steps"]
    samples, finished = taken.seconds, [one.seconds for one in taken.drawn]
    near = mean([quality(a, b) for a, b in zip(against.drawn, taken.drawn, strict=False)])
    ratios = [stock.seconds / own for stock, own in zip(base.drawn, samples, strict=False)]
    seconds = statistics.median(samples)
    skipped = [statistics.mean(column) for column in zip(*(one.skipped for one in taken.drawn), strict=True)] or [0, 0]
    due, spared = flops(subject, steps), flops_spared(subject, skipped)
    told = taken.drawn[0].stages if taken.drawn else {}
    stages = {k: statistics.median(one.stages.get(k, 0.0) for one in taken.drawn) for k in told}
    products = taken.facts.get("products", dtype)
    moved = bytes_moved(subject, steps, skipped, dtype)
    known = stages.get("denoise") and "copy" in rates and products == dtype
    return Row(
        size=subject.size,
        name=name,
        group=contender.group,
        note=contender.note,
        dtype=dtype,
        steps=steps,
        seconds=seconds,
        fastest=min(samples),
        slowest=max(samples),
        ratio=statistics.median(ratios) if ratios else None,
        psnr=None if near.mse is None else decibels(near.mse),
        ssim=near.ssim,
        gmsd=near.gmsd,
        differ=near.differ,
        differ_more=near.differ_more,
        load_seconds=taken.load_seconds,
        first_seconds=taken.first_seconds,
        host_bytes=taken.memory.get("host", 0),
        device_bytes=taken.memory.get("device", 0),
        tflop_per_s=due / seconds / 1e12,
        share=(due - spared) / seconds / rates[products] if products in rates else None,
        samples=samples,
        ratios=ratios,
        stages=stages,
        plan=taken.drawn[-1].plan if taken.drawn else {},
        first_steps=taken.first_steps,
        limit=taken.exceeded,
        more_than=taken.exceeded is not None and statistics.median([*finished, math.inf]) == math.inf,
        skipped=skipped,
        copy_share=moved / stages["denoise"] / rates["copy"] if known else None,
    )


def likened(row: Row) -> Row:
    """The row without the figures of likeness where its contender starts from other noise."""
    if not starts_elsewhere(row):
        return row
    return replace(row, psnr=None, ssim=None, gmsd=None, differ=None, differ_more=None)


def starts_elsewhere(row: Row) -> bool:
    """Whether its contender starts from noise of its own."""
    return row.name in CONTENDERS and CONTENDERS[row.name].other_noise


def mean(found: Sequence[Quality]) -> Quality:
    """Figure by figure; nothing where there are none."""
    if not found:
        return Quality()
    return Quality(*(statistics.mean(column) for column in zip(*map(astuple, found), strict=True)))


@cache
def quality(want: Drawn, got: Drawn) -> Quality:
    """Kept, since a run is written down after every picture."""
    a, b = want.picture, got.picture
    apart = np.abs(a.astype(int) - b)
    shares = (100 * float((apart > bound).mean()) for bound in (0, 1))
    return Quality(mse(a, b), ssim(a, b), gmsd(a, b), *shares)


@cache
def flops(subject: Subject, steps: int) -> float:
    """FLOPs of one picture with every step computed."""
    arch, work = architecture(subject), Work(subject.width, subject.height, steps)
    decode = costs.decode_flops(arch, subject.width, subject.height)
    return costs.encode_flops(arch) + steps * costs.step_flops(arch, work) + decode


def architecture(subject: Subject) -> costs.Architecture:
    return load.architecture(store.find(subject.model, "standard"))


def flops_spared(subject: Subject, skipped: Sequence[float]) -> float:
    """FLOPs of so many double and single blocks left out."""
    arch = architecture(subject)
    tokens = arch.tokens(subject.width, subject.height) + arch.text_tokens
    each = costs.one_block_flops(arch, tokens, tokens)
    return sum(count * one for count, one in zip(skipped, each, strict=True))


def bytes_moved(subject: Subject, steps: int, skipped: Sequence[float], dtype: str) -> float:
    """Bytes that denoising a picture cannot but move, in proportion to the arithmetic where blocks are left out."""
    arch, work = architecture(subject), Work(subject.width, subject.height)
    computed = 1 - flops_spared(subject, skipped) / (steps * costs.step_flops(arch, work))
    return steps * computed * costs.step_bytes(arch, work, dtype)


def with_adherence(rows: Sequence[Row], outcome: Outcome, judged: Judged) -> list[Row]:
    """The rows with what the judge finds in the pictures that they are of."""
    drawn = {row.name: outcome.samples[row.name].pictures for row in rows}
    found = {name: judged.judge(pictures) for name, pictures in drawn.items() if pictures}
    against = found.get((references(outcome) or ("",))[0], [])
    return [with_verdicts(row, found.get(row.name, []), against) for row in rows]


def with_verdicts(row: Row, verdicts: list[str], against: list[str]) -> Row:
    """The row with its pictures' verdicts, and how they differ from ``against``."""
    asked = sum(map(len, verdicts))
    if not asked:
        return row
    change, error = paired(against, verdicts)
    return replace(
        row,
        adherence=100 * "".join(verdicts).count("1") / asked,
        asked=asked,
        verdicts=verdicts,
        adherence_change=change,
        adherence_error=error,
    )


def paired(before: Sequence[str], after: Sequence[str]) -> tuple[float, float] | tuple[None, None]:
    """How many points of a hundred ``after`` has more in the same things, and the standard error of that.

    Pictures are independent and the things in one are not, so that the error is that of a ratio of sums over pictures. Nothing where
    both have fewer than two.
    """
    pairs = list(zip(before, after, strict=False))
    if len(pairs) < 2:
        return None, None
    gains, sizes = [b.count("1") - a.count("1") for a, b in pairs], [len(a) for a, _ in pairs]
    share, count = sum(gains) / sum(sizes), len(pairs)
    apart = sum((gain - share * size) ** 2 for gain, size in zip(gains, sizes, strict=True))
    return 100 * share, 100 * math.sqrt(count / (count - 1) * apart) / sum(sizes)


def adherence(row: Row) -> str:
    """With how many things it is a share of and how far it is from the exact tier's, or "" where nobody judged."""
    if row.adherence is None:
        return ""
    far = "" if row.adherence_change is None else f" ({row.adherence_change:+.1f} ± {row.adherence_error:.1f})"
    return f"{row.adherence:.0f} % of {row.asked}{far}"


def share(row: Row) -> str:
    """Of the product rate, or what it is at most; "" where that rate was not measured."""
    bound = "< " if row.more_than else "≤ " if row.skipped is None else ""
    return "" if row.share is None else f"{bound}{row.share:.0%}"


def figure(value: float | None, form: str) -> str:
    """A figure in a format's form, or "" where there is none."""
    return "" if value is None else format(value, form)


def likeness(row: Row, unit: str = "") -> str:
    """PSNR with ``unit`` after it, or that the pictures are equal; "" where it is not known."""
    return "equal" if row.differ == 0 else "" if row.psnr is None else f"{row.psnr:.1f}{unit}"


def seconds(row: Row) -> str:
    """The median, or what it is more than."""
    return f"{'> ' if row.more_than else ''}{row.seconds:.2f}"


def ratio(row: Row) -> str:
    """To the stock pipeline, or what it is less than."""
    return "" if row.ratio is None else f"{'< ' if row.more_than else ''}{row.ratio:.2f}"


READING = (
    "Of products: FLOPs that were computed, those of skipped steps left out, of what matrix products of the same type reach here; "
    "≤ where a result does not say what was skipped. Of copies: bytes that the linear layers of denoising must move, of what a "
    "copy reaches; of ours, which tell the seconds of denoising. Of quantized weights there is neither. Adherence: in brackets the "
    "points more than the exact tier in the same things, ± the standard error."
)


def table(rows: Sequence[Row], base: str = BASE) -> str:
    """The rows as a Markdown table; :data:`READING` says how to read it.

    Args:
        base: whose seconds the ratios are of.
    """
    head = ("size", "", "seconds", "spread", f"× {base}", "PSNR", "SSIM", "GMSD", "adherence", "MiB", "load s", "first s",
            "of products", "of copies")  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += [
        f"| {r.size} | {r.name} | {seconds(r)} | {r.fastest:.2f}–{'> ' if r.limit else ''}{r.slowest:.2f} | {ratio(r)} "
        f"| {likeness(r)} | {figure(r.ssim, '.4f')} | {figure(r.gmsd, '.4f')} "
        f"| {adherence(r)} | {(r.device_bytes or r.host_bytes) / 2**20:.0f} | {r.load_seconds:.1f} "
        f"| {r.first_seconds:.1f} | {share(r)} | {figure(r.copy_share, '.0%')} |"
        for r in rows
    ]
    return "\n".join(lines)
