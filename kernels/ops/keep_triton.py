"""The kernel of products of one row with a weight, as after a norm: each program norms the row once and keeps it in
registers, while rows of the weight pass by, some at a time, of which the next are always on their way.

What `gemv` does for every few rows of a weight, reading the row and taking its norm along, is done once a program
here. Beside tiles of `gemv` that the tuner chose between on an H200, that took from half a percent more time (16384 x
4096) to 3 and 4 % less (4800 x 1600, 4672 x 4544); so it is one of the ways that are measured for a shape.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

from headrace.kernels.ops.activation_triton import activated
from headrace.kernels.ops.chain_triton import let_next_begin, wait_for_earlier
from headrace.kernels.ops.narrow_triton import packed, wide

__all__ = ["keep"]


@triton.jit
def keep(
    x,
    weight,
    bias,
    weight_scale,
    norm_weight,
    norm_bias,
    residual,
    out,
    other_weight,
    other_bias,
    other_scale,
    other_norm_weight,
    other_norm_bias,
    other_out,
    eps,
    N: tl.constexpr,
    OTHER_N: tl.constexpr,
    K: tl.constexpr,
    NORM: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OTHER_ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    OTHER_GATED: tl.constexpr,
    CHAINED: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LANE: tl.constexpr,
):
    """Columns of one product, or of two of the same row: the first PROGRAMS programs are those of the first."""
    let_next_begin(CHAINED)
    program = tl.program_id(0)
    if program < PROGRAMS:
        _columns(
            program, PROGRAMS, x, weight, bias, weight_scale, norm_weight, norm_bias, residual, out, eps,
            N, K, NORM, UNIT_OFFSET, ACTIVATION, GATED, CHAINED, BLOCK_N, BLOCK_K, LANE,
        )  # fmt: skip
    elif OTHER_N > 0:
        _columns(
            program - PROGRAMS, tl.num_programs(0) - PROGRAMS, x, other_weight, other_bias, other_scale,
            other_norm_weight, other_norm_bias, None, other_out, eps,
            OTHER_N, K, NORM, UNIT_OFFSET, OTHER_ACTIVATION, OTHER_GATED, CHAINED, BLOCK_N, BLOCK_K, LANE,
        )  # fmt: skip


@triton.jit
def _columns(
    program,
    programs,
    x,
    weight,
    bias,
    weight_scale,
    norm_weight,
    norm_bias,
    residual,
    out,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    NORM: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    CHAINED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LANE: tl.constexpr,
):
    """Every so many tiles of columns, the wait for earlier kernels included."""
    k = tl.arange(0, BLOCK_K)
    # Weights are there before what comes before is done; what they are multiplied with is not.
    w = _weights(weight, program, k, N, K, BLOCK_N, BLOCK_K)
    v = _weights(weight + N * K, program, k, N, K, BLOCK_N, BLOCK_K) if GATED else w
    scale = 1.0
    shift = 0.0
    if norm_weight is not None:
        scale = _values(norm_weight, k, K, BLOCK_K)
        if UNIT_OFFSET:
            scale += 1.0
    if norm_bias is not None:
        shift = _values(norm_bias, k, K, BLOCK_K)
    wait_for_earlier(CHAINED)

    values = _values(x, k, K, BLOCK_K)
    if NORM == "layer":
        values -= tl.sum(values, axis=0) / K
        if K != BLOCK_K:
            values = tl.where(k < K, values, 0.0)
    if NORM is not None:
        values *= 1.0 / tl.sqrt(tl.sum(values * values, axis=0) / K + eps)
        values = values * scale + shift
    for tile in range(program, (N + BLOCK_N - 1) // BLOCK_N, programs):
        next_w = _weights(weight, tile + programs, k, N, K, BLOCK_N, BLOCK_K)
        next_v = _weights(weight + N * K, tile + programs, k, N, K, BLOCK_N, BLOCK_K) if GATED else next_w
        column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        held = column < N
        # Behind the product they would be waited for. Asked for as early as the rows are, they would take so many
        # registers that fewer programs fit on a processor.
        factor, added = _constants(weight_scale, bias, column, held)
        if GATED:
            other_factor, other_added = _constants(weight_scale, bias, N + column, held)
        value = _product(w, values, LANE) * factor + added
        if ACTIVATION is not None:
            value = activated(value, ACTIVATION)
        if GATED:
            value *= _product(v, values, LANE) * other_factor + other_added
        if residual is not None:
            value += tl.load(residual + column, mask=held, other=0.0).to(tl.float32)
        tl.store(out + column, value.to(out.dtype.element_ty), mask=held)
        w = next_w
        v = next_v


@triton.jit
def _weights(weight, tile, k, N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Rows of the weight as they are stored; nothing is read past the last."""
    row = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    held = (row < N)[:, None]
    start = packed(weight, K)
    PACK: tl.constexpr = start.dtype.element_ty.primitive_bitwidth // weight.dtype.element_ty.primitive_bitwidth
    if PACK > 1:
        k = tl.arange(0, BLOCK_K // PACK)
    if K != BLOCK_K:
        held &= (k < K // PACK)[None, :]
    place = row.to(tl.int64)[:, None] * (K // PACK) + k[None, :]
    return tl.load(start + place, mask=held, other=0.0, eviction_policy="evict_first")


@triton.jit
def _values(start, k, K: tl.constexpr, BLOCK_K: tl.constexpr):
    values = tl.load(start + k) if K == BLOCK_K else tl.load(start + k, mask=k < K, other=0.0)
    return values.to(tl.float32)


@triton.jit
def _product(w, values, LANE: tl.constexpr):
    """Sums [rows of the weight]; first of what a thread holds side by side."""
    products = wide(w) * values[None, :]
    by_thread = tl.sum(tl.reshape(products, (products.shape[0], products.shape[1] // LANE, LANE)), axis=2)
    return tl.sum(by_thread, axis=1)


@triton.jit
def _constants(weight_scale, bias, row, held):
    """Factors of some rows of a weight, and their bias; 1 and 0 if there are none."""
    factor = 1.0
    added = 0.0
    if weight_scale is not None:
        factor = tl.load(weight_scale + row, mask=held, other=0.0).to(tl.float32)
    if bias is not None:
        added = tl.load(bias + row, mask=held, other=0.0).to(tl.float32)
    return factor, added
