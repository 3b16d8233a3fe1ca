"""Weights of 8 bits as float32, in as few instructions as there are: what a product of few rows does for every weight.

Four are read as one whole number, int32 of int8 and uint32 of fp8 (e4m3), if rows are whole such numbers: of single
bytes, a compiler makes twice the instructions.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["packed", "wide"]

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# Four bytes of a register. Of int8: a whole number with its sign's bit turned is 128 more, and in place of the last
# digits of 2**23 a float32, from which both are taken off; the hardware's own conversion is a slow one.
_OF_INT8 = tl.constexpr("""{
    .reg .b32 turned, a, b, c, d;
    xor.b32 turned, $4, 0x80808080;
    prmt.b32 a, turned, 0x4B000000, 0x7540;
    prmt.b32 b, turned, 0x4B000000, 0x7541;
    prmt.b32 c, turned, 0x4B000000, 0x7542;
    prmt.b32 d, turned, 0x4B000000, 0x7543;
    sub.f32 $0, a, 0f4B000080;
    sub.f32 $1, b, 0f4B000080;
    sub.f32 $2, c, 0f4B000080;
    sub.f32 $3, d, 0f4B000080;
}""")
# Of fp8: float16 on their way, which is what the hardware makes of two of them.
_OF_FP8 = tl.constexpr("""{
    .reg .b16 low, high, a, b, c, d;
    .reg .b32 first, second;
    mov.b32 {low, high}, $4;
    cvt.rn.f16x2.e4m3x2 first, low;
    cvt.rn.f16x2.e4m3x2 second, high;
    mov.b32 {a, b}, first;
    mov.b32 {c, d}, second;
    cvt.f32.f16 $0, a;
    cvt.f32.f16 $1, b;
    cvt.f32.f16 $2, c;
    cvt.f32.f16 $3, d;
}""")


@triton.jit
def packed(weight, K: tl.constexpr):
    """A pointer to a weight with rows of K values, to four at a time if there are such."""
    if weight.dtype.element_ty.primitive_bitwidth > 8 or K % 16 != 0:
        pointer = weight
    elif weight.dtype.element_ty.is_int8():
        pointer = weight.to(tl.pointer_type(tl.int32), bitcast=True)
    else:
        pointer = weight.to(tl.pointer_type(tl.uint32), bitcast=True)
    return pointer


@triton.jit
def wide(tile):
    """A tile of a weight [rows, values], or of [rows, fours], as float32 [rows, values]."""
    if tile.dtype.is_int32() or tile.dtype.is_uint32():
        if _INTERPRETED:
            a, b, c, d = _byte(tile, 0), _byte(tile, 1), _byte(tile, 2), _byte(tile, 3)
        elif tile.dtype.is_int32():
            a, b, c, d = _bytes(tile, _OF_INT8)
        else:
            a, b, c, d = _bytes(tile, _OF_FP8)
        values = tl.join(tl.join(a, c), tl.join(b, d))
        values = tl.reshape(values, (tile.shape[0], tile.shape[1] * 4))
    else:
        values = tile.to(tl.float32)
    return values


@triton.jit
def _bytes(tile, CODE: tl.constexpr):
    return tl.inline_asm_elementwise(
        CODE,
        "=f,=f,=f,=f,r",
        [tile],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _byte(tile, INDEX: tl.constexpr):
    """As one of `_bytes`; the interpreter knows no instructions."""
    byte = (tile >> (8 * INDEX)).to(tl.uint8)
    number = byte.to(tl.int8, bitcast=True) if tile.dtype.is_int32() else byte.to(tl.float8e4nv, bitcast=True)
    return number.to(tl.float32)
