"""The attention kernel of prompts for Hopper GPUs (sm_90), in Gluon: who loads and who computes are different warps.

As in FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608), one warp copies keys and values into rings of tiles, and
three groups of four warps multiply, with 64 rows each. A group's softmax runs while tensor cores are busy for another,
and with its own values of the tile before; the groups take turns at asking for products. Rows are queries with the
heads that share a kv head, side by side. Programs stay, one a processor, and take tiles of queries in turns, those
that see most first.

The cache is read as blocks [slots of a block, values] by the hardware's copies, which put zeros where there is nothing:
the last block of a context is read from a row before its first, so that what lies behind the context is never seen,
whatever is there. Its keys are in the tile that much later, which the mask knows.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from headrace.kernels.ops.hopper_load_triton import BUFFERS, GROUPS, ROWS, barriers, load, work

__all__ = ["attend_on_hopper"]

_LOG2_E = gl.constexpr(1.4426950408889634)
_NOWHERE = gl.constexpr(1 << 30)  # behind every query
_FIRST_BARRIER = 8  # that Triton does not use
_all_threads = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # of a group; renamed after Triton 3.6


@gluon.jit(do_not_specialize=["first_sequence", "num_sequences", "num_places", "table_stride", "rounds"])
def attend_on_hopper(
    out,
    q,
    keys,
    values,
    query_starts,
    context_lens,
    block_tables,
    first_sequence,
    num_sequences,
    num_places,
    table_stride,
    scale,
    rounds,
    NUM_KV_HEADS: gl.constexpr,
    HEADS: gl.constexpr,
    DIMS: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
    LOADER_REGISTERS: gl.constexpr,
    REGISTERS: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Tiles of GROUPS * ROWS rows; `q`, `keys` and `values` are descriptors (`headrace.kernels.ops.hopper_launch`)."""
    gl.static_assert(num_warps == 4)
    dtype: gl.constexpr = keys.dtype
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q_tiles = gl.allocate_shared_memory(dtype, [BUFFERS * GROUPS, ROWS, DIMS], tile)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, COLUMNS, DIMS], tile)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, COLUMNS, DIMS], tile)
    q_full, q_empty = barriers(BUFFERS)
    k_full, k_empty = barriers(STAGES)
    v_full, v_empty = barriers(STAGES)
    fence_async_shared()
    places = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    texts = (query_starts + first_sequence, context_lens + first_sequence, num_sequences, num_places, rounds)
    row = block_tables + gl.to_tensor(first_sequence).to(gl.int64) * table_stride
    loaded = (q, keys, values, q_tiles, k_ring, v_ring, places, texts, row, table_stride)
    computed = (out, q_tiles, k_ring, v_ring, places, texts, scale)
    gl.warp_specialize(
        [
            (_compute, (computed, 0, NUM_KV_HEADS, HEADS, DIMS, BLOCK_SIZE, COLUMNS, STAGES)),
            (_compute, (computed, 1, NUM_KV_HEADS, HEADS, DIMS, BLOCK_SIZE, COLUMNS, STAGES)),
            (_compute, (computed, 2, NUM_KV_HEADS, HEADS, DIMS, BLOCK_SIZE, COLUMNS, STAGES)),
            (load, (loaded, NUM_KV_HEADS, HEADS, DIMS, BLOCK_SIZE, COLUMNS, STAGES)),
        ],
        [4, 4, 1],
        [REGISTERS, REGISTERS, LOADER_REGISTERS],
    )


@gluon.jit
def _compute(
    args,
    GROUP: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    HEADS: gl.constexpr,
    DIMS: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The rows of a group, of all rounds."""
    out, q_tiles, k_ring, v_ring, places, texts, scale = args
    q_full, q_empty, k_full, k_empty, v_full, v_empty = places
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    found_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIMS, 16])
    in_rows: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (DIMS // 8), DIMS // 8], [4, 1], [1, 0])
    factor = scale * _LOG2_E
    at = 0
    done = 0
    if GROUP == GROUPS - 1:
        _pass_turn(GROUP)  # the first group begins
    for round in range(texts[4]):
        kv_head, _, start, left, context, first_position, tiles = work(round, texts, NUM_KV_HEADS, HEADS, COLUMNS, 4)
        if tiles > 0:
            buffer = done % BUFFERS
            q_tile = q_tiles.index(buffer * GROUPS + GROUP)
            mbarrier.wait(q_full.index(buffer), (done // BUFFERS) & 1)
            row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, scores_layout)) + GROUP * ROWS
            position = first_position + row // HEADS
            largest = gl.full([ROWS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, scores_layout))
            total = gl.zeros([ROWS], gl.float32, layout=gl.SliceLayout(1, scores_layout))
            found = gl.zeros([ROWS, DIMS], gl.float32, layout=found_layout)
            blank = gl.zeros([ROWS, COLUMNS], gl.float32, layout=scores_layout)
            stage = at % STAGES
            mbarrier.wait(k_full.index(stage), (at // STAGES) & 1)
            _wait_for_turn(GROUP)
            scores = warpgroup_mma(q_tile, k_ring.index(stage).permute((1, 0)), blank, use_acc=False, is_async=True)
            _pass_turn(GROUP)
            scores = warpgroup_mma_wait(0, deps=(scores,))
            mbarrier.arrive(k_empty.index(stage), count=1)
            weights, largest, total, _decay = _weigh(
                scores, largest, total, factor, position, 0, context, True, BLOCK_SIZE, COLUMNS
            )
            weights = gl.convert_layout(weights.to(v_ring.dtype), gl.DotOperandLayout(0, found_layout, 2))
            at += 1
            mbarrier.wait(k_full.index(at % STAGES), (at // STAGES) & 1, pred=tiles > 1)
            # Up to here the tile's queries see all keys.
            clear = gl.maximum(1, gl.minimum((first_position + 1) // COLUMNS, tiles))
            for HIDDEN in gl.static_range(2):
                for tile in range(clear if HIDDEN else 1, tiles if HIDDEN else clear):
                    found, weights, largest, total = _step(
                        q_tile, k_ring, v_ring, k_full, k_empty, v_full, v_empty, at, tile * COLUMNS, tile + 1 < tiles,
                        found, weights, largest, total, factor, position, context, HIDDEN, BLOCK_SIZE, GROUP,
                    )  # fmt: skip
                    at += 1
            before = (at - 1) % STAGES
            mbarrier.wait(v_full.index(before), ((at - 1) // STAGES) & 1)
            _wait_for_turn(GROUP)
            found = warpgroup_mma(weights, v_ring.index(before), found, is_async=True)
            _pass_turn(GROUP)
            found = warpgroup_mma_wait(0, deps=(found,))
            mbarrier.arrive(v_empty.index(before), count=1)
            share = gl.convert_layout(1.0 / total, gl.SliceLayout(1, found_layout), assert_trivial=True)
            # Through the queries' place, so that whole rows are written.
            q_tile.store((found * share[:, None]).to(q_tile.dtype))
            _all_threads()
            found_rows = q_tile.load(in_rows)
            fence_async_shared()
            mbarrier.arrive(q_empty.index(buffer), count=1)
            done += 1
            _write(out, found_rows, start, left, kv_head, GROUP, NUM_KV_HEADS, HEADS)


@gluon.jit
def _write(out, found, start, left, kv_head, GROUP: gl.constexpr, NUM_KV_HEADS: gl.constexpr, HEADS: gl.constexpr):
    """Rows of a group, as far as they are of queries."""
    DIMS: gl.constexpr = found.shape[1]
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, found.type.layout)) + GROUP * ROWS
    dim = gl.arange(0, DIMS, layout=gl.SliceLayout(0, found.type.layout))
    place = (start + row // HEADS).to(gl.int64) * (NUM_KV_HEADS * HEADS * DIMS)
    place += (kv_head * HEADS + row % HEADS) * DIMS
    held = (row // HEADS < left)[:, None] & (dim >= 0)[None, :]
    gl.store(out + place[:, None] + dim[None, :], found, mask=held)


@gluon.jit
def _step(
    q_tile,
    k_ring,
    v_ring,
    k_full,
    k_empty,
    v_full,
    v_empty,
    at,
    first_key,
    more,
    found,
    weights,
    largest,
    total,
    factor,
    position,
    context,
    HIDDEN: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    GROUP: gl.constexpr,
):
    """Scores of a tile; values of the tile before are added up while their softmax is at work."""
    STAGES: gl.constexpr = k_ring.shape[0]
    COLUMNS: gl.constexpr = k_ring.shape[1]
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    stage = at % STAGES
    before = (at - 1) % STAGES
    blank = gl.zeros([ROWS, COLUMNS], gl.float32, layout=scores_layout)
    _wait_for_turn(GROUP)
    scores = warpgroup_mma(q_tile, k_ring.index(stage).permute((1, 0)), blank, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(before), ((at - 1) // STAGES) & 1)
    found = warpgroup_mma(weights, v_ring.index(before), found, is_async=True)
    _pass_turn(GROUP)
    scores = warpgroup_mma_wait(1, deps=(scores,))
    mbarrier.arrive(k_empty.index(stage), count=1)
    new_weights, largest, total, decay = _weigh(
        scores, largest, total, factor, position, first_key, context, HIDDEN, BLOCK_SIZE, COLUMNS
    )
    # The wait for the next keys is a branch, over which ptxas lifts no wait for products.
    mbarrier.wait(k_full.index((at + 1) % STAGES), ((at + 1) // STAGES) & 1, pred=more)
    found = warpgroup_mma_wait(0, deps=(found,))
    mbarrier.arrive(v_empty.index(before), count=1)
    found = found * gl.convert_layout(decay, gl.SliceLayout(1, found.type.layout), assert_trivial=True)[:, None]
    return found, gl.convert_layout(new_weights.to(v_ring.dtype), weights.type.layout), largest, total


@gluon.jit
def _weigh(
    scores,
    largest,
    total,
    factor,
    position,
    first_key,
    context,
    HIDDEN: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    COLUMNS: gl.constexpr,
):
    """A running softmax: the weights of a tile's keys, and by how much what was added up before decays."""
    if HIDDEN:
        # In the last block, keys come after as many zeros as are missing.
        key = first_key + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, scores.type.layout))
        last = (context - 1) // BLOCK_SIZE * BLOCK_SIZE
        missing = last + BLOCK_SIZE - context
        key = gl.where(key < last, key, gl.where(key < last + missing, _NOWHERE, key - missing))
        scores = gl.where(key[None, :] <= position[:, None], scores, float("-inf"))
    new_largest = gl.maximum(largest, gl.max(scores, 1) * factor)
    decay = gl.exp2(largest - new_largest)
    weights = gl.exp2(scores * factor - new_largest[:, None])
    return weights, new_largest, total * decay + gl.sum(weights, 1), decay


@gluon.jit
def _wait_for_turn(GROUP: gl.constexpr):
    """Wait until the group before has asked for its products."""
    _barrier("sync", GROUP)


@gluon.jit
def _pass_turn(GROUP: gl.constexpr):
    """Let the next group ask for its products."""
    _barrier("arrive", (GROUP + 1) % GROUPS)


@gluon.jit
def _barrier(WHAT: gl.constexpr, GROUP: gl.constexpr):
    instruction: gl.constexpr = _barrier_instruction(WHAT, GROUP)
    gl.inline_asm_elementwise(instruction, "=r,r", [gl.to_tensor(0)], dtype=gl.int32, is_pure=False, pack=1)


@gluon.constexpr_function
def _barrier_instruction(what, group):
    """At the barrier of a group meet its own threads and those of the group before."""
    return f"mov.u32 $0, 0; bar.{what} {_FIRST_BARRIER + group}, {2 * 4 * 32};"
