"""Attention: one file per backend, one table, and the choice among them, made once, when a model is planned.

Which backend is fastest depends on the card, its driver and the versions installed, so on a CUDA device the choice is a
measurement; elsewhere it is the table's order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..errors import BackendUnavailableError
from ..model.ops import Attend
from ..presets import Tier
from . import flash2, flash3, flex, matmul, sage, sdpa, trial, xformers
from .backend import Backend, Problem, problem_on

__all__ = ["AUTO", "BACKENDS", "NAMES", "Backend", "Pick", "Problem", "load", "pick", "problem_on"]

BACKENDS: Mapping[str, Backend] = {
    b.name: b
    for b in (
        matmul.BACKEND,
        *sdpa.BACKENDS,
        flash3.BACKEND,
        flash2.BACKEND,
        xformers.BACKEND,
        sage.BACKEND,
        flex.BACKEND,
    )
}
"""Most wanted first, where nothing can be measured."""

AUTO = "auto"
NAMES = (AUTO, *BACKENDS)
DEFAULT = "sdpa"
CLOSE = 1.03
"""Backends within this factor of the fastest are as fast; the table's order decides, so that noise does not."""


@dataclass(frozen=True)
class Pick:
    """The backend chosen, why, and every other with why not."""

    name: str
    reason: str
    rejected: tuple[tuple[str, str], ...]


def load(name: str) -> Attend:
    """The function of a backend, (q, k, v [B, T, H, d]) -> [B, T, H, d]. It may overwrite q and k.

    Raises:
        BackendUnavailableError: its package does not import.
    """
    try:
        return BACKENDS[name].load()
    except ImportError as error:
        raise BackendUnavailableError(unavailable(name, f"it does not import ({error})")) from error


def pick(asked: str, problem: Problem, tier: Tier) -> Pick:
    """Choose the backend.

    Args:
        asked: "auto", or a backend's name, which then is the one or an error.
        problem: device, dtype and the model's shape.
        tier: the exact tier keeps the reference's call; only the high tier permits lossy backends.

    Raises:
        BackendUnavailableError: the backend named cannot be used; the message says why and how to get it.
    """
    against = {name: backend.reason_against(problem, tier) for name, backend in BACKENDS.items()}
    if asked != AUTO:
        return named(asked, against[asked], problem)
    usable = [name for name, why in against.items() if why is None]
    lost = {name: why for name, why in against.items() if why is not None}
    if tier.exact:
        kept = "the exact tier keeps the reference pipeline's call"
        return Pick(DEFAULT, f"{kept} and its rounding", tuple((lost | others(usable, DEFAULT, kept)).items()))
    lost |= {name: BACKENDS[name].only_named for name in usable if BACKENDS[name].only_named}
    usable = [name for name in usable if name not in lost]
    if problem.measurable:
        return measured(usable, lost, problem)
    reason = "the first of the table that runs here"
    later = (
        "on the card itself it is timed against the others" if problem.kind == "cuda" else "it comes later in the table"
    )
    return Pick(usable[0], reason, tuple((lost | others(usable, usable[0], later)).items()))


def others(names: list[str], winner: str, why: str) -> dict[str, str]:
    return {name: why for name in names if name != winner}


def named(name: str, why: str | None, problem: Problem) -> Pick:
    """The backend that was asked for; on a CUDA device it is tried before anything expensive begins."""
    if why is None and problem.measurable:
        why = trial.run(BACKENDS[name], replace(problem, tokens=trial.SMALL)).problem or None
    if why is not None:
        raise BackendUnavailableError(unavailable(name, f"on {problem.title}: {why}"))
    get = BACKENDS[name].get
    reason = f"asked for; there: {get}" if problem.described and get else "asked for"
    return Pick(name, reason, tuple((other, f"{name} was asked for") for other in BACKENDS if other != name))


def measured(usable: list[str], lost: dict[str, str], problem: Problem) -> Pick:
    """The fastest by a timed trial; where no trial runs, torch's own."""
    trials = {name: trial.run(BACKENDS[name], problem) for name in usable}
    lost |= {name: t.problem for name, t in trials.items() if t.problem}
    times = {name: t.seconds for name, t in trials.items() if not t.problem}
    if not times:
        lost.pop(DEFAULT, None)
        return Pick(DEFAULT, "torch's own; no trial of any backend ran", tuple(lost.items()))
    best = min(times.values())
    winner = next(name for name, seconds in times.items() if seconds <= CLOSE * best)
    lost |= {
        name: f"{1e3 * seconds:.2f} ms a call against {1e3 * times[winner]:.2f}"
        for name, seconds in times.items()
        if name != winner
    }
    shape = f"{problem.tokens} tokens, {problem.heads} heads of {problem.head_dim}"
    return Pick(
        winner, f"the fastest measured here: {1e3 * times[winner]:.2f} ms a call ({shape})", tuple(lost.items())
    )


def unavailable(name: str, why: str) -> str:
    """What to tell the user about a backend that was named and cannot be used."""
    get = BACKENDS[name].get
    how = f" To get it: {get}." if get and get not in why else ""
    return f"Attention {name!r} cannot be used {why}.{how} Leave attention out to have the best one chosen."
