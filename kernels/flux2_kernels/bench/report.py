"""One row a problem: times of every way to compute it, as bandwidth or arithmetic, as a share of what the card can do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from ..constraint import Format, Place, name_of
from ..op import Case, Function, Inputs, Op
from ..rates import Rates
from ..registry import reasons
from ..verify import draw
from .checks import check_one
from .rivals import cublas_bf16, inductor, libraries
from .timing import measure, sets_for

MEMORY_AIM = 85.0  # percent of the measured copy bandwidth
LIBRARY_AIM = 0.9  # of the best library's speed
CUBLAS_AIM = 1.7  # times bf16 cuBLAS, at the shapes of CUBLAS_LAYERS
CUBLAS_LAYERS = ("dev-single-in", "dev-attention")


@dataclass(frozen=True)
class Row:
    """Milliseconds are medians; ``error`` is the largest error as a share of its bound; None stands for "not there"."""

    op: str
    shape: str
    format: str
    dims: str
    implementation: str
    error: float
    ours_p20: float
    ours_ms: float
    ours_p80: float
    eager_ms: float | None
    inductor_ms: float | None
    library: str | None
    library_ms: float | None
    cublas_bf16_ms: float | None
    gb_per_s: float
    tflop_per_s: float | None
    roofline_ms: float | None
    percent_of_measured: float | None

    def aims(self) -> Iterator[tuple[str, bool]]:
        """What this row is to reach, and whether it does."""
        if self.tflop_per_s is None:
            if self.percent_of_measured is not None:
                yield f"{MEMORY_AIM:.0f}% of copy bandwidth", self.percent_of_measured >= MEMORY_AIM
        elif self.library_ms is not None:
            yield f"{LIBRARY_AIM:.0%} of {self.library}", self.library_ms / self.ours_ms >= LIBRARY_AIM
        if self.op == "linear_w8a8" and self.shape in CUBLAS_LAYERS and self.cublas_bf16_ms is not None:
            yield f"{CUBLAS_AIM}x bf16 cuBLAS", self.cublas_bf16_ms / self.ours_ms >= CUBLAS_AIM


COLUMNS = tuple(field.name for field in fields(Row))


def values(row: Row) -> dict[str, Any]:
    """A row for a CSV: four digits, empty where there is nothing."""
    return {k: "" if v is None else f"{v:.4g}" if isinstance(v, float) else v for k, v in asdict(row).items()}


@dataclass(frozen=True)
class Bench:
    """Where and against what problems are measured.

    Attributes:
        place, device: where.
        rates: as measured there.
        backend: that compiles the reference; "inductor" but in a dry run.
    """

    place: Place
    device: torch.device
    rates: Rates
    backend: str = "inductor"

    def rows(self, op: Op, cases: Sequence[Case]) -> Iterator[Row]:
        """Each of ``cases`` with bf16 activations, in each format that runs here."""
        for form in op.formats:
            if form.dtype != torch.bfloat16:
                continue
            for case in cases:
                if reasons(op.name, self.place, form, case.dims)["triton"] is None:
                    yield self.row(op, form, case)

    def row(self, op: Op, form: Format, case: Case) -> Row:
        """Measure the Triton implementation and its rivals on one problem."""
        cost = op.cost(case.dims, form)

        def make(seed: int) -> Inputs:
            return draw(op, case, form, self.device, seed)

        sets = sets_for(make, cost.bytes)
        few = Case(case.name, {**case.dims, "tokens": min(case.dims["tokens"], 1040)}, case.strided)
        error = check_one(op, few, form, "triton", self.device).share
        ours = measure(op.implementation("triton").load(), sets)
        library, library_ms = self.best_library(libraries(op, form, case.dims, self.place), sets)
        cublas = cublas_bf16(op.name, sets[0])
        seconds, roofline = ours.p50 / 1e3, self.rates.seconds(cost)
        return Row(
            op=op.name,
            shape=case.name,
            format=str(form),
            dims=" ".join(f"{k}={v}" for k, v in case.dims.items()),
            implementation="triton",
            error=error,
            ours_p20=ours.p20,
            ours_ms=ours.p50,
            ours_p80=ours.p80,
            eager_ms=self.median(op.reference, sets),
            inductor_ms=self.median(inductor(op, self.backend), sets),
            library=library,
            library_ms=library_ms,
            cublas_bf16_ms=self.median(cublas[0], [cublas[1]]) if cublas else None,
            gb_per_s=cost.bytes / seconds / 1e9,
            tflop_per_s=cost.flops / seconds / 1e12 if cost.matmul else None,
            roofline_ms=roofline * 1e3 if roofline else None,
            percent_of_measured=100 * roofline / seconds if roofline else None,
        )

    def median(self, function: Function, sets: Sequence[Inputs]) -> float | None:
        """Median milliseconds; None where it does not run here (most often for want of memory)."""
        try:
            return measure(function, sets).p50
        except (RuntimeError, NotImplementedError):
            return None

    def best_library(self, found: dict[str, Function], sets: Sequence[Inputs]) -> tuple[str | None, float | None]:
        """The quickest of the libraries that run, and its median milliseconds."""
        timed = [(ms, name) for name, function in found.items() if (ms := self.median(function, sets)) is not None]
        ms, name = min(timed, default=(None, None))
        return name, ms


def rates_record(rates: Rates) -> dict[str, float]:
    """The measured rates for the environment's record: GB/s, TFLOP/s by dtype."""
    matmul = {f"{name_of(dtype)}_tflops": rate / 1e12 for dtype, rate in rates.matmul.items()}
    return {"copy_gb_per_s": rates.memory / 1e9, **matmul}
