"""The kernels of two products of a few rows in one launch, made of the parts of `gemv`: between two launches a GPU runs
empty and fills up again, while no weight is read."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="assignment"
from __future__ import annotations

import triton
import triton.language as tl

from headrace.kernels.ops.chain_triton import let_next_begin, wait_for_earlier
from headrace.kernels.ops.gemv_triton import add, begin, columns, constants, end, places, walk, weights

__all__ = ["gemv_both", "gemv_sum"]


@triton.jit(do_not_specialize=["num_rows"])
def gemv_both(
    x,
    weight,
    bias,
    weight_scale,
    norm_weight,
    folded,
    out,
    other_weight,
    other_bias,
    other_scale,
    other_norm_weight,
    other_folded,
    other_out,
    x_stride,
    num_rows,
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
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LANE: tl.constexpr,
):
    """Columns BLOCK_N of one of two products of the same rows; the first programs are those of the first."""
    let_next_begin(CHAINED)
    TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0)
    if tile < TILES:
        columns(
            tile, x, weight, bias, weight_scale, norm_weight, folded, None, out, x_stride, 0, num_rows, eps,
            N, K, NORM, UNIT_OFFSET, ACTIVATION, GATED, CHAINED, ROWS, BLOCK_N, BLOCK_K, LANE,
        )  # fmt: skip
    else:
        columns(
            tile - TILES, x, other_weight, other_bias, other_scale, other_norm_weight, other_folded, None, other_out,
            x_stride, 0, num_rows, eps,
            OTHER_N, K, NORM, UNIT_OFFSET, OTHER_ACTIVATION, OTHER_GATED, CHAINED, ROWS, BLOCK_N, BLOCK_K, LANE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def gemv_sum(
    x,
    weight,
    bias,
    weight_scale,
    other,
    other_weight,
    other_bias,
    other_scale,
    residual,
    out,
    x_stride,
    other_stride,
    residual_stride,
    num_rows,
    N: tl.constexpr,
    K: tl.constexpr,
    OTHER_K: tl.constexpr,
    CHAINED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LANE: tl.constexpr,
):
    """Columns BLOCK_N of the sum of two products of up to ROWS rows, as if their depths were one."""
    let_next_begin(CHAINED)
    first = tl.program_id(0) * BLOCK_N
    gate = places(weight, first, N, K, BLOCK_N, BLOCK_K)
    k = tl.arange(0, BLOCK_K)
    w = weights(gate, k, 0, K, BLOCK_K)
    column = first + tl.arange(0, BLOCK_N)
    _, added, factor = constants(bias, weight_scale, None, column, column < N, N, None)
    _, other_added, other_factor = constants(other_bias, other_scale, None, column, column < N, N, None)
    wait_for_earlier(CHAINED)

    sources, pivots, addends, sums = begin(
        x, x_stride, residual, residual_stride, num_rows, column, N, None, ROWS, BLOCK_N, BLOCK_K, LANE
    )
    others, _, _, nothing = begin(other, other_stride, None, 0, num_rows, column, N, None, ROWS, BLOCK_N, BLOCK_K, LANE)
    sums, w, _ = walk(sums, w, w, gate, gate, sources, pivots, None, k, K, None, False, False, ROWS, BLOCK_K, LANE)
    # The first tile of the second weight is on its way while the last one of the first is added up.
    gate = places(other_weight, first, N, OTHER_K, BLOCK_N, BLOCK_K)
    next_w = weights(gate, k, 0, OTHER_K, BLOCK_K)
    last = (K - 1) // BLOCK_K * BLOCK_K
    sums = add(sums, w, w, sources, pivots, None, last + k, K, None, False, False, ROWS, BLOCK_K, LANE)
    if weight_scale is not None:  # the sums of each weight have a factor of their own
        addends = _with(addends, sums[0], factor, ROWS)
        sums = nothing
    sums, w, _ = walk(
        sums, next_w, next_w, gate, gate, others, pivots, None, k, OTHER_K, None, False, False, ROWS, BLOCK_K, LANE
    )
    last = (OTHER_K - 1) // BLOCK_K * BLOCK_K
    sums = add(sums, w, w, others, pivots, None, last + k, OTHER_K, None, False, False, ROWS, BLOCK_K, LANE)
    constant = 0.0, added + other_added, other_factor
    end(sums, constant, constant, addends, out, column, num_rows, 0.0, N, K, None, None, False, ROWS)


@triton.jit
def _with(addends, sums, factor, ROWS: tl.constexpr):
    """What is added to each row, with sums that are done."""
    more = ()
    for row in tl.static_range(ROWS):
        more = more + (addends[row] + tl.sum(sums[row], axis=1) * factor,)
    return more
