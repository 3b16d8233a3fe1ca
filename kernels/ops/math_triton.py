"""What kernels share: options, and functions in forms that Triton's interpreter computes too."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["OPTIONS", "round_to_bfloat16", "sigmoid", "tanh", "to_fp8"]

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# Of every launch. Triton 3.9 warns if nobody says whether a * b + c may be rounded once, and 3.10 changes its mind.
OPTIONS = {"enable_fp_fusion": True}


@triton.jit
def sigmoid(x):
    """Of float32; where exp overflows, the limit comes out."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """Of float32, within 1e-7."""
    small = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - small) / (1.0 + small)
    return tl.where(x < 0.0, -size, size)


@triton.jit
def round_to_bfloat16(x):
    """The nearest bfloat16, ties to even, as float32. The interpreter's own cast cuts digits off."""
    bits = x.to(tl.int32, bitcast=True)
    bits += 0x7FFF + ((bits >> 16) & 1)
    return (bits & -65536).to(tl.float32, bitcast=True)


@triton.jit
def to_fp8(x):
    """The nearest fp8 (e4m3) of numbers up to 448, ties to even. The interpreter's own cast loses carries."""
    if _INTERPRETED:
        exponent = (x.to(tl.int32, bitcast=True) >> 23) & 255
        step = ((tl.maximum(exponent, 121) - 3) << 23).to(tl.float32, bitcast=True)  # between those of three digits
        x = (x / step + 12582912.0 - 12582912.0) * step  # 1.5 * 2**23, which has no place for fractions
    return x.to(tl.float8e4nv)
