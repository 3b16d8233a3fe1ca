"""The one block, driven by a LayerSpec: norms, attention over the cache, feed-forward."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headrace.kernels.batch import Batch
from headrace.kernels.ops.activation import gated
from headrace.kernels.ops.attention import paged_attention
from headrace.kernels.ops.linear import linear, pack_weight
from headrace.kernels.ops.norm import add_rms_norm
from headrace.kernels.ops.rotary import rotate_and_cache
from headrace.kernels.spec import LayerSpec, NormSpec

__all__ = ["Block", "Linear", "Norm"]


class Linear(nn.Module):
    """A projection. Its weight is filled in row by row, then packed."""

    def __init__(self, in_size: int, out_size: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_size, in_size))
        self.bias = nn.Parameter(torch.empty(out_size)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """The product [T, out] of x [T, in]."""
        return linear(x, self.weight, self.bias)

    def pack(self) -> None:
        """Bring the weight into the layout that its device multiplies fastest; nothing can be read from it then."""
        packed = pack_weight(self.weight)
        if packed is not self.weight:
            self.weight = nn.Parameter(packed, requires_grad=False)

    def extra_repr(self) -> str:
        """For `print(model)`."""
        out_size, in_size = self.weight.shape
        return f"{in_size}, {out_size}, bias={self.bias is not None}"


class Norm(nn.Module):
    """A normalization that also adds the residual."""

    def __init__(self, spec: NormSpec, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = spec.eps

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """The normalized sum and the sum."""
        return add_rms_norm(x, residual, self.weight, self.eps)

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"{len(self.weight)}, eps={self.eps}"


class Block(nn.Module):
    """One layer. Projections that read the same input are stacked into one matrix."""

    def __init__(self, spec: LayerSpec, hidden_size: int) -> None:
        super().__init__()
        attention, mlp = spec.attention, spec.mlp
        self.spec = spec
        self.attention_norm = Norm(spec.norm, hidden_size)
        self.qkv = Linear(hidden_size, attention.qkv_size, bias=attention.qkv_bias)
        self.out = Linear(attention.num_heads * attention.head_dim, hidden_size, bias=attention.out_bias)
        self.mlp_norm = Norm(spec.norm, hidden_size)
        self.gate_up = Linear(hidden_size, 2 * mlp.size, bias=mlp.bias)
        self.down = Linear(mlp.size, hidden_size, bias=mlp.bias)

    def forward(
        self, x: Tensor, residual: Tensor | None, cos_sin: Tensor, cache: tuple[Tensor, Tensor], batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """What the next block takes: this block's last addend [T, hidden] and the residual it belongs to."""
        spec = self.spec.attention
        keys, values = cache
        x, residual = self.attention_norm(x, residual)
        q_thd = rotate_and_cache(self.qkv(x), cos_sin, batch.slots, keys, values, num_heads=spec.num_heads)
        x = self.out(paged_attention(q_thd, keys, values, batch, scale=spec.scale))
        x, residual = self.mlp_norm(x, residual)
        return self.down(gated(self.gate_up(x), self.spec.mlp.activation)), residual
