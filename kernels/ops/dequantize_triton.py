"""The kernel of `dequantize`: each program writes a piece of some rows."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.ops.math_triton import OPTIONS

__all__ = ["dequantize"]

# Of a piece: a thread reads 16 values at once, which is what a load takes.
_ROWS, _COLUMNS, _WARPS = 4, 1024, 8


def dequantize(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """As `headrace.kernels.ops.dequantize.dequantize`."""
    assert values.is_contiguous()
    num_rows, num_columns = values.shape
    out = torch.empty((num_rows, num_columns), dtype=dtype, device=values.device)
    _dequantize[(triton.cdiv(num_columns, _COLUMNS), triton.cdiv(num_rows, _ROWS))](
        values, scale, out, num_rows, NUM_COLUMNS=num_columns, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=_WARPS, **OPTIONS
    )
    return out


@triton.jit
def _dequantize(values, scale, out, num_rows, NUM_COLUMNS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    held = (row < num_rows)[:, None] & (column < NUM_COLUMNS)[None, :]
    place = row[:, None].to(tl.int64) * NUM_COLUMNS + column[None, :]
    number = tl.load(values + place, mask=held, other=0.0).to(tl.float32)
    number *= tl.load(scale + row, mask=row < num_rows, other=0.0).to(tl.float32)[:, None]
    tl.store(out + place, number.to(out.dtype.element_ty), mask=held)
