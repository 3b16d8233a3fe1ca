"""Steps of the kernel of decodes: what it reads of the cache, the newest key and value, and how parts are joined."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

from headrace.kernels.ops.rotation_triton import normed_and_rotated

__all__ = ["join", "load_tiles", "newest_pair"]


@triton.jit
def newest_pair(
    k_start,
    k_place,
    v_place,
    head_tile,
    dims,
    turns,
    q_norm,
    k_norm,
    eps,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
):
    """Key and value [1, dims] of the query's own position as the cache has them, where they are written to."""
    held = dims < HEAD_DIM
    k_new = tl.load(k_start + dims, mask=held, other=0.0)
    v_new = tl.load(k_start + NUM_KV_HEADS * HEAD_DIM + dims, mask=held, other=0.0)
    if PAIRS > 0 or NORM != "none":
        k_new = normed_and_rotated(
            k_new,
            k_start,
            dims,
            held,
            tl.zeros((1, 1), tl.int1),
            turns,
            q_norm,
            k_norm,
            eps,
            HEAD_DIM,
            PAIRS,
            INTERLEAVED,
            NORM,
            UNIT_OFFSET,
        ).to(k_place.dtype.element_ty)
    if head_tile == 0:
        tl.store(k_place, k_new, mask=held)
        tl.store(v_place, v_new, mask=held)
    return k_new.to(tl.float32), v_new.to(tl.float32)


@triton.jit
def load_tiles(
    keys,
    values,
    key,
    held,
    block,
    dims,
    kv_head,
    slot_stride,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Keys and values [keys, dims] of a kv head at the positions `key`, which are in the blocks `block`."""
    slot = block.to(tl.int64) * BLOCK_SIZE + key % BLOCK_SIZE
    place = (slot * slot_stride + kv_head * HEAD_DIM)[:, None] + dims[None, :]
    held_values = held[:, None] & (dims < HEAD_DIM)[None, :]
    k_tile = tl.load(keys + place, mask=held_values, other=0.0)
    v_tile = tl.load(values + place, mask=held_values, other=0.0)
    if WIDE:
        k_tile = k_tile.to(tl.float32)
        v_tile = v_tile.to(tl.float32)
    return k_tile, v_tile


@triton.jit
def join(
    parts,
    states,
    state,
    held_rows,
    num_states,
    num_parts,
    dims,
    HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    JOINED_HEADS: tl.constexpr,
    JOINED_PARTS: tl.constexpr,
    DIMS: tl.constexpr,
):
    """What the parts found together [heads, dims]; `state` [heads] is where the first part's states are.

    They were written by other processors, so they are read past the cache of this one.
    """
    largest = tl.full((JOINED_HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((JOINED_HEADS,), tl.float32)
    joined = tl.zeros((JOINED_HEADS, DIMS), tl.float32)
    for begin in range(0, num_parts, JOINED_PARTS):
        part = begin + tl.arange(0, JOINED_PARTS)
        place = state[None, :] + part[:, None] * HEADS
        held = (part < num_parts)[:, None] & held_rows[None, :]
        maxima = tl.load(states + place, mask=held, other=float("-inf"), cache_modifier=".cg")
        totals = tl.load(states + num_states + place, mask=held, other=0.0, cache_modifier=".cg")
        found = tl.load(
            parts + place[:, :, None] * HEAD_DIM + dims[None, None, :],
            mask=held[:, :, None] & (dims < HEAD_DIM)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        new_largest = tl.maximum(largest, tl.max(maxima, axis=0))
        base = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        weights = tl.exp2(maxima - base[None, :])
        decay = tl.exp2(largest - base)
        largest = new_largest
        total = total * decay + tl.sum(totals * weights, axis=0)
        joined = joined * decay[:, None] + tl.sum(found * weights[:, :, None], axis=0)
    return joined / tl.where(total == 0.0, 1.0, total)[:, None]
