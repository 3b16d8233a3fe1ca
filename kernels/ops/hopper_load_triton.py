"""What the attention kernel for Hopper GPUs loads (`headrace.kernels.ops.hopper_triton`): which tiles are a program's,
and the warp that copies them into rings in shared memory."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="assignment"
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import shared_memory_descriptor
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

__all__ = ["BUFFERS", "GROUPS", "ROWS", "barriers", "load", "work"]

GROUPS = gl.constexpr(3)  # of warps that multiply
ROWS = gl.constexpr(64)  # of a group
BUFFERS = gl.constexpr(2)  # of queries: those of the next tile arrive while one is computed
_BOX = gl.constexpr(64)  # values that one copy can lay out as tensor cores read them
# Names of Triton 3.6, and what became of them.
_start_copy = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_PUBLIC_REINTERPRET = gl.constexpr(hasattr(shared_memory_descriptor, "reinterpret"))


@gluon.jit
def barriers(COUNT: gl.constexpr):
    """Of so many places, barriers that tell when one is full, by the copy into it, and empty, by all groups."""
    full = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(COUNT):
        mbarrier.init(full.index(place), count=1)
        mbarrier.init(empty.index(place), count=GROUPS)
    return full, empty


@gluon.jit
def work(round, texts, NUM_KV_HEADS: gl.constexpr, HEADS: gl.constexpr, COLUMNS: gl.constexpr, WARPS: gl.constexpr):
    """What this program computes in a round: kv head, sequence, first query among all, queries from there to the end of
    the text, context, position of the first, and tiles of keys, of which there may be none.

    Tiles of queries are numbered as in `headrace.kernels.ops.attend_triton`. Rounds go there and back, so that all
    programs get as much.
    """
    query_starts, context_lens, num_sequences, num_places, _ = texts
    QUERIES: gl.constexpr = GROUPS * ROWS // HEADS
    program = gl.program_id(0)
    if round % 2 == 1:
        program = gl.num_programs(0) - 1 - program
    item = round * gl.num_programs(0) + program
    kv_head = item % NUM_KV_HEADS
    place = num_places - 1 - item // NUM_KV_HEADS
    lanes: gl.constexpr = gl.BlockedLayout([4], [32], [WARPS], [0])
    first = gl.load(query_starts)
    begun = 0
    for begin in range(0, num_sequences, 128):
        number = begin + gl.arange(0, 128, layout=lanes)
        held = number < num_sequences
        tiles_before = (gl.load(query_starts + number, mask=held, other=0) - first) // QUERIES + number
        begun += gl.sum((held & (tiles_before <= place)).to(gl.int32), axis=0)
    sequence = gl.maximum(begun - 1, 0)
    start = gl.load(query_starts + sequence)
    tile = place - (start - first) // QUERIES - sequence
    num_queries = gl.load(query_starts + sequence + 1) - start
    context = gl.load(context_lens + sequence)
    left = num_queries - tile * QUERIES
    position = context - left
    stop = gl.minimum(context, position + QUERIES)
    tiles = gl.where((left > 0) & (place >= 0), (stop + COLUMNS - 1) // COLUMNS, 0)
    return kv_head, sequence, start + tile * QUERIES, left, context, position, tiles


@gluon.jit
def load(
    args,
    NUM_KV_HEADS: gl.constexpr,
    HEADS: gl.constexpr,
    DIMS: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Copy queries, keys and values of all rounds, each as soon as there is a place for it."""
    q, keys, values, q_tiles, k_ring, v_ring, places, texts, block_tables, table_stride = args
    q_full, q_empty, k_full, k_empty, v_full, v_empty = places
    PARTS: gl.constexpr = DIMS // _BOX
    EACH: gl.constexpr = ROWS // HEADS  # queries of a group
    q_boxes = _boxes(q_tiles, BUFFERS * GROUPS * PARTS, EACH, HEADS)
    at = 0
    done = 0
    for round in range(texts[4]):
        kv_head, sequence, start, _, context, _, tiles = work(round, texts, NUM_KV_HEADS, HEADS, COLUMNS, 1)
        if tiles > 0:
            buffer = done % BUFFERS
            mbarrier.wait(q_empty.index(buffer), ((done // BUFFERS) & 1) ^ 1)
            mbarrier.expect(q_full.index(buffer), GROUPS * ROWS * DIMS * 2)
            for group in gl.static_range(GROUPS):
                for part in gl.static_range(PARTS):
                    _start_copy(
                        q,
                        [start + group * EACH, kv_head * HEADS, part * _BOX],
                        q_full.index(buffer),
                        q_boxes.index((buffer * GROUPS + group) * PARTS + part),
                    )
            done += 1
        row = block_tables + gl.to_tensor(sequence).to(gl.int64) * table_stride
        for tile in range(tiles):
            stage = at % STAGES
            phase = ((at // STAGES) & 1) ^ 1
            first = tile * (COLUMNS // BLOCK_SIZE)
            blocks = ()
            for block in gl.static_range(COLUMNS // BLOCK_SIZE):
                blocks = blocks + (gl.load(row + gl.minimum(first + block, (context - 1) // BLOCK_SIZE)),)
            mbarrier.wait(k_empty.index(stage), phase)
            _copy(keys, blocks, first, context, kv_head * DIMS, k_ring, k_full, stage, DIMS, BLOCK_SIZE, COLUMNS)
            mbarrier.wait(v_empty.index(stage), phase)
            _copy(values, blocks, first, context, kv_head * DIMS, v_ring, v_full, stage, DIMS, BLOCK_SIZE, COLUMNS)
            at += 1


@gluon.jit
def _copy(
    cache,
    blocks,
    first,
    context,
    column,
    ring,
    full,
    stage,
    DIMS: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    COLUMNS: gl.constexpr,
):
    """Ask for a tile: block by block, each in boxes. What is behind the context is the last block once more."""
    PARTS: gl.constexpr = DIMS // _BOX
    BLOCKS: gl.constexpr = COLUMNS // BLOCK_SIZE
    STAGES: gl.constexpr = ring.shape[0]
    boxes = _boxes(ring, STAGES * PARTS * BLOCKS, 1, BLOCK_SIZE)
    last = (context - 1) // BLOCK_SIZE
    missing = (last + 1) * BLOCK_SIZE - context
    mbarrier.expect(full.index(stage), COLUMNS * DIMS * 2)
    for block in gl.static_range(BLOCKS):
        first_row = gl.where(first + block >= last, 0 - missing, 0)
        for part in gl.static_range(PARTS):
            _start_copy(
                cache,
                [blocks[block], first_row, column + part * _BOX],
                full.index(stage),
                boxes.index((stage * PARTS + part) * BLOCKS + block),
            )


@gluon.jit
def _boxes(tiles, COUNT: gl.constexpr, DEPTH: gl.constexpr, HEIGHT: gl.constexpr):
    """The same memory, as what single copies fill."""
    box: gl.constexpr = gl.NVMMASharedLayout(128, 16, 3)
    shape: gl.constexpr = [COUNT, DEPTH, HEIGHT, _BOX]
    return (
        tiles.reinterpret(tiles.dtype, shape, box)
        if _PUBLIC_REINTERPRET
        else tiles._reinterpret(tiles.dtype, shape, box)
    )
