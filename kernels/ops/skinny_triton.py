"""The kernel of products of up to 256 rows with a weight of 16 or 8 bits, on tensor cores.

A tensor core takes 64 rows of what stands on its left, so that is the weight: few rows of x fill its right side. Tiles
of fewer than 64 columns, for many rows of x, have the weight on the right. While the kernel before is still running, a
program's first tile of the weight may be fetched, to be multiplied last, or all of its tiles may be brought as near as
the L2 cache; whether that pays is measured by shape.
Where tiles of columns are too few for a GPU, many rows are cut into tiles too, whose programs share the weight in the
L2 cache, and the depth into parts; the last program of a tile to be done adds them up, in their order, so that the
result does not depend on who that is.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

from headrace.kernels.ops.activation_triton import activated
from headrace.kernels.ops.chain_triton import let_next_begin, wait_for_earlier

__all__ = ["skinny"]


@triton.jit(do_not_specialize=["num_rows"])
def skinny(
    x,
    weight,
    bias,
    factors,
    weight_scale,
    residual,
    out,
    parts,
    counters,
    x_stride,
    residual_stride,
    num_rows,
    N: tl.constexpr,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    CHAINED: tl.constexpr,
    WIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
    AHEAD: tl.constexpr,
    LOWER: tl.constexpr,
):
    """Columns BLOCK_N of the product of ROWS rows, or a part of their depth."""
    let_next_begin(CHAINED)
    SHARE: tl.constexpr = (K + BLOCK_K * SPLITS - 1) // (BLOCK_K * SPLITS) * BLOCK_K
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK_K)
    # In 8 bits, rows of x come in two halves, one below the other.
    HALVES: tl.constexpr = factors is not None
    LINES: tl.constexpr = ROWS * (2 if HALVES else 1)
    TYPE: tl.constexpr = tl.int32 if weight.dtype.element_ty.is_int8() else tl.float32
    gate = weight + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K  # past the end, the last one again
    line = tl.arange(0, LINES)
    source = tl.program_id(2) * ROWS + line % ROWS
    inside = (source < num_rows)[:, None]
    rows = x + (source + line // ROWS * num_rows).to(tl.int64)[:, None] * x_stride
    ON_THE_RIGHT: tl.constexpr = BLOCK_N < 64
    value = tl.zeros((LINES, BLOCK_N) if ON_THE_RIGHT else (BLOCK_N, LINES), TYPE)
    other = value
    held = n < N
    of_gate = _column(bias, n, held)
    of_up = _column(bias, N + n, held) if GATED else of_gate
    begin = tl.program_id(1) * SHARE
    PARTIAL: tl.constexpr = K % BLOCK_K != 0 or SHARE * (SPLITS - 1) >= K  # tiles, or whole parts, past the end
    if AHEAD and CHAINED:
        _bring_near(gate, begin, K, SHARE, BLOCK_N)
        if GATED:
            _bring_near(gate + N * K, begin, K, SHARE, BLOCK_N)
    if EARLY:
        first = _tile(gate, begin + k, K, PARTIAL, WIDE)
        first_up = _tile(gate + N * K, begin + k, K, PARTIAL, WIDE) if GATED else first
    wait_for_earlier(CHAINED)
    held = held[:, None] & (m < num_rows)[None, :]
    if residual is not None:
        addends = residual + m[None, :].to(tl.int64) * residual_stride + n[:, None]
        if SPLITS == 1:  # on its way while products are added up
            addend = tl.load(addends, mask=held, other=0.0)
    for at in range(begin + (BLOCK_K if EARLY else 0), tl.minimum(begin + SHARE, K), BLOCK_K):
        some = _some(rows, at + k, inside, K, WIDE)
        value = _added(value, _tile(gate, at + k, K, PARTIAL, WIDE), some, ON_THE_RIGHT)
        if GATED:
            other = _added(other, _tile(gate + N * K, at + k, K, PARTIAL, WIDE), some, ON_THE_RIGHT)
    if EARLY:
        some = _some(rows, begin + k, inside, K, WIDE)
        value = _added(value, first, some, ON_THE_RIGHT)
        if GATED:
            other = _added(other, first_up, some, ON_THE_RIGHT)
    if ON_THE_RIGHT:
        value = tl.trans(value)
        other = tl.trans(other)
    if HALVES:
        value = _of_halves(value, LOWER)
        other = _of_halves(other, LOWER)

    if SPLITS > 1:
        place = tl.arange(0, BLOCK_N)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
        SIZE: tl.constexpr = BLOCK_N * ROWS
        tile = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        parts += tile.to(tl.int64) * (SPLITS * SIZE * (2 if GATED else 1))
        tl.store(parts + tl.program_id(1) * SIZE + place, value)
        if GATED:
            tl.store(parts + (SPLITS + tl.program_id(1)) * SIZE + place, other)
        tl.debug_barrier()  # all threads have written before one of them says so
        if tl.atomic_add(counters + tile, 1, sem="acq_rel") < SPLITS - 1:
            return
        tl.store(counters + tile, 0)
        value = _sum(parts, place, SPLITS, SIZE)
        if GATED:
            other = _sum(parts + SPLITS * SIZE, place, SPLITS, SIZE)

    if HALVES:
        factor = tl.load(factors + m, mask=m < num_rows, other=0.0)[None, :]
        value *= _column(weight_scale, n, n < N) * factor
        if GATED:
            other *= _column(weight_scale, N + n, n < N) * factor
    value += of_gate
    other += of_up
    if ACTIVATION is not None:
        value = activated(value, ACTIVATION)
    if GATED:
        value *= other
    if residual is not None:
        if SPLITS > 1:
            addend = tl.load(addends, mask=held, other=0.0)
        value += addend.to(tl.float32)
    tl.store(out + m[None, :].to(tl.int64) * N + n[:, None], value.to(out.dtype.element_ty), mask=held)


@triton.jit
def _bring_near(rows, begin, K: tl.constexpr, SHARE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Ask for a part of rows of the weight, [BLOCK_N, 1], to be brought into the L2 cache, which nobody waits for."""
    SPLIT: tl.constexpr = 1 if BLOCK_N >= 128 else 128 // BLOCK_N  # of a row, so that each thread asks about once
    BYTES: tl.constexpr = rows.dtype.element_ty.primitive_bitwidth // 8
    LINE: tl.constexpr = 16 // BYTES  # values: addresses and sizes are in 16 bytes
    PIECE: tl.constexpr = (SHARE + SPLIT * LINE - 1) // (SPLIT * LINE) * LINE
    at = begin + tl.arange(0, SPLIT)[None, :] * PIECE
    size = tl.maximum(tl.minimum(K - at, PIECE), 0) * BYTES // 16 * 16
    places = (rows + tl.minimum(at, K - 1)).to(tl.int64) // 16 * 16
    size = tl.broadcast_to(size, (BLOCK_N, SPLIT))
    tl.inline_asm_elementwise(
        "{ .reg .pred some; setp.gt.s32 some, $2, 0; @some cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r",
        [places, size],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _tile(rows, k, K: tl.constexpr, PARTIAL: tl.constexpr, WIDE: tl.constexpr):
    """Rows of the weight, as tensor cores take them."""
    tile = tl.load(rows + k[None, :], mask=(k < K)[None, :], other=0.0) if PARTIAL else tl.load(rows + k[None, :])
    return tile.to(tl.float32) if WIDE else tile


@triton.jit
def _some(rows, k, inside, K: tl.constexpr, WIDE: tl.constexpr):
    """A part of all rows of x."""
    some = tl.load(rows + k[None, :], mask=inside & (k < K)[None, :], other=0.0)
    return some.to(tl.float32) if WIDE else some


@triton.jit
def _added(sums, tile, rows, ON_THE_RIGHT: tl.constexpr):
    """Sums with the products of a tile of the weight and rows of x, both along their depth."""
    # Tensor cores add up products of fp8 with fewer digits than float32 has: after a tile, sums go where all are.
    DEPTH: tl.constexpr = tile.shape[1]
    if ON_THE_RIGHT:
        sums = tl.dot(rows, tl.trans(tile), sums, max_num_imprecise_acc=DEPTH, out_dtype=sums.dtype)
    else:
        sums = tl.dot(tile, tl.trans(rows), sums, max_num_imprecise_acc=DEPTH, out_dtype=sums.dtype)
    return sums


@triton.jit
def _of_halves(sums, LOWER: tl.constexpr):
    """Sums of both halves of the rows, side by side, as one of the rows."""
    halves = tl.reshape(sums, (sums.shape[0], 2, sums.shape[1] // 2))
    upper, lower = tl.split(tl.permute(halves, (0, 2, 1)))
    return upper.to(tl.float32) * 256.0 + lower.to(tl.float32) if sums.dtype.is_int32() else upper + lower / LOWER


@triton.jit
def _column(bias, n, held):
    """What every row has, of a bias or of factors."""
    added = 0.0
    if bias is not None:
        added = tl.load(bias + n, mask=held, other=0.0).to(tl.float32)[:, None]
    return added


@triton.jit
def _sum(parts, place, SPLITS: tl.constexpr, SIZE: tl.constexpr):
    """What all programs of a tile have written, past a cache that is not theirs."""
    total = tl.load(parts + place, cache_modifier=".cg")
    for part in tl.static_range(1, SPLITS):
        total += tl.load(parts + part * SIZE + place, cache_modifier=".cg")
    return total
