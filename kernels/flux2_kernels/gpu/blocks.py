"""Pieces that several kernels share."""

import triton
import triton.language as tl

ROUND = tl.constexpr(12582912.0)  # 1.5 · 2^23: adding and subtracting it rounds to the nearest even integer
FLOAT16_MAX = tl.constexpr(65504.0)


@triton.jit
def magnitude(x):
    """Largest absolute value along the last axis, NaN if there is one: as integers, NaN is above infinity."""
    bits = tl.abs(x).to(tl.int32, bitcast=True)
    return tl.max(bits, axis=-1)


@triton.jit
def row_scale(bits, LARGEST: tl.constexpr, FLOOR: tl.constexpr):
    """Scale of a row from the bits of :func:`magnitude`."""
    largest = bits.to(tl.float32, bitcast=True)
    return tl.where(largest < FLOOR, FLOOR, largest) / LARGEST


@triton.jit
def quantize(x, scale, INTEGER: tl.constexpr, LARGEST: tl.constexpr):
    """x / scale in the format's range; NaN becomes 0 in int8, where the scale carries it."""
    x = x / scale
    if INTEGER:
        x = tl.where(x == x, x, 0.0)
        x = tl.minimum(tl.maximum(x, -LARGEST), LARGEST)
        values = ((x + ROUND) - ROUND).to(tl.int8)
    else:
        values = tl.where(x > LARGEST, LARGEST, tl.where(x < -LARGEST, -LARGEST, x)).to(tl.float8e4nv)
    return values


@triton.jit
def saturate(x, HALF: tl.constexpr):
    """Within float16's range if HALF; NaN passes."""
    if HALF:
        x = tl.where(x > FLOAT16_MAX, FLOAT16_MAX, tl.where(x < -FLOAT16_MAX, -FLOAT16_MAX, x))
    return x


@triton.jit
def normalize(x, keep, width, EPS: tl.constexpr):
    """LayerNorm of one row held in ``x``, zero where not ``keep``."""
    mean = tl.sum(x, axis=0) / width
    x = tl.where(keep, x - mean, 0.0)
    return x * tl.rsqrt(tl.sum(x * x, axis=0) / width + EPS)
