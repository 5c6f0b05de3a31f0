"""What an attention backend is, what it is asked to do, and why it may be unable to."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..hardware import Hardware, package
from ..model.ops import Attend
from ..presets import Tier

HALF = {"bfloat16": 80, "float16": 80}
"""What kernels written for the matrix units of Ampere and later take: dtype -> smallest compute capability."""

ANY = {"float32": 0, "bfloat16": 0, "float16": 0}


@dataclass(frozen=True)
class Problem:
    """Where attention will run and on what.

    Attributes:
        device: torch's name of it.
        title: its name for people.
        described: whether the machine is not at hand; then it is taken to have every package.
        kind: "cuda", "cpu" or "mps".
        sm: compute capability as a number (89 for 8.9), or None.
        dtype: "float32", "bfloat16" or "float16".
        tokens, heads, head_dim: the shape of q, k and v, [1, tokens, heads, head_dim].
    """

    device: str
    title: str
    described: bool
    kind: str
    sm: int | None
    dtype: str
    tokens: int
    heads: int
    head_dim: int

    @property
    def measurable(self) -> bool:
        """Whether backends can be timed: a CUDA device is at hand."""
        return self.kind == "cuda" and not self.described


def problem_on(hardware: Hardware, dtype: str, tokens: int, heads: int, head_dim: int) -> Problem:
    """Attention of one shape on ``hardware``."""
    h = hardware
    return Problem(h.device, h.name, h.described, h.kind, h.sm, dtype, tokens, heads, head_dim)


@dataclass(frozen=True, eq=False)
class Backend:
    """One way to compute softmax(q·kᵀ/√d)·v.

    Attributes:
        name: what the user and the plan call it.
        load: imports what is needed and returns the function, (q [B, T, H, d], k and v [B, S, H, d], out) -> [B, T, H, d]; called
            once, when a model is loaded. The function may overwrite q and k.
        types: kind of device that it runs on -> dtype that it takes there -> smallest compute capability (on CUDA).
        sms: the only compute capabilities that it has kernels for; any from the smallest on where empty.
        head_dims: widths of a head that it takes; any where None.
        package: the distribution that it comes in; torch's own where empty.
        get: how to get it.
        lossy: whether it rounds more than the dtype does; then only the high tier permits it.
        only_named: why it is used only where it is named, or "".
    """

    name: str
    load: Callable[[], Attend]
    types: Mapping[str, Mapping[str, int]] = field(default_factory=lambda: {"cuda": HALF})
    sms: tuple[int, ...] = ()
    head_dims: Container[int] | None = None
    package: str = ""
    get: str = ""
    lossy: bool = False
    only_named: str = ""

    def reason_against(self, problem: Problem, tier: Tier) -> str | None:
        """Why it cannot be used, or None if it can. Nothing is imported."""
        return self._device(problem) or self._shape(problem) or self._tier(tier) or self._package(problem)

    def _device(self, p: Problem) -> str | None:
        if p.kind not in self.types:
            return f"it needs a {' or '.join(self.types)} device, and {p.title} is none"
        types = self.types[p.kind]
        if p.dtype not in types:
            return f"it takes {' and '.join(types)}, not {p.dtype}"
        if p.kind != "cuda":
            return None
        smallest, has = types[p.dtype], p.sm or 0
        if has < smallest:
            return f"it needs compute capability {smallest / 10:.1f} for {p.dtype}, and {p.title} has {has / 10:.1f}"
        if self.sms and has not in self.sms:
            known = ", ".join(f"{sm / 10:.1f}" for sm in self.sms)
            return f"it has kernels for compute capability {known} only, and {p.title} has {has / 10:.1f}"
        return None

    def _shape(self, p: Problem) -> str | None:
        if self.head_dims is None or p.head_dim in self.head_dims:
            return None
        return f"it takes heads of {show(self.head_dims)} channels, not {p.head_dim}"

    def _tier(self, tier: Tier) -> str | None:
        if not self.lossy or tier.name == "high":
            return None
        return f"it is lossy, and the {tier.name} tier does not permit that; the high tier does"

    def _package(self, p: Problem) -> str | None:
        if not self.package or p.described or package(self.package).usable:
            return None
        return f"{self.package} is not installed; {self.get}"


def operation(
    name: str, function: Callable[[Tensor, Tensor, Tensor], Tensor], mutates: tuple[str, ...] = ()
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """``function``, (q [B, T, H, d], k and v [B, S, H, d]) -> [B, T, H, d], as one operation that torch.compile does not trace.

    Args:
        name: of the operation, another one for every function.
        function: its result is no view of what it is given.
        mutates: those of "q", "k" and "v" that it may overwrite.
    """

    @torch.library.custom_op(f"flux2_local::{name}", mutates_args=mutates)
    def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return function(q, k, v).contiguous()

    whole.register_fake(lambda q, k, v: q.new_empty(q.shape))
    return whole


def imported(module: str, name: str, mutates: tuple[str, ...] = (), **options: object) -> Callable[[], Attend]:
    """A loader of a package's function that takes q, k and v as they are, overwrites ``mutates`` of them and returns the result,
    alone or followed by more."""

    def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = getattr(importlib.import_module(module), name)(q, k, v, **options)
        result: Tensor = found[0] if isinstance(found, tuple) else found
        return result

    # Packages choose devices and kernels in Python that cannot be traced.
    compiled = operation(module.replace(".", "_"), theirs, mutates)

    def attend(q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None) -> Tensor:
        found = (compiled if torch.compiler.is_compiling() else theirs)(q, k, v)
        return found if out is None else out.copy_(found)

    def load() -> Attend:
        getattr(importlib.import_module(module), name)
        return attend

    return load


def show(sizes: Container[int]) -> str:
    """Allowed sizes in words."""
    if isinstance(sizes, range):
        return f"{sizes[0]} to {sizes[-1]} (in steps of {sizes.step})"
    return " or ".join(map(str, sizes))  # type: ignore[call-overload]
