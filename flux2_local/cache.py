"""Step caching: a step that changes little takes what the blocks would add from the steps before it.

What the blocks add to the picture's tokens is extrapolated along the noise level from the last two steps that were computed
whole (a Taylor expansion of first order, as in TaylorSeer, arXiv:2503.06923). Which steps are skipped is decided either by
the first block, which is then computed in every step: what it adds tells how far the step is from the last whole one (the
criterion of first-block caching, as in ParaAttention and cache-dit). Or, with a threshold of infinity, by their numbers
alone, and no block is computed in a skipped step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .presets import CachePolicy

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Recorded(CachePolicy):
    """The decisions of another run, replayed; of the policy that made them only ``threshold`` still counts, which says whether the
    first block is computed in a skipped step.

    Attributes:
        skips: numbers of the skipped steps from 0; the first one cannot be among them.
    """

    skips: tuple[int, ...] = ()


Course = tuple[bool, list[int]]
"""Of one :class:`StepCache`: whether it probes, and the steps that it skipped, which grow while it works."""

_watching: ContextVar[list[Course] | None] = ContextVar("watching", default=None)


@contextmanager
def watched() -> Iterator[list[Course]]:
    """The courses of the caches that begin inside, in their order: one per picture, with classifier-free guidance the first
    passes' and then the second ones'."""
    seen: list[Course] = []
    token = _watching.set(seen)
    try:
        yield seen
    finally:
        _watching.reset(token)


@dataclass
class StepCache:
    """The memory of one picture's denoising, or of one of its two passes with classifier-free guidance.

    Args:
        policy: when steps may be skipped.
        sigmas: the run's noise levels, one per step and the last.
    """

    policy: CachePolicy
    sigmas: tuple[float, ...]
    step: int = -1
    skipped: list[int] = field(default_factory=list)
    _first: Tensor | None = None
    _whole: list[tuple[float, Tensor]] = field(default_factory=list)

    @property
    def probes(self) -> bool:
        """Whether the first block decides, and is computed in every step."""
        return self.policy.threshold < math.inf

    def rest(self, added: Tensor) -> Tensor | None:
        """A new step: what the blocks (after the first, where that decides) would add, or None where they are to be computed.

        Args:
            added: what the first block added to the picture's tokens, [N, D].
        """
        self.step += 1
        if self.step == 0 and (seen := _watching.get()) is not None:
            seen.append((self.probes, self.skipped))
        if not self._may_skip(added):
            self._first = added
            return None
        self.skipped.append(self.step)
        sigma, last = self._whole[-1]
        if len(self._whole) == 1:
            return last
        before, first = self._whole[0]
        share = (self.sigmas[self.step] - sigma) / (sigma - before)
        return last + share * (last - first)

    def keep(self, added: Tensor) -> None:
        """Remember what the same blocks added in this step."""
        self._whole = [*self._whole[-1:], (self.sigmas[self.step], added)]

    def _may_skip(self, added: Tensor) -> bool:
        policy, steps = self.policy, len(self.sigmas) - 1
        if isinstance(policy, Recorded):
            return self.step in policy.skips
        if self._first is None or not policy.warmup <= self.step < steps - policy.tail:
            return False
        if self.skipped[-policy.limit :] == list(range(self.step - policy.limit, self.step)):
            return False
        if not self.probes:
            return True
        change = (added - self._first).abs().mean() / self._first.abs().mean()
        return bool(change < policy.threshold)
