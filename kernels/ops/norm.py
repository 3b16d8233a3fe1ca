"""Normalization, together with the addition that comes before it."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import layer_norm, rms_norm

from headrace.kernels.ops.pair import pair
from headrace.kernels.spec import NormSpec

__all__ = ["add_norm", "norm"]


@pair
def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, spec: NormSpec) -> Tensor:
    """`x` normalized over its last dimension; sums are taken in fp32."""
    size = (x.shape[-1],)
    if spec.kind == "layer":
        return layer_norm(x, size, weight, bias, spec.eps)
    if spec.unit_offset:
        # 1 + weight has more digits than a narrow type holds.
        assert weight is not None
        return rms_norm(x.float(), size, 1.0 + weight.float(), spec.eps).to(x.dtype)
    return rms_norm(x, size, weight, spec.eps)


@pair
def add_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, spec: NormSpec
) -> tuple[Tensor, Tensor]:
    """The normalized sum of `x` [T, d] and `residual`, and the sum itself; without a residual the sum is `x`."""
    total = x if residual is None else residual + x
    return norm(total, weight, bias, spec), total
