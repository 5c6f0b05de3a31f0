"""Where an implementation can run: the hardware and software of a place, and what an implementation asks of it."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

FP8 = torch.float8_e4m3fn
HALF = (torch.bfloat16, torch.float16)
FLOATS = (*HALF, torch.float32)
QUANTIZED = (torch.int8, FP8)
FP8_SM = {FP8: 89}
LEAST_SM = 80
"""That Triton's kernels run on."""
NO_TRITON = "Triton is not installed (pip install triton, on Windows triton-windows, beside an NVIDIA card)"

Dims = Mapping[str, int]


def name_of(dtype: torch.dtype | None) -> str:
    """A dtype's name without "torch."; "none" for None."""
    return str(dtype).removeprefix("torch.").lower()


@dataclass(frozen=True)
class Format:
    """The dtype of an op's activations and, where it quantizes or reads quantized rows, of those."""

    dtype: torch.dtype
    quantized: torch.dtype | None = None

    def __str__(self) -> str:
        return name_of(self.dtype) + (f"+{name_of(self.quantized)}" if self.quantized else "")


@dataclass(frozen=True)
class Place:
    """Where a call will run.

    Attributes:
        device: "cuda", "cpu" or another torch device type.
        sm: the compute capability as one number (90 for 9.0), 0 where there is none.
        triton: whether Triton can be imported and, on a card that is at hand, launches kernels.
        interpreter: whether Triton interprets kernels on the CPU (``TRITON_INTERPRET=1``); then CPU tensors will do.
        problem: why Triton, which is installed, launches none; "" where it does, or is not installed.
    """

    device: str
    sm: int = 0
    triton: bool = False
    interpreter: bool = False
    problem: str = ""


@functools.cache
def sm_of(index: int) -> int:
    """Compute capability of CUDA device ``index`` as one number."""
    major, minor = torch.cuda.get_device_capability(index)
    return major * 10 + minor


def problem_on(index: int) -> str:
    """Why Triton, which is installed, launches no kernel on CUDA device ``index``; "" where it does. Tried once in a process."""
    try:
        return _problem_on(index)
    except Exception:  # memory ran out, which says nothing about Triton
        return ""


@functools.cache
def _problem_on(index: int) -> str:
    try:
        launch_one(index)
    except Exception as error:  # whatever its compiler, the C compiler that it calls or the driver says
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
            raise
        said = (str(error).strip().splitlines() or [""])[0][:160]
        return f"Triton is installed and does not run here ({type(error).__name__}: {said})"
    return ""


def launch_one(index: int) -> None:
    """Launch the smallest kernel there is. Its first launch builds a stub in C, which takes a compiler and Python's headers."""
    from .gpu import swiglu

    swiglu.swiglu(torch.zeros(1, 1, 32, device=f"cuda:{index}"))
    torch.cuda.synchronize(index)


def place_of(device: torch.device | str) -> Place:
    """Describe ``device`` as this process finds it."""
    device = torch.device(device)
    interpreter = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    triton = importlib.util.find_spec("triton") is not None
    if device.type != "cuda" or torch.version.hip is not None:
        return Place(device.type, 0, triton, interpreter)
    index = device.index if device.index is not None else torch.cuda.current_device()
    sm = sm_of(index)
    problem = problem_on(index) if triton and sm >= LEAST_SM and not interpreter else ""
    return Place("cuda", sm, triton and not problem, interpreter, problem)


@dataclass(frozen=True)
class Rule:
    """A condition on a problem's dimensions; ``text`` says what is wanted."""

    text: str
    holds: Callable[[Dims], bool]


def multiple(name: str, of: int) -> Rule:
    """Dimension ``name`` is a multiple of ``of``."""
    return Rule(f"{name} must be a multiple of {of}", lambda dims: dims.get(name, of) % of == 0)


def power_of_two(name: str, low: int, high: int) -> Rule:
    """Dimension ``name`` is a power of two from ``low`` to ``high``."""
    return Rule(
        f"{name} must be a power of two from {low} to {high}",
        lambda dims: low <= dims.get(name, low) <= high and dims.get(name, low).bit_count() == 1,
    )


def at_most(name: str, limit: int) -> Rule:
    """Dimension ``name`` does not exceed ``limit``."""
    return Rule(f"{name} must be at most {limit}", lambda dims: dims.get(name, 0) <= limit)


def one_of(name: str, *values: int) -> Rule:
    """Dimension ``name`` is one of ``values``."""
    wanted = ", ".join(map(str, values))
    return Rule(f"{name} must be one of {wanted}", lambda dims: dims.get(name, values[0]) in values)


@dataclass(frozen=True)
class Constraint:
    """What an implementation needs.

    Attributes:
        dtypes: accepted dtypes of the activations.
        quantized: accepted dtypes of quantized rows; (None,) for an op that has none.
        sm: smallest compute capability; 0 runs on any device.
        sm_for: a higher minimum for single dtypes.
        triton: whether Triton is needed.
        rules: conditions on the dimensions; a dimension that is not given is not held against it.
    """

    dtypes: tuple[torch.dtype, ...]
    quantized: tuple[torch.dtype | None, ...] = (None,)
    sm: int = 0
    sm_for: Mapping[torch.dtype, int] = field(default_factory=dict)
    triton: bool = False
    rules: tuple[Rule, ...] = ()

    def reason_against(self, place: Place, form: Format, dims: Dims) -> str | None:
        """Why this cannot run there, or None if it can."""
        for dtype, accepted in ((form.dtype, self.dtypes), (form.quantized, self.quantized)):
            if dtype not in accepted:
                return f"{name_of(dtype)} is not among its dtypes ({', '.join(map(name_of, accepted))})"
        if self.triton and not place.triton:
            return place.problem or NO_TRITON
        if not (self.triton and place.interpreter) and (reason := self._hardware(place, form)):
            return reason
        return next((rule.text for rule in self.rules if not rule.holds(dims)), None)

    def _hardware(self, place: Place, form: Format) -> str | None:
        needed = max(self.sm, *(self.sm_for.get(d, 0) for d in (form.dtype, form.quantized) if d))
        if needed and (place.device != "cuda" or not place.sm):
            return f"it needs an NVIDIA GPU and the device is {place.device}"
        if place.sm < needed:
            return f"it needs compute capability {needed / 10:.1f} and the device has {place.sm / 10:.1f}"
        return None
