"""Attention within whole texts, in both directions, without a cache: what encoders do."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from headrace.kernels.batch import Batch
from headrace.kernels.ops.pair import pair
from headrace.kernels.ops.relative import relative_bias
from headrace.kernels.spec import AttentionSpec

__all__ = ["full_attention"]


@pair
def full_attention(qkv: Tensor, batch: Batch, spec: AttentionSpec, table: Tensor | None = None) -> Tensor:
    """Every token attends to all tokens of its own text; returns [T, heads * head dim].

    Args:
        qkv: [T, (heads + 2 * kv heads) * head dim], queries first, then keys, then values.
        batch: `query_lens` says where texts begin and end.
        spec: sizes, scale and what is added to scores.
        table: [buckets, heads], if a relative bias is added.
    """
    sizes = [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads]
    qkv_thd = qkv.view(len(qkv), -1, spec.head_dim)
    out = torch.empty((len(qkv), spec.num_heads * spec.head_dim), dtype=qkv.dtype, device=qkv.device)
    added = None if spec.relative is None else batch.shared("full", lambda: _added(batch, spec, table).to(qkv.dtype))
    start = 0
    for length in batch.query_lens:
        stop = start + length
        q, k, v = (part.transpose(0, 1)[None] for part in torch.split(qkv_thd[start:stop], sizes, dim=1))
        mask = None if added is None else added[:, :length, :length]
        attended = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=spec.scale, enable_gqa=True)
        out[start:stop] = attended[0].transpose(0, 1).flatten(1)
        start = stop
    return out


def _added(batch: Batch, spec: AttentionSpec, table: Tensor | None) -> Tensor:
    """The relative bias [heads, L, L] of the longest text, whose corner is that of a shorter one."""
    assert spec.relative is not None
    assert table is not None
    positions = torch.arange(max(batch.query_lens), device=table.device)
    return relative_bias(table, positions - positions[:, None], spec.relative, both_directions=True)
