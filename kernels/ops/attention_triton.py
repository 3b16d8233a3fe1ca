"""The kernel of `paged_attention`: decodes and prompts are one launch each, whatever their number."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.kernels.batch import Batch
from headrace.kernels.ops.attend_triton import attend
from headrace.kernels.spec import AttentionSpec

__all__ = ["paged_attention"]


def paged_attention(
    q_thd: Tensor, keys: Tensor, values: Tensor, batch: Batch, spec: AttentionSpec, table: Tensor | None = None
) -> Tensor:
    """As `headrace.kernels.ops.attention.paged_attention`."""
    out = torch.empty((len(q_thd), spec.num_heads * spec.head_dim), dtype=q_thd.dtype, device=q_thd.device)
    num_decodes, num_sequences = batch.num_decodes, len(batch.query_lens)
    for sequences in (range(num_decodes), range(num_decodes, num_sequences)):
        if sequences:
            attend(q_thd, keys, values, out, batch, spec, table, sequences=sequences, paged=True)
    return out
