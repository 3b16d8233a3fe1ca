"""The one block, driven by a LayerSpec: norms, attention over the cache, feed-forward.

Between blocks travel two tensors, the last addend and the residual it belongs to, so that the addition can be done by
the norm that reads the sum; after a norm that ends a block there is no residual.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headrace.kernels.batch import Batch
from headrace.kernels.linear import Linear
from headrace.kernels.mlp import make_mlp
from headrace.kernels.ops.attention import paged_attention
from headrace.kernels.ops.full_attention import full_attention
from headrace.kernels.ops.norm import add_norm
from headrace.kernels.ops.self_attention import rotate_and_attend
from headrace.kernels.spec import AttentionSpec, LayerSpec, NormSpec

__all__ = ["Block", "CrossAttention", "Norm"]


class Norm(nn.Module):
    """A normalization that also adds the residual."""

    def __init__(self, spec: NormSpec, size: int) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(size)) if spec.affine else None
        self.bias = nn.Parameter(torch.empty(size)) if spec.affine and spec.kind == "layer" else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The normalized sum and the sum."""
        return add_norm(x, residual, self.weight, self.bias, self.spec)

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"{self.spec.kind}, eps={self.spec.eps}"


class CrossAttention(nn.Module):
    """Attention from a decoder to the states of an encoder, whose keys and values are in the same cache."""

    def __init__(self, spec: AttentionSpec, norm: NormSpec, hidden_size: int) -> None:
        super().__init__()
        self.spec = spec
        self.norm = Norm(norm, hidden_size)
        self.query = Linear(hidden_size, spec.num_heads * spec.head_dim, bias=spec.qkv_bias)
        self.key_value = Linear(hidden_size, 2 * spec.num_kv_heads * spec.head_dim, bias=spec.qkv_bias)
        self.out = Linear(spec.num_heads * spec.head_dim, hidden_size, bias=spec.out_bias)

    def forward(self, x: Tensor, residual: Tensor, batch: Batch, cache: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The addend [T, hidden] and its residual."""
        assert batch.cross is not None, "the batch does not say where the sources are"
        keys, values = cache
        normed, residual = self.norm(x, residual)
        q_thd = self.query(normed).view(len(x), self.spec.num_heads, self.spec.head_dim)
        return self.out(paged_attention(q_thd, keys, values, batch.cross, self.spec)), residual

    def remember(self, states: Tensor, slots: Tensor, cache: tuple[Tensor, Tensor]) -> None:
        """Put keys and values of encoder states [T, hidden] into their slots [T]."""
        keys, values = cache
        pairs = self.key_value(states).view(len(states), 2, self.spec.num_kv_heads, self.spec.head_dim)
        keys.index_copy_(0, slots, pairs[:, 0])
        values.index_copy_(0, slots, pairs[:, 1])


class Block(nn.Module):
    """One layer. Projections that read the same input are stacked into one matrix."""

    def __init__(self, spec: LayerSpec, hidden_size: int) -> None:
        super().__init__()
        attention = spec.attention
        self.spec = spec
        self.attention_norm = Norm(spec.norm, hidden_size)
        self.mlp_norm = None if spec.shared_norm else Norm(spec.norm, hidden_size)
        self.after_attention = Norm(spec.norm, hidden_size) if spec.placement == "sandwich" else None
        self.after_mlp = Norm(spec.norm, hidden_size) if spec.placement == "sandwich" else None
        self.qkv = Linear(hidden_size, attention.qkv_size, bias=attention.qkv_bias)
        self.q_norm = Norm(attention.qk_norm, attention.head_dim) if attention.qk_norm else None
        self.k_norm = Norm(attention.qk_norm, attention.head_dim) if attention.qk_norm else None
        self.out = Linear(attention.num_heads * attention.head_dim, hidden_size, bias=attention.out_bias)
        self.cross = CrossAttention(spec.cross, spec.norm, hidden_size) if spec.cross else None
        self.mlp = make_mlp(spec.mlp, hidden_size)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        batch: Batch,
        *,
        cache: tuple[Tensor, Tensor] | None,
        cos_sin: Tensor | None = None,
        table: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The addend [T, hidden] and the residual that the next block takes.

        Args:
            x: what the last block left to be added, [T, hidden].
            residual: to what it is to be added; None after a norm that ended the block.
            batch: of the step.
            cache: keys and values of this layer; None for texts that are whole (encoders).
            cos_sin: [T, 2, pairs], if the positions are rotary.
            table: [buckets, heads], if a relative bias is added.
        """
        if self.spec.placement == "post":
            x, _ = self.attention_norm(self._attend(x, batch, cache, cos_sin, table), x)
            assert self.mlp_norm is not None
            x, _ = self.mlp_norm(self.mlp(x), x)
            return x, None
        normed, residual = self.attention_norm(x, residual)
        attended = self._attend(normed, batch, cache, cos_sin, table)
        if self.spec.placement == "parallel":
            if self.mlp_norm is not None:
                normed, _ = self.mlp_norm(residual)
            return attended + self.mlp(normed), residual
        if self.spec.residual_from_norm:
            residual = normed
        if self.after_attention is not None:
            attended, _ = self.after_attention(attended)
        if self.cross is not None:
            assert cache is not None
            attended, residual = self.cross(attended, residual, batch, cache)
        assert self.mlp_norm is not None
        normed, residual = self.mlp_norm(attended, residual)
        if self.spec.residual_from_norm:
            residual = normed
        out = self.mlp(normed)
        if self.after_mlp is not None:
            out, _ = self.after_mlp(out)
        return out, residual

    def _attend(
        self,
        x: Tensor,
        batch: Batch,
        cache: tuple[Tensor, Tensor] | None,
        cos_sin: Tensor | None,
        table: Tensor | None,
    ) -> Tensor:
        spec, rotary = self.spec.attention, self.spec.rotary
        out: Tensor
        if not spec.causal:
            out = self.out(full_attention(self.qkv(x), batch, spec, table))
            return out
        assert cache is not None, "causal attention reads what came before"
        keys, values = cache
        attended = rotate_and_attend(
            self.qkv(x),
            batch,
            keys,
            values,
            spec,
            table,
            cos_sin=cos_sin,
            interleaved=rotary is not None and rotary.interleaved,
            q_norm=None if self.q_norm is None else self.q_norm.weight,
            k_norm=None if self.k_norm is None else self.k_norm.weight,
        )
        out = self.out(attended)
        return out
