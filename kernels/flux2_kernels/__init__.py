"""Kernels for what FLUX.2 does between its matmuls, and for quantized matmuls.

Importing this package imports torch and no Triton: an implementation is imported when :func:`choose` resolves to it. Each
module besides the registry's is one op: the plain torch reference, what each implementation needs, test cases, bytes and
operations. The Triton code is in ``gpu/``, its launch configurations in ``tuned/``.

    norm = choose("modulated_norm", device, torch.bfloat16, {"width": 6144})
    y = norm.function(x, shift, scale)
"""

from .constraint import Format, Place, place_of
from .linear_w4 import pack, unpack
from .op import Case, Cost, Implementation, Op
from .registry import OPS, Choice, KernelUnavailable, choose, reasons

__all__ = [
    "OPS",
    "Case",
    "Choice",
    "Cost",
    "Format",
    "Implementation",
    "KernelUnavailable",
    "Op",
    "Place",
    "choose",
    "pack",
    "place_of",
    "reasons",
    "unpack",
]
