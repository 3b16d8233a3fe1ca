"""A normalization as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headrace.kernels.ops.norm import NormWeights, norm
from headrace.kernels.spec import NormSpec

__all__ = ["Norm"]


class Norm(nn.Module):
    """A normalization; alone, or as what a product does first (`Linear`)."""

    def __init__(self, spec: NormSpec, size: int) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(size)) if spec.affine else None
        self.bias = nn.Parameter(torch.empty(size)) if spec.affine and spec.kind == "layer" else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The normalized x [T, size], to which the residual is added."""
        return norm(x, *self.weights, residual=residual)

    @property
    def weights(self) -> NormWeights:
        """As ops take it."""
        return NormWeights(self.weight, self.bias, self.spec)

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"{self.spec.kind}, eps={self.spec.eps}"
