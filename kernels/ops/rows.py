"""Rows as tensor cores multiply them with weights of 8 bits: a norm first, if there is one, then a factor for each row
by which its values are whole numbers of 16 bits, in two halves, or numbers of fp8."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.kernels.ops.norm import NormWeights, norm
from headrace.kernels.ops.pair import pair

__all__ = ["halve_rows", "round_rows"]

_LARGEST_WHOLE = 127.0 * 256.0  # of which the upper half is an int8
_LARGEST_FP8 = 448.0


@pair
def halve_rows(x: Tensor, before: NormWeights | None = None) -> tuple[Tensor, Tensor]:
    """The norm of `x` [T, in] as (256 * halves[0] + halves[1]) * factors[:, None]; returns halves [2, T, in] int8 and
    factors [T] float32.

    A value is kept to 1 / 65024 of the largest of its row, which for most is more exact than 16-bit floats are. The
    factor of a row that holds something that is no number is none either.
    """
    values, factors = _scaled(x, before, _LARGEST_WHOLE)
    whole = values.round().nan_to_num_().int()
    upper = (whole + 128) >> 8
    return torch.stack((upper, whole - 256 * upper)).to(torch.int8), factors


@pair
def round_rows(x: Tensor, before: NormWeights | None = None) -> tuple[Tensor, Tensor]:
    """The norm of `x` [T, in] as rows * factors; returns rows [T, in] fp8 (e4m3) and factors [T, 1] float32."""
    values, factors = _scaled(x, before, _LARGEST_FP8)
    rows = values.nan_to_num_().clamp_(-_LARGEST_FP8, _LARGEST_FP8)
    return rows.to(torch.float8_e4m3fn), factors[:, None]


def _scaled(x: Tensor, before: NormWeights | None, largest: float) -> tuple[Tensor, Tensor]:
    """Rows in float32 whose largest values are `largest`, and the factors [T] by which they are what they were."""
    values = (x if before is None else norm(x, *before)).float()
    factors = values.abs().amax(dim=1) / largest
    return values / factors.clamp(min=torch.finfo(torch.float32).tiny)[:, None], factors
