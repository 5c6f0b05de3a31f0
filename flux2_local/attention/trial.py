"""A backend on the device at hand: does it run, is it right, how long does it take."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from ..errors import is_out_of_memory
from ..model.ops import Attend, sdpa
from .backend import Backend, Problem

ROUNDS = 5
SMALL = 256
"""Tokens of the trial of a backend that was named, which is only asked whether it runs."""

TOLERANCE = {False: 0.02, True: 0.1}
"""Largest relative error, root mean square, of a backend that is exact but for rounding and of a lossy one."""


@dataclass(frozen=True)
class Trial:
    """Seconds of one call, or why there are none."""

    seconds: float
    problem: str = ""


def run(backend: Backend, problem: Problem) -> Trial:
    """Try a backend on random q, k and v; the answer is kept for the life of the process, unless memory was short.

    Whatever goes wrong is the answer's ``problem``: a package that does not import, a kernel that does not run, a result
    that is not attention.
    """
    try:
        return kept(backend, problem)
    except Exception as error:  # a model that is loaded now may be gone when the next one is planned
        return failed(error)


@cache
def kept(backend: Backend, problem: Problem) -> Trial:
    """The trial itself; it raises only what says that memory ran out."""
    try:
        attend = backend.load()
        with torch.cuda.device(problem.device):
            return timed(attend, problem, TOLERANCE[backend.lossy])
    except Exception as error:  # a backend is someone else's code, with errors of its own
        if is_out_of_memory(error):
            raise
        return failed(error)


def failed(error: Exception) -> Trial:
    return Trial(0.0, f"it does not run here ({type(error).__name__}: {first_line(error)})")


def timed(attend: Attend, problem: Problem, tolerance: float) -> Trial:
    q, k, v = draw(problem)
    want = sdpa(q, k, v).float()
    got = attend(q.clone(), k.clone(), v).float()
    error = float((got - want).norm() / want.norm())
    if not error <= tolerance:
        return Trial(0.0, f"its results are wrong on {problem.title} (relative error {error:.2g})")
    return Trial(min(clock(attend, q, k, v) for _ in range(ROUNDS)))


def draw(problem: Problem) -> tuple[Tensor, ...]:
    """q, k and v [1, T, H, d] on the device; v lies in a packed projection, as in a single block."""
    shape = (1, problem.tokens, problem.heads, problem.head_dim)
    generator = torch.Generator(problem.device).manual_seed(0)
    new = partial(torch.randn, generator=generator, device=problem.device, dtype=getattr(torch, problem.dtype))
    packed = new(1, problem.tokens, 3 * problem.heads * problem.head_dim)
    return new(shape), new(shape), packed.chunk(3, -1)[2].unflatten(-1, shape[2:])


def clock(attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> float:
    """Seconds of one call on a CUDA device, by its own clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    attend(q, k, v)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:160]
