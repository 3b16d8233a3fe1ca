"""The kernel of products of a few rows with a weight: each program reads some rows of the weight, once, and adds up in
float32, on no tensor core.

A norm in front costs no pass of its own. Its sums are taken on the same walk over the row and applied at the end:

    rms    y = sum(w * scale * x) / rms(x)
    layer  y = (sum(w * scale * x) - mean * sum(w * scale)) / deviation + sum(w * shift)

where the sums without x are made once a weight (`headrace.kernels.ops.linear.fold_norm`). For a layer norm, x is taken
relative to its first value, which is at most sqrt(K) deviations from the mean: then the mean of squares less the square
of the mean keeps its digits, however far from zero the row lies.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="assignment"
from __future__ import annotations

import triton
import triton.language as tl

from headrace.kernels.ops.activation_triton import activated
from headrace.kernels.ops.chain_triton import let_next_begin, wait_for_earlier
from headrace.kernels.ops.narrow_triton import packed, wide

__all__ = ["add", "begin", "columns", "constants", "end", "gemv", "places", "walk", "weights"]


@triton.jit(do_not_specialize=["num_rows"])
def gemv(
    x,
    weight,
    bias,
    weight_scale,
    norm_weight,
    folded,
    residual,
    out,
    x_stride,
    residual_stride,
    num_rows,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    NORM: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    CHAINED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LANE: tl.constexpr,
):
    """Columns BLOCK_N of the product of up to ROWS rows; LANE weights are one load of a thread."""
    let_next_begin(CHAINED)
    columns(
        tl.program_id(0), x, weight, bias, weight_scale, norm_weight, folded, residual, out, x_stride, residual_stride,
        num_rows, eps, N, K, NORM, UNIT_OFFSET, ACTIVATION, GATED, CHAINED, ROWS, BLOCK_N, BLOCK_K, LANE,
    )  # fmt: skip


@triton.jit
def columns(
    tile,
    x,
    weight,
    bias,
    weight_scale,
    norm_weight,
    folded,
    residual,
    out,
    x_stride,
    residual_stride,
    num_rows,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    NORM: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    CHAINED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LANE: tl.constexpr,
):
    """All that a program does for its tile of columns, the wait for earlier kernels included."""
    first = tile * BLOCK_N
    gate = places(weight, first, N, K, BLOCK_N, BLOCK_K)
    k = tl.arange(0, BLOCK_K)
    up = places(weight + N * K, first, N, K, BLOCK_N, BLOCK_K) if GATED else gate
    # Weights are there before what comes before is done; what they are multiplied with is not.
    w = weights(gate, k, 0, K, BLOCK_K)
    v = weights(up, k, 0, K, BLOCK_K) if GATED else w
    column = first + tl.arange(0, BLOCK_N)
    of_gate = constants(bias, weight_scale, folded, column, column < N, N * (2 if GATED else 1), NORM)
    of_up = constants(bias, weight_scale, folded, N + column, column < N, 2 * N, NORM) if GATED else of_gate
    wait_for_earlier(CHAINED)

    sources, pivots, addends, sums = begin(
        x, x_stride, residual, residual_stride, num_rows, column, N, NORM, ROWS, BLOCK_N, BLOCK_K, LANE
    )
    sums, w, v = walk(
        sums, w, v, gate, up, sources, pivots, norm_weight, k, K, NORM, UNIT_OFFSET, GATED, ROWS, BLOCK_K, LANE
    )
    last = (K - 1) // BLOCK_K * BLOCK_K
    sums = add(sums, w, v, sources, pivots, norm_weight, last + k, K, NORM, UNIT_OFFSET, GATED, ROWS, BLOCK_K, LANE)
    end(sums, of_gate, of_up, addends, out, column, num_rows, eps, N, K, NORM, ACTIVATION, GATED, ROWS)


@triton.jit
def places(weight, first, N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Where the first tile of some rows of the weight is."""
    n = tl.minimum(first + tl.arange(0, BLOCK_N), N - 1) - first  # past the end, the last one again
    start = packed(weight + first.to(tl.int64) * K, K)
    PACK: tl.constexpr = start.dtype.element_ty.primitive_bitwidth // weight.dtype.element_ty.primitive_bitwidth
    k = tl.arange(0, BLOCK_K // PACK)
    return start + (n[:, None] * (K // PACK) + k[None, :])


@triton.jit
def walk(
    sums,
    w,
    v,
    gate,
    up,
    sources,
    pivots,
    norm_weight,
    k,
    K: tl.constexpr,
    NORM: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LANE: tl.constexpr,
):
    """The sums with those of all tiles but the last, and the last; the next is on its way while one is added up."""
    for at in range(0, K - BLOCK_K, BLOCK_K):
        next_w = weights(gate, k, at + BLOCK_K, K, BLOCK_K)
        next_v = weights(up, k, at + BLOCK_K, K, BLOCK_K) if GATED else next_w
        sums = add(sums, w, v, sources, pivots, norm_weight, at + k, K, NORM, UNIT_OFFSET, GATED, ROWS, BLOCK_K, LANE)
        w = next_w
        v = next_v
    return sums, w, v


@triton.jit
def end(
    sums,
    of_gate,
    of_up,
    addends,
    out,
    column,
    num_rows,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write what comes out of the sums."""
    gates, ups, means, squares = sums
    for row in tl.static_range(ROWS):
        value = tl.sum(gates[row], axis=1) * of_gate[2]
        other = tl.sum(ups[row], axis=1) * of_up[2] if GATED else value
        if NORM is not None:
            mean = tl.sum(means[row], axis=0) / K if NORM == "layer" else 0.0
            variance = tl.maximum(tl.sum(squares[row], axis=0) / K - mean * mean, 0.0)
            rstd = 1.0 / tl.sqrt(variance + eps)
            value = (value - mean * of_gate[0]) * rstd
            other = (other - mean * of_up[0]) * rstd
        value += of_gate[1]
        other += of_up[1]
        if ACTIVATION is not None:
            value = activated(value, ACTIVATION)
        if GATED:
            value *= other
        value += addends[row]
        held = column < tl.where(num_rows > row, N, 0)
        tl.store(out + row * N + column, value.to(out.dtype.element_ty), mask=held)


@triton.jit
def weights(places, k, at, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile of the weight as it is stored."""
    PACK: tl.constexpr = BLOCK_K // places.shape[1]
    if PACK > 1:
        k = tl.arange(0, BLOCK_K // PACK) * PACK
    if K % BLOCK_K == 0:
        tile = tl.load(places + at // PACK, eviction_policy="evict_first")
    else:
        tile = tl.load(places + at // PACK, mask=(at + k < K)[None, :], other=0.0, eviction_policy="evict_first")
    return tile


@triton.jit
def constants(bias, weight_scale, folded, column, held, N: tl.constexpr, NORM: tl.constexpr):
    """What of a layer norm is to be taken off for a mean of 1, all that is to be added, and the factor of the sums."""
    taken = 0.0
    added = 0.0
    factor = 1.0
    if NORM == "layer":
        taken = tl.load(folded + column, mask=held, other=0.0)
        added = tl.load(folded + N + column, mask=held, other=0.0)
    if bias is not None:
        added += tl.load(bias + column, mask=held, other=0.0).to(tl.float32)
    if weight_scale is not None:
        factor = tl.load(weight_scale + column, mask=held, other=0.0).to(tl.float32)
    return taken, added, factor


@triton.jit
def begin(
    x,
    x_stride,
    residual,
    residual_stride,
    num_rows,
    column,
    N: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LANE: tl.constexpr,
):
    """Of each row: where it is, to what its values are relative, the residual, and sums of nothing for each thread."""
    tile = tl.zeros((BLOCK_N, BLOCK_K // LANE), tl.float32)
    line = tl.zeros((BLOCK_K // LANE,), tl.float32)
    sources = ()
    pivots = ()
    addends = ()
    tiles = ()
    lines = ()
    for row in tl.static_range(ROWS):
        there = tl.minimum(row, num_rows - 1).to(tl.int64)  # past the end, the last one again
        source = x + there * x_stride
        addend = 0.0
        if residual is not None:
            addend = tl.load(residual + there * residual_stride + column, mask=column < N, other=0.0).to(tl.float32)
        sources = sources + (source,)
        pivots = pivots + (tl.load(source).to(tl.float32) if NORM == "layer" else 0.0,)
        addends = addends + (addend,)
        tiles = tiles + (tile,)
        lines = lines + (line,)
    return sources, pivots, addends, (tiles, tiles, lines, lines)


@triton.jit
def add(
    sums,
    w,
    v,
    sources,
    pivots,
    norm_weight,
    k,
    K: tl.constexpr,
    NORM: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LANE: tl.constexpr,
):
    """The sums with those of one tile added."""
    gates, ups, means, squares = sums
    w = wide(w)
    v = wide(v)
    scale = 1.0
    if norm_weight is not None:
        scale = _values(norm_weight, k, K, BLOCK_K)
        if UNIT_OFFSET:
            scale += 1.0
    new_gates = ()
    new_ups = ()
    new_means = ()
    new_squares = ()
    for row in tl.static_range(ROWS):
        values = _values(sources[row], k, K, BLOCK_K)
        mean = means[row]
        square = squares[row]
        if NORM == "layer":
            values -= pivots[row]
            if K % BLOCK_K != 0:
                values = tl.where(k < K, values, 0.0)
            mean += tl.sum(tl.reshape(values, (BLOCK_K // LANE, LANE)), axis=1)
        if NORM is not None:
            square += tl.sum(tl.reshape(values * values, (BLOCK_K // LANE, LANE)), axis=1)
        if norm_weight is not None:
            values *= scale
        new_means = new_means + (mean,)
        new_squares = new_squares + (square,)
        new_gates = new_gates + (gates[row] + _by_thread(w * values[None, :], LANE),)
        new_ups = new_ups + (ups[row] + _by_thread(v * values[None, :], LANE) if GATED else ups[row],)
    return new_gates, new_ups, new_means, new_squares


@triton.jit
def _values(start, k, K: tl.constexpr, BLOCK_K: tl.constexpr):
    values = tl.load(start + k) if K % BLOCK_K == 0 else tl.load(start + k, mask=k < K, other=0.0)
    return values.to(tl.float32)


@triton.jit
def _by_thread(products, LANE: tl.constexpr):
    """Sums of what a thread holds side by side."""
    return tl.sum(tl.reshape(products, (products.shape[0], products.shape[1] // LANE, LANE)), axis=2)
