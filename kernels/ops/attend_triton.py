"""The attention kernels: one for decodes, prompts and whole texts, and one that joins the parts of a decode.

A program holds a tile of queries, rows, and walks over the keys that they may see, columns, with a running softmax. The
query heads that share a kv head are rows of one tile, so each key is read once for all of them, and the tensor cores
have work even where a sequence has a single query. Where few sequences decode, each context is cut into parts that
different programs walk over, and a second kernel joins what they found. All lengths are read from the device: the grid
depends on the shapes of the batch alone, so that a captured launch serves contexts of any length.

Nothing is read past a context, whatever is there. Scores, softmax and sums are float32; the weights of the values are
rounded to the type of the values, as tensor cores want it. Products of float32 are exact ones, not tf32.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.batch import Batch
from headrace.kernels.ops.math_triton import OPTIONS, round_to_bfloat16, tanh
from headrace.kernels.ops.relative import relative_buckets
from headrace.kernels.spec import Alibi, AttentionSpec, RelativeBias

__all__ = ["attend", "num_splits"]

# Parts of contexts for which there shall be programs: two for each processor of the largest GPUs. More than 32 parts
# of one context cost more to join than they save.
_PROGRAMS = 264
_MOST_SPLITS = 32

# Rows, columns, warps and stages of a tile by bytes of a value and padded head size. 16-bit types: a tile of queries
# and two stages of keys and values stay under 100 KB, which is what the smallest of today's GPUs have. A decode has few
# rows (here the most of them) and lives from loads in flight. Exact products of float32 are not for tensor cores; their
# operands stand in registers, which more rows or fewer warps would overflow.
_TILES = {
    (2, 64): (64, 64, 4, 2),
    (2, 128): (64, 64, 4, 2),
    (2, 256): (64, 32, 4, 2),
    (4, 64): (16, 32, 8, 2),
    (4, 128): (16, 32, 8, 2),
    (4, 256): (16, 32, 8, 1),
}
_DECODE_TILES = {
    (2, 64): (64, 128, 4, 3),
    (2, 128): (64, 64, 4, 2),
    (2, 256): (64, 32, 4, 2),
    (4, 64): (16, 32, 8, 2),
    (4, 128): (16, 32, 8, 2),
    (4, 256): (16, 32, 8, 1),
}
_FEWEST_ROWS = 16  # of a product on tensor cores
_MOST_PACKED_HEADS = 8  # in a tile of a prompt; a tile that held all 71 of Falcon's would see one token only

# The interpreter multiplies the bits of bfloat16, not the values.
_WIDE_DOTS = triton.knobs.runtime.interpret


def attend(
    q_thd: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    batch: Batch,
    spec: AttentionSpec,
    table: Tensor | None,
    *,
    sequences: range,
    paged: bool,
) -> None:
    """Attend from the queries of some of the batch's sequences, which all have one query or come last.

    Args:
        q_thd: [T, heads, head dim]; heads and values side by side.
        keys: [slots, kv heads, head dim]; heads and values side by side.
        values: likewise.
        out: [T, heads * head dim].
        batch: of the tokens.
        spec: of the attention.
        table: [buckets, heads] of a relative bias.
        sequences: which of them.
        paged: keys are where the block tables say; otherwise they are those of the tokens, in their order.
    """
    queries = batch.query_lens[sequences.start : sequences.stop]
    group = spec.num_heads // spec.num_kv_heads
    decoding = paged and max(queries) == 1
    dims = max(_FEWEST_ROWS, triton.next_power_of_2(spec.head_dim))
    assert dims <= 256, "no tiles are known for heads of more than 256 values"
    rows, columns, warps, stages = (_DECODE_TILES if decoding else _TILES)[q_thd.element_size(), max(dims, 64)]
    if decoding:
        rows = min(rows, max(_FEWEST_ROWS, triton.next_power_of_2(group)))
        heads = min(group, rows)
    else:
        heads = min(group, _MOST_PACKED_HEADS)
    head_tiles = triton.cdiv(group, heads)
    capacity = batch.block_tables.shape[1] * batch.block_size
    programs = len(sequences) * spec.num_kv_heads * head_tiles
    splits = num_splits(programs, capacity, columns) if decoding else 1
    parts = maxima = sums = None
    if splits > 1:
        shape = (len(sequences), spec.num_heads, splits)
        parts = torch.empty((*shape, spec.head_dim), dtype=torch.float32, device=q_thd.device)
        maxima, sums = (torch.empty(shape, dtype=torch.float32, device=q_thd.device) for _ in range(2))
    tiles = splits if decoding else triton.cdiv(max(queries), rows // heads)
    alibi, relative = spec.alibi, spec.relative
    assert q_thd.stride(1) == keys.stride(1) == values.stride(1) == spec.head_dim
    assert keys.stride(0) == values.stride(0)
    _attend[(len(sequences), spec.num_kv_heads * head_tiles, tiles)](
        q_thd,
        keys,
        values,
        out,
        parts,
        maxima,
        sums,
        batch.query_starts,
        batch.context_lens,
        batch.block_tables,
        None if alibi is None else _slopes(alibi, q_thd.device),
        None if relative is None else table,
        None if relative is None else _buckets(relative, spec.causal, q_thd.device),
        sequences.start,
        batch.block_tables.stride(0),
        q_thd.stride(0),
        keys.stride(0),
        spec.scale,
        0 if spec.window is None else spec.window,
        1.0 if spec.soft_cap is None else spec.soft_cap,
        0.0 if alibi is None else alibi.scale,
        NUM_HEADS=spec.num_heads,
        GROUP=group,
        HEAD_DIM=spec.head_dim,
        BLOCK_SIZE=batch.block_size,
        MAX_DISTANCE=0 if relative is None else relative.max_distance,
        PAGED=paged,
        CAUSAL=spec.causal,
        WINDOWED=spec.window is not None,
        CAPPED=spec.soft_cap is not None,
        ROUNDED=alibi is not None and alibi.rounded,
        SPLIT=splits > 1,
        WIDE=_WIDE_DOTS,
        HEADS=heads,
        HEAD_TILES=head_tiles,
        ROWS=rows,
        COLUMNS=columns,
        DIMS=dims,
        num_warps=warps,
        num_stages=stages,
        **OPTIONS,
    )
    if splits > 1:
        _join[(len(sequences), spec.num_heads)](
            parts,
            maxima,
            sums,
            out,
            batch.query_starts,
            sequences.start,
            splits,
            SPLITS=_MOST_SPLITS,
            NUM_HEADS=spec.num_heads,
            HEAD_DIM=spec.head_dim,
            DIMS=dims,
            num_warps=4,
            **OPTIONS,
        )


def num_splits(programs: int, capacity: int, columns: int) -> int:
    """Parts into which contexts are cut: enough to fill a GPU, if the block tables hold that many tiles."""
    return max(1, min(_MOST_SPLITS, _PROGRAMS // programs, -(-capacity // columns)))


@cache
def _slopes(alibi: Alibi, device: torch.device) -> Tensor:
    """[heads] float32."""
    slopes = torch.tensor(alibi.slopes, dtype=torch.float32)
    return (slopes.bfloat16().float() if alibi.rounded else slopes).to(device)


@cache
def _buckets(relative: RelativeBias, causal: bool, device: torch.device) -> Tensor:
    """[2 * max distance + 1] int32: the bucket of every distance; what is further away shares the last one."""
    distances = torch.arange(-relative.max_distance, relative.max_distance + 1)
    return relative_buckets(distances, relative, both_directions=not causal).int().to(device)


@triton.jit(do_not_specialize=["first_sequence", "table_stride", "window"])
def _attend(
    q,
    keys,
    values,
    out,
    parts,
    maxima,
    sums,
    query_starts,
    context_lens,
    block_tables,
    slopes,
    table,
    buckets,
    first_sequence,
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
    SPLIT: tl.constexpr,
    WIDE: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_TILES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIMS: tl.constexpr,
):
    QUERIES: tl.constexpr = ROWS // HEADS
    LOG2_E: tl.constexpr = 1.4426950408889634
    order = tl.program_id(0)  # of the sequence in this launch
    sequence = first_sequence + order
    kv_head = tl.program_id(1) // HEAD_TILES
    # The last queries of a prompt see most, so they begin first.
    tile = 0 if SPLIT else tl.num_programs(2) - 1 - tl.program_id(2)
    start = tl.load(query_starts + sequence).to(tl.int64)
    num_queries = (tl.load(query_starts + sequence + 1) - start).to(tl.int32)
    context = tl.load(context_lens + sequence) if PAGED else num_queries
    if tile * QUERIES >= num_queries:
        return

    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, DIMS)
    query = tile * QUERIES + rows // HEADS
    of_group = (tl.program_id(1) % HEAD_TILES) * HEADS + rows % HEADS
    head = kv_head * GROUP + of_group
    held_rows = (rows < QUERIES * HEADS) & (query < num_queries) & (of_group < GROUP)
    held_q = held_rows[:, None] & (dims < HEAD_DIM)[None, :]
    q_place = (start + query)[:, None] * q_stride + head[:, None] * HEAD_DIM + dims[None, :]
    q_tile = tl.load(q + q_place, mask=held_q, other=0.0)
    if WIDE:
        q_tile = q_tile.to(tl.float32)
    position = context - num_queries + query
    slope = 0.0
    if slopes is not None:
        slope = tl.load(slopes + head, mask=held_rows, other=0.0)[:, None]

    # Keys that a query of the tile may see; of these, the part that is this program's.
    first, stop = 0, context
    if CAUSAL:
        stop = tl.minimum(context, context - num_queries + (tile + 1) * QUERIES)
    if WINDOWED:
        first = tl.maximum(0, context - num_queries + tile * QUERIES - window + 1)
    if SPLIT:
        share = tl.cdiv(tl.cdiv(stop - first, tl.num_programs(2)), COLUMNS) * COLUMNS
        first += tl.program_id(2) * share
        stop = tl.minimum(stop, first + share)

    # Up to here the tile's queries see all keys, as far as whole tiles go: nothing to hide.
    clear = tl.minimum(stop, context - num_queries + tile * QUERIES + 1) if CAUSAL else stop
    edge = first if WINDOWED else first + tl.maximum(clear - first, 0) // COLUMNS * COLUMNS

    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    found = tl.zeros((ROWS, DIMS), tl.float32)
    for AT_EDGE in tl.static_range(2):
        for begin in range(edge if AT_EDGE else first, stop if AT_EDGE else edge, COLUMNS):
            key = begin + tl.arange(0, COLUMNS)
            held = key < stop
            if PAGED:
                block = tl.load(block_tables + sequence * table_stride + key // BLOCK_SIZE, mask=held, other=0)
                slot = block.to(tl.int64) * BLOCK_SIZE + key % BLOCK_SIZE
            else:
                slot = start + key
            place = slot * slot_stride + kv_head * HEAD_DIM
            held_k = held[None, :] & (dims < HEAD_DIM)[:, None]
            k_tile = tl.load(keys + place[None, :] + dims[:, None], mask=held_k, other=0.0)
            if WIDE:
                k_tile = k_tile.to(tl.float32)
            # Scores are in powers of two, which is what the hardware has.
            scores = tl.dot(q_tile, k_tile, input_precision="ieee")
            if CAPPED:
                scores = tanh(scores * (scale / soft_cap)) * (soft_cap * LOG2_E)
            else:
                scores *= scale * LOG2_E
            if slopes is not None:
                scores += _alibi(slope, key[None, :], position[:, None], ROUNDED) * (alibi_scale * LOG2_E)
            if table is not None:
                far = key[None, :] - position[:, None]
                far = tl.minimum(tl.maximum(far, -MAX_DISTANCE), MAX_DISTANCE) + MAX_DISTANCE
                entry = tl.load(buckets + far) * NUM_HEADS + head[:, None]
                scores += tl.load(table + entry, mask=held_rows[:, None], other=0.0).to(tl.float32) * LOG2_E
            if AT_EDGE:
                visible = held[None, :]
                if CAUSAL:
                    visible &= key[None, :] <= position[:, None]
                if WINDOWED:
                    visible &= key[None, :] > position[:, None] - window
                scores = tl.where(visible, scores, float("-inf"))

            new_largest = tl.maximum(largest, tl.max(scores, axis=1))
            base = tl.where(new_largest == float("-inf"), 0.0, new_largest)
            weights = tl.exp2(scores - base[:, None])
            decay = tl.exp2(largest - base)
            largest = new_largest
            total = total * decay + tl.sum(weights, axis=1)
            held_v = held[:, None] & (dims < HEAD_DIM)[None, :]
            v_tile = tl.load(values + place[:, None] + dims[None, :], mask=held_v, other=0.0)
            if WIDE:
                v_tile = v_tile.to(tl.float32)
            found = found * decay[:, None] + tl.dot(weights.to(v_tile.dtype), v_tile, input_precision="ieee")

    if SPLIT:
        part = (order.to(tl.int64) * NUM_HEADS + head) * tl.num_programs(2) + tl.program_id(2)
        tl.store(maxima + part, largest, mask=held_rows)
        tl.store(sums + part, total, mask=held_rows)
        if first < stop:
            tl.store(parts + part[:, None] * HEAD_DIM + dims[None, :], found, mask=held_q)
    else:
        found = found / tl.where(total == 0.0, 1.0, total)[:, None]
        out_place = (start + query)[:, None] * (NUM_HEADS * HEAD_DIM) + head[:, None] * HEAD_DIM + dims[None, :]
        tl.store(out + out_place, found.to(out.dtype.element_ty), mask=held_q)


@triton.jit
def _alibi(slope, key, position, ROUNDED: tl.constexpr):
    """Slope times distance, as far as a softmax sees it; rounded, the products with the positions are."""
    if ROUNDED:
        of_key = round_to_bfloat16(slope * round_to_bfloat16(key.to(tl.float32)))
        return of_key - round_to_bfloat16(slope * round_to_bfloat16(position.to(tl.float32)))
    return slope * (key - position).to(tl.float32)


@triton.jit(do_not_specialize=["first_sequence", "num_parts"])
def _join(
    parts,
    maxima,
    sums,
    out,
    query_starts,
    first_sequence,
    num_parts,
    SPLITS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
):
    order = tl.program_id(0)
    head = tl.program_id(1)
    dims = tl.arange(0, DIMS)
    part = tl.arange(0, SPLITS)
    place = (order.to(tl.int64) * NUM_HEADS + head) * num_parts + part
    maximum = tl.load(maxima + place, mask=part < num_parts, other=float("-inf"))
    sum_ = tl.load(sums + place, mask=part < num_parts, other=0.0)
    filled = sum_ != 0.0  # or NaN; of empty parts nothing else was written
    largest = tl.max(maximum, axis=0)
    weights = tl.exp2(maximum - tl.where(largest == float("-inf"), 0.0, largest))
    total = tl.sum(weights * sum_, axis=0)
    held = filled[:, None] & (dims < HEAD_DIM)[None, :]
    found = tl.load(parts + place[:, None] * HEAD_DIM + dims[None, :], mask=held, other=0.0)
    joined = tl.sum(found * weights[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    token = tl.load(query_starts + first_sequence + order).to(tl.int64)
    out_place = (token * NUM_HEADS + head) * HEAD_DIM + dims
    tl.store(out + out_place, joined.to(out.dtype.element_ty), mask=dims < HEAD_DIM)
