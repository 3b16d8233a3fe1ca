"""What happens to queries, keys and values between their projection and attention: norms, rotation, the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.kernels.ops.norm import norm
from headrace.kernels.ops.pair import pair
from headrace.kernels.spec import AttentionSpec, RotarySpec

__all__ = ["rotary_table", "rotate_and_cache"]


def rotary_table(spec: RotarySpec, num_positions: int, device: torch.device) -> Tensor:
    """Cosine and sine of every position: [positions, 2, rotary pairs] float32."""
    frequencies = torch.tensor(spec.inverse_frequencies, dtype=torch.float32, device=device)
    angles = torch.arange(num_positions, dtype=torch.float32, device=device)[:, None] * frequencies
    return torch.stack((angles.cos(), angles.sin()), dim=1) * spec.attention_factor


@pair
def rotate_and_cache(
    qkv: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    spec: AttentionSpec,
    *,
    cos_sin: Tensor | None = None,
    interleaved: bool = False,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
) -> Tensor:
    """Normalize and rotate queries and keys, put keys and values into their slots, return the queries.

    Args:
        qkv: [T, (heads + 2 * kv heads) * head dim], queries first, then keys, then values; may be overwritten.
        slots: [T] int64.
        keys: [slots, kv heads, head dim] of the cache, written in place.
        values: likewise.
        spec: of the attention.
        cos_sin: [T, 2, rotary pairs] float32, rows of `rotary_table`; None leaves positions to others.
        interleaved: whether pairs are neighbours.
        q_norm: [head dim], scale of the queries' norm; None if there is no such norm.
        k_norm: likewise for keys.

    Returns:
        [T, heads, head dim]
    """
    num_heads, rotated = spec.num_heads, spec.num_heads + spec.num_kv_heads
    qkv_thd = qkv.view(len(qkv), rotated + spec.num_kv_heads, spec.head_dim)
    if spec.qk_norm is not None:
        qkv_thd[:, :num_heads] = norm(qkv_thd[:, :num_heads], q_norm, None, spec.qk_norm)
        qkv_thd[:, num_heads:rotated] = norm(qkv_thd[:, num_heads:rotated], k_norm, None, spec.qk_norm)
    if cos_sin is not None:
        _rotate(qkv_thd[:, :rotated, : 2 * cos_sin.shape[-1]], cos_sin, interleaved)
    keys.index_copy_(0, slots, qkv_thd[:, num_heads:rotated])
    values.index_copy_(0, slots, qkv_thd[:, rotated:])
    return qkv_thd[:, :num_heads]


def _rotate(x: Tensor, cos_sin: Tensor, interleaved: bool) -> None:
    """Turn pairs of `x` [T, heads, 2 * pairs] in place; computed in fp32."""
    cos, sin = cos_sin[:, None, 0], cos_sin[:, None, 1]
    wide = x.float()
    if interleaved:
        first, second = wide[..., ::2], wide[..., 1::2]
        x.copy_(torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2))
    else:
        first, second = wide.chunk(2, dim=-1)
        x.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1))
