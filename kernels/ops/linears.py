"""Two products at a time, for few rows of which each launch would end and begin with a GPU half empty: of one input, or
to one sum."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from headrace.kernels.ops.linear import linear
from headrace.kernels.ops.norm import NormWeights
from headrace.kernels.ops.pair import pair
from headrace.kernels.spec import Activation

__all__ = ["Projection", "linear_both", "linear_sum"]


class Projection(NamedTuple):
    """What `headrace.kernels.ops.linear.linear` is given beside its input, under the same names."""

    weight: Tensor
    bias: Tensor | None = None
    before: NormWeights | None = None
    folded: Tensor | None = None
    activation: Activation | None = None
    gated: bool = False


@pair
def linear_both(x: Tensor, first: Projection, second: Projection) -> tuple[Tensor, Tensor]:
    """`linear` of the same `x` [T, in] by two projections: [T, out of the first] and [T, out of the second]."""
    return linear(x, **first._asdict()), linear(x, **second._asdict())


@pair
def linear_sum(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    other: Tensor,
    other_weight: Tensor,
    other_bias: Tensor | None,
    *,
    residual: Tensor,
) -> Tensor:
    """x @ weight.T + bias + other @ other_weight.T + other_bias + residual; returns [T, out].

    Args:
        x: [T, in].
        weight: [out, in], packed or plain.
        bias: [out].
        other: [T, other in].
        other_weight: [out, other in], packed or plain.
        other_bias: [out].
        residual: [T, out]. It is lost: its memory may be that of the result.
    """
    return linear(other, other_weight, other_bias, residual=linear(x, weight, bias, residual=residual))
