"""Normalization, together with the addition that comes after it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import layer_norm, rms_norm

from headrace.kernels.ops.pair import pair
from headrace.kernels.spec import NormSpec

__all__ = ["NormWeights", "norm"]


class NormWeights(NamedTuple):
    """A norm as other ops take it, to be applied to what they read.

    Attributes:
        weight: [d], the scale; None if there is none.
        bias: [d], the shift; likewise.
        spec: what it is.
    """

    weight: Tensor | None
    bias: Tensor | None
    spec: NormSpec


@pair
def norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, spec: NormSpec, *, residual: Tensor | None = None
) -> Tensor:
    """`x` normalized over its last dimension, sums being taken in fp32; then the residual is added."""
    size = (x.shape[-1],)
    if spec.kind == "layer":
        out = layer_norm(x, size, weight, bias, spec.eps)
    elif spec.unit_offset:
        # 1 + weight has more digits than a narrow type holds.
        assert weight is not None
        out = rms_norm(x.float(), size, 1.0 + weight.float(), spec.eps).to(x.dtype)
    else:
        out = rms_norm(x, size, weight, spec.eps)
    return out if residual is None else out.add_(residual)
