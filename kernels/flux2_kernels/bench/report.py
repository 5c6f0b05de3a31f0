"""One row a problem: times of every way to compute it, as bandwidth or arithmetic, as a share of what the card can do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from ..constraint import Format, Place, name_of
from ..op import Case, Inputs, Op
from ..rates import Rates
from ..registry import reasons
from ..verify import draw
from .checks import check_one, said
from .rivals import in_bf16, inductor, libraries, linear_bf16
from .stock import STOCK
from .timing import host_us, in_turn, prepared, sets_for

MEMORY_AIM = 85.0  # percent of the measured copy bandwidth
LIBRARY_AIM = 0.9  # of the best library's speed
CUBLAS_AIM = 1.7  # times bf16 cuBLAS, at the shapes of CUBLAS_LAYERS
CUBLAS_LAYERS = ("dev-single-in", "dev-attention")


@dataclass(frozen=True)
class Row:
    """Milliseconds are medians; None stands for "not there".

    Attributes:
        op, shape, format, dims, implementation: what ran.
        error: its largest error as a share of its bound.
        problem: what was wrong, with the result or with measuring; empty if nothing was.
        ours_p20, ours_ms, ours_p80: replays of a CUDA graph, so that they hold no launch, in turn with those of the rivals.
        host_us: microseconds that a call without a graph keeps the host.
        eager_ms, inductor_ms: the form of ``stock.py``, op by op and compiled.
        library, library_ms: the quickest library that runs.
        cublas_bf16_ms: a linear's product in bf16.
        gb_per_s, tflop_per_s: of ours.
        roofline_ms, percent_of_measured: by the rates measured on the card.
    """

    op: str
    shape: str
    format: str
    dims: str
    implementation: str
    error: float
    problem: str
    ours_p20: float | None = None
    ours_ms: float | None = None
    ours_p80: float | None = None
    host_us: float | None = None
    eager_ms: float | None = None
    inductor_ms: float | None = None
    library: str | None = None
    library_ms: float | None = None
    cublas_bf16_ms: float | None = None
    gb_per_s: float | None = None
    tflop_per_s: float | None = None
    roofline_ms: float | None = None
    percent_of_measured: float | None = None

    def aims(self) -> Iterator[tuple[str, bool]]:
        """What this row is to reach, and whether it does; nothing where there is a problem."""
        if self.problem or self.ours_ms is None:
            return
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
        """Check the Triton implementation on one problem and measure it and its rivals; an exception is the row's problem."""
        few = Case(case.name, {**case.dims, "tokens": min(case.dims["tokens"], 1040)}, case.strided)
        check = check_one(op, few, form, "triton", self.device)
        dims = " ".join(f"{k}={v}" for k, v in case.dims.items())
        row = Row(op.name, case.name, str(form), dims, "triton", check.share, check.fault)
        try:
            return self.timed(row, op, form, case)
        except Exception as error:
            return replace(row, problem=row.problem or said(error))

    def timed(self, row: Row, op: Op, form: Format, case: Case) -> Row:
        """``row`` with its times and what follows from them."""
        cost = op.cost(case.dims, form)

        def make(seed: int) -> Inputs:
            return draw(op, case, form, self.device, seed)

        sets = sets_for(make, cost.bytes)
        function, found = op.implementation("triton").load(), libraries(op, form, case.dims, self.place)
        rivals = {**found, "eager": STOCK[op.name], "inductor": inductor(STOCK[op.name], self.backend)}
        runs = {"ours": prepared(function, sets)}
        for name, rival in rivals.items():
            with suppress(Exception):  # most often for want of memory
                runs[name] = prepared(rival, sets)
        if op.name.startswith("linear"):
            with suppress(Exception):
                runs["bf16"] = prepared(linear_bf16, list(map(in_bf16, sets)))
        took = in_turn(runs)
        ours, medians = took["ours"], {name: times.p50 for name, times in took.items()}
        library = min(found.keys() & medians.keys(), key=medians.__getitem__, default=None)
        seconds, roofline = ours.p50 / 1e3, self.rates.seconds(cost)
        return replace(
            row,
            ours_p20=ours.p20,
            ours_ms=ours.p50,
            ours_p80=ours.p80,
            host_us=host_us(function, sets[0]),
            eager_ms=medians.get("eager"),
            inductor_ms=medians.get("inductor"),
            library=library,
            library_ms=None if library is None else medians[library],
            cublas_bf16_ms=medians.get("bf16"),
            gb_per_s=cost.bytes / seconds / 1e9,
            tflop_per_s=cost.flops / seconds / 1e12 if cost.matmul else None,
            roofline_ms=roofline * 1e3 if roofline else None,
            percent_of_measured=100 * roofline / seconds if roofline else None,
        )


def rates_record(rates: Rates) -> dict[str, float]:
    """The measured rates for the environment's record: GB/s, TFLOP/s by dtype."""
    matmul = {f"{name_of(dtype)}_tflops": rate / 1e12 for dtype, rate in rates.matmul.items()}
    return {"copy_gb_per_s": rates.memory / 1e9, **matmul}
