"""The weight formats there are: what each needs, what it weighs, what it costs in precision. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import BackendUnavailableError
from ..hardware import Hardware, Kind, package

HALF = ("bfloat16", "float16")
FLOATS = (*HALF, "float32")
FP8_FIRST = 90
"""The compute capability from which ``builtin`` means fp8: before it, int8 units are the faster ones."""


@dataclass(frozen=True)
class Format:
    """One way of holding and multiplying the weights of linear layers.

    Attributes:
        name: what the user calls it: backend, then what the weights are.
        backend: the module of this package that does it.
        weight_bytes: bytes per weight, scales included (of 3072 input channels where there is a scale per row).
        loss: relative error of a layer's output on normal rows and weights, 3072 input channels (``scripts/calibrate_quant.py``).
        dtypes: of activations.
        kinds: devices it runs on.
        sm: smallest compute capability on CUDA.
        packages: distributions it needs, each with its first version that will do.
        group: input channels that share a scale, where it is not the whole row; a layer must have a multiple of it.
        rounded: whether rows of activations are made int8 too, where weights share scales by group.
        rotation: largest block of input channels that a Hadamard matrix mixes; 0 is none.
        automatic: whether the planner may choose it; the others are used when they are named.
        product: what its matrix products are of, a key of :attr:`Hardware.flops` where the device is fast at it; "" for the compute
            type.
        unpacked: bytes per weight that another backend's layer takes while it multiplies, in 16 bit (``tests/test_quant.py``).
        spelt_out: whether it rounds rows and scales sums by torch's plain operations, each of which makes a tensor.
        not_kept: why its weights are quantized at every loading; "" where they are kept on disk.
        note: what to know before choosing it.
    """

    name: str
    backend: str
    weight_bytes: float
    loss: float
    dtypes: tuple[str, ...] = FLOATS
    kinds: tuple[Kind, ...] = ("cuda", "cpu", "mps")
    sm: int = 0
    packages: tuple[tuple[str, str], ...] = ()
    group: int = 0
    rounded: bool = False
    rotation: int = 0
    automatic: bool = False
    product: str = ""
    unpacked: float = 2.0
    spelt_out: bool = False
    not_kept: str = ""
    note: str = ""

    def reason_against(self, hardware: Hardware, dtype: str) -> str | None:
        """Why it cannot be used with ``dtype`` on ``hardware``, with how to get it where it can be got; None if it can."""
        if hardware.kind not in self.kinds:
            return f"it needs {' or '.join(self.kinds)}, and {hardware.name} is a {hardware.kind} device"
        if hardware.kind == "cuda" and (hardware.sm or 0) < self.sm:
            return (
                f"it needs compute capability {self.sm / 10:.1f}, and {hardware.name} has {(hardware.sm or 0) / 10:.1f}"
            )
        if dtype not in self.dtypes:
            return f"it computes in {' or '.join(self.dtypes)}, not {dtype} (--dtype says which)"
        for name, first in self.packages:
            found = package(name)
            if found.version is None:
                return f"it needs {name} {first} or newer, which is {found.problem}"
            if numbers(found.version) < numbers(first):
                return (
                    f"it needs {name} {first} or newer, and {found.version} is installed; pip install --upgrade {name}"
                )
        return None


def numbers(version: str) -> tuple[int, ...]:
    """ "0.18.0+cpu" -> (0, 18, 0)."""
    plain = version.split("+")[0].split(".")
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in plain)


TORCHAO: tuple[tuple[str, str], ...] = (("torchao", "0.18"),)
QUANTO: tuple[tuple[str, str], ...] = (("optimum-quanto", "0.2.7"),)
FP8 = "float8_e4m3fn"
ROW_CHANNELS = 3072
ROW, GROUP_128 = 4 / ROW_CHANNELS, 4 / 128
UNPACKS = "multiplies in the compute type after unpacking the weights at every call"

FORMATS: dict[str, Format] = {
    form.name: form
    for form in (
        Format("builtin-int8", "builtin", 1 + ROW, 0.012, automatic=True, product="int8"),
        Format("builtin-int8-rotated", "builtin", 1 + ROW, 0.012, rotation=128, product="int8"),
        Format("builtin-fp8", "builtin", 1 + ROW, 0.0375, kinds=("cuda",), sm=89, automatic=True, product=FP8),
        Format("builtin-fp8-rotated", "builtin", 1 + ROW, 0.0375, kinds=("cuda",), sm=89, rotation=128, product=FP8),
        Format("builtin-int4", "builtin", 0.5 + GROUP_128, 0.116, group=128, automatic=True),
        Format(
            "builtin-int4-int8", "builtin", 0.5 + GROUP_128, 0.117, dtypes=HALF, kinds=("cuda",), sm=80, group=128,
            rounded=True, note="multiplies in int8, by name only until a card has been measured with it",
        ),
        Format(
            "torchao-int8-dynamic", "torchao", 1 + ROW / 2, 0.012, packages=TORCHAO, kinds=("cuda", "cpu"), spelt_out=True
        ),
        Format("torchao-int8", "torchao", 1 + ROW / 2, 0.009, packages=TORCHAO, kinds=("cuda", "cpu"), note=UNPACKS),
        Format(
            "torchao-fp8", "torchao", 1 + ROW, 0.0266, packages=TORCHAO, kinds=("cuda", "cpu"), unpacked=10, note=UNPACKS
        ),
        Format(
            "torchao-fp8-dynamic", "torchao", 1 + ROW, 0.0375, dtypes=("bfloat16",), kinds=("cuda",), sm=89,
            packages=TORCHAO, note="slower than bfloat16 unless it is compiled",
        ),
        Format(
            "torchao-int4", "torchao", 0.5 + GROUP_128, 0.1, dtypes=("bfloat16",), kinds=("cuda",), sm=80,
            packages=TORCHAO, group=128, not_kept="its tiles are packed by the card, for the card",
        ),
        Format("quanto-int8", "quanto", 1 + ROW / 2, 0.009, packages=QUANTO, note=UNPACKS),
        Format(
            "quanto-fp8", "quanto", 1 + ROW / 2, 0.0266, kinds=("cuda", "cpu"), packages=QUANTO, unpacked=4, note=UNPACKS
        ),
        Format(
            "quanto-int4", "quanto", 0.5 + GROUP_128, 0.1, dtypes=("bfloat16",), kinds=("cpu",), packages=QUANTO, group=128,
            note="in float32 it would compile C++ at its first use, for minutes; packed for processors, not for cards",
        ),
    )
}  # fmt: skip
NAMES = ("auto", "none", "builtin", *FORMATS)
"""What ``quantize`` may say."""


def find(name: str, hardware: Hardware, dtype: str) -> Format:
    """The format that ``name`` says, which must be usable: a format is never replaced by another.

    Args:
        name: of :data:`FORMATS`, or "builtin" for fp8 from Hopper on and int8 elsewhere.
        hardware, dtype: where and in what it is to compute.

    Raises:
        BackendUnavailableError: it cannot be used here; the message says why, how to get it, and what can be.
    """
    form = FORMATS[eight_bit(hardware) if name == "builtin" else name]
    name = form.name
    reason = form.reason_against(hardware, dtype)
    if reason is not None:
        usable = [f.name for f in FORMATS.values() if f.reason_against(hardware, dtype) is None]
        raise BackendUnavailableError(
            f"The format {name} cannot be used here: {reason}. Usable here: {', '.join(usable) or 'none'}."
        )
    return form


def eight_bit(hardware: Hardware) -> str:
    """The built-in 8-bit format that a device's units are made for."""
    return "builtin-fp8" if hardware.kind == "cuda" and (hardware.sm or 0) >= FP8_FIRST else "builtin-int8"


def automatic(hardware: Hardware, dtype: str) -> tuple[Format, ...]:
    """What the planner may choose from on ``hardware``, the smallest loss first."""
    usable = [f for f in FORMATS.values() if f.automatic and f.reason_against(hardware, dtype) is None]
    return tuple(sorted(usable, key=lambda f: f.loss))
