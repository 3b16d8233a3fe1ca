"""Products of many rows with weights of fp8, by a library, and what is done to their rows before and after.

The library has two products. One multiplies with factors of rows on its way out. The other leaves that to us, and of
some hundred rows it is the faster one: it is taken where there is a pass over its results anyway, which then does that
too, an addition or the rounding for the next product.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from headrace.kernels.ops.activation import activate
from headrace.kernels.ops.linears import Projection
from headrace.kernels.ops.rows_triton import finish_rows, round_products, round_rows
from headrace.kernels.tuning import MOST_ROWS

__all__ = ["linear_of_fp8", "linear_of_fp8_rows", "rounded_between"]

_NARROW = torch.bfloat16  # what the library makes of fp8


def linear_of_fp8(x: Tensor, part: Projection, *, residual: Tensor | None) -> Tensor:
    """As `headrace.kernels.ops.linear.linear`, of rows that are rounded."""
    return linear_of_fp8_rows(*round_rows(x, part.before), part, residual=residual, dtype=x.dtype)


def linear_of_fp8_rows(
    rows: Tensor, factors: Tensor, part: Projection, *, residual: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Likewise, of rows that `round_rows` made."""
    assert part.scale is not None
    if residual is not None and part.activation is None and len(rows) <= MOST_ROWS:
        return finish_rows(_unscaled(rows, part.weight), factors, part.scale, part.bias, residual=residual)
    out = _scaled(rows, factors, part).to(dtype)
    if part.activation is not None:
        out = activate(out, part.activation, gated=part.gated)
    return out if residual is None else out.add_(residual)


def rounded_between(rows: Tensor, factors: Tensor, part: Projection) -> tuple[Tensor, Tensor]:
    """What `round_rows` makes of a product of rows that it made, activated."""
    assert part.scale is not None
    if len(rows) <= MOST_ROWS:
        out = _unscaled(rows, part.weight)
        return round_products(out, factors, part.scale, part.bias, activation=part.activation, gated=part.gated)
    return round_rows(_scaled(rows, factors, part), activation=part.activation, gated=part.gated)


def _scaled(rows: Tensor, factors: Tensor, part: Projection) -> Tensor:
    assert part.scale is not None
    return torch._scaled_mm(
        rows,
        part.weight.T,
        scale_a=factors,
        scale_b=part.scale[None, :],
        bias=None if part.bias is None else part.bias.to(_NARROW),
        out_dtype=_NARROW,
        use_fast_accum=True,
    )


def _unscaled(rows: Tensor, weight: Tensor) -> Tensor:
    one = _one(rows.device)
    return torch._scaled_mm(rows, weight.T, scale_a=one, scale_b=one, out_dtype=_NARROW, use_fast_accum=True)


@cache
def _one(device: torch.device) -> Tensor:
    # In a graph, it would be one only once that has run.
    assert device.type != "cuda" or not torch.cuda.is_current_stream_capturing(), "run a step before one is captured"
    return torch.ones((), device=device)
