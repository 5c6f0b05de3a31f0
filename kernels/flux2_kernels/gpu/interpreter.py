"""What Triton's interpreter does unlike the hardware, put right with torch.

It truncates where the hardware rounds to nearest even, its fp8 has no NaN, it takes integers for the bits of a bfloat16, and
its dot multiplies such bits. For tests and dry runs under ``TRITON_INTERPRET=1``: a kernel's bounds then mean the same
interpreted and on a chip.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_TORCH = {
    tl.float32: (torch.float32, torch.int32),
    tl.float16: (torch.float16, torch.int16),
    tl.bfloat16: (torch.bfloat16, torch.int16),
    tl.float8e4nv: (torch.float8_e4m3fn, torch.int8),
}
_builtin = interpreter._convert_float
_builtin_cast = interpreter.InterpreterBuilder.cast_impl


def _convert(values: Any, source: Any, target: Any, rounding: Any) -> Any:
    if source not in _TORCH or target not in _TORCH:
        return _builtin(values, source, target, rounding)
    (source_type, source_bits), (target_type, target_bits) = _TORCH[source], _TORCH[target]
    signed = np.dtype(str(source_bits).removeprefix("torch."))
    bits = torch.from_numpy(np.array(values, order="C").view(signed))  # a copy: broadcast views are read-only
    converted = bits.view(source_type).to(target_type).view(target_bits).numpy()
    return converted.view(np.dtype("u" + str(target_bits).removeprefix("torch."))).reshape(np.shape(values))


def _cast(builder: Any, source: Any, target: Any) -> Any:
    if target.scalar == tl.bfloat16 and source.dtype.scalar.is_int():
        source = _builtin_cast(builder, source, tl.float32)
    return _builtin_cast(builder, source, target)


def _operand(x: Any) -> Any:
    return x.data if x.dtype == tl.int8 else _convert(x.data, x.dtype, tl.float32, None).view(np.float32)


def _dot(builder: Any, a: Any, b: Any, total: Any, *_: Any) -> Any:
    product = np.matmul(_operand(a), _operand(b), dtype=total.data.dtype)
    return interpreter.TensorHandle(product + total.data, total.dtype.scalar)


def act_like_hardware() -> None:
    """Replace the interpreter's float conversions and dot for the rest of the process."""
    interpreter._convert_float = _convert
    interpreter.InterpreterBuilder.cast_impl = _cast
    interpreter.InterpreterBuilder.create_dot = _dot
