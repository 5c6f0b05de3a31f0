"""What a run keeps: one row per contender and size, with every sample that a figure is made of."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from .. import costs, load, store
from ..costs import Work
from .contenders import BASE, CONTENDERS, IN_16_BIT, REFERENCE
from .metrics import gmsd, psnr, ssim
from .runner import Outcome, Samples
from .subject import Judged, Subject


@dataclass(frozen=True)
class Row:
    """One contender at one size.

    Attributes:
        size, name, group, note: which, and what it is.
        dtype, steps: of activations, and of denoising.
        seconds: median of whole calls, loading and the first picture left out; ``fastest`` and ``slowest`` of ``samples``.
        ratio: median over the rounds (``ratios``) of the stock pipeline's seconds to this one's.
        psnr, ssim, gmsd: means over the pictures against the exact tier's; dB (99 for equal ones), 1 and 0 for equal ones.
        differ, differ_more: share of values that differ at all, and by more than one, in percent.
        load_seconds: from the start of the process until it is loaded.
        first_seconds: of the first picture: it compiles and warms up.
        host_bytes, device_bytes: peaks: resident memory of its process (mapped weights included), and allocated on a card.
        tflop_per_s: of the model's arithmetic, as if no step were skipped and nothing were computed twice.
        share: of the matrix product rate measured in its dtype.
        stages: median seconds per stage, where it tells them.
        plan: what runs, for ours.
        adherence, asked: of the ``asked`` things that the prompts ask for, the share that a judge finds in the pictures, in
            percent; None and 0 where nobody judged.
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
    ratio: float
    psnr: float
    ssim: float
    gmsd: float
    differ: float
    differ_more: float
    load_seconds: float
    first_seconds: float
    host_bytes: int
    device_bytes: int
    tflop_per_s: float
    share: float
    samples: list[float]
    ratios: list[float]
    stages: dict[str, float] = field(default_factory=dict)
    plan: dict[str, str] = field(default_factory=dict)
    adherence: float | None = None
    asked: int = 0


def rows(outcome: Outcome, subject: Subject, rates: dict[str, float]) -> list[Row]:
    """The figures of every contender that ran.

    Where the stock pipeline does not fit, its 16-bit form takes its place, and without the exact tier quality is held against
    them; without those, against the first that ran.
    """
    samples = outcome.samples
    if not samples:
        return []
    first = next(iter(samples))

    def one_of(*names: str) -> Samples:
        return samples[next((name for name in names if name in samples), first)]

    against, base = one_of(REFERENCE, BASE, IN_16_BIT), one_of(BASE, IN_16_BIT)
    return [row(name, taken, against, base, subject, rates) for name, taken in samples.items()]


def row(
    name: str,
    taken: Samples,
    against: Samples,
    base: Samples,
    subject: Subject,
    rates: dict[str, float],
) -> Row:
    contender, dtype, steps = CONTENDERS[name], taken.facts["dtype"], taken.facts["steps"]
    pairs = list(zip(against.pictures, taken.pictures, strict=True))
    apart = np.stack([np.abs(a.astype(int) - b) for a, b in pairs])
    ratios = [a / b for a, b in zip(base.seconds, taken.seconds, strict=True)]
    seconds = statistics.median(taken.seconds)
    rate = flops(subject, steps) / seconds
    return Row(
        size=subject.size,
        name=name,
        group=contender.group,
        note=contender.note,
        dtype=dtype,
        steps=steps,
        seconds=seconds,
        fastest=min(taken.seconds),
        slowest=max(taken.seconds),
        ratio=statistics.median(ratios),
        psnr=mean_of(psnr, pairs),
        ssim=mean_of(ssim, pairs),
        gmsd=mean_of(gmsd, pairs),
        differ=100 * float((apart > 0).mean()),
        differ_more=100 * float((apart > 1).mean()),
        load_seconds=taken.load_seconds,
        first_seconds=taken.first_seconds,
        host_bytes=taken.memory["host"],
        device_bytes=taken.memory.get("device", 0),
        tflop_per_s=rate / 1e12,
        share=rate / rates[dtype],
        samples=taken.seconds,
        ratios=ratios,
        stages={k: statistics.median(s.get(k, 0.0) for s in taken.stages) for k in taken.stages[0]},
        plan=taken.facts.get("plan", {}),
    )


def mean_of(metric: Callable[[np.ndarray, np.ndarray], float], pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    return statistics.mean(metric(a, b) for a, b in pairs)


def flops(subject: Subject, steps: int) -> float:
    """FLOPs of one picture with every step computed."""
    arch = load.architecture(store.find(subject.model, "standard"))
    work = Work(subject.width, subject.height, steps)
    decode = costs.decode_flops(arch, subject.width, subject.height)
    return costs.encode_flops(arch) + steps * costs.step_flops(arch, work) + decode


def with_adherence(rows: Sequence[Row], outcome: Outcome, judged: Judged) -> list[Row]:
    """The rows with what the judge finds in the pictures that they are of."""
    found = []
    for row in rows:
        right, asked = judged.judge(outcome.samples[row.name].pictures)
        found.append(replace(row, adherence=100 * right / asked, asked=asked))
    return found


def adherence(row: Row) -> str:
    """With how many things it is a share of, or "" where nobody judged."""
    return "" if row.adherence is None else f"{row.adherence:.0f} % of {row.asked}"


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    head = ("size", "", "seconds", "spread", "× diffusers", "PSNR", "SSIM", "GMSD", "adherence", "MiB", "load s", "first s",
            "share")  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += [
        f"| {r.size} | {r.name} | {r.seconds:.2f} | {r.fastest:.2f}–{r.slowest:.2f} | {r.ratio:.2f} | {r.psnr:.1f} "
        f"| {r.ssim:.4f} | {r.gmsd:.4f} "
        f"| {adherence(r)} | {(r.device_bytes or r.host_bytes) / 2**20:.0f} | {r.load_seconds:.1f} "
        f"| {r.first_seconds:.1f} | {r.share:.0%} |"
        for r in rows
    ]
    return "\n".join(lines)
