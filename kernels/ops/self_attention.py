"""Attention of tokens to their own sequence, from their projection on: rotation, the cache's write and attention."""

from __future__ import annotations

from torch import Tensor

from headrace.kernels.batch import Batch
from headrace.kernels.ops.attention import paged_attention
from headrace.kernels.ops.pair import pair
from headrace.kernels.ops.rotary import rotate_and_cache
from headrace.kernels.spec import AttentionSpec

__all__ = ["rotate_and_attend"]


@pair
def rotate_and_attend(
    qkv: Tensor,
    batch: Batch,
    keys: Tensor,
    values: Tensor,
    spec: AttentionSpec,
    table: Tensor | None = None,
    *,
    cos_sin: Tensor | None = None,
    interleaved: bool = False,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
) -> Tensor:
    """`rotate_and_cache`, then `paged_attention` to what was cached; returns [T, heads * head dim].

    Args:
        qkv: [T, (heads + 2 * kv heads) * head dim], queries first, then keys, then values; may be overwritten.
        batch: of the tokens; keys and values are written to its slots, and its contexts hold them.
        keys: [slots, kv heads, head dim] of the cache, written in place; the last slot holds zeros.
        values: likewise.
        spec: of the attention.
        table: [buckets, heads], if a relative bias is added.
        cos_sin: [T, 2, rotary pairs] float32, rows of `rotary_table`; None leaves positions to others.
        interleaved: whether pairs are neighbours.
        q_norm: [head dim], scale of the queries' norm; None if there is no such norm.
        k_norm: likewise for keys.
    """
    q_thd = rotate_and_cache(
        qkv,
        batch.slots,
        keys,
        values,
        spec,
        cos_sin=cos_sin,
        interleaved=interleaved,
        q_norm=q_norm,
        k_norm=k_norm,
    )
    return paged_attention(q_thd, keys, values, batch, spec, table)
