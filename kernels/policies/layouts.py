"""How checkpoints arrange a fused query-key-value projection, turned into ours: all queries, all keys, all values."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.kernels.spec import ModelSpec

__all__ = ["per_group", "transposed"]


def transposed(tensor: Tensor, spec: ModelSpec) -> Tensor:
    """Stored with inputs as rows, as GPT-2's Conv1D does; vectors are the same."""
    return tensor.T


def per_group(tensor: Tensor, spec: ModelSpec) -> Tensor:
    """One kv head after the other, each with the query heads that share it before it: [q, ..., q, k, v] per group.

    With as many kv heads as heads that is [q, k, v] per head (GPT-NeoX, BLOOM), with one kv head all queries first
    (Falcon 7B), in between Falcon 40B's groups.
    """
    attention = spec.layers[0].attention
    groups = attention.num_kv_heads
    grouped = tensor.reshape(groups, -1, attention.head_dim, *tensor.shape[1:])
    queries, keys, values = grouped[:, :-2], grouped[:, -2:-1], grouped[:, -1:]
    return torch.cat([part.flatten(0, 2) for part in (queries, keys, values)])
