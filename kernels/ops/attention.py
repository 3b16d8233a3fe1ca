"""Attention over the paged cache: every token attends to its own sequence up to itself, or to all of a source.

The reference gathers each context into one piece and leaves the rest to PyTorch's fused attention, where it can.
Queries that share a key head are given to it as rows of one query, so keys are read once per group. Decodes are one
call for all sequences, prompts one call each: their lengths differ too much to be padded to each other.

Letters in shapes: S sequences, L tokens of the longest context (or window), Q queries of one sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from headrace.kernels.batch import Batch
from headrace.kernels.ops.pair import pair
from headrace.kernels.ops.relative import relative_bias
from headrace.kernels.spec import Alibi, AttentionSpec

__all__ = ["paged_attention"]


@pair
def paged_attention(
    q_thd: Tensor, keys: Tensor, values: Tensor, batch: Batch, spec: AttentionSpec, table: Tensor | None = None
) -> Tensor:
    """Attend from `q_thd` [T, heads, head dim] to the cached contexts; returns [T, heads * head dim].

    Args:
        q_thd: queries of the batch's tokens; the heads that share a kv head are side by side.
        keys: [slots, kv heads, head dim], this step's keys included; the last slot holds zeros.
        values: likewise.
        batch: which token belongs to which sequence, and where the contexts are.
        spec: scale, direction, window, soft cap and what is added to scores.
        table: [buckets, heads], if a relative bias is added.
    """
    num_decodes = batch.num_decodes
    if num_decodes == len(batch.query_lens):
        return _decode(q_thd, keys, values, batch, spec, table)
    out = torch.empty((len(q_thd), q_thd.shape[1] * q_thd.shape[2]), dtype=q_thd.dtype, device=q_thd.device)
    if num_decodes:
        out[:num_decodes] = _decode(q_thd[:num_decodes], keys, values, batch, spec, table)
    start = num_decodes
    for index in range(num_decodes, len(batch.query_lens)):
        stop = start + batch.query_lens[index]
        out[start:stop] = _prefill(q_thd[start:stop], keys, values, batch, index, spec, table)
        start = stop
    return out


def _decode(
    q_thd: Tensor, keys: Tensor, values: Tensor, batch: Batch, spec: AttentionSpec, table: Tensor | None
) -> Tensor:
    num_decodes, blank = batch.num_decodes, len(keys) - 1
    key = ("decode", blank, spec.window, spec.alibi, spec.relative)
    slots, mask = batch.shared(key, lambda: _decode_context(batch, blank, spec, table, q_thd.dtype))
    shape = (num_decodes, -1, spec.num_kv_heads, spec.head_dim)
    k = keys.flatten(1).index_select(0, slots).view(shape).transpose(1, 2)
    v = values.flatten(1).index_select(0, slots).view(shape).transpose(1, 2)
    q = q_thd.reshape(num_decodes, spec.num_kv_heads, -1, spec.head_dim)
    if spec.soft_cap is not None:
        return _capped(q, k, v, mask, spec).flatten(1)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=spec.scale).flatten(1)


def _decode_context(
    batch: Batch, blank: int, spec: AttentionSpec, table: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Slots [S * L] of what decodes see, blank past their ends; a mask [S, kv heads or 1, group or 1, L] if needed."""
    contexts = batch.context_lens_host[: batch.num_decodes]
    lens = contexts if spec.window is None else tuple(min(context, spec.window) for context in contexts)
    longest = max(lens)
    ends = batch.context_lens[: batch.num_decodes, None].long()
    starts = 0 if spec.window is None else (ends - spec.window).clamp_(min=0)
    positions = starts + torch.arange(longest, device=ends.device)
    past = positions >= ends
    tables = batch.block_tables[: batch.num_decodes].long()
    held = positions.clamp(max=tables.shape[1] * batch.block_size - 1)
    blocks = tables.gather(1, (held // batch.block_size).expand(len(tables), -1))
    slots = (blocks * batch.block_size + held % batch.block_size).masked_fill_(past, blank).flatten()
    added = _added(spec, table, positions.expand(len(tables), -1), ends - 1)
    if min(lens) == longest and added is None:
        return slots, None
    mask = torch.zeros(past.shape, dtype=torch.float32, device=ends.device).masked_fill_(past, float("-inf"))
    mask = mask[:, None, None]
    if added is not None:
        mask = mask + added.transpose(0, 1).reshape(len(tables), spec.num_kv_heads, -1, longest)
    return slots, mask.to(dtype)


def _prefill(
    q_thd: Tensor, keys: Tensor, values: Tensor, batch: Batch, index: int, spec: AttentionSpec, table: Tensor | None
) -> Tensor:
    key = ("prefill", index, spec.window, spec.alibi, spec.relative, spec.soft_cap is not None)
    slots, mask = batch.shared(key, lambda: _prefill_context(batch, index, spec, table, q_thd.dtype))
    k, v = keys.index_select(0, slots), values.index_select(0, slots)
    q, k, v = (x.transpose(0, 1)[None] for x in (q_thd, k, v))
    if spec.soft_cap is not None:
        group = spec.num_heads // spec.num_kv_heads
        out = _capped(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), mask, spec)
    else:
        triangle = spec.causal and mask is None
        out = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=triangle, scale=spec.scale, enable_gqa=True
        )
    return out[0].transpose(0, 1).flatten(1)


def _prefill_context(
    batch: Batch, index: int, spec: AttentionSpec, table: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Slots [L] of what one sequence's queries see; a mask [heads or 1, Q, L] unless they see all, or a triangle."""
    length, context = batch.query_lens[index], batch.context_lens_host[index]
    first = 0 if spec.window is None else max(0, context - length - spec.window + 1)
    device = batch.block_tables.device
    positions = torch.arange(first, context, device=device)
    blocks = batch.block_tables[index].long()[positions // batch.block_size]
    slots = blocks * batch.block_size + positions % batch.block_size
    if not spec.causal:
        return slots, None
    queries = torch.arange(context - length, context, device=device)[:, None]
    added = _added(spec, table, positions.expand(length, -1), queries)
    windowed = spec.window is not None and spec.window < context
    if length == context and not windowed and added is None and spec.soft_cap is None:
        return slots, None
    hidden = positions > queries
    if spec.window is not None:
        hidden |= positions <= queries - spec.window
    mask = torch.zeros(hidden.shape, dtype=torch.float32, device=device).masked_fill_(hidden, float("-inf"))[None]
    return slots, (mask if added is None else mask + added).to(dtype)


def _added(spec: AttentionSpec, table: Tensor | None, positions: Tensor, queries: Tensor) -> Tensor | None:
    """What is added to the scores: [heads, rows, L] for keys at `positions` [rows, L] and `queries` [rows, 1]."""
    if spec.alibi is not None:
        return _alibi(spec.alibi, positions, queries)
    if spec.relative is not None:
        assert table is not None
        return relative_bias(table, positions - queries, spec.relative, both_directions=False)
    return None


def _alibi(alibi: Alibi, positions: Tensor, queries: Tensor) -> Tensor:
    """A softmax does not see what is added to a whole row, so distances, which stay small, serve as well as positions;
    but not if the products were rounded."""
    slopes = torch.tensor(alibi.slopes, dtype=torch.float32, device=positions.device)[:, None, None]
    if not alibi.rounded:
        return slopes * ((positions - queries) * alibi.scale)
    products = (slopes.bfloat16() * positions).float()
    return (products - (slopes.bfloat16() * queries).float()) * alibi.scale


def _capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, spec: AttentionSpec) -> Tensor:
    """Attention whose scores are capped softly, which PyTorch's fused one does not offer."""
    assert spec.soft_cap is not None
    scores = torch.matmul(q, k.transpose(-1, -2)).float() * spec.scale
    scores = torch.tanh(scores / spec.soft_cap) * spec.soft_cap
    if mask is not None:
        scores = scores + mask
    return torch.matmul(scores.softmax(-1).to(v.dtype), v)
