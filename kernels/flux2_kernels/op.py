"""What an operation is: its reference, its implementations, its test cases and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from .constraint import Constraint, Dims, Format

Function = Callable[..., Any]
Inputs = dict[str, Any]
OutputKind = Literal["dense", "quantized"]


@dataclass(frozen=True)
class Cost:
    """Device memory traffic (every input read once, every output written once) and arithmetic of one call.

    Attributes:
        bytes: bytes read and written.
        flops: floating-point or integer operations, a multiply-add counted as two.
        matmul: the dtype of the operands that matrix units multiply, or None where there is no matmul.
    """

    bytes: int
    flops: int
    matmul: torch.dtype | None = None

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops, self.matmul or other.matmul)


@dataclass(frozen=True)
class Case:
    """One call: its dimensions and how its inputs lie in memory.

    Attributes:
        name: unique within the op.
        dims: the sizes that :attr:`Op.inputs` and :attr:`Op.cost` take.
        strided: inputs are views into larger buffers, as a packed projection's parts are.
    """

    name: str
    dims: Dims
    strided: bool = False


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    Attributes:
        name: "reference", "triton" or a library's name.
        load: imports what is needed and returns the function; called once, when the implementation is chosen.
        constraint: where it can run.
        slack: as :attr:`Op.slack`, for an implementation that rounds where the op does not.
    """

    name: str
    load: Callable[[], Function]
    constraint: Constraint
    slack: float = 0.0


@dataclass(frozen=True)
class Op:
    """An operation of the FLUX.2 denoising step.

    Attributes:
        name: the name in the registry.
        reference: plain torch, runs on every device and dtype.
        exact: the outputs without quantization, one tensor per entry of ``outputs``; in float64 when the inputs are.
        outputs: what each output is. A "quantized" one is a pair (values, float32 scale per row).
        formats: the dtypes that :attr:`inputs` and :attr:`cost` accept, the usual one first.
        inputs: (case, format, device, generator) -> keyword arguments of every implementation.
        cost: (dims, format) -> :class:`Cost`.
        cases: small and odd sizes for tests.
        shapes: sizes at which the models call it, for benchmarks.
        implementations: from most to least wanted; the reference is always the last.
        slack: error allowed on top of rounding the result, in roundoffs of the dtype at the result's largest magnitude;
            not 0 for ops that round in between.
    """

    name: str
    reference: Function
    exact: Function
    outputs: tuple[OutputKind, ...]
    formats: tuple[Format, ...]
    inputs: Callable[[Case, Format, torch.device, torch.Generator], Inputs]
    cost: Callable[[Dims, Format], Cost]
    cases: tuple[Case, ...]
    shapes: tuple[Case, ...]
    implementations: tuple[Implementation, ...]
    slack: float = 0.0

    def implementation(self, name: str) -> Implementation:
        """The implementation of that name; KeyError names the ones there are."""
        for implementation in self.implementations:
            if implementation.name == name:
                return implementation
        known = ", ".join(i.name for i in self.implementations)
        raise KeyError(f"{self.name} has no implementation {name!r}; there are: {known}")


def size_of(dtype: torch.dtype) -> int:
    """Bytes per element."""
    return torch.empty(0, dtype=dtype).element_size()


def product(dims: Mapping[str, int], *names: str) -> int:
    """The product of the named dimensions."""
    result = 1
    for name in names:
        result *= dims[name]
    return result
