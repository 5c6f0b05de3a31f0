"""Correctness where the ops run: every implementation against float64, in CUDA graphs, on a stream beside the current one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..constraint import Format, Place
from ..op import Case, Inputs, Op
from ..registry import choose, reasons
from ..verify import draw, poisoned, shares
from .timing import captured

LONGEST = 300  # characters of an exception


@dataclass(frozen=True)
class Check:
    """One comparison: what ran, and its largest error as a share of the bound (see ``verify.py``); at most 1 passes."""

    op: str
    case: str
    form: str
    implementation: str
    share: float
    problem: str = ""

    @property
    def passed(self) -> bool:
        return self.share <= 1 and not self.problem

    @property
    def fault(self) -> str:
        """What is wrong; empty if it passed."""
        return "" if self.passed else self.problem or f"{self.share:.3g} of its bound"


def check_one(op: Op, case: Case, form: Format, name: str, device: torch.device, seed: int = 0) -> Check:
    """Run one implementation on poisoned memory and compare; an exception is a failed check."""

    def share() -> float:
        inputs = draw(op, case, form, device, seed)
        with poisoned():
            outputs = op.implementation(name).load()(**inputs)
        return max(shares(op, form, case.dims, inputs, outputs, name))

    return judged(op, case.name, form, name, share)


def judged(op: Op, case: str, form: Format, name: str, share: Callable[[], float]) -> Check:
    """The check whose largest error ``share`` finds; an exception is a failed check."""
    labels = (op.name, case, str(form), name)
    try:
        return Check(*labels, share())
    except Exception as error:
        return Check(*labels, math.inf, said(error))


def said(error: Exception) -> str:
    """An exception in one line, of which a compiler's would take hundreds."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST]


def check_all(op: Op, cases: Sequence[Case], place: Place, device: torch.device) -> Iterator[Check]:
    """``cases`` of ``op`` in every format and implementation that runs at ``place``."""
    for form in op.formats:
        for case in cases:
            for name, reason in reasons(op.name, place, form, case.dims).items():
                if reason is None:
                    yield check_one(op, case, form, name, device)


def flat(outputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Outputs as a list."""
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def check_graph(op: Op, form: Format, place: Place, device: torch.device) -> Check:
    """Capture a call in a CUDA graph on a side stream, change the inputs, replay: it must compute the new result."""
    return judged(op, "graph", form, "triton", lambda: replayed(op, form, place, device))


def replayed(op: Op, form: Format, place: Place, device: torch.device) -> float:
    """The largest error of a graph's result on other inputs than it was captured with, as a share of its bound."""
    case = op.cases[-1]
    function = choose(op.name, place, form, case.dims, "triton").function
    inputs, fresh = draw(op, case, form, device, 0), draw(op, case, form, device, 1)
    kept: list[Tensor] = []

    def once() -> None:
        kept[:] = flat(function(**inputs))

    replay = captured(once)
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            value.copy_(fresh[name])
    for out in kept:
        out.zero_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        replay()
    stream.synchronize()
    outputs = kept[0] if len(kept) == 1 else kept
    return max(shares(op, form, case.dims, inputs, outputs))


def check_compiled(op: Op, form: Format, place: Place, device: torch.device, backend: str = "inductor") -> Check:
    """torch.compile in one graph must return what the call returns, bit for bit."""
    return judged(op, "compiled", form, "triton", lambda: 0.0 if traced(op, form, place, device, backend) else math.inf)


def traced(op: Op, form: Format, place: Place, device: torch.device, backend: str) -> bool:
    """Whether the compiled call returns what the call returns."""
    case = op.cases[0]
    function = choose(op.name, place, form, case.dims, "triton").function
    inputs: Inputs = draw(op, case, form, device)
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    pairs = zip(flat(compiled(**inputs)), flat(function(**inputs)), strict=True)
    return all(torch.equal(ours.float(), plain.float()) for ours, plain in pairs)
