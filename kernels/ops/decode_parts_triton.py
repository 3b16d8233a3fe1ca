"""Steps of the kernel of decodes: what it reads of the cache, the newest key and value, and how parts are joined."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

from headrace.kernels.ops.rotation_triton import normed_and_rotated

__all__ = ["blocks_of", "join", "load_tiles", "newest_pair"]


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
    slot = block * BLOCK_SIZE + (key.to(tl.uint32) % BLOCK_SIZE).to(tl.int32)
    place = (slot.to(tl.int64) * slot_stride + kv_head * HEAD_DIM)[:, None] + dims[None, :]
    held_values = held[:, None] & (dims < HEAD_DIM)[None, :]
    k_tile = tl.load(keys + place, mask=held_values, other=0.0)
    v_tile = tl.load(values + place, mask=held_values, other=0.0)
    if WIDE:
        k_tile = k_tile.to(tl.float32)
        v_tile = v_tile.to(tl.float32)
    return k_tile, v_tile


@triton.jit
def blocks_of(key, BLOCK_SIZE: tl.constexpr):
    """Of positions, the blocks that they are in; no position is negative, which saves instructions."""
    return key.to(tl.uint32) // BLOCK_SIZE


@triton.jit
def join(
    parts,
    weights,
    num_parts,
    rows,
    dims,
    held,
    HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
):
    """What the parts found together [rows, dims], each in itself a mean whose weight is given as a power of two.

    They were written by other processors, so they are read past the cache of this one.
    """
    held_rows = rows < HEADS
    part = tl.arange(0, MOST_SPLITS)
    all_weights = tl.load(
        weights + part[:, None] * HEADS + rows[None, :],
        mask=(part < num_parts)[:, None] & held_rows[None, :],
        other=float("-inf"),
        cache_modifier=".cg",
    )
    largest = tl.max(all_weights, axis=0)
    largest = tl.where(largest == float("-inf"), 0.0, largest)[:, None]
    total = tl.zeros_like(largest)
    joined = tl.zeros(held.shape, tl.float32)
    for begin in range(0, num_parts, 8):
        for index in tl.static_range(8):
            number = begin + index + tl.zeros_like(rows)[:, None]
            row = number * HEADS + rows[:, None]
            is_part = number < num_parts
            found = tl.load(
                parts + row * HEAD_DIM + dims[None, :], mask=held & is_part, other=0.0, cache_modifier=".cg"
            )
            weight = tl.load(
                weights + row, mask=held_rows[:, None] & is_part, other=float("-inf"), cache_modifier=".cg"
            )
            weight = tl.exp2(weight - largest)
            total += weight
            joined += weight * found
    return joined / tl.where(total == 0.0, 1.0, total)
