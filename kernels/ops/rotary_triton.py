"""The kernel of `rotate_and_cache`: norms, rotation and the cache's write of one token's heads in one launch.

A program takes one token and a few of its heads, as they come: queries, keys, values. For every value it also loads the
other one of its pair, which has been fetched already. Nothing is written over what others may still have to read.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.ops.chain_triton import chained, let_next_begin, wait_for_earlier
from headrace.kernels.ops.math_triton import OPTIONS
from headrace.kernels.ops.rotation_triton import normed_and_rotated
from headrace.kernels.spec import AttentionSpec

__all__ = ["rotate_and_cache"]

# Values that a program holds, eight for each thread of four warps: at one token of a model of 32 heads of 128 values
# there are still six programs, at many tokens enough.
_VALUES = 1024
_WARPS = 4


def rotate_and_cache(
    qkv: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    spec: AttentionSpec,
    *,
    cos_sin: Tensor | None = None,
    interleaved: bool = False,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
) -> Tensor:
    """As `headrace.kernels.ops.rotary.rotate_and_cache`."""
    head_dim, num_heads = spec.head_dim, spec.num_heads
    qkv = qkv.view(len(qkv), spec.qkv_size)
    assert qkv.stride(1) == keys.stride(2) == values.stride(2) == 1
    assert keys.stride() == values.stride()
    assert keys.stride(1) == head_dim
    # Queries that stay as they are need no copy.
    untouched = cos_sin is None and spec.qk_norm is None
    first = num_heads if untouched else 0
    queries: Tensor
    if untouched:
        queries = qkv.view(len(qkv), -1, head_dim)[:, :num_heads]
    else:
        queries = torch.empty((len(qkv), num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    dims = triton.next_power_of_2(head_dim)
    heads = max(1, min(_VALUES // dims, triton.next_power_of_2(num_heads + 2 * spec.num_kv_heads - first)))
    norm = spec.qk_norm
    if len(qkv):
        grid = (len(qkv), triton.cdiv(num_heads + 2 * spec.num_kv_heads - first, heads))
        _rotate_and_cache[grid](
            qkv,
            slots,
            keys,
            values,
            queries,
            None if cos_sin is None else cos_sin.contiguous(),
            q_norm,
            k_norm,
            qkv.stride(0),
            keys.stride(0),
            0.0 if norm is None else norm.eps,
            FIRST=first,
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=spec.num_kv_heads,
            HEAD_DIM=head_dim,
            PAIRS=0 if cos_sin is None else cos_sin.shape[-1],
            INTERLEAVED=interleaved,
            NORM="none" if norm is None else norm.kind,
            UNIT_OFFSET=norm is not None and norm.unit_offset,
            HEADS=heads,
            DIMS=dims,
            num_warps=_WARPS,
            **chained(qkv.device),
            **OPTIONS,
        )
    return queries


@triton.jit
def _rotate_and_cache(
    qkv,
    slots,
    keys,
    values,
    queries,
    cos_sin,
    q_norm,
    k_norm,
    qkv_stride,
    slot_stride,
    eps,
    FIRST: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    HEADS: tl.constexpr,
    DIMS: tl.constexpr,
    CHAINED: tl.constexpr,
):
    let_next_begin(CHAINED)
    wait_for_earlier(CHAINED)
    token = tl.program_id(0).to(tl.int64)
    head = FIRST + tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    dim = tl.arange(0, DIMS)[None, :]
    held = (head < NUM_HEADS + 2 * NUM_KV_HEADS) & (dim < HEAD_DIM)
    is_query = head < NUM_HEADS
    is_value = head >= NUM_HEADS + NUM_KV_HEADS
    start = qkv + token * qkv_stride + head * HEAD_DIM
    as_stored = tl.load(start + dim, mask=held, other=0.0)
    table = None if cos_sin is None else cos_sin + token * (2 * PAIRS)
    x = normed_and_rotated(
        as_stored,
        start,
        dim,
        held,
        is_query,
        table,
        q_norm,
        k_norm,
        eps,
        HEAD_DIM,
        PAIRS,
        INTERLEAVED,
        NORM,
        UNIT_OFFSET,
    )

    tl.store(
        queries + token * (NUM_HEADS * HEAD_DIM) + head * HEAD_DIM + dim,
        x.to(queries.dtype.element_ty),
        mask=held & is_query,
    )
    slot = tl.load(slots + token) * slot_stride
    tl.store(
        keys + slot + (head - NUM_HEADS) * HEAD_DIM + dim,
        x.to(keys.dtype.element_ty),
        mask=held & (head >= NUM_HEADS) & (head < NUM_HEADS + NUM_KV_HEADS),
    )
    tl.store(
        values + slot + (head - NUM_HEADS - NUM_KV_HEADS) * HEAD_DIM + dim,
        as_stored.to(values.dtype.element_ty),
        mask=held & is_value,
    )
