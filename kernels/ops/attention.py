"""Attention over the paged cache: every token attends to its own sequence up to itself.

The reference gathers each context into one piece and leaves the rest to PyTorch's fused attention. Queries that share a
key head are given to it as rows of one query, so keys are read once per group. Decodes are one call for all sequences,
prompts one call each: their lengths differ too much to be padded to each other.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from headrace.kernels.batch import Batch

__all__ = ["paged_attention"]


def paged_attention(q_thd: Tensor, keys: Tensor, values: Tensor, batch: Batch, *, scale: float) -> Tensor:
    """Attend from `q_thd` [T, heads, head dim] to the cached contexts; returns [T, heads * head dim].

    Args:
        q_thd: queries of the batch's tokens; heads are a multiple of the kv heads, those of one group side by side.
        keys: [slots, kv heads, head dim], this step's keys included; the last slot holds zeros.
        values: likewise.
        batch: which token belongs to which sequence, and where the contexts are.
        scale: multiplies the scores.
    """
    num_decodes = batch.num_decodes
    if num_decodes == len(batch.query_lens):
        return _decode(q_thd, keys, values, batch, scale)
    out = torch.empty((len(q_thd), q_thd.shape[1] * q_thd.shape[2]), dtype=q_thd.dtype, device=q_thd.device)
    if num_decodes:
        out[:num_decodes] = _decode(q_thd[:num_decodes], keys, values, batch, scale)
    start = num_decodes
    for index in range(num_decodes, len(batch.query_lens)):
        stop = start + batch.query_lens[index]
        out[start:stop] = _prefill(q_thd[start:stop], keys, values, batch, index, scale)
        start = stop
    return out


def _decode(q_thd: Tensor, keys: Tensor, values: Tensor, batch: Batch, scale: float) -> Tensor:
    num_kv_heads, head_dim = keys.shape[1:]
    slots, mask = batch.shared(("decode", len(keys)), lambda: _decode_context(batch, len(keys) - 1, q_thd.dtype))
    shape = (batch.num_decodes, -1, num_kv_heads, head_dim)
    k = keys.flatten(1).index_select(0, slots).view(shape).transpose(1, 2)
    v = values.flatten(1).index_select(0, slots).view(shape).transpose(1, 2)
    q = q_thd.reshape(batch.num_decodes, num_kv_heads, -1, head_dim)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).flatten(1)


def _decode_context(batch: Batch, blank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Slots [S * L] of the decodes' contexts, blank past their ends; a mask [S, 1, 1, L] if not all end together."""
    lens = batch.context_lens_host[: batch.num_decodes]
    longest = max(lens)
    blocks = batch.block_tables[: batch.num_decodes, : -(-longest // batch.block_size)].long()
    offsets = torch.arange(batch.block_size, device=blocks.device)
    slots = (blocks[:, :, None] * batch.block_size + offsets).flatten(1)[:, :longest]
    if min(lens) == longest:
        return slots.flatten(), None
    past = torch.arange(longest, device=blocks.device) >= batch.context_lens[: batch.num_decodes, None]
    mask = torch.zeros(past.shape, dtype=dtype, device=blocks.device).masked_fill_(past, float("-inf"))
    return slots.masked_fill(past, blank).flatten(), mask[:, None, None]


def _prefill(q_thd: Tensor, keys: Tensor, values: Tensor, batch: Batch, index: int, scale: float) -> Tensor:
    context = batch.context_lens_host[index]
    slots, mask = batch.shared(("prefill", index), lambda: _prefill_context(batch, index, q_thd.dtype))
    k, v = keys.index_select(0, slots), values.index_select(0, slots)
    q, k, v = (x.transpose(0, 1)[None] for x in (q_thd, k, v))
    whole = len(q_thd) == context
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=whole, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1).flatten(1)


def _prefill_context(batch: Batch, index: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Slots [L] of one context, and a mask [queries, L] unless the queries are the whole context."""
    length, context = batch.query_lens[index], batch.context_lens_host[index]
    blocks = batch.block_tables[index, : -(-context // batch.block_size)].long()
    offsets = torch.arange(batch.block_size, device=blocks.device)
    slots = (blocks[:, None] * batch.block_size + offsets).flatten()[:context]
    if length == context:
        return slots, None
    mask = torch.full((length, context), float("-inf"), dtype=dtype, device=blocks.device)
    return slots, mask.triu_(context - length + 1)
