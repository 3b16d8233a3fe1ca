"""Normalization, together with the addition that comes before it."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import rms_norm

__all__ = ["add_rms_norm"]


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The normalized sum of `x` [T, d] and `residual`, and the sum itself, which is the next residual.

    Without a residual the sum is `x`. Squares are summed in fp32.
    """
    total = x if residual is None else residual + x
    return rms_norm(total, (total.shape[-1],), weight, eps), total
