"""A projection as a module: its weight is filled in row by row, then packed for its device."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headrace.kernels.ops.linear import linear, pack_weight

__all__ = ["Linear"]


class Linear(nn.Module):
    """x times weight [out, in], plus bias."""

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
