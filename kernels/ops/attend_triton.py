"""The attention kernel of prompts and whole texts, whatever their number and lengths, in one launch.

A program holds a tile of queries, rows, and walks over the keys that they may see, columns, with a running softmax. The
query heads that share a kv head are rows of one tile, so each key is read once for all of them. Tiles of all sequences
are numbered through; which is whose, each program finds out itself. All lengths are read from the device: the grid
depends on the shapes of the batch alone.

Nothing is read past a context, whatever is there. Scores, softmax and sums are float32; the weights of the values are
rounded to the type of the values, as tensor cores want it. Products of float32 are exact ones, not tf32.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

import math
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.batch import Batch
from headrace.kernels.ops.chain_triton import chained, let_next_begin, wait_for_earlier
from headrace.kernels.ops.hopper_launch import attend_as_hopper, hopper_can_attend
from headrace.kernels.ops.math_triton import OPTIONS
from headrace.kernels.ops.scores_triton import WIDE_DOTS, absorb, added_tensors, scores_of, slopes_of
from headrace.kernels.spec import AttentionSpec

__all__ = ["attend"]

# Rows, columns, warps and stages of a tile by bytes of a value and padded head size. 16-bit types: of the larger tiles
# one fills a processor of today's large GPUs, whose two groups of warps share each key; of the others queries and two
# stages of keys and values stay under 100 KB, which is what the smallest GPUs have. They are also for queries that in
# larger ones would leave half of the processors without any. Exact products of float32 are not for tensor cores; their
# operands stand in registers, which more rows or fewer warps would overflow.
_LARGE_TILES = {
    (2, 64): (128, 64, 8, 3),
    (2, 128): (128, 64, 8, 3),
    (2, 256): (128, 32, 8, 3),
}
_LARGE_BYTES = 164_000  # of shared memory that they take
_TILES = {
    (2, 64): (64, 64, 4, 3),
    (2, 128): (64, 64, 4, 2),
    (2, 256): (64, 32, 4, 2),
    (4, 64): (16, 32, 8, 2),
    (4, 128): (16, 32, 8, 2),
    (4, 256): (16, 32, 8, 1),
}
# Of whole texts that are together no longer than a tile has columns: all that a program reads is on its way at once.
_SHORT_TILES = {(2, 64): (64, 128, 4, 1)}
_FEWEST_DIMS = 16  # of a product on tensor cores
_MOST_PACKED_HEADS = 8  # in a tile; one that held all 71 of Falcon's would see one token only


def attend(
    q_thd: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    batch: Batch,
    spec: AttentionSpec,
    table: Tensor | None,
    *,
    first_sequence: int,
    paged: bool,
) -> None:
    """Attend from the queries of some of the batch's sequences.

    Args:
        q_thd: [T, heads, head dim]; heads and values side by side.
        keys: [slots, kv heads, head dim]; heads and values side by side.
        values: likewise.
        out: [T, heads * head dim].
        batch: of the tokens.
        spec: of the attention.
        table: [buckets, heads] of a relative bias.
        first_sequence: it and those behind it.
        paged: keys are where the block tables say; otherwise they are those of the tokens, in their order.
    """
    group = spec.num_heads // spec.num_kv_heads
    dims = max(_FEWEST_DIMS, triton.next_power_of_2(spec.head_dim))
    assert dims <= 256, "no tiles are known for heads of more than 256 values"
    assert q_thd.stride(1) == keys.stride(1) == values.stride(1) == spec.head_dim
    assert keys.stride(0) == values.stride(0)
    assert spec.scale > 0
    if paged and hopper_can_attend(q_thd, keys, values, batch, spec, first_sequence=first_sequence):
        attend_as_hopper(q_thd, keys, values, out, batch, spec, first_sequence=first_sequence)
        return
    heads = min(group, _MOST_PACKED_HEADS)
    head_tiles = triton.cdiv(group, heads)
    all_rows = spec.num_kv_heads * head_tiles * heads * (len(q_thd) - first_sequence)
    size = q_thd.element_size(), max(dims, 64)
    tile, at_once = _tile(*size, all_rows, q_thd.device), False
    if not paged and size in _SHORT_TILES and len(q_thd) <= _SHORT_TILES[size][1]:
        tile, at_once = _SHORT_TILES[size], True
    rows, columns, warps, stages = tile
    num_sequences = len(batch.query_lens) - first_sequence
    # Each sequence may end with a tile that is not full.
    tiles = (len(q_thd) - first_sequence) // (rows // heads) + num_sequences
    slopes, table, buckets = added_tensors(spec, table, q_thd.device)
    _attend[(spec.num_kv_heads * head_tiles, tiles)](
        q_thd,
        keys,
        values,
        out,
        batch.query_starts,
        batch.context_lens,
        batch.block_tables,
        slopes,
        table,
        buckets,
        first_sequence,
        num_sequences,
        batch.block_tables.stride(0),
        q_thd.stride(0),
        keys.stride(0),
        spec.scale,
        0 if spec.window is None else spec.window,
        1.0 if spec.soft_cap is None else spec.soft_cap,
        0.0 if spec.alibi is None else spec.alibi.scale,
        NUM_HEADS=spec.num_heads,
        GROUP=group,
        HEAD_DIM=spec.head_dim,
        BLOCK_SIZE=batch.block_size if paged else 1,  # so that whole texts are one kernel, wherever they come from
        MAX_DISTANCE=0 if spec.relative is None else spec.relative.max_distance,
        PAGED=paged,
        CAUSAL=spec.causal,
        WINDOWED=spec.window is not None,
        CAPPED=spec.soft_cap is not None,
        ROUNDED=spec.alibi is not None and spec.alibi.rounded,
        AT_ONCE=at_once,
        WIDE=WIDE_DOTS,
        HEADS=heads,
        HEAD_TILES=head_tiles,
        ROWS=rows,
        COLUMNS=columns,
        DIMS=dims,
        num_warps=warps,
        num_stages=stages,
        **chained(q_thd.device),
        **OPTIONS,
    )


def _tile(size: int, dims: int, all_rows: int, device: torch.device) -> tuple[int, int, int, int]:
    """Rows, columns, warps and stages for so many rows on a device."""
    large = _LARGE_TILES.get((size, dims))
    if large is not None and 2 * all_rows >= large[0] * _large_processors(device):
        return large
    return _TILES[size, dims]


@cache
def _large_processors(device: torch.device) -> float:
    """How many processors of a device can hold a large tile; infinite if none can, for then there are never enough."""
    if device.type != "cuda":
        return math.inf
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    if properties["max_shared_mem"] < _LARGE_BYTES:
        return math.inf
    return float(properties["multiprocessor_count"])


@triton.jit(do_not_specialize=["first_sequence", "num_sequences", "table_stride", "window"])
def _attend(
    q,
    keys,
    values,
    out,
    query_starts,
    context_lens,
    block_tables,
    slopes,
    table,
    buckets,
    first_sequence,
    num_sequences,
    table_stride,
    q_stride,
    slot_stride,
    scale,
    window,
    soft_cap,
    alibi_scale,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    MAX_DISTANCE: tl.constexpr,
    PAGED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    ROUNDED: tl.constexpr,
    AT_ONCE: tl.constexpr,
    WIDE: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_TILES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIMS: tl.constexpr,
    CHAINED: tl.constexpr,
):
    let_next_begin(CHAINED)
    # Where texts begin and end was known before the step began.
    QUERIES: tl.constexpr = ROWS // HEADS
    kv_head = tl.program_id(0) // HEAD_TILES
    sequence, tile = _whose(query_starts + first_sequence, num_sequences, QUERIES)
    sequence += first_sequence
    start = tl.load(query_starts + sequence).to(tl.int64)
    num_queries = (tl.load(query_starts + sequence + 1) - start).to(tl.int32)
    context = tl.load(context_lens + sequence) if PAGED else num_queries
    wait_for_earlier(CHAINED)
    if tile * QUERIES >= num_queries:
        return

    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, DIMS)
    query = tile * QUERIES + rows // HEADS
    of_group = (tl.program_id(0) % HEAD_TILES) * HEADS + rows % HEADS
    head = kv_head * GROUP + of_group
    held_rows = (rows < QUERIES * HEADS) & (query < num_queries) & (of_group < GROUP)
    held_q = held_rows[:, None] & (dims < HEAD_DIM)[None, :]
    q_place = (start + query)[:, None] * q_stride + head[:, None] * HEAD_DIM + dims[None, :]
    if not AT_ONCE:
        q_tile = _queries(q + q_place, held_q, WIDE)
    position = context - num_queries + query
    slope = slopes_of(slopes, head, held_rows)

    # Keys that a query of the tile may see.
    first, stop = 0, context
    if CAUSAL:
        stop = tl.minimum(context, context - num_queries + (tile + 1) * QUERIES)
    if WINDOWED:
        first = tl.maximum(0, context - num_queries + tile * QUERIES - window + 1)
    # Up to here the tile's queries see all keys, as far as whole tiles go: nothing to hide.
    clear = tl.minimum(stop, context - num_queries + tile * QUERIES + 1) if CAUSAL else stop
    edge = first if WINDOWED else first + tl.maximum(clear - first, 0) // COLUMNS * COLUMNS

    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    found = tl.zeros((ROWS, DIMS), tl.float32)
    block = tl.zeros((COLUMNS,), tl.int32)
    if PAGED:  # the blocks of a tile are looked up before its turn
        block_row = block_tables + sequence * table_stride
        key = first + tl.arange(0, COLUMNS)
        block = tl.load(block_row + key // BLOCK_SIZE, mask=key < stop, other=0)
    end = stop
    if AT_ONCE:  # one tile: with bounds that the compiler knows, it makes no loop
        edge, end = 0, COLUMNS
    for AT_EDGE in tl.static_range(1 if AT_ONCE else 0, 2):
        for begin in range(edge if AT_EDGE else first, end if AT_EDGE else edge, COLUMNS):
            key = begin + tl.arange(0, COLUMNS)
            held = key < stop
            if PAGED:
                slot = block.to(tl.int64) * BLOCK_SIZE + key % BLOCK_SIZE
                next_key = key + COLUMNS
                block = tl.load(block_row + next_key // BLOCK_SIZE, mask=next_key < stop, other=0)
            else:
                slot = start + key
            place = (slot * slot_stride + kv_head * HEAD_DIM)[:, None] + dims[None, :]
            held_values = held[:, None] & (dims < HEAD_DIM)[None, :]
            k_tile = tl.load(keys + place, mask=held_values, other=0.0)
            v_tile = tl.load(values + place, mask=held_values, other=0.0)
            if AT_ONCE:  # here, since nothing is asked for behind a tile that is waited for
                q_tile = _queries(q + q_place, held_q, WIDE)
            if WIDE:
                k_tile = k_tile.to(tl.float32)
                v_tile = v_tile.to(tl.float32)
            products = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
            scores, factor = scores_of(
                products,
                key[None, :],
                position[:, None],
                head,
                held_rows,
                slope,
                slopes,
                table,
                buckets,
                scale,
                soft_cap,
                alibi_scale,
                NUM_HEADS,
                MAX_DISTANCE,
                CAPPED,
                ROUNDED,
            )
            if AT_EDGE:
                visible = held[None, :]
                if CAUSAL:
                    visible &= key[None, :] <= position[:, None]
                if WINDOWED:
                    visible &= key[None, :] > position[:, None] - window
                scores = tl.where(visible, scores, float("-inf"))
            largest, total, found = absorb(scores, factor, v_tile, largest, total, found)

    found = found / tl.where(total == 0.0, 1.0, total)[:, None]
    out_place = (start + query)[:, None] * (NUM_HEADS * HEAD_DIM) + head[:, None] * HEAD_DIM + dims[None, :]
    tl.store(out + out_place, found.to(out.dtype.element_ty), mask=held_q)


@triton.jit
def _queries(places, held, WIDE: tl.constexpr):
    """A tile of queries, as tensor cores take them."""
    tile = tl.load(places, mask=held, other=0.0)
    return tile.to(tl.float32) if WIDE else tile


@triton.jit
def _whose(query_starts, num_sequences, QUERIES: tl.constexpr):
    """The sequence of this program's tile, counted from the first, and which of its tiles it is.

    A sequence's tiles begin at (its start // queries of a tile) + (its number): before it there are no more, since each
    may have one that is not full. The last queries of a prompt see most, so they begin first.
    """
    place = tl.num_programs(1) - 1 - tl.program_id(1)
    first_start = tl.load(query_starts)
    begun = 0
    for begin in range(0, num_sequences, 128):
        number = begin + tl.arange(0, 128)
        held = number < num_sequences
        tiles_before = (tl.load(query_starts + number, mask=held, other=0) - first_start) // QUERIES + number
        begun += tl.sum((held & (tiles_before <= place)).to(tl.int32), axis=0)
    sequence = begun - 1
    return sequence, place - (tl.load(query_starts + sequence) - first_start) // QUERIES - sequence
