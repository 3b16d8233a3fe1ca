"""The kernel of `paged_attention`: decodes and prompts are one launch each, whatever their number."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.kernels.batch import Batch
from headrace.kernels.ops.attend_triton import attend
from headrace.kernels.ops.decode_triton import decode
from headrace.kernels.spec import AttentionSpec

__all__ = ["paged_attention"]


def paged_attention(
    q_thd: Tensor, keys: Tensor, values: Tensor, batch: Batch, spec: AttentionSpec, table: Tensor | None = None
) -> Tensor:
    """As `headrace.kernels.ops.attention.paged_attention`."""
    out = torch.empty((len(q_thd), spec.num_heads * spec.head_dim), dtype=q_thd.dtype, device=q_thd.device)
    num_decodes = batch.num_decodes
    if num_decodes:
        decode(q_thd, keys, values, out, batch, spec, table, num_sequences=num_decodes)
    if num_decodes < len(batch.query_lens):
        attend(q_thd, keys, values, out, batch, spec, table, first_sequence=num_decodes, paged=True)
    return out
