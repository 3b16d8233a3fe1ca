"""Rotary positions, and the write of keys and values into the cache."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rotary_table", "rotate_and_cache"]


def rotary_table(
    inverse_frequencies: tuple[float, ...], num_positions: int, factor: float, device: torch.device
) -> Tensor:
    """Cosine and sine of every position: [positions, 2, rotary pairs] float32."""
    frequencies = torch.tensor(inverse_frequencies, dtype=torch.float32, device=device)
    angles = torch.arange(num_positions, dtype=torch.float32, device=device)[:, None] * frequencies
    return torch.stack((angles.cos(), angles.sin()), dim=1) * factor


def rotate_and_cache(
    qkv: Tensor, cos_sin: Tensor, slots: Tensor, keys: Tensor, values: Tensor, *, num_heads: int
) -> Tensor:
    """Rotate queries and keys, put keys and values into their slots, return the queries [T, heads, head dim].

    Args:
        qkv: [T, (heads + 2 * kv heads) * head dim], queries first, then keys, then values; may be overwritten.
        cos_sin: [T, 2, rotary pairs] float32, rows of `rotary_table`.
        slots: [T] int64.
        keys: [slots, kv heads, head dim] of the cache, written in place.
        values: likewise.
        num_heads: of the queries.
    """
    num_kv_heads, head_dim = keys.shape[1:]
    qkv_thd = qkv.view(len(qkv), num_heads + 2 * num_kv_heads, head_dim)
    rotated = num_heads + num_kv_heads
    pairs = cos_sin.shape[-1]
    # The rotation is computed in fp32 and written back over its input.
    cos, sin = cos_sin[:, None, 0], cos_sin[:, None, 1]
    turned = qkv_thd[:, :rotated, : 2 * pairs]
    first, second = turned.float().chunk(2, dim=-1)
    turned.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1))
    keys.index_copy_(0, slots, qkv_thd[:, num_heads:rotated])
    values.index_copy_(0, slots, qkv_thd[:, rotated:])
    return qkv_thd[:, :num_heads]
