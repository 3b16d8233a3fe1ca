"""Rows as tensor cores multiply them with weights of 8 bits: a norm first, if there is one, then a factor for each row
by which its values are numbers of 8 bits, or, in two halves, of 16."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.kernels.ops.activation import activate
from headrace.kernels.ops.norm import NormWeights, norm
from headrace.kernels.ops.pair import pair
from headrace.kernels.spec import Activation

__all__ = ["LARGEST_FP8", "LARGEST_WHOLE", "LEAST", "LOWER_FP8", "halve_rows", "round_rows"]

LARGEST_WHOLE = 127.0 * 256.0  # of which the upper half is an int8
LARGEST_FP8 = torch.finfo(torch.float8_e4m3fn).max
LEAST = 1e-30  # what counts as the largest value of rows that have none as large, so that factors can be divided by
LOWER_FP8 = 16.0  # times as large is the lower half of fp8: by so much a rounding of the upper one is smaller than it


@pair
def halve_rows(x: Tensor, dtype: torch.dtype, before: NormWeights | None = None) -> tuple[Tensor, Tensor]:
    """The norm of `x` [T, in] as the sum of two halves times factors; returns [2, T, in], and [T] float32.

    The factor of a row that holds something that is no number is none either.

    Args:
        x: [T, in].
        dtype: of the halves. Of int8 the first counts 256 times: a value is kept to 1 / 65024 of the largest of its
            row, which for most is more exact than 16-bit floats are. Of fp8 (e4m3) the second counts a 16th: a value
            has nearly the digits of bfloat16, if it is no less than a thousandth of the largest.
        before: the norm.
    """
    if dtype is torch.float8_e4m3fn:
        values, factors = _scaled(x, before, LARGEST_FP8)
        upper = _fp8(values)
        return torch.stack((upper, _fp8((values - upper.float()) * LOWER_FP8))), factors
    values, factors = _scaled(x, before, LARGEST_WHOLE)
    whole = values.round().nan_to_num_().int()
    upper = (whole + 128) >> 8
    return torch.stack((upper, whole - 256 * upper)).to(torch.int8), factors


@pair
def round_rows(
    x: Tensor, before: NormWeights | None = None, *, activation: Activation | None = None, gated: bool = False
) -> tuple[Tensor, Tensor]:
    """The norm or the activation of `x` as rows * factors; returns rows [T, in] fp8 (e4m3) and factors [T, 1] float32.

    Args:
        x: [T, in], gated [T, 2 * in], with the gate first.
        before: the norm.
        activation: gated, of the gate, which is then multiplied with what is behind it.
        gated: whether there is a gate.
    """
    if activation is not None:
        x = activate(x, activation, gated=gated)
    values, factors = _scaled(x, before, LARGEST_FP8)
    return _fp8(values), factors[:, None]


def _fp8(values: Tensor) -> Tensor:
    return values.nan_to_num().clamp_(-LARGEST_FP8, LARGEST_FP8).to(torch.float8_e4m3fn)


def _scaled(x: Tensor, before: NormWeights | None, largest: float) -> tuple[Tensor, Tensor]:
    """Rows in float32 whose largest values are `largest`, and the factors [T] by which they are what they were."""
    values = (x if before is None else norm(x, *before)).float()
    factors = values.abs().amax(dim=1).clamp_(min=LEAST) / largest
    return values / factors[:, None], factors
