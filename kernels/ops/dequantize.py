"""Weights as numbers of the model's dtype again, for products of so many rows that a library computes them."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.kernels.ops.pair import pair

__all__ = ["dequantize"]


@pair
def dequantize(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A quantized weight [out, in] times the factors [out] of its rows."""
    return values.to(dtype).mul_(scale[:, None])
