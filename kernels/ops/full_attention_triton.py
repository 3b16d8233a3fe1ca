"""The kernel of `full_attention`: keys and values are read from where the projection left them."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.kernels.batch import Batch
from headrace.kernels.ops.attend_triton import attend
from headrace.kernels.spec import AttentionSpec

__all__ = ["full_attention"]


def full_attention(qkv: Tensor, batch: Batch, spec: AttentionSpec, table: Tensor | None = None) -> Tensor:
    """As `headrace.kernels.ops.full_attention.full_attention`."""
    out = torch.empty((len(qkv), spec.num_heads * spec.head_dim), dtype=qkv.dtype, device=qkv.device)
    heads = [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads]
    q, k, v = torch.split(qkv.view(len(qkv), -1, spec.head_dim), heads, dim=1)
    attend(q, k, v, out, batch, spec, table, first_sequence=0, paged=False)
    return out
