"""The kernel of `rotate_and_attend`: decodes are one launch, with prompts among them it is those of the two ops."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.kernels.batch import Batch
from headrace.kernels.ops.attention_triton import paged_attention
from headrace.kernels.ops.decode_triton import Newest, decode
from headrace.kernels.ops.rotary_triton import rotate_and_cache
from headrace.kernels.spec import AttentionSpec

__all__ = ["rotate_and_attend"]


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
    """As `headrace.kernels.ops.self_attention.rotate_and_attend`."""
    num_sequences = len(batch.query_lens)
    if batch.num_decodes < num_sequences:
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
    out = torch.empty((len(qkv), spec.num_heads * spec.head_dim), dtype=qkv.dtype, device=qkv.device)
    newest = Newest(slots=batch.slots, cos_sin=cos_sin, interleaved=interleaved, q_norm=q_norm, k_norm=k_norm)
    decode(qkv, keys, values, out, batch, spec, table, num_sequences=num_sequences, newest=newest)
    return out
