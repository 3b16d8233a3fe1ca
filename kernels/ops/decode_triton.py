"""The kernel of decodes: one query of each sequence, and all the keys of its context, in one launch.

A program holds the query heads that share a kv head, as rows of one tile, so that each key is read once for all of
them and tensor cores have work. Where few sequences decode, a context is cut into parts for several programs: tile by
tile in turns, as many parts as it has tiles and the grid has programs for it; those that are left over end at once.
Each part leaves a running softmax; the program that comes last joins them, in their order.

The query's own key and value may come straight from the projection: then every program norms and rotates its queries,
and the one of the last part does so with the key, writes it and the value into the cache, and attends to them as they
are written. Nobody else reads that slot. All other keys are of steps before this one, so the first of them are on
their way while the projection still runs (`headrace.kernels.ops.chain_triton`).

All lengths are read from the device: the grid depends on the shapes of the batch alone, so that a captured launch
serves contexts of any length. Nothing is read past a context, whatever is there. Scores, softmax and sums are float32;
the weights of the values are rounded to the type of the values, as tensor cores want it. Products of float32 are exact
ones, not tf32.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.batch import Batch
from headrace.kernels.ops.chain_triton import chained, let_next_begin, wait_for_earlier
from headrace.kernels.ops.decode_parts_triton import blocks_of, join, load_tiles, newest_pair
from headrace.kernels.ops.decode_tiles import MOST_SPLITS, decode_tiles
from headrace.kernels.ops.math_triton import OPTIONS
from headrace.kernels.ops.rotation_triton import normed_and_rotated
from headrace.kernels.ops.scores_triton import WIDE_DOTS, absorb, added_tensors, scores_of, slopes_of
from headrace.kernels.spec import AttentionSpec

__all__ = ["Newest", "decode"]

_MOST_HEADS = 16  # of a tile, what tensor cores take at once; larger groups are several tiles
_FEWEST_DIMS = 16  # of a product on tensor cores


@dataclass(frozen=True, slots=True, kw_only=True)
class Newest:
    """How a query is made of its projection, and where its key and value go.

    Attributes:
        slots: [T] int64.
        cos_sin: [T, 2, rotary pairs] float32; None leaves positions to others.
        interleaved: whether pairs are neighbours.
        q_norm: [head dim], scale of the queries' norm; None if it has none.
        k_norm: likewise for keys.
    """

    slots: Tensor
    cos_sin: Tensor | None
    interleaved: bool
    q_norm: Tensor | None
    k_norm: Tensor | None


def decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    batch: Batch,
    spec: AttentionSpec,
    table: Tensor | None,
    *,
    num_sequences: int,
    newest: Newest | None = None,
) -> None:
    """Attend from the queries of the batch's first sequences, which have one each.

    Args:
        q: [T, heads, head dim] with heads and values side by side; with `newest` keys and values follow in each row.
        keys: [slots, kv heads, head dim]; heads and values side by side.
        values: likewise.
        out: [T, heads * head dim].
        batch: of the tokens.
        spec: of the attention.
        table: [buckets, heads] of a relative bias.
        num_sequences: how many of them.
        newest: if keys and values are not in the cache yet. Then what else is in it was written before the step began.
    """
    group = spec.num_heads // spec.num_kv_heads
    dims = max(_FEWEST_DIMS, triton.next_power_of_2(spec.head_dim))
    assert dims <= 256, "no tiles are known for heads of more than 256 values"
    assert q.stride(-1) == 1
    assert keys.stride(1) == values.stride(1) == spec.head_dim
    assert keys.stride(0) == values.stride(0)
    assert spec.scale > 0
    heads = min(group, _MOST_HEADS)
    tiles = spec.num_kv_heads * triton.cdiv(group, heads)
    capacity = batch.block_tables.shape[1] * batch.block_size
    way = decode_tiles(q.element_size(), dims, heads, num_sequences * tiles, capacity)
    parts = weights = arrivals = None
    if way.splits > 1:
        shape = (num_sequences, tiles, way.splits, heads)
        parts = torch.empty((*shape, spec.head_dim), dtype=torch.float32, device=q.device)
        weights = torch.empty(shape, dtype=torch.float32, device=q.device)
        arrivals = _arrivals(batch, num_sequences * tiles)
    slopes, table, buckets = added_tensors(spec, table, q.device)
    norm = spec.qk_norm if newest is not None else None
    cos_sin = None if newest is None or newest.cos_sin is None else newest.cos_sin.contiguous()
    rows = triton.next_power_of_2(heads)
    _decode[(tiles, way.splits, num_sequences)](
        q,
        keys,
        values,
        out,
        parts,
        weights,
        arrivals,
        batch.context_lens,
        batch.block_tables,
        None if newest is None else newest.slots,
        cos_sin,
        None if norm is None or newest is None else newest.q_norm,
        None if norm is None or newest is None else newest.k_norm,
        slopes,
        table,
        buckets,
        capacity,
        batch.block_tables.stride(0),
        q.stride(0),
        keys.stride(0),
        spec.scale,
        0 if spec.window is None else spec.window,
        1.0 if spec.soft_cap is None else spec.soft_cap,
        0.0 if spec.alibi is None else spec.alibi.scale,
        0.0 if norm is None else norm.eps,
        NUM_HEADS=spec.num_heads,
        NUM_KV_HEADS=spec.num_kv_heads,
        HEAD_DIM=spec.head_dim,
        BLOCK_SIZE=batch.block_size,
        MAX_DISTANCE=0 if spec.relative is None else spec.relative.max_distance,
        WINDOWED=spec.window is not None,
        CAPPED=spec.soft_cap is not None,
        ROUNDED=spec.alibi is not None and spec.alibi.rounded,
        NEWEST=newest is not None,
        PAIRS=0 if cos_sin is None else cos_sin.shape[-1],
        INTERLEAVED=newest is not None and newest.interleaved,
        NORM="none" if norm is None else norm.kind,
        UNIT_OFFSET=norm is not None and norm.unit_offset,
        SPLIT=way.splits > 1,
        AHEAD=way.ahead,
        WIDE=WIDE_DOTS,
        HEADS=heads,
        ROWS=rows,
        COLUMNS=way.columns,
        DIMS=dims,
        MOST_SPLITS=MOST_SPLITS,
        STAGES=way.stages,
        num_warps=way.warps,
        **chained(q.device),
        **OPTIONS,
    )


def _arrivals(batch: Batch, count: int) -> Tensor:
    """Counters [count] of parts that are done, 0 between launches, since the last to come sets them back.

    A step has its own, and so has a captured one: its launches follow each other, those of two steps may not.
    """
    return batch.shared(
        ("arrivals", count), lambda: torch.zeros(count, dtype=torch.int32, device=batch.context_lens.device)
    )


@triton.jit(do_not_specialize=["capacity", "table_stride", "window"])
def _decode(
    q,
    keys,
    values,
    out,
    parts,
    weights,
    arrivals,
    context_lens,
    block_tables,
    slots,
    cos_sin,
    q_norm,
    k_norm,
    slopes,
    table,
    buckets,
    capacity,
    table_stride,
    q_stride,
    slot_stride,
    scale,
    window,
    soft_cap,
    alibi_scale,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    MAX_DISTANCE: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    ROUNDED: tl.constexpr,
    NEWEST: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    SPLIT: tl.constexpr,
    AHEAD: tl.constexpr,
    WIDE: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIMS: tl.constexpr,
    STAGES: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
    CHAINED: tl.constexpr,
):
    let_next_begin(CHAINED)
    if not NEWEST:
        wait_for_earlier(CHAINED)
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    HEAD_TILES: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    kv_head = tl.program_id(0) // HEAD_TILES
    head_tile = tl.program_id(0) % HEAD_TILES
    part = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    context = tl.load(context_lens + sequence)
    position = context - 1
    stop = position if NEWEST else context  # of the keys in the cache
    first = tl.maximum(0, context - window) if WINDOWED else 0
    # Unless there is a window, the first keys of a part do not depend on the context: both are looked up at once.
    begin = first + part * COLUMNS
    key = begin + tl.arange(0, COLUMNS)
    block_row = block_tables + sequence * table_stride
    block = tl.load(block_row + blocks_of(key, BLOCK_SIZE), mask=key < capacity, other=0)

    num_parts = 1
    if SPLIT:
        num_parts = tl.maximum(1, tl.minimum(tl.num_programs(1), tl.cdiv(stop - first, COLUMNS)))
        if part >= num_parts:
            if NEWEST:
                wait_for_earlier(CHAINED)
            return

    dims = tl.arange(0, DIMS)
    if AHEAD:  # the first tile is on its way while the queries are made
        k_tile, v_tile = load_tiles(
            keys, values, key, key < stop, block, dims, kv_head, slot_stride, BLOCK_SIZE, HEAD_DIM, WIDE
        )
    if NEWEST:
        wait_for_earlier(CHAINED)

    rows = tl.arange(0, ROWS)
    of_group = head_tile * HEADS + rows
    head = kv_head * GROUP + of_group
    held_rows = (rows < HEADS) & (of_group < GROUP)
    held_q = held_rows[:, None] & (dims < HEAD_DIM)[None, :]
    q_start = q + sequence * q_stride + head[:, None] * HEAD_DIM
    q_tile = tl.load(q_start + dims[None, :], mask=held_q, other=0.0)
    turns = None if cos_sin is None else cos_sin + sequence * (2 * PAIRS)
    if PAIRS > 0 or NORM != "none":
        q_tile = normed_and_rotated(
            q_tile,
            q_start,
            dims[None, :],
            held_q,
            held_rows[:, None],
            turns,
            q_norm,
            k_norm,
            eps,
            HEAD_DIM,
            PAIRS,
            INTERLEAVED,
            NORM,
            UNIT_OFFSET,
        ).to(q.dtype.element_ty)
    if WIDE:
        q_tile = q_tile.to(tl.float32)
    slope = slopes_of(slopes, head, held_rows)

    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    found = tl.zeros((ROWS, DIMS), tl.float32)
    if NEWEST:
        k_start = q + sequence * q_stride + (NUM_HEADS + kv_head) * HEAD_DIM + tl.zeros((1, 1), tl.int32)
        if part == num_parts - 1:
            place = tl.load(slots + sequence) * slot_stride + kv_head * HEAD_DIM + dims[None, :]
            k_new, v_new = newest_pair(
                k_start,
                keys + place,
                values + place,
                head_tile,
                dims[None, :],
                turns,
                q_norm,
                k_norm,
                eps,
                NUM_KV_HEADS,
                HEAD_DIM,
                PAIRS,
                INTERLEAVED,
                NORM,
                UNIT_OFFSET,
            )
            scores, factor = scores_of(
                tl.sum(q_tile.to(tl.float32) * k_new, axis=1)[:, None],
                position + tl.zeros((1, 1), tl.int32),
                position,
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
            largest = tl.sum(scores, axis=1) * factor
            total = tl.exp2(largest - largest)  # 1, or not a number
            found = v_new * total[:, None]

    step = num_parts * COLUMNS
    for tile in tl.range(begin, stop, step, num_stages=STAGES):
        key = tile + tl.arange(0, COLUMNS)
        held = key < stop
        if not AHEAD:
            k_tile, v_tile = load_tiles(
                keys, values, key, held, block, dims, kv_head, slot_stride, BLOCK_SIZE, HEAD_DIM, WIDE
            )
        products = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        scores, factor = scores_of(
            products,
            key[None, :],
            position,
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
        scores = tl.where(held[None, :], scores, float("-inf"))
        largest, total, found = absorb(scores, factor, v_tile, largest, total, found)
        next_key = key + step
        if not AHEAD:
            # The blocks of the next tile are known before its turn.
            block = tl.load(block_row + blocks_of(next_key, BLOCK_SIZE), mask=next_key < stop, other=0)
        elif tile + step < stop:
            block = tl.load(block_row + blocks_of(next_key, BLOCK_SIZE), mask=next_key < stop, other=0)
            k_tile, v_tile = load_tiles(
                keys, values, next_key, next_key < stop, block, dims, kv_head, slot_stride, BLOCK_SIZE, HEAD_DIM, WIDE
            )

    found = found / tl.where(total == 0.0, 1.0, total)[:, None]
    out_place = out + sequence * (NUM_HEADS * HEAD_DIM) + head[:, None] * HEAD_DIM + dims[None, :]
    if num_parts == 1:
        tl.store(out_place, found.to(out.dtype.element_ty), mask=held_q)
    elif SPLIT:
        group_tile = sequence * tl.num_programs(0) + tl.program_id(0)
        first_row = group_tile * (tl.num_programs(1) * HEADS)
        row = part * HEADS + rows
        tl.store(weights + first_row + row, largest + tl.log2(total), mask=rows < HEADS)
        tl.store(parts + first_row * HEAD_DIM + row[:, None] * HEAD_DIM + dims[None, :], found, mask=held_q)
        tl.debug_barrier()  # all of the program's threads have stored when one of them counts
        if tl.atomic_add(arrivals + group_tile, 1, sem="acq_rel") == num_parts - 1:
            tl.store(arrivals + group_tile, 0)
            joined = join(
                parts + first_row * HEAD_DIM,
                weights + first_row,
                num_parts,
                rows,
                dims,
                held_q,
                HEAD_DIM,
                HEADS,
                MOST_SPLITS,
            )
            tl.store(out_place, joined.to(out.dtype.element_ty), mask=held_q)
