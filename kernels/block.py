"""The one block, driven by a LayerSpec: norms, attention over the cache, feed-forward.

Between blocks travels one tensor. Norms are asked of the product that reads them, additions of the product that makes
the addend (`headrace.kernels.ops.linear`). A kernel for few rows does them itself; otherwise they are passes of their
own before and after it.
"""

from __future__ import annotations

from torch import Tensor, nn

from headrace.kernels.batch import Batch
from headrace.kernels.linear import Linear, are_plain
from headrace.kernels.mlp import MLP, Experts, make_mlp
from headrace.kernels.norm import Norm
from headrace.kernels.ops.attention import paged_attention
from headrace.kernels.ops.full_attention import full_attention
from headrace.kernels.ops.linear import share_norm
from headrace.kernels.ops.linears import linear_both, linear_sum
from headrace.kernels.ops.norm import NormWeights
from headrace.kernels.ops.self_attention import rotate_and_attend
from headrace.kernels.spec import AttentionSpec, LayerSpec, NormSpec
from headrace.kernels.tuning import GEMV_ROWS

__all__ = ["Block", "CrossAttention"]


class CrossAttention(nn.Module):
    """Attention from a decoder to the states of an encoder, whose keys and values are in the same cache."""

    def __init__(self, spec: AttentionSpec, norm: NormSpec, hidden_size: int) -> None:
        super().__init__()
        self.spec = spec
        self.norm = Norm(norm, hidden_size)
        self.query = Linear(hidden_size, spec.num_heads * spec.head_dim, bias=spec.qkv_bias)
        self.key_value = Linear(hidden_size, 2 * spec.num_kv_heads * spec.head_dim, bias=spec.qkv_bias)
        self.out = Linear(spec.num_heads * spec.head_dim, hidden_size, bias=spec.out_bias)

    def forward(self, x: Tensor, batch: Batch, cache: tuple[Tensor, Tensor]) -> Tensor:
        """x [T, hidden] with what it attends to added; x itself is lost."""
        assert batch.cross is not None, "the batch does not say where the sources are"
        keys, values = cache
        q_thd = self.query(x, before=self.norm.weights).view(len(x), self.spec.num_heads, self.spec.head_dim)
        out: Tensor = self.out(paged_attention(q_thd, keys, values, batch.cross, self.spec), residual=x)
        return out

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
        batch: Batch,
        *,
        cache: tuple[Tensor, Tensor] | None,
        cos_sin: Tensor | None = None,
        table: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """What the next block takes, [T, hidden], or of it what is wanted, [N, hidden]; x itself is lost.

        Args:
            x: what the last block left, [T, hidden].
            batch: of the step.
            cache: keys and values of this layer; None for texts that are whole (encoders).
            cos_sin: [T, 2, pairs], if the positions are rotary.
            table: [buckets, heads], if a relative bias is added.
            rows: [N] int64, tokens whose states are wanted, None for all: behind the last block nobody reads others, so
                what follows attention, by which tokens see each other, is left out for these.
        """
        around = (batch, cache, cos_sin, table)
        if self.spec.placement == "parallel":
            return self._parallel(x, *around, rows)
        assert self.mlp_norm is not None
        x, before = self._entered(x, self.attention_norm)
        attended = self._attended(self.qkv(x, before=before), *around)
        if self.cross is None:
            x, attended = _chosen(rows, x, attended)
            if not len(x):
                return x
        if self.after_attention is not None:
            x = self.after_attention(self.out(attended), residual=x)
        else:
            x = self.out(attended, residual=x)
        x = self._left(x, self.attention_norm)
        if self.cross is not None:
            assert cache is not None
            (x,) = _chosen(rows, self.cross(x, batch, cache))
            if not len(x):
                return x
        x, before = self._entered(x, self.mlp_norm)
        if self.after_mlp is not None:
            x = self.after_mlp(self.mlp(x, before), residual=x)
        else:
            x = self.mlp(x, before, residual=x)
        return self._left(x, self.mlp_norm)

    def fold(self) -> None:
        """Let norms be part of the products that read them, once all weights are there."""
        products: list[tuple[nn.Module, Norm]] = []
        if self.spec.placement != "post" and not self.spec.residual_from_norm:
            products += [(self.qkv, self.attention_norm), (self.mlp, self.mlp_norm or self.attention_norm)]
        if self.cross is not None:
            products.append((self.cross.query, self.cross.norm))
        for product, norm in products:
            if isinstance(product, Linear | MLP | Experts):  # and nothing that an owner put in its place
                product.fold(norm)

    def _entered(self, x: Tensor, norm: Norm) -> tuple[Tensor, NormWeights | None]:
        """What attention or feed-forward reads and carries on, and the norm that is left to be done when it is read."""
        if self.spec.placement == "post":
            return x, None
        if self.spec.residual_from_norm:
            return norm(x), None
        return x, norm.weights

    def _left(self, x: Tensor, norm: Norm) -> Tensor:
        """What is behind attention or feed-forward."""
        if self.spec.placement != "post":
            return x
        normed: Tensor = norm(x)
        return normed

    def _parallel(
        self,
        x: Tensor,
        batch: Batch,
        cache: tuple[Tensor, Tensor] | None,
        cos_sin: Tensor | None,
        table: Tensor | None,
        rows: Tensor | None,
    ) -> Tensor:
        first, second = self.attention_norm.weights, None if self.mlp_norm is None else self.mlp_norm.weights
        read, before = (x, first) if second is not None else share_norm(x, first)
        around, mlp = (batch, cache, cos_sin, table), self.mlp
        few = rows is None and len(x) <= GEMV_ROWS
        if few and isinstance(mlp, MLP) and are_plain(mlp, self.qkv, mlp.up, mlp.down, self.out):
            # What does not wait for attention is computed with what does, so that each needs one launch.
            up = mlp.up.projection(second or before, mlp.spec.activation, gated=mlp.spec.gated)
            qkv, inner = linear_both(read, self.qkv.projection(before), up)
            attended, down, last = self._attended(qkv, *around), mlp.down, self.out
            return linear_sum(inner, down.projection(), attended, last.projection(), residual=x)
        attended = self._attended(self.qkv(read, before=before), *around)
        x, read, attended = _chosen(rows, x, read, attended)
        if not len(x):
            return x
        # Attention has read x by now, so the sum may take its place.
        x = mlp(read, second or before, residual=x)
        out: Tensor = self.out(attended, residual=x)
        return out

    def _attended(
        self,
        qkv: Tensor,
        batch: Batch,
        cache: tuple[Tensor, Tensor] | None,
        cos_sin: Tensor | None,
        table: Tensor | None,
    ) -> Tensor:
        """What attention says, [T, heads * head dim], to queries, keys and values."""
        spec, rotary = self.spec.attention, self.spec.rotary
        if not spec.causal:
            return full_attention(qkv, batch, spec, table)
        assert cache is not None, "causal attention reads what came before"
        keys, values = cache
        return rotate_and_attend(
            qkv,
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


def _chosen(rows: Tensor | None, *states: Tensor) -> tuple[Tensor, ...]:
    """Of states [T, any] of tokens, those of the wanted ones, [N, any]."""
    return states if rows is None else tuple(each[rows] for each in states)
