"""Two products at a time, for few rows of which each launch would end and begin with a GPU half empty: of one input, or
to one sum; and for many, one after the other."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from headrace.kernels.ops.linear import linear
from headrace.kernels.ops.norm import NormWeights
from headrace.kernels.ops.pair import pair
from headrace.kernels.spec import Activation

__all__ = ["Projection", "linear_both", "linear_chain", "linear_sum"]


class Projection(NamedTuple):
    """What `headrace.kernels.ops.linear.linear` is given beside its input, under the same names."""

    weight: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None
    before: NormWeights | None = None
    folded: Tensor | None = None
    activation: Activation | None = None
    gated: bool = False


@pair
def linear_both(x: Tensor, first: Projection, second: Projection) -> tuple[Tensor, Tensor]:
    """`linear` of the same `x` [T, in] by two projections: [T, out of the first] and [T, out of the second]."""
    return linear(x, **first._asdict()), linear(x, **second._asdict())


@pair
def linear_sum(x: Tensor, first: Projection, other: Tensor, second: Projection, *, residual: Tensor) -> Tensor:
    """`linear` of `x` [T, in] by one projection, and of `other` [T, other in] by another, added up; returns [T, out].

    Neither projection has a norm, an activation or a gate.

    Args:
        x: [T, in].
        first: to [T, out].
        other: [T, other in].
        second: to [T, out].
        residual: [T, out], added too. It is lost: its memory may be that of the result.
    """
    return linear(other, **second._asdict(), residual=linear(x, **first._asdict(), residual=residual))


@pair
def linear_chain(x: Tensor, first: Projection, second: Projection, *, residual: Tensor | None = None) -> Tensor:
    """`linear` of what `linear` makes of `x` [T, in], plus the residual; returns [T, out of the second].

    Args:
        x: [T, in].
        first: with what comes before and after it.
        second: without.
        residual: [T, out]. It is lost: its memory may be that of the result.
    """
    return linear(linear(x, **first._asdict()), **second._asdict(), residual=residual)
